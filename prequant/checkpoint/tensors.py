"""Tensors in safetensors files: written contiguous and unshared, read only if they are what a table says."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prequant.runtime.memory import MappedFiles

from .arguments import DTYPES, named
from .errors import CheckpointError
from .graph_file import is_tensor_name
from .json_file import Record, describe

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}

MAPPED_BYTES = 1 << 16
"""Of the smallest tensor that is left in a mapped file."""


@dataclass(frozen=True)
class Stored:
    """What a table says of a tensor: dtype and shape in the Program, whether it is a parameter, whether that trains,
    whether the file holds its transpose.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    parameter: bool = False
    trainable: bool = False
    transposed: bool = False

    @property
    def shape_in_file(self) -> tuple[int, ...]:
        """The shape that the file has to show."""
        return self.shape[::-1] if self.transposed else self.shape

    def encode(self) -> dict[str, Any]:
        """As JSON; what is false is left out."""
        entry: dict[str, Any] = {"dtype": str(self.dtype).removeprefix("torch."), "shape": list(self.shape)}
        flags = ("parameter", "trainable", "transposed")
        return entry | {flag: True for flag in flags if getattr(self, flag)}


def decode_table(record: Record, key: str) -> dict[str, Stored]:
    """The table of tensors under ``key``. Raises :class:`CheckpointError` for a name or entry out of order."""
    table = {}
    for name, entry in record.records(key):
        if not is_tensor_name(name):
            raise CheckpointError(f"{record.where}, {key}: {describe(name)} is no name of a tensor")
        entry.only(("dtype", "shape", "parameter", "trainable", "transposed"))
        flags = {flag: entry.get(flag, bool, False) for flag in ("parameter", "trainable", "transposed")}
        stored = Stored(named(DTYPES, "dtype")(entry.get("dtype", str)), entry.sizes("shape"), **flags)
        if stored.transposed and len(stored.shape) != 2:
            raise CheckpointError(
                f"{entry.where}: of shape {list(stored.shape)}; only a matrix can be stored transposed"
            )
        if stored.trainable and not (stored.parameter and stored.dtype.is_floating_point):
            raise CheckpointError(f"{entry.where}: trainable, and no parameter of floats")
        table[name] = stored
    return table


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, with the metadata that transformers looks for beside what is given."""
    ready: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        # safetensors refuses tensors that share memory; those that do (views) become tensors of their own.
        pointer = tensor.untyped_storage().data_ptr()
        if pointer in seen or tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(pointer)
        ready[name] = tensor
    save_file(ready, path, metadata={"format": "pt", **(metadata or {})})


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def hash_tensors(sha: Any, tensors: Mapping[str, Tensor]) -> None:
    """Add names, types, shapes and bytes of tensors to a hash of hashlib's; those that lie in a file are given back."""
    for name, tensor in tensors.items():
        sha.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}\n".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    MappedFiles().give_back(tensors.values())


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_tensors(path: Path, table: Mapping[str, Stored], mapped: bool) -> dict[str, Tensor]:
    """The tensors of a safetensors file, which holds exactly those of ``table``, in memory of their own; if ``mapped``,
    large ones of bytes stay in the file, which is mapped.

    Everything about all of them is checked from the header before the first is read; safetensors itself has checked
    there that offsets, shapes and the file's length agree. Raises :class:`CheckpointError`.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = set(file.keys())
            if missing := sorted(table.keys() - names):
                raise CheckpointError(f"{path}: the tensor {missing[0]} is missing{_more(missing)}")
            if unknown := sorted(names - table.keys()):
                raise CheckpointError(f"{path}: the tensor {describe(unknown[0])} is in no list{_more(unknown)}")
            for name, stored in table.items():
                check_header(path, name, file.get_slice(name), stored.dtype, stored.shape_in_file)
            tensors = {
                name: _checked(path, name, file.get_tensor(name), mapped and not stored.transposed)
                for name, stored in table.items()
            }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: can't be read as safetensors: {error}") from error
    for name, tensor in tensors.items():
        if table[name].transposed:
            tensors[name] = tensor.t().contiguous()
    if mapped:
        MappedFiles().give_back(tensors.values())  # what came into memory beside tensors that were copied
    return tensors


def check_header(path: Path, name: str, view: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise :class:`CheckpointError` unless a tensor in a safetensors file has this type and shape."""
    found = SAFETENSORS_DTYPES.get(view.get_dtype())
    if found is not dtype:
        raise CheckpointError(
            f"{path}: {name} is of type {view.get_dtype()}; expected {str(dtype).removeprefix('torch.')}"
        )
    if tuple(view.get_shape()) != shape:
        raise CheckpointError(f"{path}: {name} is of shape {describe(list(view.get_shape()))}; expected {list(shape)}")


def _checked(path: Path, name: str, tensor: Tensor, mapped: bool) -> Tensor:
    """A copy, not a view of the mapped file: what has been checked must not change with the file afterwards. Packed
    codes may stay there: a byte of theirs decides what is computed, never which memory is read.
    """
    if mapped and tensor.dtype is torch.uint8 and tensor.nbytes >= MAPPED_BYTES:
        return tensor
    if tensor.dtype is torch.bool and tensor.numel() and int(tensor.view(torch.uint8).max()) > 1:
        raise CheckpointError(
            f"{path}: {name} holds the byte {int(tensor.view(torch.uint8).max())}; a boolean is 0 or 1"
        )
    return tensor.clone()


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
