"""An adapter as a file of its own: safetensors, whose metadata say what it is and which base it belongs to.

The metadata's ``prequant_adapter`` is JSON::

    {"version": 1, "base": "<SHA-256 of the base>", "model": {...}, "config": {...}, "about": {...}}

``model`` and ``config`` are those of the base with the adapter (another head has another class and other labels), as in
``prequant.json`` and ``config.json``. ``about`` is for people: the task, settings and versions, and what was measured.
Tensors have the names that they have in the Program; of a binary-coded weight whose first alphas alone differ these
are stored, as ``<weight>.first_alphas``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prequant.checkpoint import CheckpointError
from prequant.checkpoint.atomic import replacing_file
from prequant.checkpoint.graph_file import is_tensor_name
from prequant.checkpoint.json_file import Record, describe, parse_json
from prequant.checkpoint.weight_tensors import check_finite

from .errors import AdapterError

VERSION = 1
"""Of the file. A reader refuses every version that it does not know."""

_KEY = "prequant_adapter"
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Adapter:
    """What a task has of its own on a base. ``base`` is the base's :func:`~prequant.adapters.fingerprint`."""

    base: str
    tensors: Mapping[str, Tensor]
    model: Mapping[str, Any]
    config: Mapping[str, Any]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def write_adapter(path: str | os.PathLike[str], adapter: Adapter) -> Path:
    """Write an adapter; the file appears whole or not at all. Returns its path."""
    path = Path(path)
    check_adapter_path(path)
    content = {
        "version": VERSION,
        "base": adapter.base,
        "model": dict(adapter.model),
        "config": dict(adapter.config),
        "about": dict(adapter.about),
    }
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in adapter.tensors.items()}
    with replacing_file(path) as staging:
        save_file(tensors, staging, metadata={"format": "pt", _KEY: text})
    return path


def check_adapter_path(path: Path) -> None:
    """Raise :class:`AdapterError` where no file can be written: better said before the training than after."""
    if path.is_dir():
        raise AdapterError(f"{path} is a folder; an adapter is a file, such as {path / 'task.safetensors'}")
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise AdapterError(f"{path} can't be written: {nearest} is no folder that can be written to")


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Read an adapter. The file may come from anywhere: nothing in it is run, and all of it is checked; whether it fits
    a base is checked when it is loaded there. Raises :class:`AdapterError`.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            text = (file.metadata() or {}).get(_KEY)
            if text is None:
                raise AdapterError(f"{path} is a safetensors file, but no adapter of prequant")
            record = Record(parse_json(text, str(path)), f"{path}, {_KEY}")
            _check(record)
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (no mapping)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: can't be read as an adapter: {error}") from error
    except CheckpointError as error:
        raise AdapterError(str(error)) from error
    for name, tensor in tensors.items():
        if not is_tensor_name(name):
            raise AdapterError(f"{path}: {describe(name)} is no name of a tensor")
        try:
            check_finite(None, tensor, f"{path}: {name}")
        except CheckpointError as error:
            raise AdapterError(str(error)) from error
    values = record.value
    return Adapter(values["base"], tensors, values["model"], values["config"], values["about"])


def _check(record: Record) -> None:
    version = record.get("version", int)
    if version != VERSION:
        raise AdapterError(f"{record.where}: version {version}; this prequant reads version {VERSION}")
    record.only(("version", "base", "model", "config", "about"))
    if not _DIGEST.fullmatch(record.get("base", str)):
        raise AdapterError(f"{record.where}: base is {describe(record.value['base'])}, no SHA-256")
    for name in ("model", "config", "about"):
        record.record(name)


def is_adapter(path: Path) -> bool:
    """Whether a file says that it is an adapter."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return _KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False
