"""Calls of ``packed_linear`` that repeat an earlier one on another input: what was checked then is not checked again.

A layer is called again and again with the same tensors. As long as they are those, and were not written to, all that
can differ is the input: so a call that the native kernels took is remembered by its codes, and one like it goes to them
at once. Every other call takes the long way, :func:`~prequant.runtime.ops.checked_linear` and the choice of a backend.

The way to the kernels can take as long as the multiplication of a small layer: this one is written for speed.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from . import backends, native, native_linear, ops, reference
from .native_workspace import run, run_all

Operands = tuple[Any, ...]
"""What stays the same from call to call, in the order of the schema: ``scale`` to ``input_zero_point``, then the
options."""

State = tuple[int, "int | None"]
"""Where a tensor is, and how often it was written to (None if it does not count that, see native_linear.py)."""


def _state(tensor: Tensor) -> State:
    return tensor.data_ptr(), None if tensor.is_inference() else tensor._version


class Repeat:
    """A call that the native kernels took: what has to be as it was for another input to take the same way.

    It is made before the call and remembered after it, so that what is written to in between is not missed. The codes
    it knows by their place alone: their life decides how long a call is remembered.
    """

    __slots__ = (
        *("address", "codes_state", "columns", "death", "dtype", "isa", "last", "layer", "operands", "rows"),
        "watched",
    )

    def __init__(self, codes: Tensor, operands: Operands) -> None:
        self.operands, self.columns, self.isa = operands, operands[10], native.chosen_isa()
        self.codes_state = _state(codes)
        self.watched = tuple((tensor, *_state(tensor)) for tensor in operands if isinstance(tensor, Tensor))

    def remember(self, codes: Tensor, layer: native_linear.PackedLayer, dtype: torch.dtype) -> None:
        """From now on calls may repeat this one, unless another backend has to be asked first."""
        self.rows, self.dtype, self.layer, self.address = codes.shape[-2], dtype, layer, layer.address
        self.last: tuple[tuple[int, ...], int, tuple[int, ...]] = ((-1,), 0, ())
        """Shape of the last input (none has one of -1), how many tokens that is, and shape of its output."""
        if not backends.is_first(native_linear.BACKEND):
            return
        # The interpreter clears a module's names before its tensors: what goes then finds the table by its own means.
        key, repeats = id(codes), _repeats
        self.death = weakref.ref(codes, lambda _: repeats.pop(key, None))
        repeats[key] = self

    def output_for(self, input: Tensor) -> tuple[Tensor, int] | None:
        """Memory for the result, and the number of tokens; None for an input that does not fit."""
        if input.dtype is not self.dtype or not input.is_contiguous():
            return None
        last, tokens, output_shape = self.last
        shape = input.shape
        if shape != last:
            if shape[-1:] != (self.columns,):
                return None
            tokens, output_shape = input.numel() // self.columns, (*shape[:-1], self.rows)
            self.last = shape, tokens, output_shape
        return input.new_empty(*output_shape), tokens


_repeats: dict[int, Repeat] = {}
"""The call that was last made with each tensor of codes, by its ``id``."""

backends.on_change.append(_repeats.clear)


def find(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    values: Tensor | None,
    places: Tensor | None,
    offsets: Tensor | None,
    replace: bool,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero: Tensor | None,
    format: str,
    columns: int,
    input_format: str,
    activation: str,
) -> Repeat | None:
    """The call that one with these operands repeats; None if there is none, or if anything has changed since."""
    repeat = _repeats.get(id(codes))
    if repeat is None or repeat.isa is not native.chosen_isa() or backends.recording.on:
        return None
    # fmt: off
    (scale_, zero_point_, values_, places_, offsets_, replace_, bias_, input_scale_, input_zero_,
     format_, columns_, input_format_, activation_) = repeat.operands
    # fmt: on
    if (
        scale is not scale_
        or zero_point is not zero_point_
        or values is not values_
        or places is not places_
        or offsets is not offsets_
        or replace is not replace_
        or bias is not bias_
        or input_scale is not input_scale_
        or input_zero is not input_zero_
        or format != format_
        or columns != columns_
        or input_format != input_format_
        or activation != activation_
    ):
        return None
    # The same tensor may have been written to, or got other memory (`tensor.data = other`).
    address, version = repeat.codes_state
    if codes.data_ptr() != address or (version is not None and codes._version != version):
        return None
    for tensor, address, version in repeat.watched:
        if tensor.data_ptr() != address or (version is not None and tensor._version != version):
            return None
    return repeat


def _packed_linear(
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    values: Tensor | None,
    places: Tensor | None,
    offsets: Tensor | None,
    replace: bool,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero: Tensor | None,
    residual: Tensor | None = None,
    format: str = "",
    columns: int = 0,
    input_format: str = "",
    activation: str = "",
) -> Tensor:
    """The op on the CPU, all of whose tensors are there and plain: the dispatcher sees to that."""
    # fmt: off
    repeat = find(codes, scale, zero_point, values, places, offsets, replace, bias, input_scale, input_zero,
                  format, columns, input_format, activation)
    # fmt: on
    if repeat is not None and (made := repeat.output_for(input)) is not None:
        output, tokens = made
        if residual is None:
            run(repeat.address, input.data_ptr(), None, output.data_ptr(), tokens)
            return output
        if residual.shape == output.shape and residual.dtype is output.dtype and residual.is_contiguous():
            run(repeat.address, input.data_ptr(), residual.data_ptr(), output.data_ptr(), tokens)
            return output
    options = (format, columns, input_format, activation)
    weight = (codes, scale, zero_point, values, places, offsets, replace)
    backend, arguments, new = _examined((input, *weight, bias, input_scale, input_zero, residual, *options))
    result: Tensor = (reference.packed_linear if backend is None else backend.kernel)(*arguments)
    if backend is native_linear.BACKEND:
        new.remember(codes, native_linear.layer_of(*arguments), input.dtype)
    return result


def _examined(call: tuple[Any, ...]) -> tuple[backends.Backend | None, tuple[Any, ...], Repeat]:
    """Who takes a call of ``packed_linear``, with the arguments that it takes, and what to remember of it."""
    new = Repeat(call[1], _operands(call))
    arguments = ops.checked_linear(*call)
    return backends.choose("packed_linear", *arguments), arguments, new


def _operands(call: tuple[Any, ...]) -> Operands:
    """The arguments of a call without input, codes and residual."""
    return (*call[2:11], *call[12:])


def _packed_linears(*arguments: Any, **options: Any) -> list[Tensor]:
    """Several linears on one input, on the CPU: one call of the library if the native kernels take each of them."""
    calls = ops.linears_of(*arguments, **options)
    input: Tensor = calls[0][0]
    known = []
    if not backends.registered_backends("packed_linears", "cpu"):  # one that is asked first
        known = [repeat for call in calls if (repeat := find(call[1], *_operands(call))) is not None]
    if len(known) == len(calls) and (outputs := _joined(known, input)) is not None:
        return outputs
    examined = [_examined(call) for call in calls]
    checked = (None, input, [each for _, each, _ in examined])
    if (taker := backends.choose("packed_linears", *checked)) is not None:
        return list(taker.kernel(*checked))
    if any(backend is not native_linear.BACKEND for backend, _, _ in examined):
        return [
            (reference.packed_linear if backend is None else backend.kernel)(*each) for backend, each, _ in examined
        ]
    for call, (_, each, new) in zip(calls, examined, strict=True):
        new.remember(call[1], native_linear.layer_of(*each), input.dtype)
    outputs = _joined([new for _, _, new in examined], input.contiguous())
    assert outputs is not None, "an input that was examined fits"
    return outputs


def _joined(repeats: list[Repeat], input: Tensor) -> list[Tensor] | None:
    """What all of them give for ``input``; None if it is not as they take it."""
    made = [each for repeat in repeats if (each := repeat.output_for(input)) is not None]
    if len(made) < len(repeats):
        return None
    outputs = [output for output, _ in made]
    addresses = [repeat.address for repeat in repeats]
    run_all(addresses, input.data_ptr(), [output.data_ptr() for output in outputs], made[0][1])
    return outputs


ops.implement_on_cpu("packed_linear", _packed_linear)
ops.implement_on_cpu("packed_linears", _packed_linears)
