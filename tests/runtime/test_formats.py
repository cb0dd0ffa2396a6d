"""The vocabulary of formats: text both ways, what is refused and how, and the sizes that follow."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prequant.runtime import FormatError, Granularity, PrequantError, Scheme, WeightFormat

GRANULARITIES = st.one_of(
    st.just(("tensor", 0)), st.just(("row", 0)), st.tuples(st.just("group"), st.integers(1, 10**9))
)


@st.composite
def formats(draw: st.DrawFn) -> WeightFormat:
    granularity, group = draw(GRANULARITIES)
    scheme = draw(st.sampled_from(["affine", "ternary", "binary", "bcq"]))
    if scheme == "affine":
        return WeightFormat.affine(draw(st.integers(2, 8)), granularity, group, draw(st.booleans()))
    if scheme == "ternary":
        return WeightFormat.ternary(granularity, group, draw(st.booleans()))
    if scheme == "binary":
        return WeightFormat.binary(granularity, group)
    return WeightFormat.bcq(draw(st.integers(1, 8)), group)


@given(formats())
def test_text_and_back(format: WeightFormat) -> None:
    assert WeightFormat.parse(str(format)) == format


@given(formats(), formats())
def test_two_formats_with_one_text_are_one_format(one: WeightFormat, other: WeightFormat) -> None:
    assert (str(one) == str(other)) == (one == other)


@pytest.mark.parametrize(
    ("format", "text"),
    [
        (WeightFormat.affine(4), "affine4:row"),
        (WeightFormat.affine(8, "tensor"), "affine8:tensor"),
        (WeightFormat.affine(3, "group", 64, symmetric=False), "affine3:group64:asym"),
        (WeightFormat.ternary(), "ternary:row"),
        (WeightFormat.ternary("group", 32, base3=True), "ternary:group32:base3"),
        (WeightFormat.binary("tensor"), "binary:tensor"),
        (WeightFormat.bcq(3), "bcq3:row"),
        (WeightFormat.bcq(1, 128), "bcq1:group128"),
    ],
)
def test_the_text_is_the_one_that_files_hold(format: WeightFormat, text: str) -> None:
    assert str(format) == text
    assert WeightFormat.parse(text) == format


def test_fields_may_be_given_as_text() -> None:
    assert WeightFormat("affine", 4, "group", 8) == WeightFormat(Scheme.AFFINE, 4, Granularity.GROUP, 8)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightFormat.affine(1), "bits=1 is not possible for affine weights: use 2 to 8"),
        (lambda: WeightFormat.affine(9), "bits=9"),
        (lambda: WeightFormat.affine(4.0), "bits=4.0 must be an integer"),  # type: ignore[arg-type]
        (lambda: WeightFormat.affine("4"), "bits='4' must be an integer"),  # type: ignore[arg-type]
        (lambda: WeightFormat.affine(True), "bits=True must be an integer"),
        (lambda: WeightFormat.bcq(0), "bits=0 is not possible for bcq weights: use 1 to 8"),
        (lambda: WeightFormat.bcq(9), "bits=9"),
        (lambda: WeightFormat(Scheme.TERNARY, 3), "bits=3 is not possible for ternary weights: use 2 to 2"),
        (lambda: WeightFormat(Scheme.BINARY, 2), "bits=2 is not possible for binary weights: use 1 to 1"),
        (lambda: WeightFormat.affine(4, "group"), "group_size=0 with granularity='group'"),
        (lambda: WeightFormat.affine(4, "row", 64), "group_size=64 with granularity='row'"),
        (lambda: WeightFormat.affine(4, "row", -1), "group_size=-1 with granularity='row'"),
        (lambda: WeightFormat.affine(4, "group", -64), "group_size=-64"),
        (lambda: WeightFormat.affine(4, "group", 64.0), "group_size=64.0 must be an integer"),  # type: ignore[arg-type]
        (lambda: WeightFormat.affine(4, "rows"), r"granularity='rows': expected one of \['tensor', 'row', 'group'\]"),
        (lambda: WeightFormat.ternary("column"), "granularity='column'"),
        (lambda: WeightFormat.binary("column"), "granularity='column'"),
        (lambda: WeightFormat("uniform", 4), "scheme='uniform': expected one of"),  # type: ignore[arg-type]
        (lambda: WeightFormat(Scheme.BINARY, 1, symmetric=False), "binary weights are symmetric"),
        (lambda: WeightFormat(Scheme.TERNARY, 2, symmetric=False), "ternary weights are symmetric"),
        (lambda: WeightFormat(Scheme.BCQ, 2, symmetric=False), "bcq weights are symmetric"),
        (lambda: WeightFormat(Scheme.AFFINE, 2, base3=True), "base-3 storage is for ternary weights"),
        (lambda: WeightFormat(Scheme.BCQ, 2, Granularity.TENSOR), "one alpha per row or group, not per tensor"),
    ],
)
def test_what_does_not_go_together_is_refused(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(FormatError, match=message):
        make()


@pytest.mark.parametrize(
    "text",
    [
        *("", "affine4", "affine:row", "affine1:row", "affine16:row", "affine4:row64", "affine4:row:sym", "int4:row"),
        *("affine4:group", "affine4:group0", "affine4:group-8", "affine4:row:asym:asym", "affine4:row:base3:asym"),
        *("ternary:row:asym", "ternary3:row", "binary2:row", "bcq:row", "bcq0:row", "bcq9:row", "bcq2:tensor"),
        *("bcq2:row:asym", "affine4:row:base3", "affine4:row ", " affine4:row", "affine4:row\n", "Affine4:row"),
    ],
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(FormatError):
        WeightFormat.parse(text)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("affine4:group064", "affine4:group64"),
        ("ternary2:row", "ternary:row"),
        ("binary1:row", "binary:row"),
        ("affine٤:row", "affine4:row"),
    ],
)
def test_almost_right_text_is_refused_with_the_right_one(text: str, meant: str) -> None:
    with pytest.raises(FormatError, match=f"did you mean '{meant}'"):
        WeightFormat.parse(text)


@pytest.mark.parametrize("text", [None, 4, ["affine4:row"], b"affine4:row"])
def test_only_text_is_parsed(text: object) -> None:
    with pytest.raises(FormatError, match="a weight format is text"):
        WeightFormat.parse(text)  # type: ignore[arg-type]


def test_a_format_error_is_a_prequant_error() -> None:
    assert issubclass(FormatError, PrequantError)


@given(formats(), st.integers(0, 50), st.integers(0, 10**6))
def test_a_row_takes_the_fewest_bytes_that_hold_its_codes(format: WeightFormat, rows: int, columns: int) -> None:
    if format.base3:
        bits_per_code = Fraction(8, 5)
    elif format.scheme is Scheme.BCQ:
        bits_per_code = Fraction(1)
    else:
        bits_per_code = Fraction(format.bits)
    expected = math.ceil(columns * bits_per_code / 8)
    assert format.row_bytes(columns) == expected
    planes = (format.bits,) if format.scheme is Scheme.BCQ else ()
    assert format.codes_shape(rows, columns) == (*planes, rows, expected)


@given(formats(), st.integers(0, 50), st.integers(1, 10**6))
def test_scales_cover_every_weight_once(format: WeightFormat, rows: int, columns: int) -> None:
    planes = (format.bits,) if format.scheme is Scheme.BCQ else ()
    if format.granularity is Granularity.TENSOR:
        assert format.scale_shape(rows, columns) == (1, 1)
        return
    *leading, groups = format.scale_shape(rows, columns)
    assert tuple(leading) == (*planes, rows)
    if format.granularity is Granularity.ROW:
        assert groups == 1
    else:
        assert (groups - 1) * format.group_size < columns <= groups * format.group_size


@pytest.mark.parametrize(
    ("text", "levels", "bits"),
    [
        *(("affine3:row", 8, 3.0), ("affine8:row", 256, 8.0), ("ternary:row", 3, 2.0), ("ternary:row:base3", 3, 1.6)),
        *(("binary:row", 2, 1.0), ("bcq3:row", 2, 3.0)),
    ],
)
def test_levels_and_bits(text: str, levels: int, bits: float) -> None:
    format = WeightFormat.parse(text)
    assert format.levels == levels
    assert format.bits_per_weight == bits
