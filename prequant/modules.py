"""Modules over packed weights: what transformers' own linears and embeddings become when a saved folder is loaded
through it.

The module keeps its class (a subclass of it, so that what its code does beside the product stays) and its place; its
``weight`` becomes a :class:`PackedWeight`, a module whose tensors have the names in the file: ``query.weight.codes``,
``query.weight.scale``. All are buffers: transformers takes a model's dtype from its first float parameter, and a scale
is float32 whatever the model computes in.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prequant.runtime import PrequantError, Scheme, WeightFormat, ops

from .checkpoint.config import InputSpec, WeightSpec
from .checkpoint.weight_tensors import OUTLIER_PARTS


class _KeepsDtypes(nn.Module):
    """Moves with ``to(device)``; the types of its tensors stay what the format says under ``to(dtype)``."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype is tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


class PackedWeight(_KeepsDtypes):
    """A compressed weight ``[rows, columns]``; stands where the float parameter ``weight`` stood.

    ``dtype``, ``device``, ``shape`` and ``size()`` answer as that parameter would, in the dtype that the model computes
    in; for a Conv1D too, the shape is ``[out, in]``.
    """

    _is_hf_initialized = True
    """Says to transformers: not to be filled with random numbers."""

    def __init__(self, spec: WeightSpec, dtype: torch.dtype, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.dtype = dtype
        for part, (shape, part_dtype) in spec.tensors().items():
            owner: nn.Module = self
            *path, leaf = part.split(".")
            for name in path:
                if name not in owner._modules:
                    owner.add_module(name, _KeepsDtypes())
                owner = owner.get_submodule(name)
            owner.register_buffer(leaf, torch.empty(shape, dtype=part_dtype, device=device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        return super()._apply(fn, recurse)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by part (``codes``, ``outliers.values``, ...)."""
        return dict(self.named_buffers())

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return next(self.buffers()).device

    @property
    def shape(self) -> torch.Size:
        """``[rows, columns]``."""
        return torch.Size((self.spec.rows, self.spec.columns))

    def size(self, dim: int | None = None) -> Any:
        """As ``Tensor.size``."""
        return self.shape if dim is None else self.shape[dim]

    def dequantize(self) -> Tensor:
        """The float weight ``[rows, columns]`` that it stands for."""
        parts, spec = self.tensors(), self.spec
        if spec.format is None:
            value = parts["dense"]
        elif spec.format.scheme is Scheme.BCQ:
            value = ops.dequantize_bcq(parts["planes"], parts["alphas"], **self._options(spec.format))
        else:
            value = ops.dequantize(
                parts["codes"], parts["scale"], parts.get("zero_point"), **self._options(spec.format)
            )
        if spec.outliers is not None:
            value = ops.add_outliers(value, *(parts[part] for part in OUTLIER_PARTS), replace=spec.outliers.replace)
        return value.to(self.dtype)

    def linear(self, input: Tensor, bias: Tensor | None, quantized: QuantizedInput | None = None) -> Tensor:
        """``input`` ``[..., columns]``, quantized first if asked for, times the weight's transpose, plus the bias."""
        if self.spec.format is None:
            return nn.functional.linear(input if quantized is None else quantized(input), self.dequantize(), bias)
        scale = zero_point = None
        text = ""
        if quantized is not None:
            scale, zero_point, text = quantized.scale, quantized.zero_point, str(quantized.format)
        options = self._options(self.spec.format) | {"input_format": text}
        return cast(Tensor, ops.packed_linear(input, *self._operands(), bias, scale, zero_point, **options))

    def embedding(self, ids: Tensor, padding_idx: int | None = None) -> Tensor:
        """Rows ``ids``, ``[*ids.shape, columns]``."""
        padding = -1 if padding_idx is None else padding_idx
        if self.spec.format is None:
            return nn.functional.embedding(ids, self.dequantize(), padding_idx)
        options = self._options(self.spec.format) | {"padding_idx": padding, "dtype": self.dtype}
        return cast(Tensor, ops.packed_embedding(ids, *self._operands(), **options))

    def _operands(self) -> tuple[Any, ...]:
        parts = self.tensors()
        stored, scale = ("planes", "alphas") if "planes" in parts else ("codes", "scale")
        replace = self.spec.outliers is not None and self.spec.outliers.replace
        return (
            parts[stored],
            parts[scale],
            parts.get("zero_point"),
            *(parts.get(part) for part in OUTLIER_PARTS),
            replace,
        )

    def _options(self, format: WeightFormat) -> dict[str, Any]:
        return {"format": str(format), "columns": self.spec.columns}

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        outliers = "" if self.spec.outliers is None else f", {self.spec.outliers.count} outliers"
        return f"{self.spec.format or self.spec.dtype} [{self.spec.rows}, {self.spec.columns}]{outliers}"


class QuantizedInput(_KeepsDtypes):
    """A linear's quantized input: by a dynamic scale, or a stored one (``scale``, ``zero_point``, ``[1, 1]``)."""

    scale: Tensor | None
    zero_point: Tensor | None

    def __init__(self, spec: InputSpec, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.format = spec.format
        names = ("scale",) if spec.format.symmetric else ("scale", "zero_point")
        for name in ("scale", "zero_point"):
            stored = bool(spec.scale) and name in names
            self.register_buffer(name, torch.empty(1, 1, device=device, dtype=torch.float32) if stored else None)

    def forward(self, input: Tensor) -> Tensor:
        """``input`` rounded to its levels."""
        text = str(self.format)
        scale = ops.dynamic_scale(input, format=text) if self.scale is None else self.scale
        return cast(Tensor, ops.fake_quantize(input, scale, self.zero_point, format=text))

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"{self.format}, {'dynamic' if self.scale is None else 'static'}"


# ---- modules that hold them ------------------------------------------------------------------------------------------


class _Product(nn.Module):
    """What linears of all kinds share: a product with a packed weight, or a float product of a quantized input."""

    quantized_input: QuantizedInput | None = None

    def forward(self, input: Tensor) -> Tensor:
        weight, quantized = cast(Any, self.weight), self.quantized_input
        if isinstance(weight, PackedWeight):
            return weight.linear(input, cast("Tensor | None", self.bias), quantized)
        return cast(Tensor, super().forward(input if quantized is None else quantized(input)))


class PackedLinear(_Product, nn.Linear):
    """``nn.Linear`` over a packed weight."""


class PackedConv1D(_Product, Conv1D):
    """GPT-2's ``Conv1D`` over a packed weight, which is ``[out, in]`` like that of any linear."""


class PackedEmbedding(nn.Embedding):
    """``nn.Embedding`` over a packed weight."""

    def forward(self, input: Tensor) -> Tensor:
        """Rows ``input`` of the weight."""
        return cast(Any, self.weight).embedding(input, self.padding_idx)


_KINDS: tuple[tuple[type[nn.Module], type[nn.Module]], ...] = (
    (nn.Linear, PackedLinear),
    (Conv1D, PackedConv1D),
    (nn.Embedding, PackedEmbedding),
)


@lru_cache(maxsize=256)
def packed_class(kind: Any) -> Any:
    """The packed form of a linear's or embedding's class.

    A subclass with code of its own (OPT's positional embedding) keeps it: its ``super().forward`` reaches the packed
    one. Raises :class:`PrequantError` for a class that is neither.
    """
    for base, packed in _KINDS:
        if issubclass(kind, base):
            return packed if kind is base else type(f"Packed{kind.__name__}", (kind, packed), {"__module__": __name__})
    raise PrequantError(f"a {kind.__name__} can't hold a packed weight: only linears, Conv1D and embeddings can")


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """``[rows, columns]`` of the weight of a linear (Conv1D too) or an embedding."""
    rows, columns = cast(Tensor, module.weight).shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def pack_module(module: nn.Module, weight: PackedWeight, owner: bool) -> None:
    """Put ``weight`` in the place of a module's float weight.

    One of several tied modules is the ``owner``, in whose state its tensors stand; the others only refer to it.
    Raises :class:`PrequantError` for a module that can't compute with it.
    """
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq or module.sparse):
        raise PrequantError(
            "an embedding with max_norm, scale_grad_by_freq or sparse gradients can't hold a packed weight"
        )
    module.__class__ = packed_class(cast(Any, type(module)))
    del module._parameters["weight"]
    if owner:
        module.add_module("weight", weight)
    else:
        object.__setattr__(module, "weight", weight)  # past nn.Module's own, which would register it


def quantize_input(module: nn.Module, quantized: QuantizedInput, name: str | None) -> None:
    """Let a linear quantize its input. ``name``: under which it owns the scale; None if another module does."""
    if not isinstance(module, _Product):
        module.__class__ = packed_class(cast(Any, type(module)))
    if name is not None:
        if hasattr(module, name):
            raise PrequantError(
                f"a {type(module).__name__} has an attribute {name!r} already, so it can't hold an input's scale there"
            )
        module.add_module(name, quantized)
    object.__setattr__(module, "quantized_input", quantized)
