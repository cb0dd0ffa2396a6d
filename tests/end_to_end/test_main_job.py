"""The main job on a real encoder (all-MiniLM-L6-v2) and real text, in few steps, from the command line to a fresh
process.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer
from typer.testing import CliRunner

import prequant
from prequant.checkpoint import save
from prequant.cli import app
from prequant.passes import Pipeline, Program, QuantizeActivations, QuantizeWeights, SplitOutliers, lower, weights
from prequant.sources import canonical_program, load_for
from prequant.tasks import task

SST2 = task("sst2")
HEAD = ("classifier.weight", "classifier.bias")
TASK = ("--task", "sst2", "--data", "sample")
TEXTS = ["A powerful, reliable drill that makes hard jobs easy.", "Nothing but noise.", "Why, oh why, did I buy it?"]

# What someone would do with the folder elsewhere: nothing of this process, one thread.
ELSEWHERE = """
import json, sys, torch
import prequant
from transformers import AutoModelForSequenceClassification, AutoTokenizer
torch.set_num_threads(1)
folder, texts = sys.argv[1], json.loads(sys.argv[2])
batch = AutoTokenizer.from_pretrained(folder)(texts, return_tensors="pt", padding=True)
with torch.inference_mode():
    ours = prequant.load(folder)(**batch).logits
    theirs = AutoModelForSequenceClassification.from_pretrained(folder)(**batch)
print(json.dumps([ours.tolist(), theirs.logits.tolist()]))
"""


def command(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output + repr(result.exception)
    return str(result.stdout)


@pytest.fixture(autouse=True)
def few_threads(reproducible: None) -> None:
    torch.set_num_threads(2)


@pytest.fixture(scope="module")
def job(minilm_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that ``prequant compress`` makes, and what it prints."""
    out = tmp_path_factory.mktemp("main") / "compressed"
    options = (
        "--recipe",
        "prequant",
        "--bits",
        4,
        "--baseline",
        "none",
        "--max-steps",
        4,
        "--batch-size",
        8,
        "--quiet",
    )
    return out, command("compress", minilm_path, *TASK, "--out", out, *options)


@pytest.fixture(scope="module")
def original(minilm_path: Path) -> Program:
    model, _ = load_for(minilm_path, SST2, 42)
    return canonical_program(model, AutoTokenizer.from_pretrained(minilm_path))


@pytest.fixture(scope="module")
def validation(minilm_path: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    return SST2.load("sample")["validation"], tokenizer


def test_compress_ends_with_the_comparison(job: tuple[Path, str]) -> None:
    out, text = job
    report = json.loads((out / "prequant-report.json").read_text())
    ours = report["compressed"]
    assert ours["trainable"] / ours["parameters"] < 0.01 and ours["training"]["steps"] == 4
    share = f"{ours['trainable'] / ours['parameters']:.2%}"
    for part in (f"{ours['metric']:.4f}", f"{ours['bytes_on_disk']:,}", f"{ours['trainable']:,}", share, "SQNR"):
        assert part in text, part
    assert ours["bytes_on_disk"] == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    # The packed weights stay packed in training: without them, float32 gradients and AdamW's state would be 4 x 91 MB.
    assert ours["training"]["peak_memory"] < 4 * 91e6


def test_inspect_and_eval_agree_with_the_report(job: tuple[Path, str], minilm_path: Path) -> None:
    out, _ = job
    report = json.loads((out / "prequant-report.json").read_text())
    shown = json.loads(command("inspect", out, "--json"))
    assert shown["weights"] == report["weights"] and len(shown["weights"]) == 3 + 6 * 6 + 2
    packed = [row for row in shown["weights"] if row["name"] not in HEAD]
    assert all(row["format"] == "affine4:row" and row["lowered"] and 15 < row["sqnr"] < 30 for row in packed)
    table = command("inspect", out)
    assert "word_embeddings" in table and f"{report['compressed']['bytes_on_disk']:,} bytes on disk" in table
    scored = command("eval", out, *TASK, "--quiet")
    assert scored == f"accuracy {report['compressed']['metric']:.4f} on 80 examples\n"


def test_a_fresh_process_loads_the_folder_both_ways_with_the_same_predictions(
    job: tuple[Path, str], tmp_path: Path
) -> None:
    out, _ = job
    words = [sys.executable, "-c", ELSEWHERE, str(out), json.dumps(TEXTS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path)
    ours, theirs = (torch.tensor(logits) for logits in json.loads(done.stdout.splitlines()[-1]))
    batch = AutoTokenizer.from_pretrained(out)(TEXTS, return_tensors="pt", padding=True)
    with torch.inference_mode():
        here = prequant.load(out)(**batch).logits
    for logits in (ours, theirs):
        torch.testing.assert_close(logits, here, rtol=0, atol=1e-5)
        assert torch.equal(logits.argmax(1), here.argmax(1))


@pytest.mark.parametrize("activations", [False, True])
def test_lowered_equals_simulated_over_the_validation_set(
    original: Program, validation: Any, activations: bool, request: pytest.FixtureRequest
) -> None:
    if activations:
        # An activation on the edge between two codes falls to either side when the float sums before it are rounded
        # otherwise. The reference does the simulated arithmetic, and rounds alike.
        request.getfixturevalue("reference_kernels")
    passes = [SplitOutliers(ratio=0.005, exclude=HEAD[:1]), QuantizeWeights(strategy="minmax", exclude=HEAD[:1])]
    simulated = Pipeline([*passes, *([QuantizeActivations(bits=8)] if activations else [])])(original)
    rows, tokenizer = validation
    first, second = (
        SST2.evaluate(program, rows, tokenizer, progress=False).predictions.astype(np.float64)
        for program in (simulated, lower(simulated))
    )
    assert np.abs(first - second).max() <= 1e-5 * np.abs(first).max()
    assert np.array_equal(first.argmax(1), second.argmax(1))


@pytest.mark.parametrize("ratio", [0.0, 0.005])
def test_files_are_as_large_as_arithmetic_says_and_2_bits_halve_the_codes(
    original: Program, tmp_path: Path, ratio: float
) -> None:
    codes = {}
    for bits in (4, 2):
        split = [SplitOutliers(ratio=ratio, dtype="float16", exclude=HEAD[:1])] if ratio else []
        packed = lower(Pipeline([*split, QuantizeWeights(bits=bits, strategy="minmax", exclude=HEAD[:1])])(original))
        file = save(packed, tmp_path / f"{bits}") / "model.safetensors"
        # MiniLM: 30,522 words, 512 positions, 2 types, and per layer four 384 x 384 and two of 384 x 1,536; a pooler.
        shapes = [(30_522, 384), (512, 384), (2, 384), (384, 384), *6 * [*4 * [(384, 384)], (1536, 384), (384, 1536)]]
        floats = 4 * (2 * 384 + 2 + 2 * 384 + 384 + 6 * (4 * 384 + 1536 + 384 + 4 * 384))  # head, norms, biases
        predicted = floats
        codes[bits] = 0
        for rows, columns in shapes:
            codes[bits] += rows * columns * bits // 8
            predicted += rows * columns * bits // 8 + 4 * rows
            if ratio:
                predicted += round(ratio * rows * columns) * (2 + 2) + 4 * (rows + 1)  # value, column; row offsets
        assert abs(file.stat().st_size / predicted - 1) < 0.03
        with safe_open(file, "pt") as tensors:
            stored = sum(tensors.get_tensor(name).numel() for name in list(tensors.keys()) if name.endswith(".codes"))
        assert (
            stored
            == codes[bits]
            == sum(packed.tensor(v.tensors["codes"]).numel() for v in weights(packed) if v.lowered)
        )
    assert codes[4] == 2 * codes[2]


def test_opt_runs_the_pipeline_of_the_readme(minilm_path: Path, tmp_path: Path) -> None:
    pipeline = "canonicalize,split-outliers{ratio=0.005},quantize-weights{bits=4,granularity=row},lower"
    text = command("opt", minilm_path, "--pipeline", pipeline, "--out", tmp_path / "out")
    assert re.search(r"lowered 40", text)
    program = prequant.load(tmp_path / "out")
    batch = AutoTokenizer.from_pretrained(minilm_path)(TEXTS, return_tensors="pt", padding=True)
    from transformers import AutoModel

    with torch.inference_mode():
        exact, close = (model(**batch).last_hidden_state for model in (AutoModel.from_pretrained(minilm_path), program))
    assert torch.nn.functional.cosine_similarity(exact, close, dim=-1)[batch["attention_mask"] == 1].min() > 0.9
