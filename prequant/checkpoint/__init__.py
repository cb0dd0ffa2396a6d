"""Folders: a Program saved as an ordinary Hugging Face model folder, and loaded again with everything in it checked."""

from typing import TYPE_CHECKING, Any

from .errors import CheckpointError

if TYPE_CHECKING:
    from .folder import load, save

__all__ = ["CheckpointError", "load", "save"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: what transformers needs to know of folders should not bring the whole of tracing along.
    if name in ("load", "save"):
        from . import folder

        return getattr(folder, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
