"""Decoding in ONNX Runtime and in OpenVINO, with keys and values as inputs and outputs, or as OpenVINO's state."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from decode_contenders import Decoding, Source, WithPast  # type: ignore[import-not-found]

BLOCK = 32
"""Weights of 4 bits that share a scale: as many as in llama.cpp's Q4_0."""


class OnnxDecoder(Decoding):
    """ONNX Runtime; keys and values go from call to call as its own values, which are not copied."""

    library = "onnxruntime"
    modules = ("onnxruntime",)

    def prepare(self, source: Source, folder: Path) -> None:
        self._export(source, folder / "model.onnx")

    def _export(self, source: Source, path: Path) -> None:
        model = WithPast(source, "eager").eval()
        inputs, outputs = model.names
        batch, length, past = (torch.export.Dim(name) for name in ("batch", "length", "past"))
        shapes = ({0: batch, 1: length}, tuple({0: batch, 2: past} for _ in inputs[1:]))
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                (torch.ones(2, 3, dtype=torch.int64), *model.past(2, 4)),
                path,
                input_names=inputs,
                output_names=outputs,
                dynamic_shapes=shapes,
                dynamo=True,
                external_data=False,
            )

    def load(self, folder: Path, source: Source, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        path = str(folder / "model.onnx")
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._value = onnxruntime.OrtValue.ortvalue_from_numpy
        self._inputs = [item.name for item in self._session.get_inputs()][1:]
        self._outputs = [item.name for item in self._session.get_outputs()]
        self._shape = [item.shape for item in self._session.get_inputs()][1]

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        empty = np.empty((len(ids), self._shape[1], 0, self._shape[3]), dtype=np.float32)
        self._past = [self._value(empty) for _ in self._inputs]
        return self._run(ids)

    def step(self, ids: np.ndarray) -> np.ndarray:
        return self._run(ids[:, None])

    def _run(self, ids: np.ndarray) -> np.ndarray:
        feed = {"input_ids": self._value(ids), **dict(zip(self._inputs, self._past, strict=True))}
        logits, *self._past = self._session.run_with_ort_values(self._outputs, feed)
        return np.asarray(logits.numpy())


class OnnxDecoderInt8(OnnxDecoder):
    """Weights as int8, inputs of linears quantized on the fly."""

    def prepare(self, source: Source, folder: Path) -> None:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        path = folder / "model.onnx"
        self._export(source, path)
        quantize_dynamic(path, path, weight_type=QuantType.QInt8, per_channel=True)


class OnnxDecoderInt4(OnnxDecoder):
    """Weights as 4 bits in blocks; accuracy level 4 has inputs quantized to 8 bits, its fastest way."""

    def prepare(self, source: Source, folder: Path) -> None:
        import onnx
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
        from onnxruntime.quantization.onnx_model import ONNXModel

        path = folder / "model.onnx"
        self._export(source, path)
        model = ONNXModel(onnx.load(path))
        model.replace_gemm_with_matmul()
        quantizer = MatMulNBitsQuantizer(model.model, block_size=BLOCK, is_symmetric=True, accuracy_level=4)
        quantizer.process()
        quantizer.model.save_model_to_file(str(path))


class OpenVinoDecoder(Decoding):
    """OpenVINO, with keys and values as its state, and weights compressed by NNCF if they have 8 or 4 bits."""

    library = "openvino"
    modules = ("openvino",)

    def prepare(self, source: Source, folder: Path) -> None:
        import openvino
        from openvino._offline_transformations import apply_make_stateful_transformation

        module = WithPast(source, "sdpa").eval()
        inputs, outputs = module.names
        example = (torch.ones(2, 3, dtype=torch.int64), *module.past(2, 4))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tracing
            model = openvino.convert_model(module, example_input=example)
        for names, ports in ((inputs, model.inputs), (outputs, model.outputs)):
            for name, port in zip(names, ports, strict=True):
                port.get_tensor().set_names({name})
        heads, size = module.past(1, 1)[0].shape[1::2]
        past = {name: [-1, heads, -1, size] for name in inputs[1:]}
        model.reshape({"input_ids": [-1, -1], **past})
        apply_make_stateful_transformation(model, dict(zip(inputs[1:], outputs[1:], strict=True)))
        openvino.save_model(self._compressed(model), folder / "model.xml")

    def _compressed(self, model: Any) -> Any:
        import nncf

        if self.bits >= 16:
            return model
        nncf.set_log_level(logging.WARNING)
        with contextlib.redirect_stdout(io.StringIO()):  # bars of progress
            if self.bits == 8:
                return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
            mode = nncf.CompressWeightsMode.INT4_SYM
            return nncf.compress_weights(model, mode=mode, ratio=1.0, group_size=BLOCK, all_layers=True)

    def load(self, folder: Path, source: Source, threads: int) -> None:
        import openvino

        options = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
        model = openvino.Core().compile_model(folder / "model.xml", "CPU", options)
        self._request = model.create_infer_request()
        self._empty: list[np.ndarray] = []

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        import openvino

        self._request.reset_state()
        for state in self._request.query_state():
            shape = list(state.state.shape)
            shape[0], shape[2] = len(ids), 0
            state.state = openvino.Tensor(np.empty(shape, dtype=np.float32))
        return self._run(ids)

    def step(self, ids: np.ndarray) -> np.ndarray:
        return self._run(ids[:, None])

    def _run(self, ids: np.ndarray) -> np.ndarray:
        found = self._request.infer([ids], share_inputs=True, share_outputs=True)
        return np.asarray(found[0])


def onnx_and_openvino() -> list[Decoding]:
    """From wide to narrow, library by library."""
    return [
        OnnxDecoder("ONNX Runtime fp32", 32),
        OnnxDecoderInt8("ONNX Runtime int8 dynamic", 8),
        OnnxDecoderInt4("ONNX Runtime 4-bit weights", 4),
        OpenVinoDecoder("OpenVINO bf16", 16),
        OpenVinoDecoder("OpenVINO 8-bit weights", 8),
        OpenVinoDecoder("OpenVINO 4-bit weights", 4),
    ]
