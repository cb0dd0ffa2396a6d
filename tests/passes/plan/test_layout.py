"""Layouts against torch itself: after any views, both look at the same elements in the same order."""

from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prequant.passes.plan.layout import Layout, contiguous_strides, equal, size_of

N, M = (sympy.Symbol(name, integer=True, positive=True) for name in "nm")


def seen(layout: Layout, base: Tensor) -> Tensor:
    return base.as_strided(layout.sizes, layout.strides, layout.offset)


def factored(count: int, draw: Any) -> list[int]:
    """Sizes with that product, some of them 1."""
    sizes: list[int] = []
    while count > 1 and len(sizes) < 4:
        size = draw(st.sampled_from([d for d in range(1, count + 1) if count % d == 0]))
        sizes.append(size)
        count //= size
    return [*sizes, count] if count != 1 or not sizes else sizes


def view(data: Any, layout: Layout, tensor: Tensor) -> tuple[Layout | None, Tensor | None]:
    """A random view of both."""
    draw, rank = data.draw, tensor.dim()
    kinds = ["unsqueeze", "view"] + ["transpose", "permute", "select", "slice", "expand", "squeeze"] * (rank > 0)
    kind = draw(st.sampled_from(kinds))
    axis = draw(st.integers(0, max(rank - 1, 0)))
    if kind == "unsqueeze":
        axis = draw(st.integers(0, rank))
        return layout.with_axis(axis), tensor.unsqueeze(axis)
    if kind in ("transpose", "permute"):
        order = draw(st.permutations(range(rank)))
        return layout.permuted(order), tensor.permute(order)
    if kind == "select" and tensor.shape[axis]:
        index = draw(st.integers(0, tensor.shape[axis] - 1))
        return layout.selected(axis, index), tensor.select(axis, index)
    if kind == "slice":
        start, step = draw(st.integers(0, tensor.shape[axis])), draw(st.integers(1, 3))
        end = draw(st.integers(start, tensor.shape[axis]))
        size = -(-(end - start) // step)
        return layout.sliced(axis, start, size, step), tensor[(slice(None),) * axis + (slice(start, end, step),)]
    if kind == "squeeze" and tensor.shape[axis] == 1:
        return layout.without(axis), tensor.squeeze(axis)
    if kind == "expand":
        sizes = [draw(st.sampled_from([1, 2, 3])) if size == 1 else size for size in tensor.shape]
        sizes = draw(st.sampled_from([[], [2], [1, 3]])) + sizes
        return layout.expanded(sizes), tensor.expand(sizes)
    sizes = factored(tensor.numel(), draw) if tensor.numel() else list(tensor.shape)
    try:
        return layout.viewed(sizes), tensor.view(sizes)
    except RuntimeError:
        return layout.viewed(sizes), None


@settings(deadline=None)
@given(st.data(), st.lists(st.integers(0, 4), max_size=4))
def test_views_are_those_of_torch(data: Any, sizes: list[int]) -> None:
    base = torch.arange(int(torch.Size(sizes).numel()), dtype=torch.float32)
    layout, tensor = Layout.contiguous(0, torch.float32, sizes), base.view(sizes)
    for _ in range(data.draw(st.integers(1, 6))):
        if tensor.dim() > 5 or tensor.numel() > 400:
            break
        found, expected = view(data, layout, tensor)
        assert (found is None) == (expected is None), "torch.view and Layout.viewed disagree"
        if found is None or expected is None:
            continue
        layout, tensor = found, expected
        assert layout.sizes == tuple(tensor.shape)
        assert layout.elements == tensor.numel()
        if tensor.numel():
            assert torch.equal(seen(layout, base), tensor)
            assert layout.is_contiguous == tensor.is_contiguous()


def symbolic(*sizes: Any) -> Layout:
    return Layout.contiguous(0, torch.float32, sizes)


def test_heads_of_a_dynamic_length_are_split_and_joined() -> None:
    split = symbolic(N, M, 64).viewed((N, M, 4, 16))
    assert split is not None
    heads = split.permuted((0, 2, 1, 3))
    assert heads.sizes == (N, 4, M, 16)
    assert heads.strides == (64 * M, 16, 64, 1)
    assert not heads.is_contiguous
    assert heads.viewed((N, 4 * M, 16)) is None
    joined = heads.permuted((0, 2, 1, 3)).viewed((N, M, 64))
    assert joined is not None
    assert joined.is_contiguous


def test_rows_of_a_slice_are_joined_where_nothing_lies_between() -> None:
    part = symbolic(N, M, 6, 8).sliced(2, 1, 3)
    assert part.offset == 8
    joined = part.viewed((N * M, 3, 8))
    assert joined is not None
    assert joined.strides == (48, 8, 1)
    assert part.viewed((N * M * 3, 8)) is None
    taken = part.viewed((N, M, 24))
    assert taken is not None
    assert taken.strides == (48 * M, 48, 1)


def test_the_last_token_is_a_view_of_a_dynamic_offset() -> None:
    last = symbolic(N, M, 8).selected(1, M - 1)
    assert last.sizes == (N, 8)
    assert equal(last.offset, 8 * M - 8)


def test_only_axes_of_one_element_are_broadcast() -> None:
    expanded = symbolic(N, 1, M).expanded((3, N, M, M))
    assert expanded.strides == (0, M, 0, 1)
    # The same number, which no expansion shows: it has to stay what it is.
    rounded = sympy.floor((2 * N + 1) / 2)
    assert symbolic(N, M).expanded((rounded, M)).strides == (M, 1)


def test_sizes() -> None:
    assert size_of(sympy.Integer(3)) == 3
    assert isinstance(size_of(sympy.Integer(3)), int)
    assert contiguous_strides((N, 2, M)) == (2 * M, M, 1)
    assert equal(N * (M + 1), N * M + N)
    assert not equal(N, M)
    with pytest.raises(TypeError, match="is not a size"):
        size_of(1.5)
