"""trace: from a model to a Program."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel

from prequant.passes import Input, Program, ProgramInfo, Signature

from .losses import LABELS, task_of
from .model import ModelProgram, describe
from .trace_errors import TraceError, explain, trace_error
from .trace_inputs import LENGTH, Axes, Example, prepare
from .trace_state import flat_forward, traceable
from .traced import TracedProgram
from .unlift import Unlifted, unlift

__all__ = ["BOUND", "UNREAD", "TraceError", "trace"]

UNREAD = "unread"
"""Key in ``info.extra``: names in the model's state dict that its graph does not need."""
BOUND = "bound"
"""Key in ``info.extra``: the constants among the example inputs."""


def trace(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | Sequence[Any] | Tensor,
    *,
    dynamic_axes: Axes | None = None,
    attn_implementation: str | None = None,
) -> Program:
    """Trace a model into a Program that takes other batch sizes and lengths than the example.

    ``example_inputs``: a mapping from argument names to tensors (what a tokenizer returns), or the tensors in the order
    of ``forward``'s arguments. Their values don't matter. Booleans, numbers, strings and None among them are bound as
    constants; labels are left out, because a Program of a transformers model computes the loss outside its graph.

    ``dynamic_axes``: names of dynamic axes by input and position, ``{"input_ids": {0: "batch", 1: "length"}}``; all
    others are then fixed. By default a transformers model's inputs are ``[batch, length, ...]``, where inputs of a
    decoder have a ``decoder_length``. For another module the first axis is the batch (that of every input that is as
    large there as the first input), and further axes are dynamic where its code allows it: the Program's signature
    tells.

    ``attn_implementation``: how attention is traced, if not as the model does it: ``"eager"`` has its scores in the
    graph.

    The Program shares its weights with the model, is in train mode if the model is, and switches with ``train()`` and
    ``eval()``. The model is left as it was. Raises :class:`TraceError`, which says what can't be traced, where, and
    what to try.
    """
    task = task_of(model) if isinstance(model, PreTrainedModel) else None
    example = prepare(model, example_inputs, dynamic_axes, LABELS[task] if task is not None else ())
    with traceable(model, attn_implementation):
        exported = _export(model, example)
    lifted = unlift(exported, model)
    _check_use(model, lifted, example)
    inputs = _inputs(model, example, lifted)
    for item, node in zip(inputs, lifted.inputs, strict=True):
        node.target = item.name
    kind: type[Program] = TracedProgram
    extra = {UNREAD: lifted.unread, BOUND: example.constants}
    if isinstance(model, PreTrainedModel):
        kind = ModelProgram
        extra |= describe(model, task, lifted.output_type)
    info = ProgramInfo(Signature(inputs, lifted.outputs), lifted.aliases, extra, lifted.constants)
    return kind(lifted.tensors, lifted.graph, info).train(model.training)


def _export(model: nn.Module, example: Example) -> ExportedProgram:
    shapes = tuple(
        {axis: Dim.AUTO if example.others or axis in example.axes[name] else Dim.STATIC for axis in range(value.dim())}
        for name, value in example.tensors.items()
    )
    # Without gradients: a model that turns them off in places would get a graph within the graph for each.
    with flat_forward(model, tuple(example.tensors), example.constants), torch.no_grad():
        try:
            return torch.export.export(model, tuple(example.tensors.values()), dynamic_shapes=shapes, strict=False)
        except Exception as error:  # whatever the model's code or the exporter raises is why it can't be traced
            raise explain(model, error) from error


def _check_use(model: nn.Module, lifted: Unlifted, example: Example) -> None:
    """Raise :class:`TraceError` for inputs that went into ``**kwargs`` and were ignored, as misspelt ones are."""
    named = inspect.signature(model.forward).parameters
    for name, node in zip(example.tensors, lifted.inputs, strict=True):
        if name not in named and not node.users:
            raise trace_error(
                model, f"it takes the input {name!r} and does not use it", f"inputs by name: {', '.join(named)}"
            )


def _inputs(model: nn.Module, example: Example, lifted: Unlifted) -> tuple[Input, ...]:
    """The Program's inputs with their dynamic axes. Raises :class:`TraceError` for one that should be and is not."""
    labels: dict[Any, str] = {}
    for (name, axes), node in zip(example.axes.items(), lifted.inputs, strict=True):
        for axis, label in axes.items():
            symbol = _symbol(node, axis)
            if symbol is None:
                found = node.meta["val"].shape[axis]
                raise trace_error(
                    model,
                    f"axis {axis} of {name!r}, the {label}, has to be dynamic; the model's code fixes it to {found}",
                    "look for sizes that the code turns into constants (int(), shapes in Python conditions, numbers in "
                    "view); if it is meant, name the dynamic axes with dynamic_axes",
                )
            if labels.setdefault(symbol, label) != label:
                raise trace_error(
                    model,
                    f"its code takes axis {axis} of {name!r}, the {label}, to be as large as the {labels[symbol]}",
                    "name them alike with dynamic_axes if they are",
                )
    return tuple(
        Input(name, value.dtype, tuple(_axis(name, node, axis, labels) for axis in range(value.dim())))
        for (name, value), node in zip(example.tensors.items(), lifted.inputs, strict=True)
    )


def _symbol(node: fx.Node, axis: int) -> Any:
    """The symbol of an input's axis; None if its size is fixed, or bound to be a multiple of something."""
    size = node.meta["val"].shape[axis]
    return size.node.expr if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol else None


def _axis(name: str, node: fx.Node, axis: int, labels: dict[Any, str]) -> int | str:
    size = node.meta["val"].shape[axis]
    if not isinstance(size, torch.SymInt) or size.node.expr.is_number:
        return int(size)
    label = LENGTH if axis == 1 and LENGTH not in labels.values() else f"{name}.{axis}"
    return labels.setdefault(size.node.expr, label)
