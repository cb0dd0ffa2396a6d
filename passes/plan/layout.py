"""Where a value of a graph lies in memory, with sizes and strides that are expressions of the dynamic axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeAlias

import sympy
import torch

Size: TypeAlias = "int | sympy.Expr"
"""A number of elements or bytes: an int, or an expression of the symbols that stand for dynamic axes."""


def size_of(value: Any) -> Size:
    """An int, a SymInt or an expression as a :data:`Size`; raises ``TypeError`` for what is none."""
    if isinstance(value, torch.SymInt):
        value = value.node.expr
    if isinstance(value, sympy.Expr):
        return int(value) if value.is_Integer else value
    if isinstance(value, int):
        return value
    raise TypeError(f"{value!r} is not a size")


def product(sizes: Sequence[Size]) -> Size:
    """The product, simplified as far as equal expressions need to become the same."""
    return size_of(sympy.expand(prod(sizes, start=sympy.Integer(1))))


def equal(left: Size, right: Size) -> bool:
    """Whether two sizes are the same whatever the dynamic axes are, as far as expansion can tell."""
    return bool(sympy.expand(left - right) == 0)


@dataclass(frozen=True)
class Layout:
    """Elements of a buffer: ``offset`` and ``strides`` are in elements, ``buffer`` is the plan's number of it."""

    buffer: int
    dtype: torch.dtype
    sizes: tuple[Size, ...]
    strides: tuple[Size, ...]
    offset: Size = 0

    @staticmethod
    def contiguous(buffer: int, dtype: torch.dtype, sizes: Sequence[Size]) -> Layout:
        """All of a buffer, in order."""
        return Layout(buffer, dtype, tuple(sizes), contiguous_strides(sizes))

    @property
    def elements(self) -> Size:
        """How many there are."""
        return product(self.sizes)

    @property
    def is_contiguous(self) -> bool:
        """Whether elements follow each other in order; axes of one element don't matter."""
        expected = contiguous_strides(self.sizes)
        return all(
            equal(size, 1) or equal(stride, wanted)
            for size, stride, wanted in zip(self.sizes, self.strides, expected, strict=True)
        )

    def permuted(self, axes: Sequence[int]) -> Layout:
        """The axes in another order."""
        return replace(
            self, sizes=tuple(self.sizes[axis] for axis in axes), strides=tuple(self.strides[axis] for axis in axes)
        )

    def sliced(self, axis: int, start: Size, size: Size, step: int = 1) -> Layout:
        """``size`` elements along an axis, from ``start``."""
        return replace(
            self,
            sizes=(*self.sizes[:axis], size, *self.sizes[axis + 1 :]),
            strides=(*self.strides[:axis], self.strides[axis] * step, *self.strides[axis + 1 :]),
            offset=size_of(sympy.expand(self.offset + start * self.strides[axis])),
        )

    def selected(self, axis: int, index: Size) -> Layout:
        """One element along an axis, which goes."""
        return self.sliced(axis, index, 1).without(axis)

    def without(self, axis: int) -> Layout:
        """Without an axis of one element."""
        return replace(
            self,
            sizes=self.sizes[:axis] + self.sizes[axis + 1 :],
            strides=self.strides[:axis] + self.strides[axis + 1 :],
        )

    def with_axis(self, axis: int) -> Layout:
        """With an axis of one element before ``axis``."""
        stride = product((self.sizes[axis], self.strides[axis])) if axis < len(self.sizes) else 1
        return replace(
            self,
            sizes=(*self.sizes[:axis], 1, *self.sizes[axis:]),
            strides=(*self.strides[:axis], stride, *self.strides[axis:]),
        )

    def expanded(self, sizes: Sequence[Size]) -> Layout:
        """Broadcast to ``sizes``: new axes, and those of one element that become larger, stay in place."""
        # What is not 1 is what is wanted, even where that can't be told of the expressions.
        new = len(sizes) - len(self.sizes)
        mine = (1,) * new + self.sizes
        strides = (0,) * new + self.strides
        return replace(
            self,
            sizes=tuple(sizes),
            strides=tuple(
                0 if equal(size, 1) and not equal(wanted, 1) else stride
                for size, stride, wanted in zip(mine, strides, sizes, strict=True)
            ),
        )

    def viewed(self, sizes: Sequence[Size]) -> Layout | None:
        """The same elements in order under other sizes; None where that needs a copy, or can't be told without one."""
        if self.is_contiguous or equal(self.elements, 0):
            return replace(self, sizes=tuple(sizes), strides=contiguous_strides(sizes))
        runs = self._runs()
        strides: list[Size] = []
        run_size, run_stride = runs.pop()
        taken: Size = 1
        for size in reversed(sizes):
            if equal(size, 1):
                strides.append(product((taken, run_stride)))
                continue
            if equal(taken, run_size):
                if not runs:
                    return None
                run_size, run_stride = runs.pop()
                taken = 1
            strides.append(product((taken, run_stride)))
            taken = product((taken, size))
            if not _divides(taken, run_size):
                return None
        if not equal(taken, run_size) or runs:
            return None
        return replace(self, sizes=tuple(sizes), strides=tuple(reversed(strides)))

    def _runs(self) -> list[tuple[Size, Size]]:
        """Axes joined where elements follow each other: how many they are, and how far apart; outermost first."""
        runs: list[tuple[Size, Size]] = []
        for size, stride in zip(self.sizes, self.strides, strict=True):
            if equal(size, 1):
                continue
            if runs and equal(runs[-1][1], product((size, stride))):
                runs[-1] = (product((runs[-1][0], size)), stride)
            else:
                runs.append((size, stride))
        return runs or [(1, 1)]


def contiguous_strides(sizes: Sequence[Size]) -> tuple[Size, ...]:
    """Strides of elements that follow each other in order."""
    return tuple(product(sizes[axis + 1 :]) for axis in range(len(sizes)))


def _divides(part: Size, whole: Size) -> bool:
    quotient = sympy.cancel(sympy.Integer(1) * whole / part)
    return bool(quotient.is_polynomial() and sympy.denom(quotient) == 1)
