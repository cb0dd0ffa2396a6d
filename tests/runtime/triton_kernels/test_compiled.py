"""The kernels compile for an H100, with or without one: to tensor cores and wide copies, without spills."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_code.py"


def test_what_comes_out(tmp_path: Path) -> None:
    # Its own process: in this one, Triton interprets.
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    options = ("--json", "--small", "--tokens", "1", "--inputs", "bfloat16,int8")
    formats = ("--formats", "affine4:group128", "--everything", "affine7:group64:asym", "--together", "affine4:row")
    command = [sys.executable, "-P", str(SCRIPT), *options, *formats]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 20 and all(row["spilled"] == 0 for row in found), found
    assert [row["product"] for row in found[:6]] == ["HGMMA", "IGMMA"] * 3
    assert all(row["pending"] == 0 for row in found[:6]), "weights are unpacked into registers that are still read"
    for row in (*found[:2], *found[4:6]):
        loads = row["loads"].split()  # all of them past the registers
        assert "LDGSTS.E.BYPASS.128" in loads and all(name.startswith("LDGSTS") for name in loads), row
        assert row["shared"] <= 227 * 1024
