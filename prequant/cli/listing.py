"""Things with options (passes, recipes) as a list to read in a terminal of any width."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from prequant.passes.options import REQUIRED, Option
from prequant.passes.text import default_text

OPTION_WIDTH = 36


def listing(entries: Iterable[tuple[str, str, Iterable[Option]]]) -> Group:
    """Each entry's name and what it does, and under it its options: name, type, default, and what it is for."""
    parts: list[RenderableType] = []
    for name, summary, options in entries:
        parts += [Text(name, style="bold"), Padding(_plain(summary), (0, 0, 0, 2))]
        grid = Table.grid(padding=(0, 2))
        grid.add_column(max_width=OPTION_WIDTH, overflow="fold")
        grid.add_column(overflow="fold")
        for option in options:
            default = "" if option.default is REQUIRED else f" = {default_text(option)}"
            grid.add_row(Text(f"{option.name}: {option.type_text}{default}"), _plain(option.help))
        parts += [Padding(grid, (0, 0, 1, 4))] if grid.row_count else [Text("")]
    return Group(*parts)


def _plain(text: str) -> Text:
    return Text(text.replace("``", ""))
