"""The benchmarks stay runnable: each in its smallest form. What they measure here means nothing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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


def test_linear_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    for words, message in ((("--peers", "tensorflow"), "tensorflow"), (("--shape", "64x100"), "multiple of 64")):
        done = run("linear.py", *words, "--out", tmp_path)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
