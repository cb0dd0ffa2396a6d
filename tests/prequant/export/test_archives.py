"""PyTorch's own files: ``torch.export`` archives and AOTInductor packages."""

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import prequant
from prequant.checkpoint import save
from prequant.cli import app
from prequant.export import ExportError, export_aoti, export_pt2
from prequant.export.aoti import INPUTS, OUTPUTS
from prequant.measure import tensor_bytes
from prequant.passes import (
    Canonicalize,
    Lower,
    Pipeline,
    Program,
    QuantizeActivations,
    QuantizeWeights,
    SplitOutliers,
    lower,
)
from prequant.runtime import native_linear

from ...models import FAMILIES, traced

SIZES = ((2, 9), (1, 1), (3, 4), (1, 7), (5, 1))


def program_of(name: str, lowered: bool, *more: Any) -> Program:
    passes = [Canonicalize(), SplitOutliers(ratio=0.01), QuantizeWeights(bits=4), *more]
    simulated = Pipeline(passes)(traced(name))
    return lower(simulated) if lowered else simulated


def inputs_of(program: Program, name: str, batch: int, length: int) -> dict[str, Tensor]:
    made = FAMILIES[name]().make_inputs(batch, length)
    return {key: made[key] for key in program.signature.names}


def same(found: Any, program: Program, inputs: dict[str, Tensor], atol: float = 1e-4) -> None:
    wanted = program(**inputs)
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("lowered", [False, True], ids=["simulated", "lowered"])
@pytest.mark.parametrize("name", ["bert-question-answering", "gpt2-causal-lm", "t5-seq2seq-lm", "llama-causal-lm"])
def test_an_archive_computes_the_same_at_any_size(name: str, lowered: bool, tmp_path: Path) -> None:
    program = program_of(name, lowered)
    loaded = torch.export.load(export_pt2(program, tmp_path / "model.pt2")).module()
    for batch, length in SIZES:
        inputs = inputs_of(program, name, batch, length + 2)
        with torch.no_grad():
            same(loaded(**inputs), program, inputs)


@pytest.mark.parametrize("lowered", [False, True], ids=["simulated", "lowered"])
def test_a_package_computes_the_same_at_any_size(
    lowered: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "bert-sequence-classification"
    program = program_of(name, lowered, QuantizeActivations(bits=8))
    assert any(b.dtype == torch.uint16 and b.numel() <= 8 for b in program.buffers()), "few outliers in some weight"
    loaded = torch._inductor.aoti_load_package(str(export_aoti(program, tmp_path / "model.pt2")))
    inputs = inputs_of(program, name, 2, 9)
    loaded(**inputs)
    packed, pack = [], native_linear._pack_scales

    def packing(*weight: Any) -> Tensor:
        packed.append(weight)
        return pack(*weight)

    monkeypatch.setattr(native_linear, "_pack_scales", packing)
    for batch, length in SIZES:
        inputs = inputs_of(program, name, batch, length)
        found = loaded(**inputs)
        assert not packed, "the package's weights are the same tensors in each call, so the first has packed them all"
        same(found, program, inputs)
        packed.clear()  # the Program's own
    described = loaded.get_metadata()
    assert described[INPUTS] == "input_ids int64 [batch, length]\nattention_mask int64 [batch, length]"
    assert described[OUTPUTS] == "logits"


def test_what_a_plan_would_fuse_is_fused_in_the_file(tmp_path: Path) -> None:
    name = "bert-sequence-classification"
    program = Pipeline([Lower()])(program_of(name, lowered=False))
    before = [str(node.target) for node in program.graph.nodes]
    loaded = torch.export.load(export_pt2(program, tmp_path / "model.pt2"))
    found = [str(node.target) for node in loaded.graph.nodes]
    assert "prequant.packed_linears.default" in found and "prequant.packed_linears.default" not in before
    assert not any("gelu" in target for target in found) and any("gelu" in target for target in before)


def test_what_a_folder_holds_is_exported(tmp_path: Path) -> None:
    name = "bert-sequence-classification"
    folder = save(program_of(name, lowered=True), tmp_path / "folder")
    program = prequant.load(folder).train()
    loaded = torch.export.load(export_pt2(program, tmp_path / "model.pt2")).module()
    assert program.training, "the Program stays as it is"
    inputs = inputs_of(program, name, 2, 9)
    with torch.no_grad():
        same(loaded(**inputs), program.eval(), inputs)


def test_the_command(tmp_path: Path) -> None:
    name = "bert-sequence-classification"
    folder = save(program_of(name, lowered=True), tmp_path / "folder")
    words = ["export", str(folder), "--format", "pt2", "--out", str(tmp_path / "model.pt2")]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output + repr(result.exception)
    path = tmp_path / "model.pt2"
    assert (
        f"{path.stat().st_size:,} bytes, of {tensor_bytes(prequant.load(folder)):,} bytes of tensors" in result.output
    )
    program = prequant.load(folder)
    inputs = inputs_of(program, name, 2, 9)
    with torch.no_grad():
        same(torch.export.load(path).module()(**inputs), program, inputs)
    refused = CliRunner().invoke(app, [*words, "--opset", "22"])
    assert refused.exit_code != 0 and "--opset is for --format onnx, not pt2" in refused.stderr


@pytest.mark.parametrize("format", ["onnx", "pt2", "aoti"])
def test_a_folder_in_the_way_is_noticed_before_the_work(format: str, tmp_path: Path) -> None:
    (tmp_path / "model.pt2").mkdir()
    words = ["export", str(tmp_path / "no-model"), "--format", format, "--out", str(tmp_path / "model.pt2")]
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2
    assert refused.stderr == f"prequant export: {tmp_path / 'model.pt2'} is a folder; name a file to write\n"


def test_nothing_is_unpacked_in_an_archive(tmp_path: Path) -> None:
    program = program_of("bert-sequence-classification", lowered=True)
    path = export_pt2(program, tmp_path / "model.pt2")
    with zipfile.ZipFile(path) as archive:
        stored = sum(
            item.file_size
            for item in archive.infolist()
            if "/weights/" in item.filename or "/constants/" in item.filename
            if not item.filename.endswith(".json")
        )
    assert tensor_bytes(program) <= stored <= 1.05 * tensor_bytes(program)


def test_no_name_of_a_temporary_file_is_left_in_an_archive(tmp_path: Path) -> None:
    path = export_pt2(program_of("bert-sequence-classification", lowered=True), tmp_path / "model.pt2")
    with zipfile.ZipFile(path) as archive:
        assert {name.split("/")[0] for name in archive.namelist()} == {"model"}
    assert list(tmp_path.iterdir()) == [path]


def test_an_archive_needs_the_runtime_alone(tmp_path: Path) -> None:
    name = "bert-sequence-classification"
    program = program_of(name, lowered=True)
    path = export_pt2(program, tmp_path / "model.pt2")
    inputs = inputs_of(program, name, 2, 5)
    torch.save({**inputs, "logits": program(**inputs).logits.detach()}, tmp_path / "call")
    code = f"""
import sys
for name in ("transformers", "datasets", "safetensors", "tqdm", "typer"):
    sys.modules[name] = None
import torch
import prequant.runtime
inputs = torch.load({str(tmp_path / "call")!r})
wanted = inputs.pop("logits")
model = torch.export.load({str(path)!r}).module()
with torch.no_grad():
    torch.testing.assert_close(model(**inputs)["logits"], wanted, rtol=1e-5, atol=1e-5)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, cwd=tmp_path)


@pytest.mark.parametrize("export", [export_pt2, export_aoti])
def test_other_names_are_refused(export: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"model\.bin: PyTorch loads .* from files named \*\.pt2"):
        export(program_of("bert-sequence-classification", lowered=True), tmp_path / "model.bin")
    assert not list(tmp_path.iterdir())


def test_what_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.pt2").write_text("before")

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(torch.export, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        export_pt2(program_of("bert-sequence-classification", lowered=True), tmp_path / "model.pt2")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]
