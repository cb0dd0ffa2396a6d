"""What a model is traced with: named tensors, large enough; constants; and the axes that have to stay dynamic."""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .trace_errors import trace_error

BATCH, LENGTH, DECODER_LENGTH = "batch", "length", "decoder_length"
DECODER_PREFIX = "decoder_"

Axes: TypeAlias = Mapping[str, Mapping[int, str]]
"""Names of dynamic axes, by input and position; equal names are equal sizes."""


@dataclass(frozen=True)
class Example:
    """Inputs to trace a model with."""

    tensors: dict[str, Tensor]
    """The inputs of the Program, in the order of the model's ``forward``.

    Every axis that has to be dynamic has at least two entries: the exporter takes a size of one for a constant.
    """
    constants: dict[str, Any]
    """Further arguments (booleans, None, numbers), which the Program has no input for."""
    axes: dict[str, dict[int, str]]
    """Axes that have to stay dynamic, by input."""
    others: bool
    """Whether other axes become dynamic where the model allows it."""


def prepare(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | Sequence[Any] | Tensor,
    dynamic_axes: Axes | None = None,
    leave_out: tuple[str, ...] = (),
) -> Example:
    """Sort example inputs into tensors and constants, and bring them to a size that can be traced.

    ``leave_out``: names to ignore (labels, where the loss is no part of the graph). Raises :class:`TraceError` for
    inputs that the model does not take, values that are neither tensors nor constants, and sizes that do not go
    together.
    """
    values = {name: value for name, value in _named(model, example_inputs).items() if name not in leave_out}
    tensors, constants = _sort(model, values)
    axes = _axes(model, tensors, dynamic_axes)
    others = dynamic_axes is None and not isinstance(model, PreTrainedModel)
    return Example(_sized(model, tensors, axes), constants, axes, others)


def _named(model: nn.Module, inputs: Mapping[str, Any] | Sequence[Any] | Tensor) -> dict[str, Any]:
    """The inputs by name, in the order of ``forward``'s parameters."""
    parameters = inspect.signature(model.forward).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    names = [name for name, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if isinstance(inputs, Mapping):
        given = dict(inputs)
        if inspect.Parameter.VAR_KEYWORD not in kinds and (unknown := [name for name in given if name not in names]):
            raise trace_error(model, f"its forward has no input {unknown[0]!r}", f"those it has: {', '.join(names)}")
        if bad := [name for name in given if not str(name).isidentifier() or keyword.iskeyword(str(name))]:
            raise trace_error(model, f"{bad[0]!r} is no name of an argument", "name inputs as the model's forward does")
        known = [name for name in names if name in given]
        return {name: given[name] for name in dict.fromkeys((*known, *given))}
    sequence = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    if len(sequence) > len(names):
        taken = f"{len(names)} named inputs" + (" before *args" if inspect.Parameter.VAR_POSITIONAL in kinds else "")
        raise trace_error(
            model,
            f"{len(sequence)} example inputs given; its forward takes {taken}",
            "give each input of forward a name of its own",
        )
    return dict(zip(names, sequence, strict=False))


def _sort(model: nn.Module, values: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    constants: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            # The same tensor under two names would be exported as one input.
            tensors[name] = value.clone() if any(value is other for other in tensors.values()) else value
        elif value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
            constants[name] = value
        else:
            raise trace_error(
                model,
                f"the example input {name!r} is a {type(value).__name__}",
                "pass tensors (return_tensors='pt' in a tokenizer), and constants as bool, number, str or None",
            )
    if not tensors:
        raise trace_error(model, "the example inputs hold no tensor", "pass what the model is called with")
    if constants.get("use_cache"):
        raise trace_error(model, "use_cache=True in the example inputs", "leave it out: a key/value cache is no tensor")
    return tensors, constants


def _axes(model: nn.Module, tensors: dict[str, Tensor], dynamic_axes: Axes | None) -> dict[str, dict[int, str]]:
    if dynamic_axes is not None:
        if unknown := [name for name in dynamic_axes if name not in tensors]:
            raise trace_error(
                model, f"dynamic_axes names {unknown[0]!r}, which is no tensor input", f"inputs: {', '.join(tensors)}"
            )
        axes = {name: dict(dynamic_axes.get(name, {})) for name in tensors}
    elif isinstance(model, PreTrainedModel):
        axes = {name: _text_axes(name, value) for name, value in tensors.items()}
    else:
        sizes = next(iter(tensors.values())).shape[:1]
        axes = {name: {0: BATCH} if sizes and value.shape[:1] == sizes else {} for name, value in tensors.items()}
    for name, wanted in axes.items():
        if bad := [axis for axis in wanted if not 0 <= axis < tensors[name].dim()]:
            shape = list(tensors[name].shape)
            raise trace_error(
                model, f"axis {bad[0]} of {name!r} is to be dynamic, its shape is {shape}", "name axes from 0 on"
            )
    return axes


def _text_axes(name: str, value: Tensor) -> dict[int, str]:
    """``[batch, length, ...]``, as all inputs of language models are."""
    length = DECODER_LENGTH if name.startswith(DECODER_PREFIX) else LENGTH
    return dict(enumerate((BATCH, length)[: value.dim()]))


def _sized(model: nn.Module, tensors: dict[str, Tensor], axes: dict[str, dict[int, str]]) -> dict[str, Tensor]:
    """The tensors, every dynamic axis of size one repeated to the size that others have under its name, or two."""
    sizes: dict[str, tuple[int, str]] = {}
    for name, value in tensors.items():
        for axis, label in axes[name].items():
            size = int(value.shape[axis])
            if size == 0:
                raise trace_error(model, f"axis {axis} of {name!r} is empty", "pass at least one example of one token")
            if size > 1 and sizes.setdefault(label, (size, name))[0] != size:
                other, where = sizes[label]
                raise trace_error(
                    model,
                    f"the inputs disagree on the axis {label!r}: {other} in {where!r}, {size} in {name!r}",
                    "make them equal, or name axes that differ differently with dynamic_axes",
                )
    sized = {}
    for name, value in tensors.items():
        for axis, label in axes[name].items():
            if value.shape[axis] == 1:
                value = value.repeat_interleave(sizes.get(label, (2, ""))[0], axis)
        sized[name] = value
    return sized
