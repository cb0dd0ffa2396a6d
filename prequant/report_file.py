"""The file beside a saved model that keeps what was measured when it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prequant.checkpoint.tensors import digest
from prequant.measure import write_json
from prequant.runtime import PrequantError

REPORT_FILE = "prequant-report.json"


def write_report(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the report of a folder whose weights are there, with their sizes and digests."""
    files = {path.name: _identity(path) for path in _weight_files(folder)}
    write_json(folder / REPORT_FILE, {**content, "files": files})


def recorded_errors(folder: Path) -> dict[str, float] | None:
    """SQNR in dB by weight name, as measured when the folder was made.

    None if it has no report, or one of other weights: those that were there before something else was saved over them.
    Raises :class:`PrequantError` for a file that is no report.
    """
    path = folder / REPORT_FILE
    if not path.is_file():
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        errors = {row["name"]: float(row["sqnr"]) for row in report["weights"] if row["sqnr"] is not None}
        known = report["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise PrequantError(
            f"{path} is damaged ({type(error).__name__}: {error}); remove it, or compress anew"
        ) from error
    return errors if known == {file.name: _identity(file) for file in _weight_files(folder)} else None


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _identity(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": digest(path)}
