"""What adapter files hold, as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from prequant.measure import weight_bytes
from prequant.model import ModelProgram

from .file import Adapter, read_adapter
from .fingerprint import fingerprint
from .variant import SHOWN

KINDS = {
    ".first_alphas": "first alphas",
    ".alphas": "alphas",
    ".outliers.values": "outliers",
    ".scale": "scales",
    ".zero_point": "zero points",
    ".bias": "biases",
}
"""What a tensor is, by the end of its name."""


def adapters_table(base: ModelProgram, folder: Path, files: Iterable[Path]) -> Table:
    """A row for each file: its task and score, what it holds, its size, and whether it was made on this base.

    Raises :class:`~prequant.adapters.AdapterError` for a file that is no adapter.
    """
    own, size = fingerprint(base), weight_bytes(folder)
    table = Table("file", "task", "score", "holds", "numbers", "bytes", "of the base", "made on")
    table.title = Text(f"{folder}: base {own[:SHOWN]}, {size:,} bytes")
    for file in files:
        adapter = read_adapter(file)
        bytes_ = file.stat().st_size
        cells = (
            str(file),
            str(adapter.about.get("task", "–")),
            _score(adapter.about),
            _kinds(adapter),
            f"{adapter.parameters:,}",
            f"{bytes_:,}",
            f"{bytes_ / size:.2%}",
            "this base" if adapter.base == own else f"another: {adapter.base[:SHOWN]}",
        )
        table.add_row(*map(Text, cells))  # what a file says is no markup
    return table


def _score(about: Mapping[str, Any]) -> str:
    scores = about.get("scores")
    if not isinstance(scores, dict) or not scores:
        return "–"
    name, score = next(iter(scores.items()))
    return f"{name} {score:.4f}" if isinstance(score, float) else f"{name} {score}"


def _kinds(adapter: Adapter) -> str:
    counts = Counter(
        next((kind for end, kind in KINDS.items() if name.endswith(end)), "other tensors") for name in adapter.tensors
    )
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
