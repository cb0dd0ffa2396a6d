"""The example with two tasks on one base, with a tiny encoder and a few steps."""

import os
import subprocess
import sys
from pathlib import Path

from prequant.adapters import read_adapter

from ..prequant.tiny import save_folder

EXAMPLE = Path(__file__).parents[2] / "examples" / "many_tasks.py"


def test_two_tasks_on_one_base(tmp_path: Path) -> None:
    model, out = save_folder(tmp_path / "model"), tmp_path / "out"
    words = [sys.executable, str(EXAMPLE), "--model", str(model), "--out", str(out), "--steps", "2"]
    done = subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    adapter = read_adapter(out / "length.safetensors")
    assert adapter.about["task"] == "length" and adapter.config["id2label"] == {"0": "short", "1": "long"}
    praised = [line.partition(":")[0] for line in done.stdout.splitlines()[-3:]]
    assert all(
        line.split(", ")[0] in ("negative", "positive") and line.split(", ")[1] in ("short", "long") for line in praised
    )
