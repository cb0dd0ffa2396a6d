"""Every format in both styles: what ONNX Runtime computes, and what the file holds."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
import torch

from prequant.export import ExportError
from prequant.export.onnx import Exported
from prequant.passes import Canonicalize, Pipeline, Program, QuantizeWeights, SplitOutliers, lower, weights
from prequant.runtime import Granularity
from prequant.trace import trace

from .onnx_models import CASES, COLUMNS, exported, layers, operators, run, session, stored_bytes

WAYS = {"qdq, 21": ("qdq", 21), "qdq, 25": ("qdq", 25), "matmulnbits, 21": ("matmulnbits", 21)}
IDS = torch.arange(12).reshape(3, 4) * 4
EXACT = 1e-5
"""Of results within ±1: both sum up the same products in float32, in another order."""


class Export:
    def __init__(self, folder: Path, way: str, tied: bool) -> None:
        self.style, self.opset = WAYS[way]
        self.model, self.program = layers(tied)
        program = self.program if self.opset == 21 else lower(self.program)
        path = folder / f"{way}{tied}.onnx"
        self.result: Exported
        self.result, self.proto = exported(program, path, style=self.style, opset=self.opset)
        self.found = run(path, {"ids": IDS})
        with torch.no_grad():
            self.expected, self.original = self.program(ids=IDS), self.model(IDS)


@pytest.fixture(scope="module", params=[(way, tied) for way in WAYS for tied in (False, True)], ids=str)
def export(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Export:
    return Export(tmp_path_factory.mktemp("onnx"), *request.param)


@pytest.mark.parametrize("name", CASES)
def test_results_are_the_programs(export: Export, name: str) -> None:
    found, expected, original = export.found[name], export.expected[name].numpy(), export.original[name].numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=EXACT)
    # The Program is the model, compressed: not the same, and near it.
    assert np.abs(found - original).max() > 100 * EXACT
    assert (found * original).sum() > 0.6 * np.linalg.norm(found) * np.linalg.norm(original)


@pytest.mark.parametrize("name", CASES)
def test_a_weight_takes_the_bytes_of_its_codes(export: Export, name: str) -> None:
    case = CASES[name]
    growth = case.matmulnbits if export.style == "matmulnbits" else case.qdq
    views = [view for view in weights(export.program) if f".{name}." in view.name]
    tied = "True" in export.result.files[0].name
    assert len(views) == (1 if tied else 2)
    for view in views:
        codes = view.tensors["planes" if "planes" in view.tensors else "codes"]
        packed = export.program.tensor(codes).numel()
        narrow = growth
        if export.style == "qdq" and export.opset < 25 and "linear" in view.kind and _is_narrow(name):
            narrow *= 2  # int4, as there is no int2
        rest = view.bytes - packed
        if (
            tied and "outliers.values" in view.tensors
        ):  # by rows for the table; for the product filled up to powers of two
            again = [export.program.tensor(view.tensors[f"outliers.{part}"]).nbytes for part in ("values", "columns")]
            rest += round(4 / 3 * sum(again))
        assert stored_bytes(export.proto, f"{view.name}.") <= 1.05 * (narrow * packed + rest)


def _is_narrow(name: str) -> bool:
    return name.startswith(("affine2", "ternary", "binary", "bcq2", "bcq3", "outliers_bcq"))


def test_nothing_is_stored_as_floats(export: Export) -> None:
    floats = [
        item
        for item in export.proto.graph.initializer
        if item.data_type == onnx.TensorProto.FLOAT and len(item.raw_data) >= 4 * 50 * 24
    ]
    assert not floats, [item.name for item in floats]
    assert {entry.version for entry in export.proto.opset_import if not entry.domain} == {export.opset}
    wanted = {"MatMulNBits", "GatherBlockQuantized"} if export.style == "matmulnbits" else {"DequantizeLinear"}
    assert wanted <= operators(export.proto)
    if export.style == "qdq":
        assert {entry.domain for entry in export.proto.opset_import} == {""}


def test_what_was_exported_is_reported(export: Export) -> None:
    rows = {row.name: row for row in export.result.weights}
    assert set(rows) == {view.name for view in weights(export.program)}
    assert rows["tables.outliers.weight"].mapping.endswith("+ sparse outliers")
    assert rows["tables.bcq3.weight"].mapping.startswith("3 × ")
    assert "×" not in rows["tables.bcq_uniform.weight"].mapping
    assert "offset" in rows["tables.affine4_hqq.weight"].mapping
    assert "offset" not in rows["tables.affine4_asymmetric.weight"].mapping
    assert export.result.bytes == export.result.files[0].stat().st_size
    table = export.result.table()
    assert table.row_count >= 10 and f"{export.result.bytes:,}" in str(table.title)


def test_tied_weights_have_one_set_of_codes(export: Export) -> None:
    if "True" not in export.result.files[0].name:
        return
    readers: dict[str, list[str]] = {}
    for node in export.proto.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    for case in CASES:
        read = sorted(readers[f"tables.{case}.weight.codes"])
        assert read == (
            ["GatherBlockQuantized", "MatMulNBits"] if export.style == "matmulnbits" else ["DequantizeLinear"]
        )
        assert f"heads.{case}.weight.codes" not in readers


def two_layers(columns: int, *steps: Any) -> Program:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(30, columns), torch.nn.Linear(columns, 7)).eval()
    return Pipeline([Canonicalize(), *steps])(trace(model, (torch.zeros(2, 5, dtype=torch.int64),)))


@pytest.mark.parametrize("group", [24, 20])
def test_groups_that_are_no_blocks(tmp_path: Path, group: int) -> None:
    """ONNX itself takes any group, also with a shorter one at the end; MatMulNBits does not."""
    program = two_layers(COLUMNS, QuantizeWeights(granularity=Granularity.GROUP, group_size=group, symmetric=False))
    path = tmp_path / "model.onnx"
    exported(program, path, style="qdq")
    (found,) = run(path, {program.signature.names[0]: IDS % 30}).values()
    np.testing.assert_allclose(found, program(IDS % 30).detach().numpy(), rtol=0, atol=EXACT)
    before = path.read_bytes()
    with pytest.raises(ExportError, match=rf"0.weight \(%.*, affine4:group{group}:asym\).*power of two"):
        exported(program, path, style="matmulnbits")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("style", ["matmulnbits", "qdq"])
def test_a_row_may_end_in_a_block_that_is_not_full(tmp_path: Path, style: str) -> None:
    program = two_layers(40, SplitOutliers(ratio=0.05), QuantizeWeights(symmetric=False))
    ids = torch.arange(30)[None]
    exported(program, tmp_path / "model.onnx", style=style)
    for level in (0, 4):
        (found,) = run(tmp_path / "model.onnx", {program.signature.names[0]: ids}, level).values()
        # ONNX Runtime makes a MatMulNBits of the portable form, which rounds its inputs to 8 bits at level 4.
        within = EXACT if style == "matmulnbits" or level == 0 else 0.05
        np.testing.assert_allclose(found, program(ids).detach().numpy(), rtol=0, atol=within)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_sums_of_outliers_with_several_threads(tmp_path: Path, dtype: Literal["float32", "float16"]) -> None:
    """More outliers than one thread adds up, many in a row, rows without any: the same numbers in every run."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(192, 4000).eval()
    with torch.no_grad():
        linear.weight[100] *= 4
        linear.weight[200:300] /= 4
    traced = Canonicalize()(trace(linear, (torch.zeros(2, 192),)))
    program = Pipeline([SplitOutliers(ratio=0.02, dtype=dtype), QuantizeWeights()])(traced)
    (name,), inputs = program.signature.names, torch.randn(64, 192)
    counts = program.tensor("weight.outliers.row_offsets").diff()
    assert counts.max() > 64 and counts.min() == 0
    exported(program, tmp_path / "model.onnx", style="matmulnbits")
    running = session(tmp_path / "model.onnx", threads=4)
    expected = program(inputs).detach().numpy()
    results = [running.run(None, {name: inputs.numpy()})[0] for _ in range(20)]
    np.testing.assert_allclose(results[0], expected, rtol=0, atol=EXACT)
    assert all(np.array_equal(result, results[0]) for result in results)


def test_dynamic_axes_have_the_programs_names(export: Export) -> None:
    (item,) = session(export.result.files[0]).get_inputs()
    assert (item.name, item.shape) == ("ids", list(export.program.signature.inputs[0].shape))
    assert [value.name for value in export.proto.graph.output] == list(CASES)
