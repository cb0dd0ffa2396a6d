"""The benchmarks stay runnable: each in its smallest form. What they measure here means nothing."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ..prequant.tiny import save_folder, write_data

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TORCH_PEERS = {
    "torch fp32",
    "torch bf16",
    "torch int4pack, bf16",
    "oneDNN int8, static scales",
    "torch int8 dynamic, onednn",
    "torch int8 dynamic, x86",
}


def run(script: str, *words: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, str(BENCHMARKS / script), *map(str, words)], capture_output=True, text=True)


@pytest.mark.slow
def test_linear_measures_prequant_and_its_peers(tmp_path: Path) -> None:
    layer = ("--shape", "64x128", "--tokens", 3, "--format", "affine4:row", "--threads", 1, "--peers", "torch")
    quick = ("--repeats", 1, "--warmup", 0, "--lead-ms", 0, "--block-ms", 0, "--rotated-mib", 0)
    ceilings = ("--memory-mib", 1, "--product-size", 64)
    done = run("linear.py", *layer, *quick, *ceilings, "--out", tmp_path)
    assert done.returncode == 0, done.stderr

    found: dict[str, Any] = json.loads((tmp_path / "linear.json").read_text())
    (ceiling,) = found["ceilings"]
    assert min(ceiling["memory"], ceiling["rotated"], *ceiling["operations"].values()) > 0
    rows = {row["name"]: row for row in found["measurements"]}
    ours = {"prequant affine4:row, float32", "prequant affine4:row, affine8:row"}
    # Which of torch's engines there are depends on the processor. What is missing has to be accounted for.
    assert ours | {"torch fp32", "torch bf16"} <= set(rows) <= ours | TORCH_PEERS
    assert {name.partition(", 64 ×")[0] for name in found["absent"]} == TORCH_PEERS - set(rows)
    for row in rows.values():
        assert (row["threads"], row["N"], row["K"], row["M"]) == (1, 64, 128, 3)
        assert 0 < row["p10"] <= row["time"] <= row["p90"] and row["floor"] > 0 and 0 <= row["error"] < 0.4
    for name in ours:
        row = rows[name]
        assert row["weight_bytes"] == 64 * 128 // 2 + 4 * 64
        assert row["over_fp32"] == pytest.approx(rows["torch fp32"]["time"] / row["time"])
        assert row["of_floor"] == pytest.approx(row["time"] / row["floor"])

    table = (tmp_path / "linear.md").read_text(encoding="utf-8")
    assert done.stdout.strip() == table.strip()
    for name in rows:
        assert f"\n| {name} | " in table


@pytest.mark.slow
def test_model_measures_prequant_and_its_peers(tmp_path: Path) -> None:
    names = ["torch fp32", "prequant affine8:row, affine8:row", "prequant affine8:row, float32"]
    quick = ("--repeats", 2, "--warmup", 0, "--lead-ms", 0, "--block-ms", 0, "--threads", 1)
    chosen = ("--model", "tiny", "--contender", "prequant affine8")
    done = run("model.py", "--work", tmp_path / "work", *chosen, *quick, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    # Compiled peers would take minutes here. Nobody who was asked for may be missing.
    found: dict[str, Any] = json.loads((tmp_path / "model.json").read_text())
    assert found["absent"] == {} and found["circumstances"]["threads"] == "1"

    rows = found["measurements"]
    assert [(row["cell"], row["name"]) for row in rows] == [
        (cell, name) for cell in ("batch 1, length 16", "batch 2, length 8") for name in names
    ]
    for row in rows:
        assert 0 < row["p10"] <= row["median"] <= row["p90"] and row["throughput"] > 0
        # 8 bits are near the float model, and are not it.
        near = (0, 1e-6) if row["name"] == "torch fp32" else (1e-4, 0.02)
        assert near[0] <= row["error"] <= near[1] and row["cosine"] > 0.999
    for name in names[1:]:
        fp32, ours = (next(row for row in rows if row["name"] == which) for which in (names[0], name))
        assert ours["over_fp32"] == ours["over_best_peer"] == pytest.approx(fp32["median"] / ours["median"])
        assert ours["best_peer"] == "torch fp32" and ours["best_peer_of_width"] is None

    loaded = {row["name"]: row for row in found["loaded"]}
    assert list(loaded) == names
    for name in names:
        folder = tmp_path / "work/tiny" / re.sub(r"[^a-z0-9]+", "-", name)
        assert loaded[name]["disk"] == sum(file.stat().st_size for file in folder.iterdir()) > 0
        assert loaded[name]["peak"] > 0 and loaded[name]["load"] > 0 and loaded[name]["first_call"] > 0
    assert loaded[names[1]]["disk"] < loaded[names[0]]["disk"] / 2

    table = (tmp_path / "model.md").read_text(encoding="utf-8")
    assert done.stdout.strip() == table.strip()
    for name in names:
        assert table.count(f"\n| {name} | ") == 3


@pytest.mark.slow
def test_decode_compares_generation(tmp_path: Path) -> None:
    names = ["torch fp32", "torch bf16", "prequant affine8:row, affine8:row"]
    quick = ("--repeats", 2, "--warmup", 0, "--lead-ms", 0, "--threads", 1)
    chosen = ("--model", "tiny", "--contender", "torch bf16", "--contender", "prequant affine8")
    done = run("decode.py", "--work", tmp_path / "work", *chosen, *quick, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((tmp_path / "decode.json").read_text())
    rows = [row for row in found["measurements"] if row["name"] in names]
    assert [(row["batch"], row["name"]) for row in rows] == [(batch, name) for batch in (1, 2) for name in names]
    for row in rows:
        assert 0 < row["step_p10"] <= row["step"] <= row["step_p90"] and row["prefill"] > 0
        assert row["whole_tokens_per_second"] > 0 and row["tokens_per_second"] > 0
        assert row["error"] <= (1e-6 if row["name"] == "torch fp32" else 0.05) and row["cosine"] > 0.99
    table = (tmp_path / "decode.md").read_text(encoding="utf-8")
    assert done.stdout.strip() == table.strip()


@pytest.mark.slow
def test_onnx_export_compares_with_onnx_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "glue" / "SST-2"
    data.mkdir(parents=True)
    for split in ("train", "validation"):
        write_data(
            data / f"{split}.tsv", train=4 if split == "train" else 0, validation=4 if split == "validation" else 0
        )
    monkeypatch.setenv("PREQUANT_DATA", str(tmp_path))
    model = save_folder(tmp_path / "model", head="ForSequenceClassification", hidden_size=64, intermediate_size=128)
    words = ("--model", model, "--work", tmp_path / "work", "--export", "matmulnbits", "--limit", 3, "--out", tmp_path)
    done = run("onnx_export.py", *words)
    assert done.returncode == 0, done.stderr
    tables = json.loads((tmp_path / "onnx_export.json").read_text())["tables"]
    exact = [
        row
        for row in tables["SST-2"]
        if row["run by"].endswith("matmulnbits") and "inputs" not in row["weights and inputs"]
    ]
    assert exact and all(float(row["largest difference of logits"]) < 1e-4 for row in exact)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="measures for minutes where there is a GPU")
def test_those_of_a_gpu_run_in_the_interpreter_and_refuse_without_one(tmp_path: Path) -> None:
    """Each contender checks its results itself; there is nothing to write."""
    pytest.importorskip("triton")
    done = run("gpu_linear.py", "--smoke", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    for name in (
        "cuBLAS bf16",
        "2 bits",
        "ternary",
        "3 binary planes",
        "4 bits, 0.5 % outliers",
        "4 bits, 8-bit inputs",
    ):
        assert re.search(rf"^\| {re.escape(name)} \| [\d,.]+( \([\d.]+\))? \| ", done.stdout, re.MULTILINE), name
    for peer in ("GemLite", "bitsandbytes", "torch _weight_int4pack_mm"):  # measured, or said to be absent
        assert f"\n| {peer}" in done.stdout
    done = run("gpu_decode.py", "--smoke", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| (transformers|prequant)[^|]* \| (-?[\d,]+) \|", done.stdout, re.MULTILINE)
    assert [name for name, _ in rows] == ["transformers", "prequant"]
    done = run("gpu_tiles.py", "--smoke")
    assert done.returncode == 0 and done.stdout.count(" % of the copy rate  Tiles(rows=") == 2, done.stderr
    for script, *words in (
        ("gpu_linear.py", "--out", tmp_path),
        ("gpu_decode.py", "--out", tmp_path),
        ("gpu_tiles.py",),
    ):
        done = run(script, *words)
        assert done.returncode == 1 and "torch finds no CUDA device here" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_they_refuse_what_they_do_not_know(tmp_path: Path) -> None:
    for words, message in ((("--peers", "tensorflow"), "tensorflow"), (("--shape", "64x100"), "multiple of 64")):
        done = run("linear.py", *words, "--out", tmp_path)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    for script, words in (("model.py", ("--model", "gpt5")), ("decode.py", ("--contender", "tensorflow"))):
        done = run(script, "--work", tmp_path / "work", *words, "--out", tmp_path)
        assert done.returncode == 2 and words[1] in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
