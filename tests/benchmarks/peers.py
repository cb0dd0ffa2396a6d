"""The peers of the benchmark of a linear layer: torch, oneDNN, ONNX Runtime and OpenVINO, as each wants to be called.

llama.cpp's kernels are not here: ``llama-cpp-python`` has no wheels on PyPI and takes long to build. Nor is torchao:
its wheel declares linears for x86 (``da8w4_linear_cpu``) but has no CPU kernels for them; what else it runs are torch
operators that are here.
"""

import contextlib
import functools
import importlib
import io
import logging
import tempfile
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from contenders import GROUP, Contender, Layer  # type: ignore[import-not-found]
from torch import Tensor
from turns import Call  # type: ignore[import-not-found]


def peers() -> list[Contender]:
    """Every peer, whether it can run here or not."""
    return [
        TorchFloat("torch fp32", 32, "fp32", torch.float32),
        TorchFloat("torch bf16", 16, "bf16", torch.bfloat16),
        TorchInt4("torch int4pack, bf16"),
        OneDnnStatic("oneDNN int8, static scales"),
        TorchInt8("torch int8 dynamic, onednn", "onednn"),
        TorchInt8("torch int8 dynamic, x86", "x86"),
        OnnxDynamic("ONNX Runtime int8 dynamic"),
        *(OnnxNBits(f"ONNX Runtime MatMulNBits {bits}", bits) for bits in (8, 4, 2)),
        *(OpenVino(f"OpenVINO u{bits}", bits) for bits in (8, 4)),
    ]


def symmetric_codes(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight ``[N, K]`` rounded in groups: codes ``[N, K]`` int8 around 0, scales ``[N, K / group]``, and the weight
    that they stand for."""
    grouped = weight.view(len(weight), -1, group)
    scale = grouped.abs().amax(2) / (2 ** (bits - 1) - 1)
    codes = torch.round(grouped / scale[..., None])
    return codes.to(torch.int8).view_as(weight), scale, (codes * scale[..., None]).view_as(weight)


# ---- torch -----------------------------------------------------------------------------------------------------------


class TorchFloat(Contender):
    """``torch.nn.functional.linear``."""

    def __init__(self, name: str, bits: int, arithmetic: str, dtype: torch.dtype) -> None:
        super().__init__(name)
        self.bits, self.arithmetic, self.dtype, self.input_bytes = bits, arithmetic, dtype, dtype.itemsize

    def prepare(self, layer: Layer) -> None:
        weight = layer.weight.to(self.dtype)
        self.bytes = weight.numel() * weight.element_size()
        self.copies = [weight.clone() for _ in layer.copies(self.bytes)]
        self.expect(layer, weight.float())

    def calls(self, input: Tensor) -> list[Call]:
        input = input.to(self.dtype)
        return [partial(torch.nn.functional.linear, input, copy) for copy in self.copies]


class TorchInt4(Contender):
    """``aten._weight_int4pack_mm_for_cpu``, groups of 64, on bfloat16: with float32 inputs it is many times slower."""

    bits, arithmetic, input_bytes = 4, "bf16", 2

    def prepare(self, layer: Layer) -> None:
        codes, scale, meant = symmetric_codes(layer.weight, 4, GROUP)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int() + 8, 1)
        # [groups, N, 2]: value = (code - 8) * scale + zero
        scales = torch.stack([scale.T, torch.zeros_like(scale.T)], -1).bfloat16().contiguous()
        self.bytes = packed.numel() + 2 * scales.numel()
        self.copies = [(packed.clone(), scales.clone()) for _ in layer.copies(self.bytes)]
        self.expect(layer, meant)

    def calls(self, input: Tensor) -> list[Call]:
        input = input.bfloat16()
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu.default
        return [partial(multiply, input, packed, GROUP, scales) for packed, scales in self.copies]


class OneDnnStatic(Contender):
    """``onednn.qlinear_pointwise``: the input has a known scale and is quantized already, which is not counted; the
    weight has a scale for each row; the output is float32."""

    bits, arithmetic = 8, "int8"

    def prepare(self, layer: Layer) -> None:
        self.codes, scale, meant = symmetric_codes(layer.weight, 8, layer.weight.shape[1])
        self.scale, self.zeros = scale[:, 0].contiguous(), torch.zeros(len(scale), dtype=torch.int64)
        self.bytes = self.codes.numel() + 4 * scale.numel()
        self.rotation = layer.copies(self.bytes)
        self.input_scale = float(layer.inputs.abs().max()) / 127
        self.expect(layer, meant)

    def calls(self, input: Tensor) -> list[Call]:
        quantized = (torch.round(input / self.input_scale) + 128).to(torch.uint8)
        multiply = torch.ops.onednn.qlinear_pointwise.default
        rest: tuple[Any, ...] = (self.scale, self.zeros, None, 1.0, 0, torch.float32, "none", [], "")
        # Packed anew for each M, as oneDNN's layout may depend on it.
        packed = [torch.ops.onednn.qlinear_prepack(self.codes, list(input.shape)) for _ in self.rotation]
        return [partial(multiply, quantized, self.input_scale, 128, copy, *rest) for copy in packed]


class TorchInt8(Contender):
    """``quantized.linear_dynamic``, what dynamically quantized torch modules run."""

    bits, arithmetic = 8, "int8"

    def __init__(self, name: str, engine: str) -> None:
        super().__init__(name)
        self.engine = engine

    def prepare(self, layer: Layer) -> None:
        codes, scale, meant = symmetric_codes(layer.weight, 8, layer.weight.shape[1])
        self.bytes = codes.numel() + 4 * scale.numel()
        before, torch.backends.quantized.engine = torch.backends.quantized.engine, self.engine
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # quantized tensors are deprecated
                weight = torch._make_per_channel_quantized_tensor(
                    codes, scale[:, 0].double(), torch.zeros(len(codes), dtype=torch.int64), 0
                )
                self.copies = [torch.ops.quantized.linear_prepack(weight, None) for _ in layer.copies(self.bytes)]
        finally:
            torch.backends.quantized.engine = before
        self.expect(layer, meant)

    def calls(self, input: Tensor) -> list[Call]:
        return [partial(torch.ops.quantized.linear_dynamic.default, input, copy) for copy in self.copies]


# ---- ONNX Runtime ----------------------------------------------------------------------------------------------------


@functools.cache
def onnxruntime_on(threads: int) -> ModuleType:
    """ONNX Runtime with one pool of threads for all sessions, which it lets a process set up only once."""
    runtime = importlib.import_module("onnxruntime")
    runtime.set_global_thread_pool_sizes(threads, 1)
    return runtime


class OnnxOperator(Contender):
    """One operator of ONNX Runtime, a session for each copy; called with inputs and outputs bound, its fastest way."""

    library = "onnxruntime"
    arithmetic = "int8"
    operator: str

    def open(self, layer: Layer, constants: Mapping[str, Tensor], attributes: Mapping[str, Any]) -> None:
        """Make the sessions of ``operator(A, *constants)``."""
        from onnx import TensorProto, helper, numpy_helper

        self.runtime = onnxruntime_on(layer.threads)
        self.rows, columns = layer.weight.shape
        node = helper.make_node(self.operator, ["A", *constants], ["Y"], domain="com.microsoft", **attributes)
        graph = helper.make_graph(
            [node],
            "linear",
            [helper.make_tensor_value_info("A", TensorProto.FLOAT, ["M", columns])],
            [helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["M", self.rows])],
            [numpy_helper.from_array(value.numpy(), name) for name, value in constants.items()],
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
        options = self.runtime.SessionOptions()
        options.use_per_session_threads = False
        self.bytes = sum(value.numel() * value.element_size() for value in constants.values())
        self.sessions = [
            self.runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            for _ in layer.copies(self.bytes)
        ]

    def calls(self, input: Tensor) -> list[Call]:
        value = self.runtime.OrtValue.ortvalue_from_numpy(input.numpy())
        self.result = self.runtime.OrtValue.ortvalue_from_numpy(torch.empty(len(input), self.rows).numpy())
        calls: list[Call] = []
        for session in self.sessions:
            binding = session.io_binding()
            binding.bind_ortvalue_input("A", value)
            binding.bind_ortvalue_output("Y", self.result)
            calls.append(partial(session.run_with_iobinding, binding))
        return calls

    def output(self, result: object) -> Tensor:
        return torch.from_numpy(self.result.numpy())


class OnnxNBits(OnnxOperator):
    """``MatMulNBits`` in groups of 64; accuracy level 4 quantizes the input to 8 bits, the fastest it has."""

    operator = "MatMulNBits"

    def __init__(self, name: str, bits: int) -> None:
        super().__init__(name)
        self.bits = bits

    def prepare(self, layer: Layer) -> None:
        rows, columns = layer.weight.shape
        codes, scale, meant = symmetric_codes(layer.weight, self.bits, GROUP)
        unsigned = (codes.int() + 2 ** (self.bits - 1)).view(rows, columns // GROUP, GROUP // (8 // self.bits), -1)
        # The first code of a byte in its lowest bits.
        packed = (unsigned << (torch.arange(8 // self.bits) * self.bits)).sum(-1).to(torch.uint8)
        attributes = {"K": columns, "N": rows, "bits": self.bits, "block_size": GROUP, "accuracy_level": 4}
        self.open(layer, {"B": packed, "scales": scale}, attributes)
        self.expect(layer, meant)


class OnnxDynamic(OnnxOperator):
    """``DynamicQuantizeMatMul``, what dynamically quantized ONNX models become."""

    operator = "DynamicQuantizeMatMul"
    bits = 8

    def prepare(self, layer: Layer) -> None:
        codes, scale, meant = symmetric_codes(layer.weight, 8, layer.weight.shape[1])
        self.open(layer, {"B": codes.T.contiguous(), "scales": scale[:, 0].contiguous()}, {})
        self.expect(layer, meant)


# ---- OpenVINO --------------------------------------------------------------------------------------------------------


class OpenVino(Contender):
    """A product whose weight NNCF has compressed: 4 bits in groups of 64, or 8 bits a row, with zero points. The rest
    is OpenVINO's default: it computes in bf16 where the processor can, and quantizes inputs as it sees fit."""

    library = "openvino"
    arithmetic = "int8"

    def __init__(self, name: str, bits: int) -> None:
        super().__init__(name)
        self.bits = bits
        self.tolerance = {8: 0.03, 4: 0.2}[bits]  # from the float layer, as the rounding is NNCF's

    def prepare(self, layer: Layer) -> None:
        import openvino

        core = openvino.Core()
        core.set_property({"ENABLE_MMAP": False})  # or all copies would be the same pages of a file
        options = {"INFERENCE_NUM_THREADS": layer.threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
        self.requests = []
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "linear.xml"
            openvino.save_model(self._compressed(layer.weight), path, compress_to_fp16=False)
            self.bytes = path.with_suffix(".bin").stat().st_size
            for _ in layer.copies(self.bytes):
                model = core.read_model(path)
                self.requests.append(core.compile_model(model, "CPU", options).create_infer_request())
        self.tensor = openvino.Tensor
        self.expect(layer, layer.weight)

    def _compressed(self, weight: Tensor) -> Any:
        import nncf
        import openvino
        from openvino import opset13

        nncf.set_log_level(logging.WARNING)
        input = opset13.parameter([-1, weight.shape[1]], weight.numpy().dtype, name="input")
        product = opset13.matmul(input, opset13.constant(weight.numpy()), False, True)
        model = openvino.Model([product], [input], "linear")
        with contextlib.redirect_stdout(io.StringIO()):  # bars of progress
            if self.bits == 8:
                return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
            mode = nncf.CompressWeightsMode.INT4_ASYM
            return nncf.compress_weights(model, mode=mode, ratio=1.0, group_size=GROUP, all_layers=True)

    def calls(self, input: Tensor) -> list[Call]:
        tensor = self.tensor(input.numpy(), shared_memory=True)
        for request in self.requests:
            request.set_input_tensor(0, tensor)
        return [partial(request.infer, share_outputs=True) for request in self.requests]

    def output(self, result: Any) -> Tensor:
        return torch.from_numpy(result[0])
