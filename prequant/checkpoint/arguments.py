"""Operands of a graph's nodes as JSON, and back.

Numbers, strings, booleans, null and lists stand for themselves. Everything else is an object with one key that says
what it is::

    {"node": "linear_1"}  {"float": "-inf"}  {"tuple": [...]}  {"slice": [0, null, null]}
    {"dtype": "float16"}  {"device": "cpu"}  {"layout": "strided"}  {"memory_format": "contiguous_format"}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from .errors import CheckpointError
from .json_file import describe

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.uint16,
        torch.bool,
        torch.complex64,
    )
}
"""The element types that files hold, by name."""

LAYOUTS = {"strided": torch.strided}
MEMORY_FORMATS = {
    str(value).removeprefix("torch."): value
    for value in (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d)
}
DEVICES = ("cpu", "cuda", "mps", "xpu", "meta")
FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
MAX_DEPTH = 6


def encode(value: Any) -> Any:
    """``value`` as JSON. Raises :class:`CheckpointError` for what a file can't hold (a tensor, an object)."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if type(value) is int:
        return _bounded(value)
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, slice):
        return {"slice": [encode(part) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, tuple):
        return {"tuple": [encode(item) for item in value]}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for key, known in (("dtype", DTYPES), ("layout", LAYOUTS), ("memory_format", MEMORY_FORMATS)):
        name = str(value).removeprefix("torch.")
        if known.get(name) is value:
            return {key: name}
    raise CheckpointError(f"an operand of type {type(value).__name__} can't be saved: {describe(value)}")


def decode(value: Any, nodes: Mapping[str, fx.Node], depth: int = 0) -> Any:
    """The inverse of :func:`encode`; ``nodes`` are those that stand before. Raises :class:`CheckpointError` on anything
    else.
    """
    if depth > MAX_DEPTH:
        raise CheckpointError(f"operands nested more than {MAX_DEPTH} deep")
    if value is None or isinstance(value, (bool, str, float)):
        return value
    if isinstance(value, int):
        return _bounded(value)
    if isinstance(value, list):
        return [decode(item, nodes, depth + 1) for item in value]
    if not isinstance(value, dict) or len(value) != 1:
        raise CheckpointError(f"{describe(value)} is no operand")
    ((kind, content),) = value.items()
    if kind not in _DECODERS:
        raise CheckpointError(f"an operand of the unknown kind {describe(kind)}; known are {', '.join(_DECODERS)}")
    return _DECODERS[kind](content, nodes, depth + 1)


def _bounded(value: int) -> int:
    if not -(1 << 63) <= value < 1 << 63:
        raise CheckpointError(f"the integer {describe(value)} does not fit into 64 bits")
    return value


def _node(content: Any, nodes: Mapping[str, fx.Node], depth: int) -> fx.Node:
    if not isinstance(content, str) or content not in nodes:
        raise CheckpointError(f"it refers to the node {describe(content)}, which no earlier node defines")
    return nodes[content]


def _tuple(content: Any, nodes: Mapping[str, fx.Node], depth: int) -> tuple[Any, ...]:
    if not isinstance(content, list):
        raise CheckpointError(f"a tuple of {describe(content)}, not of a list")
    return tuple(decode(item, nodes, depth) for item in content)


def _slice(content: Any, nodes: Mapping[str, fx.Node], depth: int) -> slice:
    parts = _tuple(content, nodes, depth)
    if len(parts) != 3:
        raise CheckpointError(f"a slice of {len(parts)} parts, not 3")
    return slice(*parts)


def _device(content: Any, nodes: Mapping[str, fx.Node], depth: int) -> torch.device:
    kind, colon, index = content.partition(":") if isinstance(content, str) else ("", "", "")
    if kind not in DEVICES or (colon and not (index.isascii() and index.isdigit() and len(index) < 4)):
        raise CheckpointError(f"{describe(content)} is no device; an example: 'cpu' or 'cuda:0'")
    return torch.device(content)


def named(known: Mapping[str, Any], kind: str) -> Callable[..., Any]:
    """A decoder of values by name."""

    def decoder(content: Any, nodes: Mapping[str, fx.Node] | None = None, depth: int = 0) -> Any:
        if not isinstance(content, str) or content not in known:
            raise CheckpointError(f"{describe(content)} is no {kind}; known are {', '.join(known)}")
        return known[content]

    return decoder


_DECODERS: dict[str, Callable[[Any, Mapping[str, fx.Node], int], Any]] = {
    "node": _node,
    "float": named(FLOATS, "special float"),
    "tuple": _tuple,
    "slice": _slice,
    "dtype": named(DTYPES, "dtype"),
    "device": _device,
    "layout": named(LAYOUTS, "layout"),
    "memory_format": named(MEMORY_FORMATS, "memory format"),
}
