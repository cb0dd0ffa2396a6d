"""Pictures of a Record as files: SVG and PNG, which look like the page, and DOT for Graphviz."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from prequant.checkpoint.atomic import replacing_file
from prequant.runtime import PrequantError

from .dot import dot
from .record import Record
from .scene import scene
from .svg import svg

FORMATS = ("svg", "png", "dot")
PAGE = "html"
COLOURINGS = ("bits", "weights", "values", "bytes", "time")
"""What boxes can be coloured by: bits and error of weights, error of values, bytes, time."""
ZOOM = 2.0
"""Pixels of a PNG for each unit of the drawing."""


class PictureError(PrequantError):
    """A picture that can't be drawn."""


def write_picture(
    record: Record, path: str | Path, format: str, colouring: str = "bits", depth: int | None = None
) -> Path:
    """Draw the last stage of a Record into a file, whole or not at all.

    ``depth``: how many levels of blocks are open; None opens down to the repeated layers. DOT has them all. Raises
    :class:`PictureError` for another format or colouring, and where a library is missing.
    """
    if format == PAGE:
        raise PictureError("a page is no picture: write_page writes it")
    check_format(format, colouring)
    if format == "dot":
        content = dot(record).encode()
    else:
        drawn = svg(record, scene(record, colouring, depth))
        content = drawn.encode() if format == "svg" else png(drawn)
    path = Path(path)
    with replacing_file(path) as staging:
        staging.write_bytes(content)
    return path


def check_format(format: str, colouring: str) -> None:
    """Raise :class:`PictureError` for another format (than a picture's, or the page's) or colouring, and where a
    library is missing.
    """
    for name, value, known in (("format", format, (PAGE, *FORMATS)), ("colour", colouring, COLOURINGS)):
        if value not in known:
            raise PictureError(f"the {name} {value!r} is not known: it is one of {', '.join(known)}")
    wanted = {"svg": ("quickjs",), "png": ("quickjs", "resvg_py")}.get(format, ())
    if missing := [name for name in wanted if importlib.util.find_spec(name) is None]:
        raise PictureError(f"{format} takes the extra: pip install 'prequant[pictures]' ({missing[0]} is missing)")


def png(drawing: str) -> bytes:
    """An SVG as a PNG, by resvg."""
    import resvg_py

    return bytes(resvg_py.svg_to_bytes(svg_string=drawing, zoom=ZOOM))
