"""Scenes for pictures: the page's own scripts, run without a browser, say what lies where."""

from __future__ import annotations

import json
import threading
from typing import Any

from .page import GRAPH_SCRIPTS, scripts
from .record import Record

SCRIPTS = (*GRAPH_SCRIPTS, "picture.js")
CLONE = "globalThis.structuredClone ??= (value) => JSON.parse(JSON.stringify(value));"
"""What dagre expects of a browser and the engine lacks; dagre clones plain data only."""
STACK_BYTES = 256 << 20
"""dagre walks graphs by recursion, as deep as they are long."""


def scene(record: Record, colouring: str, depth: int | None) -> dict[str, Any]:
    """Boxes and lines with places, colours and texts, of the last stage of a Record, and its legend.

    ``depth``: how many levels of blocks are open; None opens down to the repeated layers. Takes the extra ``pictures``.
    """
    import quickjs

    found: list[Any] = []

    def draw() -> None:
        try:
            context = quickjs.Context()
            context.set_max_stack_size(STACK_BYTES // 2)
            context.eval(CLONE + scripts(SCRIPTS))
            options = json.dumps({"colouring": colouring, "depth": depth})
            found.append(json.loads(context.get("sceneOf")(json.dumps(record.to_dict()), options)))
        except Exception as error:  # reported where the picture was asked for
            found.append(error)

    before = threading.stack_size(STACK_BYTES)
    try:
        thread = threading.Thread(target=draw, name="prequant-scene")
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    if isinstance(found[0], Exception):
        raise found[0]
    drawn: dict[str, Any] = found[0]
    return drawn
