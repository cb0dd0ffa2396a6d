"""Running a Program by its plan: when it can be, and when the plan has to be made anew."""

from __future__ import annotations

import operator
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prequant.runtime import PrequantError, native

from ..program import Program
from .compile import Coverage, Draft, NoPlan, draft_plan

_version = operator.attrgetter("_version")


class PlanRunner:
    """The plan of one Program, made when it is first asked for, and again when a tensor of the Program has changed.

    It belongs to the graph that the Program has now: the Program drops it with every new one. Copies begin without.
    """

    def __init__(self, program: Program) -> None:
        self._draft: Draft | None = None
        self._obstacle = ""
        self._plan: Any = None
        self._lock = threading.Lock()
        try:
            self._draft = draft_plan(program)
        except PrequantError as error:
            self._obstacle = str(error)
        names = [] if self._draft is None else self._draft.names
        self._holders = [_holder(program, name) for name in names]
        self._known: Any = None

    @property
    def obstacle(self) -> str:
        """Why there is no plan; empty if there is one."""
        return self._obstacle

    @property
    def coverage(self) -> Coverage:
        """What runs how. Raises :class:`NoPlan` if there is no plan."""
        if self._draft is None:
            raise NoPlan(self._obstacle)
        return self._draft.coverage

    def runs(self, program: Program, inputs: Sequence[Tensor]) -> bool:
        """Whether a call goes by the plan: in eval mode, on plain tensors of the CPU whose types and sizes it is
        for, where nothing records gradients or looks at what is computed (hooks, modes, autocast, compilers).
        """
        if self._draft is None or program.training or not all(map(_is_plain, inputs)):
            return False
        if any(t.dtype is not item.dtype for t, item in zip(inputs, program.signature.inputs, strict=True)):
            return False
        if not self._draft.plan.takes(*inputs):
            return False
        if torch.is_grad_enabled() and any(p.requires_grad for p in program.parameters()):
            return False
        return not (_watched() or program._forward_hooks or program._forward_pre_hooks) and (
            native.chosen_isa() != native.REFERENCE
        )

    def __call__(self, program: Program, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
        """The flat results. Raises what :class:`prequant.runtime.plan.Plan` does."""
        state = self._state()
        if state != self._known:
            with self._lock:
                state = self._state()
                if state != self._known:
                    assert self._draft is not None
                    # The addresses of the tensors that it was made of are known for as long as these live.
                    self._kept = [holder[leaf] for holder, leaf in self._holders]
                    self._plan = self._draft.finish(program)
                    self._known = state
        results: tuple[Any, ...] = self._plan(*inputs)
        return results

    def _state(self) -> tuple[Any, ...]:
        """What changes when a tensor is replaced or written to."""
        tensors = [holder[leaf] for holder, leaf in self._holders]
        try:
            versions = tuple(map(_version, tensors))
        except RuntimeError:  # those made in inference mode don't count their versions
            versions = tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)
        return tuple(map(id, tensors)), versions, tuple(map(Tensor.data_ptr, tensors))

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()


def _holder(program: Program, name: str) -> tuple[dict[str, Any], str]:
    path, _, leaf = name.rpartition(".")
    module = program.get_submodule(path)
    return (module._parameters if leaf in module._parameters else module._buffers), leaf


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.device.type == "cpu" and not tensor.requires_grad


def _watched() -> bool:
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack()
        or torch.is_autocast_enabled("cpu")
        or torch._C._get_tracing_state()
    )
