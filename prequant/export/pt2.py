"""The ``torch.export`` archive: a graph over packed weights that PyTorch loads, with prequant's operators in it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from prequant.passes import Program

from .archive import exported, replacing_archive


def export_pt2(program: Program, path: str | os.PathLike[str]) -> Path:
    """Write a Program as a ``.pt2`` archive; returns its path.

    A process loads it with ``torch.export.load(path).module()`` once it has imported ``prequant.runtime``, which needs
    no transformers. It is called with the inputs by name, in any batch size and length, and gives a dictionary (or a
    tuple, where the model does). Raises :class:`ExportError`.
    """
    made = exported(program)
    with replacing_archive(path) as new:
        torch.export.save(made, str(new))
    return Path(path)
