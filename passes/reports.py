"""What a pass says about its work: what it changed, what it left alone and why; as a table, as text, as JSON."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, fx

from .sites import WeightSite

HEADINGS = {
    "sqnr": "SQNR (dB)",
    "alone": "alone (dB)",
    "wider": "wider (dB)",
    "narrower": "narrower (dB)",
}
"""Column headings of figures whose key does not say its unit."""

TEXT_WIDTH = 160

BRIEF = 3
"""How many things kept for the same reason a brief table names."""


@dataclass(frozen=True)
class Change:
    """One thing a pass rewrote: what, how, and figures worth a column (``sqnr`` in dB, ``bits``, ...)."""

    what: str
    how: str
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Kept:
    """One thing a pass left alone, and why."""

    what: str
    why: str


@dataclass
class Report:
    """What a pass did and did not do. ``totals`` holds figures over the whole Program (counts, shares).

    ``source`` is the pass in its text form; ``seconds`` is how long it ran, which the pipeline fills in.
    """

    source: str
    changes: list[Change] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    totals: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def rewrite(self, what: str | WeightSite | fx.Node, how: str, **figures: Any) -> None:
        """Note a change."""
        self.changes.append(Change(label(what), how, figures))

    def keep(self, what: str | WeightSite | fx.Node, why: str) -> None:
        """Note something left alone."""
        self.kept.append(Kept(label(what), why))

    def __str__(self) -> str:
        return f"{self.source}: {len(self.changes)} changed, {len(self.kept)} kept"

    # ---- forms -----------------------------------------------------------------------------------------------

    def table(self, brief: bool = False) -> Table:
        """One row per change, then one per thing kept; a column for each figure that any change has; totals as the
        caption.

        ``brief``: of the things kept for the same reason, one row names the first few.
        """
        keys = list(dict.fromkeys(key for change in self.changes for key in change.figures))
        totals = ", ".join(f"{key} {_cell(value)}" for key, value in self.totals.items())
        title = str(self)
        table = Table(
            title=Text(title),
            caption=Text(totals) if totals else None,
            title_justify="left",
            caption_justify="left",
            min_width=min(len(title), 100),
        )
        for heading in ("", "what", "how, or why not"):
            table.add_column(heading, overflow="fold")
        for key in keys:
            table.add_column(HEADINGS.get(key, key.replace("_", " ")), justify="right")
        for change in self.changes:
            figures = (_cell(change.figures.get(key, "")) for key in keys)
            table.add_row("changed", *map(Text, (change.what, change.how, *figures)))
        for kept in _by_reason(self.kept) if brief else self.kept:
            table.add_row("kept", Text(kept.what), Text(kept.why), style="dim")
        return table

    def text(self, width: int = TEXT_WIDTH) -> str:
        """The table as plain text, ``width`` columns wide at most."""
        return table_text(self.table(), width)

    def to_dict(self) -> dict[str, Any]:
        """The report as values that JSON knows.

        Infinite and undefined figures, which JSON has no numbers for, are strings.
        """
        return {
            "source": self.source,
            "seconds": self.seconds,
            "changes": [
                {"what": change.what, "how": change.how, "figures": _plain(change.figures)} for change in self.changes
            ],
            "kept": [{"what": kept.what, "why": kept.why} for kept in self.kept],
            "totals": _plain(self.totals),
        }


def label(what: str | WeightSite | fx.Node) -> str:
    """How reports and errors call a thing: a site by its weight's name, a node by its own."""
    return what if isinstance(what, str) else what.name


def table_text(table: Table, width: int = TEXT_WIDTH) -> str:
    """A rich table as plain text, without colours or trailing blanks."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def _by_reason(kept: list[Kept]) -> list[Kept]:
    names: dict[str, list[str]] = {}
    for item in kept:
        names.setdefault(item.why, []).append(item.what)
    more = {why: f" and {len(whats) - BRIEF} more" if whats[BRIEF:] else "" for why, whats in names.items()}
    return [Kept(", ".join(whats[:BRIEF]) + more[why], why) for why, whats in names.items()]


def _cell(value: Any) -> str:
    value = _plain(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _plain(value: Any) -> Any:
    """``value`` in JSON's types."""
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, Tensor):
        return _plain(value.detach().tolist())
    if isinstance(value, Mapping):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if hasattr(value, "item"):  # a scalar of numpy
        return _plain(value.item())
    return str(value)
