"""Codes to bytes and back. The hand-worked bytes keep the layout on disk from drifting."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prequant.runtime import FormatError, Scheme, WeightFormat
from prequant.runtime.packing import pack, unpack

FORMATS = [
    *(WeightFormat.affine(bits) for bits in range(2, 9)),
    WeightFormat.ternary(),
    WeightFormat.ternary(base3=True),
    WeightFormat.binary(),
    WeightFormat.bcq(1),
]


def random_codes(format: WeightFormat, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, format.levels, shape, generator=generator, dtype=torch.uint8)


@settings(deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(0, 70),
    st.integers(0, 2**32),
)
def test_codes_survive(format: WeightFormat, leading: list[int], columns: int, seed: int) -> None:
    codes = random_codes(format, (*leading, columns), seed)
    packed = pack(codes, format)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*leading, format.row_bytes(columns))
    assert packed.is_contiguous()
    unpacked = unpack(packed, format, columns)
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked, codes)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 7, 8, 24, 33])
def test_bits_form_one_little_endian_stream(bits: int, columns: int) -> None:
    """Against NumPy's own packing of single bits."""
    format = WeightFormat.binary() if bits == 1 else WeightFormat.affine(bits)
    codes = random_codes(format, (3, columns))
    stream = (codes.numpy()[:, :, None] >> np.arange(bits)) & 1
    expected = np.packbits(stream.reshape(3, -1), axis=1, bitorder="little")
    assert np.array_equal(pack(codes, format).numpy(), expected)


@pytest.mark.parametrize(
    ("text", "codes", "expected"),
    [
        # The first code sits in the lowest bits of the first byte.
        ("binary:row", [1, 0, 0, 0, 0, 0, 0, 0, 1, 1], [0b00000001, 0b00000011]),
        ("bcq1:row", [0, 1, 1, 0, 0, 0, 0, 1], [0b10000110]),
        ("affine2:row", [3, 0, 1, 2, 1], [0b10_01_00_11, 0b01]),
        ("ternary:row", [2, 0, 1, 2], [0b10_01_00_10]),
        ("affine4:row", [0x1, 0xF, 0x7], [0xF1, 0x07]),
        ("affine8:row", [0, 255, 128], [0, 255, 128]),
        # 3 bits: 5 = 101, 1 = 001, 7 = 111; the third code straddles the first two bytes.
        ("affine3:row", [5, 1, 7, 2], [0b11_001_101, 0b0000_010_1]),
        # 5 bits: 31 = 11111, 1 = 00001; byte 0 = low 3 bits of the second code over the first.
        ("affine5:row", [31, 1, 0, 16], [0b001_11111, 0b0_00000_00, 0b0000_1000]),
        # 6 bits: 4 codes fill 3 bytes.
        ("affine6:row", [0b111111, 0, 0b100001, 0b000011], [0b00_111111, 0b0001_0000, 0b000011_10]),
        # 7 bits: 127, 1, 64.
        ("affine7:row", [127, 1, 64], [0b1_1111111, 0b00_000000, 0b000_10000]),
        # Five trits a byte, the first one counting 1, the last one 81.
        ("ternary:row:base3", [2, 2, 2, 2, 2, 1, 0, 2], [242, 1 + 2 * 9]),
        ("ternary:row:base3", [0, 0, 0, 0, 1], [81]),
    ],
)
def test_bytes_by_hand(text: str, codes: list[int], expected: list[int]) -> None:
    format = WeightFormat.parse(text)
    packed = pack(torch.tensor([codes]), format)
    assert packed.tolist() == [expected]
    assert unpack(packed, format, len(codes)).tolist() == [codes]


def test_planes_of_bcq_are_packed_apart() -> None:
    planes = torch.tensor([[[1, 1, 1], [0, 0, 1]], [[0, 1, 0], [1, 0, 0]]])  # [planes, rows, columns]
    assert pack(planes, WeightFormat.bcq(2)).tolist() == [[[0b111], [0b100]], [[0b010], [0b001]]]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_so_many_bits_take_that_many_bits(bits: int) -> None:
    format = WeightFormat.binary() if bits == 1 else WeightFormat.affine(bits)
    assert pack(random_codes(format, (6, 64)), format).numel() * 8 == 6 * 64 * bits


def test_ternary_takes_two_bits_or_1_6() -> None:
    codes = random_codes(WeightFormat.ternary(), (6, 40))
    assert pack(codes, WeightFormat.ternary()).numel() * 8 == 6 * 40 * 2
    assert pack(codes, WeightFormat.ternary(base3=True)).numel() * 8 == 6 * 40 * 1.6


@pytest.mark.parametrize("planes", [1, 3, 8])
def test_bcq_takes_a_bit_a_plane(planes: int) -> None:
    format = WeightFormat.bcq(planes)
    assert pack(random_codes(format, (planes, 6, 32)), format).numel() * 8 == planes * 6 * 32


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_the_last_byte_is_padded_with_zeros(format: WeightFormat) -> None:
    """Equal weights are equal bytes: files can be compared and hashed."""
    codes = torch.full((1, 9), format.levels - 1, dtype=torch.uint8)
    longer = torch.cat([codes, torch.zeros(1, 7, dtype=torch.uint8)], 1)
    assert torch.equal(pack(codes, format), pack(longer, format)[:, : format.row_bytes(9)])


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.int8, torch.bfloat16])
def test_codes_of_any_type(format: WeightFormat, dtype: torch.dtype) -> None:
    codes = random_codes(format, (2, 13)) % 128
    assert torch.equal(pack(codes.to(dtype), format), pack(codes, format))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_strides_do_not_matter(format: WeightFormat) -> None:
    codes = random_codes(format, (24, 10))
    for view in (codes.T, codes[:, 1:], codes[::2, ::3], codes[1:]):
        packed = pack(view, format)
        assert torch.equal(packed, pack(view.clone(memory_format=torch.contiguous_format), format))
        columns = view.shape[-1]
        wide = torch.zeros(packed.shape[0], packed.shape[1] + 3, dtype=torch.uint8)
        wide[:, 1:-2] = packed
        assert torch.equal(unpack(wide[:, 1:-2], format, columns), view)
        assert torch.equal(unpack(packed.T.contiguous().T, format, columns), view)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_the_argument_is_not_written_to(format: WeightFormat) -> None:
    codes = random_codes(format, (4, 16))
    packed = pack(codes, format)
    before = codes.clone(), packed.clone()
    unpack(packed, format, 16)
    assert torch.equal(codes, before[0])
    assert torch.equal(packed, before[1])


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("wrong", [-1.0, None, float("nan"), float("inf")])
def test_codes_out_of_range_are_refused(format: WeightFormat, wrong: float | None) -> None:
    codes = random_codes(format, (2, 5)).float()
    codes[1, 3] = format.levels if wrong is None else wrong
    with pytest.raises(FormatError, match=f"has levels 0 to {format.levels - 1}"):
        pack(codes, format)


@pytest.mark.parametrize("value", range(243, 256))
def test_bytes_that_base_3_never_writes_still_give_trits(value: int) -> None:
    """So that a kernel may read any byte; a loader refuses them where it matters."""
    trits = unpack(torch.tensor([[value]], dtype=torch.uint8), WeightFormat.ternary(base3=True), 5)
    assert trits.tolist() == [[value // 3**i % 3 for i in range(5)]]


def test_every_format_is_covered() -> None:
    assert {format.scheme for format in FORMATS} == set(Scheme)
