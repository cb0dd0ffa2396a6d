"""The folder beside a job's result in which its trainings are kept while it is not finished."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoints import Checkpoints
from .settings import TrainingError


class Unfinished:
    """``OUT.unfinished``, for the job that writes ``OUT``; with ``save_steps`` 0 there is none, and nothing is kept.

    The same job, repeated, goes on from there; :meth:`remove` is for the one that has finished. Raises
    :class:`TrainingError` for another number, and where a job was left unfinished and this one would not go on.
    """

    def __init__(self, out: Path, save_steps: int, about: Mapping[str, Any]) -> None:
        if save_steps < 0:
            raise TrainingError(f"save_steps={save_steps}: expected 1 or more, or 0 to keep nothing")
        self.folder, self.save_steps, self.about = out.parent / f"{out.name}.unfinished", save_steps, dict(about)
        if not save_steps and self.folder.exists():
            raise TrainingError(
                f"{self.folder} has the checkpoints of a job that did not finish: go on from them with save_steps "
                "above 0, or remove the folder to begin anew"
            )

    def checkpoints(self, name: str) -> Checkpoints | None:
        """For one of the job's trainings."""
        if not self.save_steps:
            return None
        return Checkpoints(self.folder / f"{name}.safetensors", self.save_steps, {**self.about, "training": name})

    def remove(self) -> None:
        """Remove the folder, if there is one."""
        if self.folder.exists():
            shutil.rmtree(self.folder)
