"""Planned Programs under ``torch.compile``: one opaque operator, ``torch.ops.prequant.planned_call``.

A compiler that followed the graph would fuse what it can around packed operators; the plan has done so natively
already, and is faster. So where a call goes by a plan, a compiled one does, too.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensor, FakeTensorMode

from prequant.runtime import PrequantError

from .aliasing import COPIES_WHERE_NEEDED, is_view

if TYPE_CHECKING:
    from .program import Program

_library = torch.library.Library("prequant", "FRAGMENT")
_library.define("planned_call(str key, Tensor[] inputs) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))

_programs: WeakValueDictionary[str, Program] = WeakValueDictionary()


def enrol(program: Program, serial: uuid.UUID, code: str) -> str:
    """A key by which the operator finds the Program while its graph has this ``code``: the same again after a switch of
    modes and back. With the ``serial`` of one Program no other has it, in any process: compilers keep what they made of
    it on disk.
    """
    key = uuid.uuid5(serial, code).hex
    _programs[key] = program
    return key


def planned_call(key: str, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The flat results of a call of an enrolled Program; for compilers, one operator without a gradient."""
    return tuple(torch.ops.prequant.planned_call.default(key, list(inputs)))


def _program(key: str) -> Program:
    program = _programs.get(key)
    if program is None:
        raise PrequantError(f"what was compiled calls a Program that is gone ({key}): keep it, or compile again")
    return program


def _call(key: str, inputs: Sequence[Tensor]) -> list[Tensor]:
    # Compilers were told that results are new, and contiguous: they write into what nothing else reads any more.
    program = _program(key)
    held = {_storage(tensor) for tensor in (*inputs, *(program.tensor(name) for name in _handed_out(key)))}
    results = []
    for result in program.flat_results(tuple(inputs)):
        own = result.clone(memory_format=torch.contiguous_format) if _storage(result) in held else result.contiguous()
        held.add(_storage(own))
        results.append(own)
    return results


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@lru_cache(maxsize=256)
def _handed_out(key: str) -> tuple[str, ...]:
    """Names of the tensors of a Program that its results may share memory with; a key is that of one graph."""
    found, waiting = set[str](), list(_program(key).graph.output_node().all_input_nodes)
    while waiting:
        node = waiting.pop()
        if node.op == "get_attr":
            found.add(str(node.target))
        elif is_view(node) or node.target in COPIES_WHERE_NEEDED:
            waiting += node.all_input_nodes
    return tuple(sorted(found))


def _fake_call(key: str, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Shapes and types, from the graph."""
    mode = detect_fake_mode(inputs)
    assert mode is not None
    results = _Shapes(_program(key), mode).run(*inputs)
    return [torch.empty_like(result, memory_format=torch.contiguous_format) for result in results]


class _Shapes(fx.Interpreter):
    """Runs a graph on tensors without numbers."""

    def __init__(self, program: Program, mode: FakeTensorMode) -> None:
        super().__init__(program)
        self._mode = mode

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A tensor of the Program, without its numbers."""
        tensor = super().get_attr(target, args, kwargs)
        return tensor if isinstance(tensor, FakeTensor) else self._mode.from_tensor(tensor, static_shapes=True)


_library.impl("planned_call", _call, "CompositeExplicitAutograd")
torch.library.register_fake("prequant::planned_call", _fake_call, lib=_library)
