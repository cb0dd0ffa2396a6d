"""Which files of a folder may be opened."""

from __future__ import annotations

from pathlib import Path

from .errors import CheckpointError


def inside(folder: Path, name: str) -> Path:
    """A file of a folder. It may be a link only to somewhere inside it, or into the blobs of the hub's cache that the
    folder is part of.

    Raises :class:`CheckpointError` for a file that is missing or lies elsewhere.
    """
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{path} is missing" if folder.is_dir() else f"{folder} is no folder")
    resolved, home = path.resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not (resolved.is_relative_to(home) or resolved.is_relative_to(blobs)):
        raise CheckpointError(f"{path} leads to {resolved}, outside the folder")
    return path
