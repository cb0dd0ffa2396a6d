"""Which base an adapter was made on: a hash over everything that the base computes with."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from prequant.checkpoint.tensors import hash_tensors
from prequant.passes import Program, weights
from prequant.runtime.versions import version_of


@dataclass(frozen=True)
class _Known:
    """``kept``: identities in the ``state`` are those of living tensors."""

    state: tuple[Any, ...]
    hash: str
    kept: tuple[Tensor, ...]


_KNOWN: WeakKeyDictionary[Program, _Known] = WeakKeyDictionary()


def fingerprint(program: Program) -> str:
    """SHA-256, in hexadecimal, over the names, types, shapes and bytes of every tensor that a Program reads, and the
    formats of its weights.

    A Program that was saved and loaded again, lowered or fused, has the same. It is computed once for as long as the
    tensors stay as they are; those that lie in a file are read there, and given back.
    """
    tensors = {name: program.tensor(name) for name in _names(program)}
    state = tuple((name, id(t), t.dtype, t.data_ptr(), version_of(t)) for name, t in tensors.items())
    known = _KNOWN.get(program)
    if known is None or known.state != state:
        known = _KNOWN[program] = _Known(state, _hash(program, tensors), tuple(tensors.values()))
    return known.hash


def _names(program: Program) -> list[str]:
    return sorted({str(node.target) for node in program.graph.find_nodes(op="get_attr")})


def _hash(program: Program, tensors: dict[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for view in sorted(weights(program), key=lambda view: view.name):
        sha.update(f"{view.name}|{view.format}|{view.shape}|{view.outliers_replace}|{view.input_format}\n".encode())
    hash_tensors(sha, tensors)
    return sha.hexdigest()
