"""``packed_linear`` on the native kernels: packs a weight for them once, and calls them.

The kernels' own layout of a weight (``native/panels.h``) is made when it is first used, and kept for as long as its
codes live and none of its tensors changes. (A tensor made in inference mode does not count its changes: one that is
written to in place has to be replaced to be seen.) Weights that are being trained change at every step, so a call that
records gradients for its weight unpacks it instead (native_rows.py).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from . import memory, native, native_rows
from .backends import Backend, records_gradients, register_backend
from .formats import Granularity, Scheme, WeightFormat
from .native_weight import NeutralWeight, address_of, float_copy
from .native_workspace import run
from .reference import Outliers

TYPES = {torch.float32: 0, torch.bfloat16: 1}
"""Inputs and outputs that the kernels take, and what the library calls them."""

MAX_COLUMNS = 1 << 16
GROUP_MULTIPLE = 32
"""Groups that the kernels take are multiples of so many columns."""

ACTIVATIONS = {"": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3}
"""What may be done to the result, and what the library calls it."""

FLOAT, DYNAMIC, STATIC = 0, 1, 2
"""How inputs are quantized, as the library calls it."""


class PackedLayer:
    """A linear layer as the library describes it, with the panels of its weight. Nothing in it changes, so that a call
    on another thread goes on with the layer that it began with.

    The description holds bare addresses; what they point at is kept here. So are the tensors of ``made_from``: as long
    as their memory is not given back, nothing else can be found at their addresses.
    """

    def __init__(
        self,
        panels: Tensor,
        bias: Tensor | None,
        input_scale: Tensor | None,
        input_zero_point: Tensor | None,
        input_format: WeightFormat | None,
        activation: str,
        dtype: torch.dtype,
    ) -> None:
        half = 0 if input_format is None else input_format.levels // 2
        floats = float_copy(bias), float_copy(input_scale)
        self._kept = (panels, *floats, *map(_memory, (bias, input_scale, input_zero_point)))
        self._linear = native.Linear(
            panels=panels.data_ptr(),
            bias=address_of(floats[0]),
            input_scale=address_of(floats[1]),
            input_zero=0.0 if input_zero_point is None else float(input_zero_point) - half,
            input_levels=2 * half,
            input=FLOAT if input_format is None else DYNAMIC if input_scale is None else STATIC,
            type=TYPES[dtype],
            activation=ACTIVATIONS[activation],
        )
        self.address = ctypes.addressof(self._linear)


class PackedWeight:
    """A weight in the kernels' layout, and the layer that it was last called as.

    ``made_from`` is the :func:`_state` of its tensors, whose memory is kept for the same reason as in a layer.
    """

    def __init__(self, panels: Tensor, made_from: tuple[object, ...], tensors: Sequence[Tensor | None]) -> None:
        self.panels, self.made_from = panels, made_from
        self._kept = [_memory(tensor) for tensor in tensors]
        self._last: tuple[tuple[object, ...], PackedLayer | None] = ((), None)

    def layer(
        self,
        bias: Tensor | None,
        input_scale: Tensor | None,
        input_zero_point: Tensor | None,
        input_format: WeightFormat | None,
        activation: str,
        dtype: torch.dtype,
    ) -> PackedLayer:
        """The layer of this weight and the rest: the last one, if nothing of it has changed."""
        operands = (bias, input_scale, input_zero_point)
        made_from = (input_format, activation, dtype, *map(_state, operands))
        known, layer = self._last
        if layer is None or known != made_from:
            layer = PackedLayer(self.panels, *operands, input_format, activation, dtype)
            self._last = (made_from, layer)
        return layer


_packed: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""The weight packed last of each tensor of codes."""


def accepts(
    format: WeightFormat,
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    outliers: Outliers | None,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    columns: int,
    input_format: WeightFormat | None,
    *_: object,
) -> bool:
    """Whether the kernels can run a call of ``packed_linear``."""
    if native.chosen_isa() == native.REFERENCE or input.dtype not in TYPES or columns > MAX_COLUMNS:
        return False
    if format.group_size % GROUP_MULTIPLE or scale.dtype is not torch.float32:
        return False
    if input_format is not None and not _takes_input(input_format, input_scale, input_zero_point):
        return False
    return not records_gradients(scale, zero_point, None if outliers is None else outliers.values)


def _takes_input(format: WeightFormat, scale: Tensor | None, zero_point: Tensor | None) -> bool:
    if format.scheme is not Scheme.AFFINE or format.granularity is Granularity.GROUP:
        return False
    if scale is None:
        return format.granularity is Granularity.ROW
    return scale.numel() == 1 and (zero_point is None or zero_point.numel() == 1)


def packed_linear(
    format: WeightFormat,
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    outliers: Outliers | None,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    columns: int,
    input_format: WeightFormat | None,
    activation: str,
    residual: Tensor | None,
) -> Tensor:
    """See :func:`prequant.runtime.reference.packed_linear`; ``[..., rows]`` in the input's dtype."""
    layer = layer_of(
        *(format, input, codes, scale, zero_point, outliers, bias, input_scale, input_zero_point, columns),
        *(input_format, activation),
    )
    input = input.contiguous()
    output = input.new_empty((*input.shape[:-1], codes.shape[-2]))
    added = None if residual is None else residual.contiguous()
    run(layer.address, input.data_ptr(), address_of(added), output.data_ptr(), input.numel() // columns)
    return output


def layer_of(
    format: WeightFormat,
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    outliers: Outliers | None,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    columns: int,
    input_format: WeightFormat | None,
    activation: str,
    *_: object,
) -> PackedLayer:
    """The layer that a call of :func:`packed_linear` runs; its weight is packed if it is new, or not what it was."""
    tensors = (codes, scale, zero_point, *(outliers[:3] if outliers is not None else ()))
    made_from = (format, columns, outliers is not None and outliers.replace, *map(_state, tensors))
    weight = _packed.get(codes)
    if weight is None or weight.made_from != made_from:
        weight = PackedWeight(_pack(format, codes, scale, zero_point, outliers, columns), made_from, tensors)
        _packed[codes] = weight
    return weight.layer(bias, input_scale, input_zero_point, input_format, activation, input.dtype)


def _state(tensor: Tensor | None) -> tuple[int, int] | None:
    """What changes when a tensor does: where it is, and how often it was written to."""
    if tensor is None:
        return None
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _memory(tensor: Tensor | None) -> Tensor | None:
    """The tensor's memory without the tensor, whose life decides how long a packed weight lives."""
    return None if tensor is None else tensor.detach()


def _pack(
    format: WeightFormat,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    outliers: Outliers | None,
    columns: int,
) -> Tensor:
    weight = NeutralWeight(format, codes, scale, zero_point, columns, outliers)
    library = native.load()
    size = library.prequant_panels_bytes(weight.address)
    native.check(0 if size >= 0 else 1, f"packing a weight {list(codes.shape)} of {format}")
    panels = memory.panels.take(size)
    status = library.prequant_pack_panels(weight.address, panels.data_ptr(), torch.get_num_threads())
    native.check(status, f"packing a weight {list(codes.shape)} of {format}")
    return panels


BACKEND = Backend("native", "packed_linear", "cpu", accepts, packed_linear)
register_backend(native_rows.TRAINED_LINEAR)
register_backend(BACKEND)
