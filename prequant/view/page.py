"""The page: one HTML file that holds a Record, what draws it, and nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from functools import cache
from importlib import resources
from pathlib import Path

from prequant.checkpoint.atomic import replacing_file

from .record import Record

LAYOUT = "vendored/dagre.min.js"
"""The layout of graphs: dagre, which is a fortieth of ELK in size and under the MIT licence."""
LICENCE = "vendored/dagre.min.js.LEGAL.txt"
GRAPH_SCRIPTS = (LAYOUT, "colours.js", "graph.js", "scene.js")
"""From a Record to boxes and lines with places; they need no browser."""
PAGE_SCRIPTS = (*GRAPH_SCRIPTS, "draw.js", "charts.js", "panel.js", "viewport.js", "search.js", "app.js")
HIDDEN = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
"""What could end a script's element, or a line in it, as JSON writes it harmlessly."""


def page(record: Record) -> str:
    """The HTML of a page that shows a Record. It loads nothing, and its policy keeps it from doing so."""
    style, script = asset("page.css"), scripts(PAGE_SCRIPTS)
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'; form-action 'none'"
    )
    parts = {
        "POLICY": policy,
        "TITLE": html.escape(f"{record.title} · prequant" if record.title else "prequant"),
        "STYLE": style,
        "RECORD": embedded(record),
        "SCRIPT": script,
    }
    # In one go: what a part holds is not looked at again.
    return re.sub(r"%%([A-Z]+)%%", lambda match: parts[match[1]], asset("page.html"))


def write_page(record: Record, path: str | Path) -> Path:
    """Write the page to a file, whole or not at all."""
    path = Path(path)
    with replacing_file(path) as staging:
        staging.write_text(page(record), encoding="utf-8")
    return path


def embedded(record: Record) -> str:
    """A Record as JSON that can stand in a script's element, whatever its texts are."""
    text = json.dumps(record.to_dict(), separators=(",", ":"), allow_nan=False)
    return re.sub("|".join(HIDDEN), lambda match: HIDDEN[match[0]], text)


@cache
def asset(name: str) -> str:
    """A file of the folder ``assets``."""
    return (resources.files(__package__) / "assets" / name).read_text(encoding="utf-8")


@cache
def scripts(names: tuple[str, ...]) -> str:
    """Scripts as one, with the licence of what others wrote in it."""
    return "\n".join((asset(LICENCE), *map(asset, names)))


def _hash(content: str) -> str:
    """How a policy names the one script or style that it allows."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
