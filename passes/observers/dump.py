"""Dump: what each pass made of the graph, as text files."""

from __future__ import annotations

import difflib
import os
import re
import tempfile
from pathlib import Path

from prequant.runtime import PrequantError

from ..base import Report
from ..printing import readable
from ..program import Program
from .base import Observer, Step

SUFFIXES = ("before.txt", "after.txt", "diff", "report.txt", "error.txt")
_OWN_FILE = re.compile(rf"\d\d+-.*\.({'|'.join(map(re.escape, SUFFIXES))})")


class Dump(Observer):
    """Writes ``01-canonicalize.before.txt``, ``.after.txt``, ``.diff`` and ``.report.txt`` for each pass into
    ``folder``.

    A pass that fails leaves ``.before.txt`` and ``.error.txt``. Files of an earlier dump in the folder are removed at
    the first pass, others stay. Each file is there whole or not at all. Raises :class:`PrequantError` where
    ``folder`` is no folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise PrequantError(f"can't dump into {self.folder}: it is not a folder")
        self._before = ""

    def before(self, step: Step, program: Program) -> None:
        """Write the text before."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if step.index == 0:
            for path in self.folder.iterdir():
                if _OWN_FILE.fullmatch(path.name) and path.is_file():
                    path.unlink()
        self._before = readable(program) + "\n"
        self._write(step, "before.txt", self._before)

    def after(self, step: Step, program: Program, report: Report) -> None:
        """Write the text after, the difference, and the report."""
        after = readable(program) + "\n"
        self._write(step, "after.txt", after)
        lines = (self._before.splitlines(), after.splitlines(), _name(step, "before.txt"), _name(step, "after.txt"))
        difference = list(difflib.unified_diff(*lines, lineterm=""))
        self._write(step, "diff", "\n".join(difference) + "\n" if difference else "")
        self._write(step, "report.txt", report.text() + "\n")

    def failed(self, step: Step, program: Program, error: BaseException) -> None:
        """Write the error."""
        self._write(step, "error.txt", f"{error}\n")

    def _write(self, step: Step, suffix: str, text: str) -> None:
        handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=".", suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(temporary, self.folder / _name(step, suffix))
        except BaseException:
            os.unlink(temporary)
            raise


def _name(step: Step, suffix: str) -> str:
    return f"{step.index + 1:02d}-{step.pass_.name}.{suffix}"
