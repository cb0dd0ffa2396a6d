"""A scene as an SVG picture on white, for papers."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree as ET

from .record import Record

NAMESPACE = "http://www.w3.org/2000/svg"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', Arial, sans-serif"
INK, SOFT, EDGE, STRONG_EDGE, LINE = "#161a20", "#505a69", "#c9ced8", "#8891a1", "#9aa3b2"
SURFACE, RAISED = "#ffffff", "#eef0f4"
HEAD, KEY = 58, (46, 18)
"""Height of the title with the legend below it; width and height of one colour of the legend."""
MINIMUM_WIDTH = 560
"""Room for the title and the legend."""


def svg(record: Record, scene: dict[str, Any]) -> str:
    """The picture as text. Names from models are escaped by the library that writes the XML."""
    width, height = max(scene["width"], MINIMUM_WIDTH), scene["height"] + HEAD
    root = ET.Element(
        "svg",
        {
            "xmlns": NAMESPACE,
            "width": f"{width:.0f}",
            "height": f"{height:.0f}",
            "viewBox": f"0 0 {width:.1f} {height:.1f}",
        },
    )
    root.set("font-family", FONT)
    _add(root, "rect", width="100%", height="100%", fill=SURFACE)
    _arrow(root)
    _head(root, record, scene)
    body = _add(root, "g", transform=f"translate({(width - scene['width']) / 2:.1f},{HEAD})")
    for box in scene["boxes"]:
        if box["type"] == "frame":
            _frame(body, box)
    for line in scene["lines"]:
        _line(body, line)
    for box in scene["boxes"]:
        if box["type"] != "frame":
            _box(body, box, scene["strip"])
    for box in scene["boxes"]:
        if box["type"] == "frame":  # above the lines that cross it
            _title(body, box)
    return ET.tostring(root, encoding="unicode") + "\n"


def _add(parent: ET.Element, name: str, text: str | None = None, **attributes: Any) -> ET.Element:
    """A new element; ``text_anchor`` is ``text-anchor``, numbers are cut to a tenth."""
    values = {
        key.replace("_", "-"): f"{value:.1f}" if isinstance(value, float) else str(value)
        for key, value in attributes.items()
        if value is not None
    }
    element = ET.SubElement(parent, name, values)
    element.text = text
    return element


def _arrow(root: ET.Element) -> None:
    marker = _add(
        _add(root, "defs"), "marker", id="arrow", viewBox="0 0 8 8", refX=7, refY=4, markerWidth=9, markerHeight=9,
        markerUnits="userSpaceOnUse", orient="auto",
    )  # fmt: skip
    _add(marker, "path", d="M0,1L7,4L0,7z", fill=LINE)


def _head(root: ET.Element, record: Record, scene: dict[str, Any]) -> None:
    last = record.stages[-1]
    sizes = f"{_bytes_text(record.original_bytes)} → {_bytes_text(last.bytes)}"
    bits = "" if last.mean_bits is None else f" · {last.mean_bits:.2f} bits a weight"
    title = _add(root, "text", x=16, y=24, font_size=15, fill=INK)
    _add(title, "tspan", record.title, font_weight=700)
    _add(title, "tspan", f"   {sizes}{bits}", font_size=12.5, fill=SOFT)
    for place, (colour, ink, words) in enumerate(scene["legend"]):
        x = 16 + place * KEY[0]
        _add(root, "rect", x=x, y=34, width=KEY[0], height=KEY[1], fill=colour)
        _add(root, "text", words, x=x + KEY[0] / 2, y=47, font_size=10, fill=ink, text_anchor="middle")
    _add(root, "text", scene["help"], x=24 + len(scene["legend"]) * KEY[0], y=47, font_size=11.5, fill=SOFT)


def _bytes_text(count: int) -> str:
    for power, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= power:
            return f"{count / power:.3g} {unit}"
    return f"{count} B"


def _frame(parent: ET.Element, box: dict[str, Any]) -> None:
    place = {key: box[key] for key in ("x", "y")} | {"width": box["w"], "height": box["h"]}
    _add(parent, "rect", **place, rx=10, fill="#3c5078", fill_opacity="0.045", stroke=EDGE)
    _asides(parent, box)


def _title(parent: ET.Element, box: dict[str, Any]) -> None:
    label = f"{box['label']} · {box['value']}" if box["value"] else box["label"]
    title = _add(parent, "text", label, x=box["x"] + 10, y=box["y"] + 15, font_size=12.5, font_weight=600, fill=INK)
    for key, value in (("paint-order", "stroke"), ("stroke", SURFACE), ("stroke-width", "4")):
        title.set(key, value)


def _line(parent: ET.Element, line: dict[str, Any]) -> None:
    end = None if line["bare"] else "url(#arrow)"
    _add(parent, "path", d=line["path"], fill="none", stroke=LINE, stroke_width=1.3, marker_end=end)


def _box(parent: ET.Element, box: dict[str, Any], strip: dict[str, float]) -> None:
    group = _add(parent, "g", transform=f"translate({box['x']:.1f},{box['y']:.1f})")
    is_block, terminal = box["type"] == "block", box["type"] in ("input", "output")
    fill = RAISED if terminal else SURFACE if is_block else box["fill"] or SURFACE
    corner = 9 if is_block else box["h"] / 2 if terminal else 5
    stroke = STRONG_EDGE if is_block or terminal else EDGE
    _add(group, "rect", width=box["w"], height=box["h"], rx=corner, fill=fill, stroke=stroke)
    if is_block:
        _block(group, box, strip)
    else:
        _node(group, box, INK if terminal else box["ink"] or INK)
    _asides(parent, box)


def _block(group: ET.Element, box: dict[str, Any], strip: dict[str, float]) -> None:
    _add(group, "text", box["label"], x=strip["x"], y=19, font_size=13, font_weight=600, fill=INK)
    _add(group, "text", box["sub"], x=box["subX"], y=19, font_size=11.5, fill=SOFT)
    _add(group, "text", box["value"], x=box["w"] - strip["x"], y=19, font_size=12, fill=INK, text_anchor="end")
    for cell in box["cells"]:
        _add(group, "rect", x=cell["x"], y=strip["y"], width=cell["w"], height=strip["h"], rx=1.5,
             fill=cell["fill"] or RAISED, stroke="#808080", stroke_opacity="0.55", stroke_width="0.6")  # fmt: skip


def _node(group: ET.Element, box: dict[str, Any], ink: str) -> None:
    two = box["type"] == "op" and box["sub"]
    middle, y = box["w"] / 2, 15 if two else box["h"] / 2 + 4.5
    _add(group, "text", box["label"], x=middle, y=y, font_size=13, font_weight=600, fill=ink, text_anchor="middle")
    if two:
        _add(group, "text", box["sub"], x=middle, y=29, font_size=11.5, fill=ink, text_anchor="middle")


def _asides(parent: ET.Element, box: dict[str, Any]) -> None:
    if box["asides"]:
        y = box["y"] + box["h"] / 2
        _add(parent, "text", box["asides"], x=box["x"] - 22, y=y + 4, font_size=11, fill=SOFT, text_anchor="end")
        _add(
            parent,
            "path",
            d=f"M{box['x'] - 18:.1f},{y:.1f}L{box['x']:.1f},{y:.1f}",
            stroke=LINE,
            marker_end="url(#arrow)",
        )
