"""TracedProgram: a Program that can be saved."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from prequant.passes import Program


class TracedProgram(Program):
    """What ``trace`` returns and ``load`` gives back."""

    def save_pretrained(self, folder: str | os.PathLike[str], tokenizer: Any = None) -> Path:
        """Save as a model folder; see :func:`prequant.save`."""
        from .checkpoint import save

        return save(self, folder, tokenizer)
