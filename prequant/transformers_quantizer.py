"""``AutoModel....from_pretrained`` of a saved folder: registers the quantization method ``prequant`` with transformers.

transformers builds the model's modules without their weights, this puts packed weights into the places that
``config.json`` lists, and transformers fills them from the file. Importing the module is what registers it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .checkpoint.check import check_input
from .checkpoint.config import QUANT_METHOD, InputSpec, QuantizationSpec, WeightSpec, decode_spec
from .checkpoint.errors import CheckpointError
from .checkpoint.paths import inside
from .checkpoint.tensors import check_header
from .checkpoint.weight_tensors import check_weight
from .modules import PackedWeight, QuantizedInput, pack_module, quantize_input, weight_shape


@register_quantization_config(QUANT_METHOD)
class PrequantConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a saved folder, checked as it is read. Raises :class:`CheckpointError`."""

    def __init__(self, **values: Any) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # an enum of transformers' own methods
        self.spec = decode_spec(values, "quantization_config")

    def to_dict(self) -> dict[str, Any]:
        """As in ``config.json``."""
        return self.spec.encode()


@register_quantizer(QUANT_METHOD)
class PrequantQuantizer(HfQuantizer):
    """Puts packed modules into a model that transformers loads. Everything that kernels rely on is checked in the file
    first.
    """

    requires_calibration = True  # there has to be a saved folder: weights are not packed while a float model loads
    quantization_config: PrequantConfig

    def __init__(self, quantization_config: QuantizationConfigMixin, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self._files_checked = False

    def validate_environment(self, *args: Any, **options: Any) -> None:
        """Raises :class:`CheckpointError` for a Program that does more than the model's code with packed weights."""
        if reasons := self.quantization_config.spec.reasons:
            more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
            raise CheckpointError(
                f"this folder holds a Program that the model's own modules can't express: {reasons[0]}{more}. "
                "Load it with prequant.load(folder)"
            )

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **options: Any
    ) -> None:
        spec = self.quantization_config.spec
        files = [Path(file) for file in checkpoint_files or ()]
        if files and all(file.suffix == ".safetensors" for file in files):
            _check_files(files, Path(str(model.config.name_or_path)), spec)
            self._files_checked = True
        self.quantization_config.spec = place(model, spec)

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> None:
        for path, module in model.named_modules():
            if not isinstance(module, (PackedWeight, QuantizedInput)):
                continue
            tensors = dict(module.named_buffers())
            for part, tensor in tensors.items():
                if not getattr(tensor, "_is_hf_initialized", False):
                    raise CheckpointError(f"{path}.{part} is missing in what the model was loaded from")
            if isinstance(module, PackedWeight):
                _restore_dtypes(module)
                if not self._files_checked:
                    spec = module.spec
                    check_weight(spec.format, spec.rows, spec.columns, module.tensors(), f"{path}.{{}}".format)
            elif tensors and not self._files_checked:
                check_input(module.format, list(tensors.values()), [f"{path}.{part}" for part in tensors])

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What ``save_pretrained`` writes: tied tensors once, also those that only the Program knew to be tied."""
        state = model.state_dict()
        for name, aliases in self.quantization_config.spec.tied.items():
            for alias in aliases:
                if name in state and alias in state and state[alias].data_ptr() == state[name].data_ptr():
                    del state[alias]
        return state, {}

    def is_serializable(self, *args: Any, **options: Any) -> bool:
        """The model can be saved again, with the weights packed as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients pass through packed modules to adapters and to everything that is not packed."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Packed modules call plain operators."""
        return True


# ---- the model's modules ---------------------------------------------------------------------------------------------


def place(model: Any, spec: QuantizationSpec) -> QuantizationSpec:
    """Put packed modules into a model that has no weights yet. Returns the specification in the names that this model
    uses.

    A folder saved from a model with a head loads into one without, and the other way round: names gain or lose the base
    model's prefix, and what the model does not have is left out, as transformers does with plain weights. Raises
    :class:`CheckpointError` for a module that is no linear or embedding, or of another shape.
    """
    names = _Names(model)
    ties = _Ties(model, names, spec.tied)
    weights = {found: part for name, part in spec.weights.items() if (found := names.weight(name)) is not None}
    for name, part in weights.items():
        _place_weight(model, name, part, ties.members(name))
    ties.forget(weights)
    inputs = {path: part for name, part in spec.inputs.items() if (path := names.module(name)) is not None}
    inputs = {path: replace(part, scale=names.scale(part.scale)) for path, part in inputs.items()}
    _place_inputs(model, inputs)
    return QuantizationSpec(weights, inputs, ties.tied, ())


class _Names:
    """From the names in a file to those of a model."""

    def __init__(self, model: Any) -> None:
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        self.prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""

    def module(self, path: str) -> str | None:
        """The path of a module in this model; None if it has no such module."""
        candidates = [path]
        if self.prefix:
            candidates += [path.removeprefix(self.prefix), self.prefix + path]
        return next((candidate for candidate in candidates if candidate in self.modules), None)

    def weight(self, name: str) -> str | None:
        """The name of a weight in this model; None if it does not have its module."""
        return self.tensor(name) if name.endswith(".weight") else None

    def tensor(self, name: str) -> str | None:
        """The name of any tensor in this model; None if it does not have its module."""
        path, _, leaf = name.rpartition(".")
        found = self.module(path)
        return None if found is None else f"{found}.{leaf}" if found else leaf

    def scale(self, name: str) -> str:
        """The name of an input's scale in this model."""
        path, _, leaf = name.rpartition(".")
        return f"{self.module(path) or path}.{leaf}" if name else ""


class _Ties:
    """Which weights are one, as the model says and as the file says."""

    def __init__(self, model: Any, names: _Names, tied: Mapping[str, tuple[str, ...]]) -> None:
        self.model = model
        self.expanded = [
            (f"{path}." if path else "", module, module.get_expanded_tied_weights_keys(all_submodels=False))
            for path, module in model.named_modules()
            if hasattr(module, "get_expanded_tied_weights_keys")
        ]
        self.tied: dict[str, tuple[str, ...]] = {}
        for name, aliases in tied.items():
            own = names.tensor(name)
            others = tuple(other for alias in aliases if (other := names.tensor(alias)) is not None)
            if own is not None and others:
                self.tied[own] = others
                for other in others:
                    if other not in model.all_tied_weights_keys and model.all_tied_weights_keys.get(own) != other:
                        model.all_tied_weights_keys[other] = own

    def members(self, name: str) -> list[str]:
        """All names of a weight."""
        keys: dict[str, str] = self.model.all_tied_weights_keys
        source = keys.get(name, name)
        return list(dict.fromkeys([source, name, *(target for target, other in keys.items() if other == source)]))

    def forget(self, packed: Iterable[str]) -> None:
        """Take what is packed out of the model's lists: transformers ties parameters, and these are tied already."""
        gone = {member for name in packed for member in self.members(name)}
        keys: dict[str, str] = self.model.all_tied_weights_keys
        self.model.all_tied_weights_keys = {t: s for t, s in keys.items() if t not in gone and s not in gone}
        for prefix, module, expanded in self.expanded:
            kept = {t: s for t, s in expanded.items() if prefix + t not in gone and prefix + s not in gone}
            if kept != expanded:
                module._tied_weights_keys = kept


def _place_weight(model: Any, name: str, spec: WeightSpec, members: list[str]) -> None:
    weight: PackedWeight | None = None
    for member in sorted(members, key=lambda member: member != name):  # the owner first
        path = member.rpartition(".")[0]
        module = model.get_submodule(path)
        dense = getattr(module, "weight", None)
        if not isinstance(dense, nn.Parameter) or dense.dim() != 2:
            raise CheckpointError(
                f"quantization_config lists {member}, but {path} is a {type(module).__name__} without a matrix"
            )
        try:
            shape = weight_shape(module)
            if shape != (spec.rows, spec.columns):
                raise CheckpointError(
                    f"quantization_config says that {member} is {[spec.rows, spec.columns]}; "
                    f"in this {type(model).__name__} it is {list(shape)}"
                )
            if weight is None:
                weight = PackedWeight(spec, _compute_dtype(model, member, dense.dtype), dense.device)
            pack_module(module, weight, owner=member == name)
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(f"{member}: {error}") from error


def _compute_dtype(model: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that transformers would load the float weight in: a few stay float32 in a half-precision model."""
    keep: set[str] = set()
    if dtype is torch.float16:
        keep |= set(model._keep_in_fp32_modules or ())
    if dtype in (torch.float16, torch.bfloat16):
        keep |= set(model._keep_in_fp32_modules_strict or ())
    return torch.float32 if any(part in keep for part in name.split(".")) else dtype


def _place_inputs(model: Any, inputs: Mapping[str, InputSpec]) -> None:
    shared: dict[str, QuantizedInput] = {}
    for path, spec in sorted(
        inputs.items(), key=lambda item: item[1].scale.rpartition(".")[0] != item[0]
    ):  # owners first
        module = model.get_submodule(path)
        holder, _, leaf = spec.scale.rpartition(".")
        device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), None)
        name = None
        if spec.scale and holder == path:
            name = leaf
            shared[spec.scale] = QuantizedInput(spec, device)
        elif spec.scale and spec.scale not in shared:
            raise CheckpointError(
                f"quantization_config: {path} quantizes its input by {spec.scale}, which the model does not have"
            )
        quantized = shared[spec.scale] if spec.scale else QuantizedInput(spec, device)
        if quantized.format != spec.format:
            raise CheckpointError(
                f"quantization_config: {spec.scale} is used as {quantized.format} and, by {path}, as {spec.format}"
            )
        try:
            quantize_input(module, quantized, name)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error


def _restore_dtypes(weight: PackedWeight) -> None:
    """Undo the casts of names that transformers takes for modules to keep in float32."""
    for part, (_, dtype) in weight.spec.tensors().items():
        owner = weight.get_submodule(part.rpartition(".")[0])
        leaf = part.rpartition(".")[2]
        setattr(owner, leaf, getattr(owner, leaf).to(dtype))


# ---- the files -------------------------------------------------------------------------------------------------------


def _check_files(files: list[Path], folder: Path, spec: QuantizationSpec) -> None:
    """Look at every packed tensor before transformers opens the files. Raises :class:`CheckpointError`."""
    with ExitStack() as stack:
        held: dict[str, tuple[Path, Any]] = {}
        for path in files:
            if folder.is_dir():
                inside(folder, os.path.relpath(path, folder))
            try:
                file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
                held |= dict.fromkeys(file.keys(), (path, file))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path}: can't be read as safetensors: {error}") from error
        where = files[0] if len(files) == 1 else folder
        for name, weight in spec.weights.items():
            parts = {}
            for part, (shape, dtype) in weight.tensors().items():
                parts[part] = _checked(held, where, f"{name}.{part}", dtype, shape)
            check_weight(weight.format, weight.rows, weight.columns, parts, f"{where}: {name}.{{}}".format)
        for scale, format in {spec.scale: spec.format for spec in spec.inputs.values() if spec.scale}.items():
            names = [f"{scale}.{part}" for part in (("scale",) if format.symmetric else ("scale", "zero_point"))]
            tensors = [_checked(held, where, name, torch.float32, (1, 1)) for name in names]
            check_input(format, tensors, [f"{held[name][0]}: {name}" for name in names])


def _checked(
    held: Mapping[str, tuple[Path, Any]], where: Path, name: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> Tensor:
    if name not in held:
        raise CheckpointError(f"{where}: the tensor {name} is missing")
    path, file = held[name]
    check_header(path, name, file.get_slice(name), dtype, shape)
    tensor: Tensor = file.get_tensor(name)
    return tensor
