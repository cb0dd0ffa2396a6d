import pytest
import sympy
from torch.utils._sympy.functions import CleanDiv, FloorDiv, IntTrueDiv, Max, Min, Mod, PythonMod

from prequant.passes.plan.numbers import NumberTable

A, B = (sympy.Symbol(name, integer=True, positive=True) for name in "ab")


def test_equal_sizes_share_an_entry() -> None:
    table = NumberTable()
    assert [table(size) for size in (3, A * B, 3, B * A, A, sympy.Integer(3))] == [0, 1, 0, 1, 2, 0]


@pytest.mark.parametrize(
    ("size", "value"),
    [
        (7, 7),
        (A, 5),
        (2 * A * B + 1, 31),
        (A**2, 25),
        (A - B - 4, -2),
        (FloorDiv(A * A, B), 8),
        (CleanDiv(A * B, B), 5),
        (FloorDiv(A, 2) * B, 6),
        (Mod(A, B), 2),
        (PythonMod(A, B), 2),
        (2 * Mod(A * B + A, A + B) + 1, 9),
        (FloorDiv(A + B, B - 1), 4),
        (sympy.Mod(A, 3), 2),
        (Max(A, B), 5),
        (Min(A, B + 1), 4),
        (sympy.Max(A, 9), 9),
    ],
    ids=str,
)
def test_values(size: sympy.Expr, value: int) -> None:
    table = NumberTable()
    entry = table(size)
    (found,) = [table.function([A, B])(5, 3)[entry]]
    assert found == value
    assert isinstance(found, int)


def test_conditions_are_values_too() -> None:
    table = NumberTable()
    entries = [table(relation) for relation in (sympy.Ge(A, 5), sympy.Eq(A, B), sympy.And(A > B, sympy.Ne(B, 2)))]
    values = table.function([A, B])(5, 3)
    assert [bool(values[entry]) for entry in entries] == [True, False, True]


@pytest.mark.parametrize(
    ("size", "why"),
    [
        (sympy.Symbol("u0") + A, "hangs on u0"),
        (A / 2, "takes Half"),
        (A / B, "takes Pow"),
        (IntTrueDiv(A, B), "takes IntTrueDiv"),
        (sympy.sqrt(A), "takes"),
    ],
    ids=str,
)
def test_what_is_no_integer_of_the_axes_is_refused(size: sympy.Expr, why: str) -> None:
    table = NumberTable()
    table(size)
    with pytest.raises(ValueError, match=why):
        table.function([A, B])
