"""``packed_linear`` on the native kernels: packs a weight for them once, and calls them.

The kernels' own layout of a weight (``native/panels.h``) is made when it is first used, and kept for as long as its
codes live and none of its tensors changes. Weights that are being trained change at every step, so a call that records
gradients for its weight unpacks it instead (native_rows.py).
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from . import native
from .backends import Backend, records_gradients, register_backend
from .formats import Granularity, Scheme, WeightFormat
from .native_weight import NeutralWeight, address_of, float_copy
from .reference import Outliers

TYPES = {torch.float32: 0, torch.bfloat16: 1}
"""Inputs and outputs that the kernels take, and what the library calls them."""

MAX_COLUMNS = 1 << 16
ALIGNMENT = 64
"""Bytes that scratch and panels are aligned to."""

GROUP_MULTIPLE = 32
"""Groups that the kernels take are multiples of so many columns."""

ACTIVATIONS = {"": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3}
"""What may be done to the result, and what the library calls it."""

FLOAT, DYNAMIC, STATIC = 0, 1, 2
"""How inputs are quantized, as the library calls it."""


class PackedLayer:
    """A linear layer as the kernels take it: its weight in their layout, and what goes with it.

    ``made_from`` tells whether its tensors are still what they were. The structure holds bare addresses, of tensors
    that are kept here.
    """

    def __init__(
        self,
        panels: Tensor,
        bias: Tensor | None,
        input_scale: Tensor | None,
        input_zero_point: Tensor | None,
        input_format: WeightFormat | None,
        activation: str,
        made_from: tuple[object, ...],
    ) -> None:
        self.panels, self.made_from = panels, made_from
        self._floats = [float_copy(bias), float_copy(input_scale)]
        half = 0 if input_format is None else input_format.levels // 2
        self.types = {
            dtype: native.Linear(
                panels=panels.data_ptr(),
                bias=address_of(self._floats[0]),
                input_scale=address_of(self._floats[1]),
                input_zero=0.0 if input_zero_point is None else float(input_zero_point) - half,
                input_levels=2 * half,
                input=FLOAT if input_format is None else DYNAMIC if input_scale is None else STATIC,
                type=number,
                activation=ACTIVATIONS[activation],
            )
            for dtype, number in TYPES.items()
        }
        self.addresses = {dtype: ctypes.addressof(linear) for dtype, linear in self.types.items()}


_layers: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""The layer made last of each tensor of codes."""


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
    activation: str,
    residual: Tensor | None,
) -> bool:
    """Whether the kernels can run a call of ``packed_linear``."""
    if native.chosen_isa() == native.REFERENCE or input.dtype not in TYPES or columns > MAX_COLUMNS:
        return False
    if format.group_size % GROUP_MULTIPLE or scale.dtype is not torch.float32:
        return False
    if input_format is not None and not _takes_input(input_format, input_scale, input_zero_point):
        return False
    values = None if outliers is None else outliers.values
    return not records_gradients(scale, zero_point, values, bias, input_scale, input_zero_point)


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
    operands = (codes, scale, zero_point, *(outliers[:3] if outliers else ()), bias, input_scale, input_zero_point)
    replace = outliers is not None and outliers.replace
    made_from = (format, columns, replace, input_format, activation, *map(_state, operands))
    layer = _layers.get(codes)
    if layer is None or layer.made_from != made_from:
        panels = _pack(format, codes, scale, zero_point, outliers, columns)
        layer = PackedLayer(panels, bias, input_scale, input_zero_point, input_format, activation, made_from)
        _layers[codes] = layer
    return _run(layer, input.contiguous(), residual, codes.shape[-2], columns)


def _run(layer: PackedLayer, input: Tensor, residual: Tensor | None, rows: int, columns: int) -> Tensor:
    library, threads, address = native.load(), torch.get_num_threads(), layer.addresses[input.dtype]
    tokens = input.numel() // columns
    needed = library.prequant_linear_scratch(address, tokens, threads)
    if needed < 0:
        raise native.NativeLibraryError("packed_linear: its weight was not packed by this native library")
    scratch = torch.empty(needed + ALIGNMENT, dtype=torch.uint8)
    start = scratch.data_ptr()
    output = input.new_empty((*input.shape[:-1], rows))
    added = None if residual is None else residual.contiguous()
    status = library.prequant_run_linear(
        *(address, input.data_ptr(), address_of(added), output.data_ptr(), tokens),
        *(start + -start % ALIGNMENT, needed, threads),
        native.chosen_isa().encode(),
    )
    if status:
        native.check(status, "packed_linear")
    return output


def _state(tensor: Tensor | None) -> tuple[int, int] | None:
    """What changes when a tensor does: where it is, and how often it was written to."""
    if tensor is None:
        return None
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


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
    panels = native.aligned_bytes(size)
    status = library.prequant_pack_panels(weight.address, panels.data_ptr(), torch.get_num_threads())
    native.check(status, f"packing a weight {list(codes.shape)} of {format}")
    return panels


register_backend(Backend("native", "packed_linear", "cpu", accepts, packed_linear))
