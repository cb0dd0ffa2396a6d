"""TraceError, and how a failure inside the exporter becomes one that says where, why, and what to try."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

import torch
from torch import nn

from prequant.runtime import PrequantError

_LIBRARY = str(Path(torch.__file__).parent)
_OWN = str(Path(__file__).parent)
_NODE = re.compile(r"While executing (%[^\n]+)")

_ADVICE = (
    (
        r"data.dependent|Could not guard|Could not extract specialized|aten\._local_scalar_dense|\.item\(\)|nonzero",
        "the code branches on, or takes a size from, the values of a tensor: express it with torch.where or masks, "
        "or trace the part of the model around it",
    ),
    (r"Cache", "a key/value cache is no tensor: leave past_key_values out of the example and use_cache off"),
    (
        r"not a known type|pytree|unsupported (input|output) type",
        "a model may return tensors, None, and tuples, lists, dicts or transformers' own ModelOutput classes of these",
    ),
    (
        r"missing \d+ required|unexpected keyword|positional argument|must specify|specify (exactly one|either)",
        "check that the example inputs are those that the model's forward takes",
    ),
)
_GENERAL = (
    "run the model on the example inputs as they are; if that works, try attn_implementation='eager', "
    "or trace the part of the model that matters"
)


class TraceError(PrequantError):
    """A model that can't be traced: says its class, why, the line or node where that is known, and what to try."""


def trace_error(model: nn.Module, why: str, advice: str) -> TraceError:
    """The error for ``model``, in the one form that all of them have."""
    return TraceError(f"can't trace {type(model).__name__}: {why}\n  try: {advice}")


def explain(model: nn.Module, error: Exception) -> TraceError:
    """What the exporter raised, as a :class:`TraceError` (to be raised ``from error``)."""
    message = str(error).strip()
    why = f"{type(error).__name__}: {_first_lines(message)}" if message else type(error).__name__
    if place := _source_line(error):
        why += f"\n  at: {place}"
    if node := _NODE.search(message):
        why += f"\n  node: {node[1]}"
    return trace_error(model, why, _advice(f"{type(error).__name__} {message}"))


def _first_lines(message: str, count: int = 2) -> str:
    return " ".join(line.strip() for line in message.splitlines()[:count] if line.strip())


def _advice(text: str) -> str:
    return next((advice for pattern, advice in _ADVICE if re.search(pattern, text)), _GENERAL)


def _source_line(error: BaseException) -> str | None:
    """The innermost line of the model's own code: neither torch's nor this package's."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((_LIBRARY, _OWN, "<"))
    ]
    if frames:
        last = frames[-1]
        return f"{last.filename}:{last.lineno}, in {last.name}: {last.line}"
    cause = error.__cause__ or error.__context__
    return _source_line(cause) if cause is not None else None
