"""From a base and an adapter to a Program, and back: what a tuned Program has that its base does not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prequant.checkpoint import CheckpointError
from prequant.checkpoint.check import check_graph
from prequant.checkpoint.config import QuantizationSpec
from prequant.checkpoint.json_file import Record
from prequant.checkpoint.model_file import config_json, decode_model, encode_extra, read_config
from prequant.model import CONFIG, MODEL_CLASS, ModelProgram
from prequant.model_class import find_model_class
from prequant.passes import Program, weights
from prequant.passes.trained_alphas import ALPHAS, FIRST
from prequant.runtime import PrequantError

from .errors import AdapterError
from .file import Adapter
from .fingerprint import fingerprint
from .heads import with_head

SHOWN = 12
"""Digits of a fingerprint in messages."""


def variant(base: ModelProgram, adapter: Adapter, where: str = "the adapter") -> ModelProgram:
    """The base with an adapter: a Program of its own that shares every other tensor, in eval mode.

    ``where`` begins messages: the adapter's file. Raises :class:`AdapterError` for an adapter that was made on another
    base, and for tensors that are missing, unknown, or of another shape or type.
    """
    known = fingerprint(base)
    if adapter.base != known:
        raise AdapterError(
            f"{where} was made on the base {adapter.base[:SHOWN]}, and this one is {known[:SHOWN]}; load it on the one "
            "that it was made on"
        )
    try:
        model = decode_model(Record(dict(adapter.model), f"{where}, model"))
        config = read_config(Record(dict(adapter.config), f"{where}, config"))
    except CheckpointError as error:
        raise AdapterError(str(error)) from error
    program = base.copy()
    if _has_another_head(base, model[MODEL_CLASS], adapter):
        headed = with_head(base, _class_at(model[MODEL_CLASS], where), config)
        if missing := sorted(set(headed.head) - adapter.tensors.keys()):
            raise AdapterError(f"{where} lacks {missing[0]}, a part of its head")
        program = headed.program
    for name, value in adapter.tensors.items():
        _put(program, name, value, where)
    program.update_info(extra={**program.info.extra, **model, CONFIG: config})
    read = {str(node.target): node for node in program.graph.find_nodes(op="get_attr")}
    if unread := sorted(stored_name(name) for name in adapter.tensors if stored_name(name) not in read):
        raise AdapterError(f"{where}: nothing in the base reads {unread[0]}")
    try:
        check_graph(
            program.graph, {name: program.tensor(name) for name in read}, lambda name: f"{where}: {name}", where
        )
    except CheckpointError as error:
        raise AdapterError(str(error)) from error
    program.train(False)
    return program


def _class_at(path: str, where: str) -> type[PreTrainedModel]:
    try:
        return find_model_class(path)
    except PrequantError as error:
        raise AdapterError(f"{where}: {error}") from error


def _has_another_head(base: ModelProgram, path: str, adapter: Adapter) -> bool:
    """Whether an adapter takes a graph of its own: its model is of another class, or its head has another form."""
    shapes = {name: value.shape for name, value in base.named_parameters()}
    whole = {name: value for name, value in adapter.tensors.items() if stored_name(name) == name}
    return path != base.info.extra[MODEL_CLASS] or any(shapes.get(name) != value.shape for name, value in whole.items())


def stored_name(name: str) -> str:
    """The tensor of a Program that a tensor of an adapter is, or belongs to."""
    return name.removesuffix(FIRST) + ALPHAS if name.endswith(FIRST) else name


def _put(program: Program, name: str, value: Tensor, where: str) -> None:
    stored = stored_name(name)
    try:
        old = program.tensor(stored).detach()
    except PrequantError as error:
        raise AdapterError(f"{where}: {name} is no tensor of the base") from error
    shape = (1, *old.shape[1:]) if stored != name else old.shape
    if value.shape != shape or value.dtype is not old.dtype or not value.is_floating_point():
        raise AdapterError(
            f"{where}: {name} is {value.dtype} of shape {list(value.shape)}; the base takes {old.dtype} {list(shape)}"
        )
    value = value.to(old.device)
    program.set_tensor(stored, value if stored == name else torch.cat([value, old[1:]]), trainable=False)


def adapter_of(
    base: ModelProgram, tuned: ModelProgram, about: Mapping[str, Any] | None = None, always: Iterable[str] = ()
) -> Adapter:
    """What ``tuned``, which was made of ``base``, has of its own; of what is alike, ``always`` names what to take too.

    Raises :class:`AdapterError` for a Program that differs in more than an adapter can hold: in codes, in where its
    outliers are, in shapes or types.
    """
    tensors, always = dict[str, Tensor](), set(always)
    held = {name for name, _ in (*base.named_parameters(), *base.named_buffers())}
    constants = set(tuned.info.constants)
    parts = {
        part for view in weights(base) if {"codes", "planes"} & view.tensors.keys() for part in view.tensors.values()
    }
    for name in sorted({str(node.target) for node in tuned.graph.find_nodes(op="get_attr")}):
        value = tuned.tensor(name).detach()
        if name not in held:
            if name not in constants:
                tensors[name] = _float(name, value)
            continue
        old = base.tensor(name).detach()
        if name not in parts and value.shape != old.shape:  # of a head for other classes
            tensors[name] = _float(name, value)
            continue
        if value.shape != old.shape or value.dtype is not old.dtype:
            raise AdapterError(
                f"{name} is {value.dtype} {list(value.shape)}, and {old.dtype} {list(old.shape)} in the base: an "
                "adapter keeps types and shapes"
            )
        if _alike(value, old) and name not in always:
            continue
        if name.endswith(ALPHAS) and value.shape[0] > 1 and _alike(value[1:], old[1:]):
            tensors[name.removesuffix(ALPHAS) + FIRST] = value[:1]
        else:
            tensors[name] = _float(name, value)
    config = config_json(tuned, QuantizationSpec())
    return Adapter(fingerprint(base), tensors, encode_extra(tuned)["model"], config, about or {})


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() or torch.equal(a, b)


def _float(name: str, value: Tensor) -> Tensor:
    if not value.is_floating_point():
        raise AdapterError(f"{name} differs from the base, and holds no floats: an adapter keeps codes and positions")
    return value
