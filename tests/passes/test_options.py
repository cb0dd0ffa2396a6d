from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch

from prequant.passes import OptionError, Pass, Program, QuantizeWeights, Report
from prequant.passes.options import REQUIRED, fit, near_misses, options_of, type_text
from prequant.runtime import Granularity


@dataclass(frozen=True)
class Documented(Pass):
    """Does nothing.

    ``first``: how many there are, at most. More is refused; ``second``: which of them.
    """

    name: ClassVar[str] = "documented"

    first: int
    second: str = "a"
    third: float | None = None
    """Read right
    after the field."""
    fourth: bool = field(default=False, metadata={"help": "from the metadata"})
    fifth: tuple[int, ...] = field(default_factory=lambda: (1,))

    def run(self, program: Program) -> Report:
        return self.report()


def test_options_have_types_defaults_and_help() -> None:
    options = {option.name: option for option in options_of(Documented)}
    assert list(options) == ["first", "second", "third", "fourth", "fifth"]
    assert options["first"].default is REQUIRED and options["fifth"].default == (1,)
    assert {name: option.type_text for name, option in options.items()} == {
        "first": "int",
        "second": "str",
        "third": "float|none",
        "fourth": "bool",
        "fifth": "[int]",
    }
    assert {name: option.help for name, option in options.items()} == {
        "first": "how many there are, at most",
        "second": "which of them",
        "third": "Read right after the field.",
        "fourth": "from the metadata",
        "fifth": "",
    }


def test_inherited_options_come_last_with_their_help() -> None:
    options = options_of(QuantizeWeights)
    assert options[0].name == "bits"
    assert [option.name for option in options[-2:]] == ["include", "exclude"]
    assert all(option.help for option in options[-2:])


@pytest.mark.parametrize(
    ("value", "type_", "fitted"),
    [
        (4, int, 4),
        (np.int64(4), int, 4),
        (4, float, 4.0),
        (np.float32(0.5), float, 0.5),
        ("row", Granularity, Granularity.ROW),
        (Granularity.ROW, Granularity, Granularity.ROW),
        (["a", "b"], tuple[str, ...], ("a", "b")),
        ("ab", tuple[str, ...], ("ab",)),
        ([[1], [2, 3]], tuple[tuple[int, ...], ...], ((1,), (2, 3))),
        ([1, 2], tuple[int, float], (1, 2.0)),
        (None, float | None, None),
        (1, float | None, 1.0),
        (1, int | float, 1),
        ("delta", Literal["delta", "replace"], "delta"),
        ("float16", torch.dtype, torch.float16),
        ("torch.float16", torch.dtype, torch.float16),
        (torch.float16, torch.dtype, torch.float16),
        (len, Callable[[Any], bool], len),
        (object, Any, object),
    ],
)
def test_values_fit_their_types(value: Any, type_: Any, fitted: Any) -> None:
    assert fit(value, type_) == fitted
    assert type(fit(value, type_)) is type(fitted)


@pytest.mark.parametrize(
    ("value", "type_", "message"),
    [
        ("4", int, "'4' is not an int"),
        (True, int, "True is not an int"),
        (4.0, int, "4.0 is not an int"),
        (1, bool, "1 is not a bool"),
        (True, float, "True is not a float"),
        (4, str, "4 is not a str"),
        ("rwo", Granularity, "'rwo' is not one of tensor, row, group; did you mean row"),
        ([1, "a"], tuple[int, ...], "'a' is not an int"),
        ([1], tuple[int, int], r"\[1\] has 1 values where 2 are due"),
        (1, tuple[int, int], "1 is not a list of 2 values"),
        ("a", float | None, "'a' is not a float"),
        ("a", int | float | bool, r"'a' is not one of the types int\|float\|bool"),
        (1, Literal["delta"], "1 is not one of 'delta'"),
        ("float33", torch.dtype, "'float33' is not a dtype"),
        (3, Callable[[Any], bool], "3 is not a function"),
    ],
)
def test_what_does_not_fit_is_refused(value: Any, type_: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        fit(value, type_)


def test_a_pass_fits_its_options_when_it_is_made() -> None:
    made = QuantizeWeights(granularity="group", group_size=4, include=["a*"], exclude="b*")  # type: ignore[arg-type]
    assert made.granularity is Granularity.GROUP and made.include == ("a*",) and made.exclude == ("b*",)
    assert made == QuantizeWeights(granularity=Granularity.GROUP, group_size=4, include=("a*",), exclude=("b*",))
    assert hash(made) == hash(
        QuantizeWeights(granularity=Granularity.GROUP, group_size=4, include=("a*",), exclude=("b*",))
    )
    with pytest.raises(OptionError, match="option 'bits' of pass 'quantize-weights': '4' is not an int"):
        QuantizeWeights(bits="4")  # type: ignore[arg-type]


def test_hints_that_can_not_be_resolved_name_the_class() -> None:
    @dataclass(frozen=True)
    class Odd(Pass):
        name: ClassVar[str] = "odd"
        option: "NoSuchType" = None  # type: ignore[name-defined]  # noqa: F821

        def run(self, program: Program) -> Report:
            return self.report()

    with pytest.raises(OptionError, match=r"option types of .*Odd can't be resolved: name 'NoSuchType'"):
        Odd()


def test_types_in_words() -> None:
    assert type_text(tuple[str | Callable[[Any], bool], ...]) == "[str|function]"
    assert type_text(tuple[int, float]) == "[int, float]"
    assert type_text(Literal["a", "b"] | None) == "a|b|none"
    assert type_text(Granularity) == "tensor|row|group"
    assert type_text(torch.dtype) == "dtype"


def test_near_misses_or_everything() -> None:
    assert near_misses("bit", ["bits", "group_size"]) == "; did you mean bits?"
    assert near_misses("xyz", ["bits", "group_size"]) == "; there are: bits, group_size"
    assert near_misses("xyz", []) == "; there are none"
