"""``packed_linear`` on the native kernels: packs a weight for them once, and calls them.

The kernels' own layout of a weight (``native/panels.h``) is made when it is first used: codes once, and scales, zero
points and outliers for each set of these that goes with the codes, as several tasks have them. All is kept for as long
as its tensors live and do not change. (A tensor made in inference mode does not count its changes: one that is written
to in place has to be replaced to be seen.) Weights that are being trained change at every step, so a call that records
gradients for its weight unpacks it instead (native_rows.py).
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from . import memory, native, native_rows
from .backends import Backend, records_gradients, register_backend
from .formats import Granularity, Scheme, WeightFormat
from .native_weight import NeutralWeight, address_of, float_copy
from .native_workspace import run
from .reference import Outliers, positive_scale
from .versions import version_of

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
    """A linear layer as the library describes it, with the memory of its weight. Nothing in it changes, so that a call
    on another thread goes on with the layer that it began with.

    The description holds bare addresses; what they point at is kept here. So are the tensors of ``made_from``: as long
    as their memory is not given back, nothing else can be found at their addresses.
    """

    def __init__(
        self,
        codes: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        input_scale: Tensor | None,
        input_zero_point: Tensor | None,
        input_format: WeightFormat | None,
        activation: str,
        dtype: torch.dtype,
    ) -> None:
        half = 0 if input_format is None else input_format.levels // 2
        # A learned scale may have crossed zero: what counts, as everywhere, is its magnitude.
        static = None if input_format is None or input_scale is None else positive_scale(input_scale, input_format)
        floats = float_copy(bias), float_copy(static)
        self._kept = (codes, scales, *floats, *map(_memory, (bias, input_scale, input_zero_point)))
        self._linear = native.Linear(
            codes=codes.data_ptr(),
            scales=scales.data_ptr(),
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

    def __init__(
        self, codes: Tensor, scales: Tensor, made_from: tuple[object, ...], tensors: Sequence[Tensor | None]
    ) -> None:
        self.codes, self.scales, self.made_from = codes, scales, made_from
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
            layer = PackedLayer(self.codes, self.scales, *operands, input_format, activation, dtype)
            self._last = (made_from, layer)
        return layer


class PackedCodes:
    """The codes of a weight in the kernels' layout, and the weights that were packed on them."""

    def __init__(self, memory: Tensor, made_from: tuple[object, ...], codes: Tensor) -> None:
        self.memory, self.made_from = memory, made_from
        self._kept = _memory(codes)
        self.weights: dict[tuple[int, ...], PackedWeight] = {}
        self._watching: dict[tuple[int, ...], list[weakref.finalize[Any, Any]]] = {}
        """By the identities of the tensors that a weight was made of beside the codes."""

    def weight(self, neutral: Callable[[], NeutralWeight], replaces: bool, *tensors: Tensor | None) -> PackedWeight:
        """The weight of these codes with such scales, zero points and outliers (all of ``tensors``); packed if it is
        new, or not what it was.
        """
        key, made_from = tuple(map(id, tensors)), (replaces, *map(_state, tensors))
        weight = self.weights.get(key)
        if weight is None or weight.made_from != made_from:
            if weight is None:
                self._forget_with(tensors, key)
            scales = _pack_scales(neutral(), self.memory)
            weight = self.weights[key] = PackedWeight(self.memory, scales, made_from, tensors)
        return weight

    def _forget_with(self, tensors: Sequence[Tensor | None], key: tuple[int, ...]) -> None:
        """Drop a weight when one of its tensors is gone, as those of a task are that is unloaded."""
        weights = weakref.ref(self)
        watching = [weakref.finalize(tensor, _forget, weights, key) for tensor in tensors if tensor is not None]
        for each in watching:
            each.atexit = False
        self._watching[key] = watching

    def forget(self, key: tuple[int, ...]) -> None:
        """Drop the weight, and stop to watch those of its tensors that live on."""
        self.weights.pop(key, None)
        for each in self._watching.pop(key, ()):
            each.detach()


def _forget(packed: weakref.ref[PackedCodes], key: tuple[int, ...]) -> None:
    if (codes := packed()) is not None:
        codes.forget(key)


_packed: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""What was packed last of each tensor of codes."""


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
    made_from = (format, columns, _state(codes))
    packed = _packed.get(codes)

    def neutral() -> NeutralWeight:
        return NeutralWeight(format, codes, scale, zero_point, columns, outliers)

    if packed is None or packed.made_from != made_from:
        packed = _packed[codes] = PackedCodes(_pack_codes(neutral()), made_from, codes)
    operands = (scale, zero_point, *(outliers[:3] if outliers is not None else ()))
    weight = packed.weight(neutral, outliers is not None and outliers.replace, *operands)
    return weight.layer(bias, input_scale, input_zero_point, input_format, activation, input.dtype)


def _state(tensor: Tensor | None) -> tuple[int, int] | None:
    """What changes when a tensor does: where it is, and how often it was written to."""
    if tensor is None:
        return None
    return tensor.data_ptr(), version_of(tensor)


def _memory(tensor: Tensor | None) -> Tensor | None:
    """The tensor's memory without the tensor, whose life decides how long a packed weight lives."""
    return None if tensor is None else tensor.detach()


def _pack_codes(weight: NeutralWeight) -> Tensor:
    library = native.load()
    size = library.prequant_codes_bytes(weight.address)
    native.check(0 if size >= 0 else 1, f"packing {weight}")
    codes = memory.panels.take(size)
    native.check(
        library.prequant_pack_codes(weight.address, codes.data_ptr(), torch.get_num_threads()), f"packing {weight}"
    )
    return codes


def _pack_scales(weight: NeutralWeight, codes: Tensor) -> Tensor:
    library = native.load()
    scales = memory.panels.take(library.prequant_scales_bytes(weight.address))
    threads = torch.get_num_threads()
    status = library.prequant_pack_scales(weight.address, codes.data_ptr(), scales.data_ptr(), threads)
    native.check(status, f"packing {weight}")
    return scales


BACKEND = Backend("native", "packed_linear", "cpu", accepts, packed_linear)
register_backend(native_rows.TRAINED_LINEAR)
register_backend(BACKEND)
