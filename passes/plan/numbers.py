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


class NumberTable:
    """Entries for sizes; equal expressions share one."""

    def __init__(self) -> None:
        self._entries: dict[Size, int] = {}

    def __call__(self, size: Size) -> int:
        """The entry of a size."""
        return self._entries.setdefault(size, len(self._entries))

    def constant(self, entry: int) -> int | None:
        """The value of an entry that no axis decides."""
        size = list(self._entries)[entry]
        return size if isinstance(size, int) else None

    def function(self, symbols: Sequence[sympy.Symbol]) -> Callable[..., Sequence[int]]:
        """All entries, from the values of ``symbols``.

        Raises ``ValueError`` for expressions of other symbols, or with functions that are unknown here.
        """
        expressions = [sympy.sympify(size) for size in self._entries]
        for expression in expressions:
            if unknown := expression.free_symbols - set(symbols):
                raise ValueError(f"the size {expression} hangs on {', '.join(sorted(map(str, unknown)))}")
            for part in sympy.preorder_traversal(expression):
                known = isinstance(part, (sympy.Integer, sympy.Symbol, sympy.Add, sympy.Mul, sympy.Pow))
                if not known and type(part).__name__ not in FUNCTIONS:
                    raise ValueError(f"the size {expression} takes {type(part).__name__}")
        made: Callable[..., Sequence[int]] = sympy.lambdify(list(symbols), expressions, modules=[FUNCTIONS], cse=True)
        return made
