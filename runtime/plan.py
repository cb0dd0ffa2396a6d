"""Plans: a graph as a flat list of native steps on planned memory, run by one call of the native library.

A plan is for any sizes of its dynamic axes: whatever depends on them is an entry of one table of numbers, which a
function makes of the sizes of a call. Values that live at different times share memory. Between the native steps may
stand calls of PyTorch for what the library does not compute. What makes a plan of a graph is in ``passes/plan``.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import memory, native, reference
from .arena import placed
from .errors import PrequantError

AXES, OPERANDS, SIZES, MOST_LINEARS = 4, 7, 7, 4
"""Of a step: axes of an operand, operands, sizes, and linears on one input. These, and the kinds, are
``prequant_plan.h``'s."""

LINEAR, EMBEDDING, NORMALIZE, ELEMENTWISE, COPY, ATTENTION, QUANTIZE, DEQUANTIZE = range(8)
"""Kinds of steps."""

FUNCTIONS = {
    name: code
    for code, name in enumerate(
        ("add", "subtract", "multiply", "divide", "relu", "gelu", "gelu_tanh", "tanh", "sigmoid", "silu", "negate")
    )
}
"""What an elementwise step computes."""

NO_MASK, BOOL_MASK, FLOAT_MASK = range(3)

HEAD_WORDS, LAYER_WORD = 4, 3
OPERAND_WORDS = 2 + AXES
STEP_WORDS = HEAD_WORDS + SIZES + OPERANDS * OPERAND_WORDS
"""Words of 64 bits of a ``prequant_step``: kind, option, number, layer, sizes, operands (buffer, offset, strides)."""

ABSENT = -1
"""The buffer of an operand that is not there."""

Numbers = Sequence[int]
Words = npt.NDArray[np.int64]


class Linears(ctypes.Structure):
    """``prequant_linears``: linears on one input."""

    _fields_ = (("count", ctypes.c_int64), ("linears", ctypes.c_void_p * MOST_LINEARS))


@dataclass(frozen=True)
class Buffer:
    """Memory of a plan. ``bytes`` is an entry of the numbers. A plan's own buffers are needed from step ``first`` to
    ``last``; those of others (inputs, constants, results of PyTorch, outputs) are where these are.
    """

    dtype: torch.dtype
    bytes: int
    first: int = -1
    last: int = -1
    own: bool = False


@dataclass(frozen=True)
class View:
    """A tensor in a buffer: its sizes, strides and offset, in elements, are entries of the numbers."""

    buffer: int
    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Native:
    """Steps that one call of the library runs: ``count`` from ``first``."""

    first: int
    count: int


@dataclass(frozen=True)
class Number:
    """An argument that is an entry of the numbers."""

    entry: int


@dataclass(frozen=True)
class TorchCall:
    """A call of PyTorch: arguments are views, numbers, constants and containers of these. ``results`` are the buffers
    of its tensors, -1 for one that is not a tensor or not needed. ``fixed``: sizes alone decide its results, which no
    one outside gets to see, so that they can be kept.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[int, ...]
    name: str
    fixed: bool = False


@dataclass(frozen=True)
class Plan:
    """See the module's docstring.

    ``numbers`` makes the table of numbers of the sizes of the dynamic axes; ``axes`` says where these are: input
    and axis. ``template`` holds the steps ``[steps, STEP_WORDS]``, in
    which ``places`` (flat) are filled from the entries ``sources``. ``constants`` are tensors that lie in buffers.
    ``outputs`` are views, or what does not depend on a call. ``new`` are buffers that the caller gets: made anew by
    each call. ``names`` are those of the steps' nodes, ``ids`` what embeddings look up, by step, and in how many rows.
    ``kept`` is what the addresses in the template point at.
    """

    numbers: Callable[..., Numbers]
    axes: tuple[tuple[int, int], ...]
    template: Words
    places: npt.NDArray[np.int64]
    sources: npt.NDArray[np.int64]
    buffers: tuple[Buffer, ...]
    inputs: tuple[int, ...]
    constants: dict[int, Tensor]
    new: dict[int, View]
    order: tuple[Native | TorchCall, ...]
    outputs: tuple[Any, ...]
    names: tuple[str, ...]
    ids: dict[int, tuple[View, int]]
    kept: tuple[Any, ...] = ()
    _idle: list[_Workspace] = field(default_factory=list, init=False, compare=False, repr=False)

    def __call__(self, *inputs: Tensor) -> tuple[Any, ...]:
        """The flat results.

        Raises what PyTorch's calls do, ``IndexError`` for ids outside of an embedding, and
        :class:`~prequant.runtime.native.NativeLibraryError` for steps that the library refuses.
        """
        try:
            workspace = self._idle.pop()  # one call at a time has it
        except IndexError:
            workspace = _Workspace(self)
        try:
            return workspace.run(inputs)
        finally:
            workspace.forget()
            self._idle.append(workspace)


@dataclass(frozen=True)
class _Place:
    """A view with its numbers."""

    buffer: int
    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    bytes: int | None  # of the buffer, if it is the plan's own
    whole: bool  # in order, from the buffer's beginning


@dataclass(frozen=True)
class _Sized:
    """A plan for one set of sizes and number of threads."""

    numbers: Numbers
    steps: Words
    offsets: npt.NDArray[np.int64]  # of own buffers, in the arena
    arena_bytes: int
    scratch_bytes: int
    arguments: dict[str, tuple[tuple[Any, ...], dict[str, Any]]]  # of PyTorch's calls, by name
    outputs: tuple[Any, ...]
    new: dict[int, _Place]
    fixed: dict[int, Tensor]  # results of fixed calls, once they were made


ROUNDED = 64
"""Own buffers are placed for sizes rounded up to a multiple of this, so that a growing axis seldom moves them."""

MOST_SIZES = 64
"""Sets of sizes that a workspace remembers."""

MOST_FIXED = 1 << 20
"""Bytes of a call's results that it keeps where sizes alone decide them: a mask of 4,000 by 4,000 positions is made
anew."""


class _Workspace:
    """What a call needs for itself: the memory of own buffers, addresses, and steps with their numbers filled in."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.sized: dict[tuple[object, ...], _Sized] = {}
        self.placements: dict[tuple[int, ...], tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int]] = {}
        self.arena = memory.aligned_bytes(0)
        self.scratch = memory.aligned_bytes(0)
        self.addresses = np.zeros(len(plan.buffers), dtype=np.int64)
        self.own = np.array([i for i, buffer in enumerate(plan.buffers) if buffer.own], dtype=np.int64)
        self.tensors: dict[int, Tensor] = {}
        self.failed = ctypes.c_int64(-1)
        for buffer, tensor in plan.constants.items():
            self.addresses[buffer] = tensor.data_ptr()

    def run(self, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
        plan, threads, isa = self.plan, torch.get_num_threads(), native.chosen_isa().encode()
        sizes = tuple(inputs[input].shape[axis] for input, axis in plan.axes)
        key = (*sizes, threads, isa)
        sized = self.sized.get(key)
        if sized is None:
            sized = self._remember(key, self._size(sizes, threads, isa))
        if self.arena.numel() < sized.arena_bytes:
            self.arena = memory.aligned_bytes(sized.arena_bytes)
        if self.scratch.numel() < sized.scratch_bytes:
            self.scratch = memory.aligned_bytes(sized.scratch_bytes)
        self.addresses[self.own] = self.arena.data_ptr() + sized.offsets
        for position, (buffer, input) in enumerate(zip(plan.inputs, inputs, strict=True)):
            if input.nbytes != sized.numbers[plan.buffers[buffer].bytes]:  # steps read that many
                raise PrequantError(
                    f"input {position} has the shape {list(input.shape)}, which does not go with the sizes of the "
                    "others"
                )
            self._hold(buffer, input if input.is_contiguous() else input.contiguous())
        for buffer, place in sized.new.items():
            self._hold(buffer, torch.empty(place.sizes, dtype=place.dtype, device="cpu"))
        for buffer, tensor in sized.fixed.items():
            self._hold(buffer, tensor)
        for item in plan.order:
            if isinstance(item, Native):
                self._run_native(item, sized, threads, isa)
            elif not (item.fixed and item.results[0] in sized.fixed):
                self._call(item, sized)
        return tuple(map(self._value, sized.outputs))

    def forget(self) -> None:
        """Let go of the tensors of a call."""
        self.tensors.clear()

    # ---- sizes -------------------------------------------------------------------------------------------------------

    def _remember(self, key: tuple[object, ...], sized: _Sized) -> _Sized:
        if len(self.sized) >= MOST_SIZES:
            del self.sized[next(iter(self.sized))]
        self.sized[key] = sized
        return sized

    def _size(self, sizes: tuple[int, ...], threads: int, isa: bytes) -> _Sized:
        plan = self.plan
        numbers = plan.numbers(*sizes)
        table = np.array(numbers, dtype=np.int64)
        steps = plan.template.copy()
        steps.reshape(-1)[plan.places] = table[plan.sources]
        bytes_ = table[[plan.buffers[buffer].bytes for buffer in self.own]]
        offsets, arena_bytes = self._placement(sizes, bytes_)
        scratch = native.load().prequant_plan_scratch(steps.ctypes.data, len(steps), threads, isa)
        if scratch < 0:
            raise native.NativeLibraryError("a plan has a step that the native library does not take")
        sized = functools.partial(_sized, plan, numbers)
        arguments = {
            call.name: (sized(call.args), {name: sized(argument) for name, argument in call.kwargs.items()})
            for call in plan.order
            if isinstance(call, TorchCall)
        }
        new = {buffer: sized(view) for buffer, view in plan.new.items()}
        return _Sized(numbers, steps, offsets, arena_bytes, scratch, arguments, sized(plan.outputs), new, {})

    def _placement(self, sizes: tuple[int, ...], needed: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], int]:
        rounded = tuple(size if size < ROUNDED else -(-size // ROUNDED) * ROUNDED for size in sizes)
        if rounded not in self.placements:
            own = [self.plan.buffers[buffer] for buffer in self.own]
            numbers = self.plan.numbers(*rounded)
            room = np.array([numbers[buffer.bytes] for buffer in own], dtype=np.int64)
            self.placements[rounded] = (room, *placed(room, [(buffer.first, buffer.last) for buffer in own]))
        room, offsets, total = self.placements[rounded]
        if (needed > room).any():  # a size that shrinks where an axis grows
            own = [self.plan.buffers[buffer] for buffer in self.own]
            return placed(needed, [(buffer.first, buffer.last) for buffer in own])
        return offsets, total

    # ---- running -----------------------------------------------------------------------------------------------------

    def _hold(self, buffer: int, tensor: Tensor) -> None:
        self.tensors[buffer] = tensor
        self.addresses[buffer] = tensor.data_ptr()

    def _run_native(self, item: Native, sized: _Sized, threads: int, isa: bytes) -> None:
        status = native.load().prequant_run_plan(
            sized.steps.ctypes.data + item.first * STEP_WORDS * 8,
            item.count,
            self.addresses.ctypes.data,
            self.scratch.data_ptr(),
            sized.scratch_bytes,
            threads,
            isa,
            ctypes.byref(self.failed),
        )
        if status:
            self._fail(status, item.first + self.failed.value, sized.numbers)

    def _fail(self, status: int, step: int, numbers: Numbers) -> None:
        if status == native.BAD_ROW and step in self.plan.ids:
            view, rows = self.plan.ids[step]
            reference.check_ids(self._tensor(_sized(self.plan, numbers, view)), rows)
        native.check(status, f"step {step} of a plan ({self.plan.names[step]})")

    def _call(self, call: TorchCall, sized: _Sized) -> None:
        args, kwargs = sized.arguments[call.name]
        result = call.function(
            *map(self._value, args), **{name: self._value(argument) for name, argument in kwargs.items()}
        )
        results = result if isinstance(result, (tuple, list)) else (result,)
        keeps = call.fixed and sum(value.nbytes for value in results if isinstance(value, Tensor)) <= MOST_FIXED
        for buffer, value in zip(call.results, results, strict=True):
            if buffer != ABSENT:
                expected = self.plan.buffers[buffer]
                bytes_ = sized.numbers[expected.bytes]
                if value.dtype != expected.dtype or value.nbytes != bytes_:
                    raise PrequantError(
                        f"{call.name} gave {list(value.shape)} of {value.dtype} in a plan that expects "
                        f"{bytes_} bytes of {expected.dtype}"
                    )
                self._hold(buffer, self._lasting(value))
                if keeps:
                    sized.fixed[buffer] = self.tensors[buffer]

    def _lasting(self, value: Tensor) -> Tensor:
        """A result in order, in memory that later steps don't write to: what is a view of an own buffer is copied."""
        start = self.arena.data_ptr()
        if start <= value.data_ptr() < start + self.arena.numel():
            return value.clone(memory_format=torch.contiguous_format)
        return value.contiguous()

    def _value(self, value: Any) -> Any:
        if isinstance(value, _Place):
            return self._tensor(value)
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._value, value))
        return value

    def _tensor(self, place: _Place) -> Tensor:
        if place.bytes is not None:
            start = int(self.addresses[place.buffer]) - self.arena.data_ptr()
            base = self.arena[start : start + place.bytes].view(place.dtype)
        else:
            held = self.tensors.get(place.buffer, self.plan.constants.get(place.buffer))
            if held is None:
                raise PrequantError(f"buffer {place.buffer} of a plan is read before it is written")
            # Itself, where it can be: a view made without gradients can't be written to with them.
            if place.whole and held.shape == place.sizes and held.is_contiguous():
                return held
            base = held
        return base.as_strided(place.sizes, place.strides, base.storage_offset() + place.offset)


def _sized(plan: Plan, numbers: Numbers, value: Any) -> Any:
    """A value of a plan with its numbers: views become places."""
    if isinstance(value, View):
        sizes, strides = (tuple(numbers[entry] for entry in entries) for entries in (value.sizes, value.strides))
        buffer = plan.buffers[value.buffer]
        in_order = all(
            size == 1 or stride == prod(sizes[axis + 1 :])
            for axis, (size, stride) in enumerate(zip(sizes, strides, strict=True))
        )
        offset = numbers[value.offset]
        place = (value.buffer, value.dtype, sizes, strides, offset, numbers[buffer.bytes] if buffer.own else None)
        return _Place(*place, in_order and offset == 0)
    if isinstance(value, Number):
        return numbers[value.entry]
    if isinstance(value, (list, tuple)):
        return type(value)(_sized(plan, numbers, item) for item in value)
    return value
