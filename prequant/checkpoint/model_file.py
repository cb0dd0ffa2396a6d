"""The transformers half of a Program in a folder: ``config.json``, ``generation_config.json``, and what a ModelProgram
knows beside.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, GenerationConfig, PretrainedConfig

from prequant import model as keys
from prequant.losses import LABELS
from prequant.model import ModelProgram, output_class
from prequant.passes import Program
from prequant.trace import BOUND, UNREAD

from .arguments import decode, encode
from .config import QuantizationSpec
from .describe import NOT_MODULES
from .errors import CheckpointError
from .graph_file import is_tensor_name
from .json_file import Record, describe, read_json
from .paths import inside

GENERATION_FILE = "generation_config.json"

_TEXTS = (keys.MODEL_CLASS, keys.MAIN_INPUT)
_OPTIONAL_TEXTS = (keys.OUTPUT_CLASS, keys.TASK, keys.LOSS_TYPE)
_FLAGS = (keys.ACCEPTS_LOSS_KWARGS, keys.COUNTS_ITEMS)
_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.([A-Za-z_]\w*|<locals>))*", re.ASCII)


def config_json(program: Program, spec: QuantizationSpec) -> dict[str, Any]:
    """What ``config.json`` holds: the model's own configuration, if it has one, with ``quantization_config``.

    A model of plain floats has none, so that transformers loads it where prequant is not installed.
    """
    if not isinstance(program, ModelProgram):
        return {"quantization_config": spec.encode()}
    config = copy.deepcopy(program.config)
    if hasattr(config, "quantization_config"):  # of the folder that the model came from
        del config.quantization_config
    if not spec.is_plain:
        config.quantization_config = spec.encode()
    config.architectures = [program.info.extra[keys.MODEL_CLASS].rpartition(".")[2]]
    if getattr(config, "dtype", None) is None:
        config.dtype = _model_dtype(program, spec)
    return dict(json.loads(config.to_json_string(use_diff=True)))


def _model_dtype(program: Program, spec: QuantizationSpec) -> torch.dtype:
    """The dtype of the parameters that belong to no compressed weight: what the model computes in."""
    packed = tuple(f"{name}." for name in spec.weights)
    plain = (p.dtype for name, p in program.named_parameters() if p.is_floating_point() and not name.startswith(packed))
    return next(plain, torch.float32)


def write_generation_config(program: Program, folder: Path) -> None:
    """Write ``generation_config.json`` if the Program has such a configuration."""
    config = program.info.extra.get(keys.GENERATION_CONFIG)
    if config is not None:
        config.save_pretrained(folder)


# ---- what the graph file says of it ----------------------------------------------------------------------------------


def encode_extra(program: Program) -> dict[str, Any]:
    """``info.extra`` as JSON, without the configurations, which have files of their own."""
    extra = program.info.extra
    result: dict[str, Any] = {
        "bound": {name: encode(value) for name, value in extra.get(BOUND, {}).items()},
        "unread": list(extra.get(UNREAD, ())),
        "not_modules": [str(reason) for reason in extra.get(NOT_MODULES, ())],
    }
    if isinstance(program, ModelProgram):
        names = (*_TEXTS, *_OPTIONAL_TEXTS, *_FLAGS)
        result["model"] = {name: extra[name] for name in names}
    return result


def decode_extra(record: Record, config: Record, folder: Path) -> dict[str, Any]:
    """The inverse of :func:`encode_extra`, with the configurations from their files."""
    bound = record.record("bound")
    extra: dict[str, Any] = {
        BOUND: {name: decode(value, {}) for name, value in bound.value.items()},
        UNREAD: record.strings("unread"),
    }
    if reasons := record.strings("not_modules"):
        extra[NOT_MODULES] = reasons
    if bad := [name for name in extra[UNREAD] if not is_tensor_name(name)]:
        raise CheckpointError(f"{record.where}: {describe(bad[0])} is no name of a tensor")
    if "model" in record.value:
        extra |= decode_model(record.record("model"))
        extra[keys.CONFIG] = read_config(config)
        if (folder / GENERATION_FILE).exists():
            extra[keys.GENERATION_CONFIG] = _read_generation_config(inside(folder, GENERATION_FILE))
    return extra


def decode_model(record: Record) -> dict[str, Any]:
    """What a ModelProgram's ``extra`` says of its model. Raises :class:`CheckpointError`."""
    record.only((*_TEXTS, *_OPTIONAL_TEXTS, *_FLAGS))
    values: dict[str, Any] = {flag: record.get(flag, bool) for flag in _FLAGS}
    values |= {name: record.get(name, str) for name in _TEXTS}
    for name in _OPTIONAL_TEXTS:
        if name not in record.value:
            raise CheckpointError(f"{record.where}: {name!r} is missing")
        values[name] = None if record.value[name] is None else record.get(name, str)
    for name in (keys.MODEL_CLASS, keys.OUTPUT_CLASS):
        if values[name] is not None and not _IMPORT_PATH.fullmatch(values[name]):
            raise CheckpointError(f"{record.where}: {name} {describe(values[name])} is no dotted name of a class")
    if not values[keys.MAIN_INPUT].isidentifier():
        raise CheckpointError(
            f"{record.where}: {keys.MAIN_INPUT} {describe(values[keys.MAIN_INPUT])} is no name of an input"
        )
    if values[keys.TASK] is not None and values[keys.TASK] not in LABELS:
        raise CheckpointError(f"{record.where}: task {describe(values[keys.TASK])}; known are {', '.join(LABELS)}")
    if values[keys.OUTPUT_CLASS] is not None:
        output_class(values[keys.OUTPUT_CLASS])
    return values


def read_config(record: Record) -> PretrainedConfig:
    """The model's configuration, by its ``model_type``, without ``quantization_config``."""
    kind = record.get("model_type", str)
    if kind not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{record.where}: model_type {describe(kind)} is unknown to transformers; "
            "if it is a model of your own, make it known with AutoConfig.register first"
        )
    values = {key: value for key, value in record.value.items() if key != "quantization_config"}
    try:
        return CONFIG_MAPPING[kind].from_dict(values)
    except Exception as error:  # each configuration class has checks, and ways to fail, of its own
        raise CheckpointError(f"{record.where}: can't be read as the configuration of a {kind}: {error}") from error


def _read_generation_config(path: Path) -> GenerationConfig:
    values = read_json(path)
    try:
        return GenerationConfig.from_dict(values)
    except Exception as error:
        raise CheckpointError(f"{path}: can't be read as a generation configuration: {error}") from error
