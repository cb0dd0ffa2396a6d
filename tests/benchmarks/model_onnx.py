"""Encoders in ONNX Runtime: float, dynamically quantized to 8 bits, and with 4-bit weights."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path

import numpy as np
import torch
from model_contenders import Encoding, torch_encoder  # type: ignore[import-not-found]
from model_inputs import Batch, Cell, Source  # type: ignore[import-not-found]

BLOCK = 64
"""Weights of 4 bits that share a scale."""


class Onnx(Encoding):
    """The model as ONNX Runtime's own optimizer for BERT leaves it.

    It is exported by tracing, with attention written out: in that form alone does the optimizer find what its fused
    operators replace.
    """

    library = "onnxruntime"
    modules = ("onnxruntime",)

    def prepare(self, source: Source, folder: Path) -> None:
        self._write(source, folder, fuse_attention=True)

    def _write(self, source: Source, folder: Path, fuse_attention: bool) -> Path:
        from onnxruntime.transformers import optimizer
        from onnxruntime.transformers.fusion_options import FusionOptions

        encoder = torch_encoder(source, "eager")
        config = encoder.model.config
        example = tuple(torch.ones(2, 16, dtype=torch.int64) for _ in range(2))
        axes = {0: "batch", 1: "length"}
        path = folder / "model.onnx"
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # this exporter is deprecated
            torch.onnx.export(
                encoder,
                example,
                path,
                input_names=["input_ids", "attention_mask"],
                output_names=["hidden"],
                dynamic_axes={name: axes for name in ("input_ids", "attention_mask", "hidden")},
                opset_version=17,
                dynamo=False,
            )
        options = FusionOptions("bert")
        options.enable_attention = fuse_attention
        optimized = optimizer.optimize_model(
            str(path),
            "bert",
            num_heads=config.num_attention_heads,
            hidden_size=config.hidden_size,
            optimization_options=options,
            opt_level=0,
        )
        optimized.save_model_to_file(str(path))
        return path

    def load(self, folder: Path, source: Source, cell: Cell, threads: int) -> None:
        import onnxruntime

        if not hasattr(self, "_session"):
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.log_severity_level = 3
            path = str(folder / "model.onnx")
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(self, batch: Batch) -> np.ndarray:
        (found,) = self._session.run(None, {"input_ids": batch.ids, "attention_mask": batch.mask})
        return np.asarray(found)


class OnnxInt8(Onnx):
    """Weights, those of embeddings too, as int8; inputs of linears quantized on the fly."""

    def prepare(self, source: Source, folder: Path) -> None:
        from onnx import TensorProto
        from onnxruntime.quantization import QuantType, quantize_dynamic

        path = self._write(source, folder, fuse_attention=True)
        # The quantizer does not know what type the fused operators return.
        known = {"DefaultTensorType": TensorProto.FLOAT}
        quantize_dynamic(path, path, weight_type=QuantType.QInt8, per_channel=True, extra_options=known)


class OnnxInt4(Onnx):
    """Weights of linears as 4 bits in blocks; accuracy level 4 has inputs quantized to 8 bits, its fastest way.

    Attention stays in its parts, as there is no fused one for such weights.
    """

    def prepare(self, source: Source, folder: Path) -> None:
        import onnx
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        path = self._write(source, folder, fuse_attention=False)
        quantizer = MatMulNBitsQuantizer(onnx.load(path), block_size=BLOCK, is_symmetric=True, accuracy_level=4)
        quantizer.process()
        quantizer.model.save_model_to_file(str(path))


def onnx_contenders() -> list[Encoding]:
    """From wide to narrow."""
    return [
        Onnx("ONNX Runtime fp32", 32),
        OnnxInt8("ONNX Runtime int8 dynamic", 8),
        OnnxInt4("ONNX Runtime 4-bit weights", 4),
    ]
