"""prequant adapters: what adapter files hold, and whether they belong to a base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .app import command, show


@command("adapters", "Show what adapter files hold, and whether they fit a base.")
def adapters(
    base: options.Folder,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Files that 'prequant adapt' wrote.")],
) -> None:
    """Show of each file its task and score, what it holds, its size, and whether it was made on this base."""
    from prequant.adapt import load_base
    from prequant.adapters.listing import adapters_table

    show(adapters_table(load_base(base), base, files))
