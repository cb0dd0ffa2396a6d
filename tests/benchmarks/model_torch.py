"""Encoders in torch: eager, compiled, and with torchao's quantization for x86."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from model_contenders import Encoding, torch_encoder  # type: ignore[import-not-found]
from model_inputs import Batch, Cell, Encoder, Source  # type: ignore[import-not-found]
from torch import nn

MODULES: tuple[str, ...] = ("transformers.models.bert.modeling_bert",)
INDUCTOR = "torch._inductor.compile_fx"
INT4 = "torchao.prototype.quantization.int4"
PT2E = "torchao.quantization.pt2e.quantize_pt2e"
X86 = "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer"


class TorchContender(Encoding):
    """A module, called with tensors: ``ids, mask  ->  hidden states``."""

    library = "torch"
    modules = MODULES
    _model: nn.Module
    _call: Any

    def run(self, batch: Batch) -> np.ndarray:
        found: torch.Tensor = self._call(torch.from_numpy(batch.ids), torch.from_numpy(batch.mask))
        return found.float().numpy()

    def compile(self, cell: Cell) -> None:
        """Compile for ``cell`` alone: for its shape, or for all lengths if it has several.

        With frozen weights, which inductor then arranges for oneDNN; only so does it run quantized linears at all.
        """
        import torch._inductor.config

        torch._inductor.config.freezing = True
        torch._dynamo.reset()
        self._call = torch.compile(self._model, dynamic=cell.length is None)


class Torch(TorchContender):
    """The float model as transformers makes it, in ``dtype``."""

    def __init__(self, name: str, dtype: torch.dtype, compiled: bool = False) -> None:
        super().__init__(name, 8 * dtype.itemsize)
        self.dtype, self.compiled = dtype, compiled
        self.modules = (*MODULES, INDUCTOR) if compiled else MODULES

    def prepare(self, source: Source, folder: Path) -> None:
        source.model().to(self.dtype).save_pretrained(folder)

    def load(self, folder: Path, source: Source, cell: Cell, threads: int) -> None:
        from transformers import AutoModel

        if not hasattr(self, "_model"):
            model = AutoModel.from_pretrained(folder, dtype=self.dtype, add_pooling_layer=False)
            self._model = self._call = Encoder(model).eval()
        if self.compiled:
            self.compile(cell)


class TorchAo(TorchContender):
    """torchao's ``quantize_``, then compiled. Its config is made in the process that needs it."""

    library = "torchao"
    modules = (*MODULES, INDUCTOR, "torchao.quantization", INT4)

    def __init__(self, name: str, bits: int, dtype: torch.dtype) -> None:
        super().__init__(name, bits)
        self.dtype = dtype

    def _config(self) -> Any:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig

        if self.bits == 8:
            return Int8DynamicActivationInt8WeightConfig()
        return importlib.import_module(INT4).PrototypeInt4WeightOnlyConfig(group_size=64)

    def prepare(self, source: Source, folder: Path) -> None:
        from torchao.quantization import quantize_

        model = torch_encoder(source).to(self.dtype)
        quantize_(model, self._config())
        # Not the module, which can't be pickled; and buffers that a state dict leaves out, too.
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        torch.save(tensors, folder / "model.pt")

    def load(self, folder: Path, source: Source, cell: Cell, threads: int) -> None:
        if not hasattr(self, "_model"):
            self._model = Encoder(source.skeleton()).eval()
            for name, tensor in torch.load(folder / "model.pt", weights_only=False).items():
                module, _, leaf = name.rpartition(".")
                delattr(self._model.get_submodule(module), leaf)
                setattr(self._model.get_submodule(module), leaf, tensor)
        self.compile(cell)


class TorchAoStatic(TorchContender):
    """torchao's quantization of an exported graph: weights and inputs of linears in 8 bits, static scales that were
    calibrated, then compiled."""

    library = "torchao"
    modules = (*MODULES, INDUCTOR, PT2E, X86)

    def prepare(self, source: Source, folder: Path) -> None:
        pt2e, x86 = importlib.import_module(PT2E), importlib.import_module(X86)

        example = tuple(torch.ones(2, 16, dtype=torch.int64) for _ in range(2))
        axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
        dynamic = {"input_ids": axes, "attention_mask": axes}
        exported = torch.export.export(torch_encoder(source), example, dynamic_shapes=dynamic).module()
        quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = pt2e.prepare_pt2e(exported, quantizer)
        for batch in source.calibration():
            prepared(torch.from_numpy(batch.ids), torch.from_numpy(batch.mask))
        converted = pt2e.convert_pt2e(prepared)
        torch.export.save(torch.export.export(converted, example, dynamic_shapes=dynamic), folder / "model.pt2")

    def load(self, folder: Path, source: Source, cell: Cell, threads: int) -> None:
        if not hasattr(self, "_model"):
            self._model = torch.export.load(folder / "model.pt2").module()
        self.compile(cell)


def torch_contenders() -> list[Encoding]:
    """The float ones, eager float32 first, then torchao's."""
    return [
        Torch("torch fp32", torch.float32),
        Torch("torch fp32, compiled", torch.float32, True),
        Torch("torch bf16, compiled", torch.bfloat16, True),
        TorchAo("torchao int8 dynamic, compiled", 8, torch.bfloat16),
        TorchAoStatic("torchao PT2E int8 static, compiled", 8),
        TorchAo("torchao int4 weights, bf16, compiled", 4, torch.bfloat16),
    ]
