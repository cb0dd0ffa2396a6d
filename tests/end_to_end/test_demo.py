"""The demo, in a short form: a few sentences, a few steps."""

import json
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import prequant

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"


def run(*words: object, folder: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, str(DEMO), *map(str, words)], capture_output=True, text=True, cwd=folder)


def test_the_demo_compresses_the_real_encoder_and_compares_it(minilm_path: Path, tmp_path: Path) -> None:
    lines = (resources.files("prequant") / "data" / "sentences.tsv").read_text(encoding="utf-8").splitlines()
    rows = [line for split in ("train", "validation") for line in [r for r in lines if r.endswith(split)][:32]]
    (tmp_path / "few.tsv").write_text("\n".join([lines[0], *rows]) + "\n")

    done = run("--data", "few.tsv", "--out", "out", "--epochs", 1, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads((tmp_path / "out" / "prequant-report.json").read_text())
    base, ours = report["baseline"], report["compressed"]
    assert base["training"]["steps"] == ours["training"]["steps"] == 2
    assert report["comparison"]["size"] > 7 and ours["trainable"] < 0.01 * ours["parameters"]
    shown = done.stdout
    for figure in (f"{base['metric']:.4f}", f"{ours['metric']:.4f}", f"{base['bytes_on_disk']:,}", "x smaller"):
        assert figure in shown, figure
    assert shown.splitlines()[-1] == "saved to out; look at it with: prequant inspect out"
    batch = AutoTokenizer.from_pretrained(tmp_path / "out")(["What a lovely day."], return_tensors="pt")
    with torch.inference_mode():
        assert prequant.load(tmp_path / "out")(**batch).logits.shape == (1, 2)


@pytest.mark.parametrize(("words", "message"), [(["--data", "none"], "demo: data path 'none' does not exist")])
def test_bad_input_to_the_demo_is_one_line(words: list[str], message: str, minilm_path: Path, tmp_path: Path) -> None:
    done = run(*words, folder=tmp_path)
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (1, "", [])
    assert done.stderr.strip().splitlines()[-1] == message and "Traceback" not in done.stderr
