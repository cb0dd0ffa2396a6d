"""Models to export, and ONNX Runtime to run what comes out. Import with ``from .onnx_models import ...``."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from prequant.export.onnx import Exported, export_onnx
from prequant.passes import BinaryCode, Canonicalize, Pass, Pipeline, Program, QuantizeWeights, SplitOutliers
from prequant.trace import trace

COLUMNS, ROWS = 96, 50
"""Of the weights of :func:`layers`: whole blocks of 32, and a number of rows that fills no last byte."""


class Case(NamedTuple):
    """Passes that give a weight a format; ``growth``: bytes of its codes in ONNX over those in prequant, by style."""

    steps: tuple[Callable[[tuple[str, ...]], Pass], ...]
    qdq: float = 1.0
    matmulnbits: float = 1.0


def quantize(**options: Any) -> Callable[[tuple[str, ...]], Pass]:
    return lambda include: QuantizeWeights(**options, include=include)


def code(**options: Any) -> Callable[[tuple[str, ...]], Pass]:
    return lambda include: BinaryCode(embeddings=True, **options, include=include)


def split(**options: Any) -> Callable[[tuple[str, ...]], Pass]:
    return lambda include: SplitOutliers(ratio=0.02, **options, include=include)


GROUP: dict[str, Any] = {"granularity": "group", "group_size": 32}
CASES: dict[str, Case] = {
    "affine2": Case((quantize(bits=2),)),
    "affine3": Case((quantize(bits=3),), 4 / 3, 4 / 3),
    "affine4": Case((quantize(bits=4),)),
    "affine4_tensor": Case((quantize(bits=4, granularity="tensor"),)),
    "affine4_group": Case((quantize(bits=4, **GROUP),)),
    "affine4_group48": Case((quantize(bits=4, granularity="group", group_size=48),)),
    "affine4_asymmetric": Case((quantize(bits=4, symmetric=False, **GROUP),)),
    "affine3_asymmetric": Case((quantize(bits=3, symmetric=False),), 4 / 3, 4 / 3),
    "affine4_hqq": Case((quantize(bits=4, symmetric=False, strategy="hqq", **GROUP),)),
    "affine5": Case((quantize(bits=5),), 8 / 5, 8 / 5),
    "affine8": Case((quantize(bits=8),)),
    "ternary": Case((quantize(bits=2, ternary=True),)),
    "ternary_base3": Case((quantize(bits=2, ternary=True, base3=True),), 2 / 1.6, 2 / 1.6),
    "binary": Case((quantize(bits=1),), 2, 2),
    "bcq3": Case((code(bits=3),), 2, 2),
    "bcq2_group": Case((code(bits=2, group_size=32),), 2, 2),
    "bcq_uniform": Case((quantize(bits=3), code(from_affine=True))),
    "outliers": Case((split(), quantize(bits=4))),
    "outliers_half": Case((split(mode="replace", dtype="float16"), quantize(bits=4))),
    "outliers_asymmetric": Case((split(mode="replace"), quantize(bits=4, symmetric=False))),
    "outliers_bcq": Case((split(mode="replace"), code(bits=2)), 2, 2),
}


class Layers(nn.Module):
    """A linear over an embedding for every name, each with a result of its own."""

    def __init__(self, names: tuple[str, ...], tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tables = nn.ModuleDict(
            {
                name: nn.Embedding(_weight=0.3 * torch.randn(ROWS, COLUMNS), num_embeddings=ROWS, embedding_dim=COLUMNS)
                for name in names
            }
        )
        self.heads = nn.ModuleDict({name: nn.Linear(COLUMNS, ROWS, bias=not tied) for name in names})
        for name in names if tied else ():
            self.heads[name].weight = self.tables[name].weight

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {name: torch.tanh(head(self.tables[name](ids))) for name, head in self.heads.items()}


@cache
def layers(tied: bool = False) -> tuple[nn.Module, Program]:
    """A module with every case's weights, and its Program with each in its case's format: leave both as they are."""
    model = Layers(tuple(CASES), tied).eval()
    program = Canonicalize()(trace(model, {"ids": torch.zeros(2, 5, dtype=torch.int64)}))
    for name, case in CASES.items():
        include = (f"tables.{name}.*", f"heads.{name}.*")
        program = Pipeline([step(include) for step in case.steps])(program)
    return model, program


def run(path: Path, feed: Mapping[str, Any], level: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Results by name. ``level``: what ONNX Runtime takes for the accuracy level of a MatMulNBits that it makes out of
    a DequantizeLinear itself.
    """
    running = session(path, level)
    given = {name: value.numpy() if isinstance(value, Tensor) else value for name, value in feed.items()}
    return dict(zip((item.name for item in running.get_outputs()), running.run(None, given), strict=True))


def session(path: Path, level: int = 0, threads: int = 1) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(level))
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def exported(program: Program, path: Path, **options: Any) -> tuple[Exported, onnx.ModelProto]:
    """An export that ONNX's checker takes, with shapes, and that has no opaque node left."""
    result = export_onnx(program, path, **options)
    for file in result.files:
        if file.suffix == ".onnx":
            onnx.checker.check_model(str(file), full_check=options.get("style") == "qdq")
            assert {node.domain for node in onnx.load(str(file)).graph.node} <= {"", "com.microsoft"}
    return result, onnx.load(str(result.files[-1]))


def operators(model: onnx.ModelProto) -> set[str]:
    return {node.op_type for node in model.graph.node}


def stored_bytes(model: onnx.ModelProto, prefix: str) -> int:
    """Bytes of the initializers whose names begin so."""
    return sum(len(item.raw_data) for item in model.graph.initializer if item.name.startswith(prefix))
