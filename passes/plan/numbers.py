"""The table of numbers of a plan: every size, stride and offset once, as a function of the dynamic axes' sizes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import sympy

from .layout import Size

FUNCTIONS = {
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "Max": max,
    "Min": min,
}
"""What torch's expressions of sizes call, beside sums, products and powers."""


KNOWN = (
    sympy.Integer,
    sympy.Symbol,
    sympy.Add,
    sympy.Mul,
    sympy.core.relational.Relational,
    sympy.logic.boolalg.Boolean,
)
"""What Python computes alike; sums and products of integers are integers."""


class NumberTable:
    """Entries for sizes; equal expressions share one."""

    def __init__(self) -> None:
        self._entries: dict[Size, int] = {}

    def __call__(self, size: Size) -> int:
        """The entry of a size."""
        return self._entries.setdefault(size, len(self._entries))

    def function(self, symbols: Sequence[sympy.Symbol]) -> Callable[..., Sequence[int]]:
        """All entries, from the values of ``symbols``.

        Raises ``ValueError`` for expressions of other symbols, or with functions that are unknown here.
        """
        expressions = [sympy.sympify(size) for size in self._entries]
        for expression in expressions:
            if unknown := expression.free_symbols - set(symbols):
                raise ValueError(f"the size {expression} hangs on {', '.join(sorted(map(str, unknown)))}")
            for part in sympy.preorder_traversal(expression):
                known = isinstance(part, KNOWN) or _is_power(part)
                if not known and type(part).__name__ not in FUNCTIONS:
                    raise ValueError(f"the size {expression} takes {type(part).__name__}")
        called = {f"call_{name}": function for name, function in FUNCTIONS.items()}
        written = list(map(_as_calls, expressions))
        made: Callable[..., Sequence[int]] = sympy.lambdify(list(symbols), written, modules=[called], cse=True)
        return made


def _as_calls(expression: sympy.Basic) -> sympy.Basic:
    """The expression with torch's functions under names that sympy's printer knows nothing of: it would write Mod of
    sums as ``a + b % c + d``.
    """
    return expression.replace(
        lambda part: type(part).__name__ in FUNCTIONS,
        lambda part: sympy.Function(f"call_{type(part).__name__}")(*part.args),
    )


def _is_power(part: sympy.Basic) -> bool:
    """Whether it is a product with itself: another power may be no integer."""
    return isinstance(part, sympy.Pow) and bool(part.exp.is_Integer and part.exp.is_nonnegative)
