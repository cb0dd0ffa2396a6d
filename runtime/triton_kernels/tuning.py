"""Tiles for cards that ``tables.py`` has none for: tried once, and remembered on disk.

The file is JSON, ``{"version": ..., "tiles": {key: [rows, tokens, split, warps, stages]}}``, in ``$PREQUANT_CACHE``, or
``prequant`` under ``$XDG_CACHE_HOME`` or ``~/.cache``. A key names the card, Triton's version and what was tuned for. A
file that can't be read, or entries that no kernel could run with, count as nothing, and are written anew.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .tables import MAX_SPLIT, Tiles

VERSION = 1
"""Of the file, and of the kernels that it is for: raised when either changes, so that old entries are not taken."""

_lock = threading.Lock()
_known: dict[Path, dict[str, Tiles]] = {}


def cache_file() -> Path:
    """Where tiles are remembered."""
    if folder := os.environ.get("PREQUANT_CACHE"):
        return Path(folder) / "tiles.json"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prequant" / "tiles.json"


def candidates(tiles: Tiles, columns: int) -> list[Tiles]:
    """What is tried beside ``tiles``, which come first: other heights, splits and depths."""
    found = [tiles]
    for rows in (64, 128):
        for split in (max(tiles.split // 2, 1), tiles.split, min(2 * tiles.split, MAX_SPLIT)):
            if split > 1 and split > -(-columns // 128):
                continue
            for stages in (2, 3, 4):
                warps = 8 if rows == 128 and tiles.tokens >= 64 else 4
                found.append(Tiles(rows, tiles.tokens, split, warps, stages))
    return list(dict.fromkeys(found))


def tuned(key: str, tried: Iterable[Tiles], measure: Callable[[Tiles], float]) -> Tiles:
    """The tiles remembered for ``key``; else the fastest by ``measure`` (seconds; infinite for what can't run)."""
    path = cache_file()
    with _lock:
        if (known := _entries(path).get(key)) is not None:
            return known
        times = {tiles: measure(tiles) for tiles in tried}
        best = min(times, key=times.__getitem__)
        if math.isinf(times[best]):
            return best
        # Another process may have written since.
        _known[path] = {**_read(path), **_known[path], key: best}
        _write(path, _known[path])
        return best


def remembered(key: str) -> Tiles | None:
    """The tiles that :func:`tuned` has found for ``key``, if it has."""
    with _lock:
        return _entries(cache_file()).get(key)


def _entries(path: Path) -> dict[str, Tiles]:
    if path not in _known:
        _known[path] = _read(path)
    return _known[path]


def _read(path: Path) -> dict[str, Tiles]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    entries = content.get("tiles") if isinstance(content, dict) and content.get("version") == VERSION else None
    if not isinstance(entries, dict):
        return {}
    return {key: Tiles(*values) for key, values in entries.items() if _makes_sense(values)}


def _makes_sense(values: Any) -> bool:
    """Whether it is what :func:`candidates` may be: anybody may have written it, and tiles of other sizes take minutes
    to compile, or more memory than there is.
    """
    if not isinstance(values, list) or len(values) != len(Tiles._fields):
        return False
    if not all(type(value) is int for value in values):
        return False
    tiles = Tiles(*values)
    return (
        tiles.rows in (64, 128)
        and tiles.tokens in (16, 32, 64, 128)
        and 1 <= tiles.split <= MAX_SPLIT
        and tiles.warps in (4, 8)
        and 2 <= tiles.stages <= 4
    )


def _write(path: Path, known: dict[str, Tiles]) -> None:
    """Replace the file as a whole. A folder that can't be written to costs the next process its own tuning, no more."""
    content = {"version": VERSION, "tiles": dict(sorted(known.items()))}
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
            Path(name).replace(path)
        finally:
            Path(name).unlink(missing_ok=True)
