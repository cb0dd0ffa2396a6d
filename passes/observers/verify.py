"""Verify: after each pass, is this still a well-formed Program?"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch

from prequant.runtime import PrequantError

from ..base import PassError, Report
from ..program import Program, Signature
from ..properties import violation
from ..shapes import Shapes, propagate_shapes
from .base import Observer, Step

NAMESPACES = ("aten", "prequant")
WELL_FORMED = ("valid-signature", "no-orphans", "valid-formats")
"""Properties that every Program has, whatever passes it went through."""

_SCALAR_MODULES = {operator.add.__module__, "math"}


class Verify(Observer):
    """Checks the Program before the first pass and after each, and raises :class:`PassError` at the first violation.

    * Every op is known: of ATen, of prequant, of ``namespaces``, or arithmetic on sizes.
    * Every tensor is read by a node and every read finds its tensor; placeholders and results are those of the
      signature.
    * Codes and scales fit their formats.
    * Shapes propagate through the whole graph on fake tensors, dynamic axes stay dynamic, and the results keep their
      types and shapes unless the pass changed the signature. Every node's ``meta["val"]`` is renewed on the way.
    * What earlier passes ensured still holds, except for what a later one says it ``breaks``.
    """

    def __init__(self, namespaces: Iterable[str] = ()) -> None:
        self.namespaces = (*NAMESPACES, *namespaces)
        self._ensured: dict[str, str] = {}
        self._signature: Signature | None = None
        self._outputs: tuple[Any, ...] = ()

    def before(self, step: Step, program: Program) -> None:
        """Check what the pipeline was given, so that no pass is blamed for it."""
        if step.index == 0:
            self._ensured = {}
            try:
                self._remember(program, self._check(program))
            except PrequantError as error:
                raise PassError(
                    f"the Program given is not well-formed: {error}", node=getattr(error, "node", None)
                ) from error

    def after(self, step: Step, program: Program, report: Report) -> None:
        """Check what the pass left."""
        shapes = self._check(program)
        if program.signature == self._signature and shapes.of_outputs() != self._outputs:
            raise PassError(f"the results were {_text(self._outputs)} and are now {_text(shapes.of_outputs())}")
        self._remember(program, shapes)
        self._check_ensured(step, program)

    def _check(self, program: Program) -> Shapes:
        program.graph.lint()
        for name in ("known ops", *WELL_FORMED):
            found = self._unknown_op(program) if name == "known ops" else violation(name, program)
            if found:
                raise PassError(f"{name}: {found}")
        return propagate_shapes(program)

    def _remember(self, program: Program, shapes: Shapes) -> None:
        self._signature, self._outputs = program.signature, shapes.of_outputs()

    def _check_ensured(self, step: Step, program: Program) -> None:
        for name in step.pass_.breaks:
            self._ensured.pop(name, None)
        for name, promised_by in self._ensured.items():
            if found := violation(name, program):
                raise PassError(f"{name!r}, which {promised_by} ensured, does not hold any more: {found}")
        self._ensured |= dict.fromkeys(step.pass_.ensures, step.pass_.name)

    def _unknown_op(self, program: Program) -> str | None:
        for node in program.graph.nodes:
            if node.op in ("call_module", "call_method"):
                return f"%{node.name} is a {node.op}; a Program holds call_function nodes only"
            if node.op == "call_function" and not self._is_known(node.target):
                return f"%{node.name} calls {node.target}, which is of none of {', '.join(self.namespaces)}"
        return None

    def _is_known(self, target: Any) -> bool:
        if isinstance(target, torch._ops.OpOverload):
            return target.namespace in self.namespaces
        name = getattr(target, "__name__", "")
        return getattr(target, "__module__", "") in _SCALAR_MODULES or (
            name.startswith("sym_") and getattr(torch, name, None) is target
        )


def _text(outputs: tuple[Any, ...]) -> str:
    return ", ".join("no tensor" if item is None else f"{item[0]} {list(item[1])}" for item in outputs)
