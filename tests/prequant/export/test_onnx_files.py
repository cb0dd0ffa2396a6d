"""What is written where, and what is refused before anything is."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from prequant import load
from prequant.cli import app
from prequant.export import ExportError, export_onnx
from prequant.export.onnx import export as export_module
from prequant.export.onnx.support import INPUTS, WEIGHTS, support_table
from prequant.passes import (
    Canonicalize,
    PassError,
    Pipeline,
    Program,
    QuantizeActivations,
    QuantizeWeights,
    SplitOutliers,
)
from prequant.runtime import Granularity, WeightFormat
from prequant.trace import trace

from ...models import FAMILIES
from .onnx_models import exported, run

INPUT = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


def program(*steps: Any, dtype: torch.dtype = torch.float32) -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 48)).to(dtype).eval()
    return Pipeline([Canonicalize(), *steps])(trace(model, (torch.zeros(2, 64, dtype=dtype),)))


def test_large_tensors_lie_beside_the_model(tmp_path: Path) -> None:
    made, path = program(QuantizeWeights()), tmp_path / "model.onnx"
    one, _ = exported(made, path)
    assert one.files == (path,)
    before = one.bytes
    two, _ = exported(made, path, external_over=1000)
    assert [file.name for file in two.files] == ["model.onnx.data", "model.onnx"]
    assert sorted(tmp_path.iterdir()) == sorted(two.files)
    outside = [item for item in onnx.load(str(path), load_external_data=False).graph.initializer if item.external_data]
    assert {item.name for item in outside} == {"0.weight.codes", "2.weight.codes"}
    assert path.stat().st_size < before / 2 and two.bytes < before * 1.3
    (found,) = run(path, {"input": INPUT}).values()
    np.testing.assert_allclose(found, made(INPUT).detach().numpy(), rtol=0, atol=1e-5)
    exported(made, path)
    assert list(tmp_path.iterdir()) == [path]  # the data of the version before is gone


def test_an_error_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"before")

    def unsigned(model: Any, style: str) -> None:
        model.graph.outputs.clear()
        model.opset_imports.clear()

    monkeypatch.setattr(export_module, "_sign", unsigned)
    with pytest.raises(ExportError, match="not valid ONNX"):
        export_onnx(program(QuantizeWeights()), path, external_over=0)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_nothing_of_this_machine_is_in_the_file(tmp_path: Path) -> None:
    exported(program(QuantizeWeights()), tmp_path / "model.onnx")
    content = (tmp_path / "model.onnx").read_bytes()
    assert b".py" not in content and str(Path(__file__).parents[3]).encode() not in content
    assert b"prequant" in content


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "model.pb": ({}, "a file NAME.onnx"),
    "folder.onnx": ({}, "is a folder"),
    "style.onnx": ({"style": "int4"}, "style='int4'"),
    "old.onnx": ({"opset": 20}, "opset=20: it is one of 21 to 25"),
    "new.onnx": ({"opset": 26}, "opset=26"),
    "level.onnx": ({"accuracy_level": 3}, "accuracy_level=3"),
    "qdq.onnx": ({"accuracy_level": 4, "style": "qdq"}, "an option of the style matmulnbits"),
    "size.onnx": ({"external_over": 1 << 31}, "protobuf's limit"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.onnx").mkdir()
    options, message = REFUSED[name]
    with pytest.raises(ExportError, match=message):
        export_onnx(program(QuantizeWeights()), tmp_path / name, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.onnx"]


def test_what_has_no_form_is_named(tmp_path: Path) -> None:
    group: dict[str, Any] = {"granularity": Granularity.GROUP, "group_size": 24}
    for made, message in (
        (program(QuantizeWeights(latent=True)), r"0.weight \(%linear, affine4:row\) is a latent weight"),
        (program(QuantizeWeights(**group)), r"0.weight \(%packed_linear.*, affine4:group24\).*power of two"),
        (program(QuantizeWeights(), dtype=torch.float64), r"0.weight \(%packed_linear.*\) is of float64"),
    ):
        with pytest.raises(ExportError, match=message):
            export_onnx(made, tmp_path / "model.onnx")
    static = QuantizeActivations(granularity=Granularity.TENSOR, dynamic=False)
    with pytest.raises(PassError, match="calibrat"):
        export_onnx(program(QuantizeWeights(), static), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_float_weights_stay_floats(tmp_path: Path) -> None:
    """Also with outliers over them, of which none is quantized."""
    made = program(SplitOutliers(ratio=0.02, mode="replace"), QuantizeWeights(include=("0.*",)))
    result, _ = exported(made, tmp_path / "model.onnx")
    assert [weight.name for weight in result.weights] == ["0.weight"]
    (found,) = run(tmp_path / "model.onnx", {"input": INPUT}).values()
    np.testing.assert_allclose(found, made(INPUT).detach().numpy(), rtol=0, atol=1e-5)


def test_the_table_of_formats_names_formats() -> None:
    for row in (*WEIGHTS, *INPUTS):
        assert all(str(WeightFormat.parse(text)) == text for text in row.examples)
    table = support_table()
    assert table.row_count == len(WEIGHTS) + len(INPUTS) + 1


# ---- the command ---------------------------------------------------------------------------------------------------


def command(*words: object) -> Any:
    return CliRunner().invoke(app, ["export", *map(str, words)], env={"COLUMNS": "120"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = FAMILIES["bert-sequence-classification"]()
    made: Any = Pipeline([Canonicalize(), QuantizeWeights()])(trace(family.model, family.example_inputs))
    return Path(made.save_pretrained(tmp_path_factory.mktemp("folder") / "model"))


def test_export_writes_a_folder_as_onnx(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    done = command(folder, "--style", "qdq", "--opset", 23, "--out", out)
    assert done.exit_code == 0, done.output + repr(done.exception)
    assert "affine4:row" in done.stdout and f"{out.stat().st_size:,} bytes" in done.stdout
    family = FAMILIES["bert-sequence-classification"]()
    inputs = family.make_inputs(3, 9, padded=True)
    expected = load(folder)(**inputs).logits.detach().numpy()
    np.testing.assert_allclose(run(out, inputs)["logits"], expected, rtol=0, atol=1e-4)


def test_export_says_what_is_wrong_in_one_line(folder: Path, tmp_path: Path) -> None:
    for words in ((folder, "--opset", 12, "--out", tmp_path / "m.onnx"), (tmp_path, "--out", tmp_path / "m.onnx")):
        done = command(*words)
        assert done.exit_code == 2 and done.stderr.startswith("prequant export: ") and "Traceback" not in done.output
    assert not list(tmp_path.iterdir())


def test_export_shows_what_it_can(folder: Path) -> None:
    done = command("--support")
    assert done.exit_code == 0 and "ternary" in done.stdout and "matmulnbits" in done.stdout
