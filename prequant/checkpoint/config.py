"""``quantization_config`` in ``config.json``: what transformers has to know to build the model's modules over the
packed tensors.

::

    {"quant_method": "prequant", "version": 1,
     "weights": {"bert.pooler.dense.weight": {
         "format": "affine4:row", "shape": [128, 128],
         "outliers": {"count": 82, "dtype": "float16", "index": "uint16", "replace": false}}},
     "inputs": {"bert.pooler.dense": {"format": "affine8:tensor", "scale": "bert.pooler.dense.input"}},
     "tied": {"transformer.wte.weight": ["lm_head.weight"]},
     "modules": true, "reasons": []}

``version`` is that of the byte layout (:data:`prequant.runtime.LAYOUT_VERSION`). ``weights`` lists those that are not
one plain float tensor; the format of a float weight that only has outliers is its dtype. ``inputs`` lists linears whose
input is quantized: without ``scale`` by a dynamic one, else by the stored ``<scale>.scale`` (and ``.zero_point``),
which several may share. ``modules`` is false where the graph does more than modules with such weights and inputs do;
``reasons`` then says what.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from prequant.runtime import LAYOUT_VERSION, Scheme, WeightFormat

from .arguments import DTYPES, named
from .errors import CheckpointError
from .graph_file import is_tensor_name
from .json_file import Record, describe
from .weight_tensors import FLOATS, INDICES, OUTLIER_PARTS, parse_format, part_shapes

QUANT_METHOD = "prequant"
_FLOAT_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
_INDEX_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in INDICES}


@dataclass(frozen=True)
class OutlierSpec:
    """How many outliers a weight has, their dtype, that of their columns, whether they replace what is there."""

    count: int
    dtype: torch.dtype
    index: torch.dtype
    replace: bool


@dataclass(frozen=True)
class WeightSpec:
    """A weight that is not one float tensor. ``format`` is None for a float weight with outliers; ``dtype`` is that of
    the floats that are stored (scales, zero points, alphas, or the float weight).
    """

    format: WeightFormat | None
    rows: int
    columns: int
    dtype: torch.dtype
    outliers: OutlierSpec | None = None

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor that the file holds for it, by part."""
        shapes = part_shapes(self.format, self.rows, self.columns)
        parts = {
            part: (shape, torch.uint8 if part in ("codes", "planes") else self.dtype) for part, shape in shapes.items()
        }
        if self.outliers is not None:
            count = (self.outliers.count,)
            kinds = ((count, self.outliers.dtype), (count, self.outliers.index), ((self.rows + 1,), torch.int32))
            parts |= dict(zip(OUTLIER_PARTS, kinds, strict=True))
        return parts


@dataclass(frozen=True)
class InputSpec:
    """How a linear's input is quantized. ``scale``: the name before ``.scale`` of a static one; empty for a dynamic
    one.
    """

    format: WeightFormat
    scale: str = ""


@dataclass(frozen=True)
class QuantizationSpec:
    """The parsed ``quantization_config``."""

    weights: Mapping[str, WeightSpec] = field(default_factory=dict)
    inputs: Mapping[str, InputSpec] = field(default_factory=dict)
    tied: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing to say: plain float weights, which transformers loads by itself."""
        return not (self.weights or self.inputs or self.reasons)

    def encode(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "quant_method": QUANT_METHOD,
            "version": LAYOUT_VERSION,
            "modules": not self.reasons,
            "reasons": list(self.reasons),
            "weights": {name: _encode_weight(spec) for name, spec in self.weights.items()},
            "inputs": {
                path: {"format": str(spec.format)} | ({"scale": spec.scale} if spec.scale else {})
                for path, spec in self.inputs.items()
            },
            "tied": {name: list(aliases) for name, aliases in self.tied.items()},
        }


def _encode_weight(spec: WeightSpec) -> dict[str, Any]:
    dtype = _name(spec.dtype)
    entry: dict[str, Any] = {"format": str(spec.format or dtype), "shape": [spec.rows, spec.columns]}
    if spec.format is not None and spec.dtype is not torch.float32:
        entry["scale_dtype"] = dtype
    if spec.outliers is not None:
        out = spec.outliers
        entry["outliers"] = {
            "count": out.count,
            "dtype": _name(out.dtype),
            "index": _name(out.index),
            "replace": out.replace,
        }
    return entry


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- reading ---------------------------------------------------------------------------------------------------------


def decode_spec(value: Any, where: str) -> QuantizationSpec:
    """The inverse of :meth:`QuantizationSpec.encode`. Raises :class:`CheckpointError` that names the entry."""
    record = Record(value, where)
    method = record.get("quant_method", str)
    if method != QUANT_METHOD:
        raise CheckpointError(f"{where}: quant_method is {describe(method)}, not {QUANT_METHOD!r}")
    if record.get("version", int) != LAYOUT_VERSION:
        raise CheckpointError(
            f"{where}: version {record.value['version']}; this prequant reads version {LAYOUT_VERSION}"
        )
    record.only(("quant_method", "version", "modules", "reasons", "weights", "inputs", "tied"))
    weight_specs = {_tensor_name(name, entry.where): _decode_weight(entry) for name, entry in record.records("weights")}
    inputs = {_tensor_name(name, entry.where): _decode_input(entry) for name, entry in record.records("inputs")}
    tied = record.record("tied")
    aliases = {_tensor_name(name, tied.where): tied.strings(name) for name in tied.value}
    for name in (name for names in aliases.values() for name in names):
        _tensor_name(name, tied.where)
    reasons = record.strings("reasons")
    if record.get("modules", bool) is bool(reasons):
        raise CheckpointError(f"{where}: modules is {record.value['modules']} with {len(reasons)} reasons against it")
    return QuantizationSpec(weight_specs, inputs, aliases, reasons)


def _tensor_name(name: str, where: str) -> str:
    if not is_tensor_name(name):
        raise CheckpointError(f"{where}: {describe(name)} is no name of a tensor or module")
    return name


def _decode_weight(entry: Record) -> WeightSpec:
    entry.only(("format", "shape", "scale_dtype", "outliers"))
    shape, text = entry.sizes("shape"), entry.get("format", str)
    if len(shape) != 2:
        raise CheckpointError(f"{entry.where}: shape {list(shape)} is no matrix")
    rows, columns = shape
    outliers = None
    if "outliers" in entry.value:
        part = entry.record("outliers").only(("count", "dtype", "index", "replace"))
        count = part.get("count", int)
        if not 0 <= count <= rows * columns:
            raise CheckpointError(f"{part.where}: {count} outliers in a weight of {rows * columns}")
        outliers = OutlierSpec(
            count,
            named(_FLOAT_NAMES, "float type")(part.get("dtype", str)),
            named(_INDEX_NAMES, "index type")(part.get("index", str)),
            part.get("replace", bool),
        )
    if text in DTYPES:
        if text not in _FLOAT_NAMES or outliers is None:
            raise CheckpointError(
                f"{entry.where}: format {text!r} without outliers; plain float weights are not listed"
            )
        return WeightSpec(None, rows, columns, _FLOAT_NAMES[text], outliers)
    try:
        format = parse_format(text, columns)
        dtype = named(_FLOAT_NAMES, "float type")(entry.get("scale_dtype", str, "float32"))
    except CheckpointError as error:
        raise CheckpointError(f"{entry.where}: {error}") from None
    return WeightSpec(format, rows, columns, dtype, outliers)


def _decode_input(entry: Record) -> InputSpec:
    entry.only(("format", "scale"))
    scale = entry.get("scale", str, "")
    try:
        format = parse_format(entry.get("format", str), 0)
    except CheckpointError as error:
        raise CheckpointError(f"{entry.where}: {error}") from None
    if format.scheme is not Scheme.AFFINE or format.group_size:
        raise CheckpointError(f"{entry.where}: inputs are quantized affinely, per token (row) or tensor, not {format}")
    if not scale and not format.symmetric:
        raise CheckpointError(f"{entry.where}: {format} without a stored scale; dynamic scales are symmetric")
    return InputSpec(format, _tensor_name(scale, entry.where) if scale else "")
