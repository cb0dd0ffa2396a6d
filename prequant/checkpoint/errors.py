"""The error of everything that reads or writes a folder."""

from __future__ import annotations

from prequant.runtime import PrequantError


class CheckpointError(PrequantError):
    """A folder that can't be written or read: the message names the file, the thing in it, its value and what would be
    right.
    """
