"""Running a Program by its plan: when it can be, and when the plan has to be made anew."""

from __future__ import annotations

import operator
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.nn.modules import module as torch_modules

from prequant.runtime import PrequantError, native
from prequant.runtime import plan as runtime_plan
from prequant.runtime.versions import version_of

from ..program import Input, Program
from .compile import Coverage, Draft, NoPlan, draft_plan

_version = operator.attrgetter("_version")


class PlanRunner:
    """The plan of one Program, made when it is first asked for, and again when a tensor of the Program has changed.

    It belongs to the graph that the Program has now, and to the types and shapes of its tensors: the Program drops it
    with every new graph. Copies begin without.
    """

    def __init__(self, program: Program) -> None:
        self._draft: Draft | None = None
        self._obstacle = ""
        self._made: tuple[Any, runtime_plan.Plan] | None = None  # with the state of the tensors that it is made of
        self._kept: list[Tensor] = []
        self._holds: dict[tuple[int, ...], bool] = {}
        self._lock = threading.Lock()
        try:
            draft = _draft_of(program)
        except NoPlan as error:
            self._obstacle = str(error)
            return
        self._holders = [_holder(program, name) for name in draft.names]
        self._kinds = [_kind(holder[leaf]) for holder, leaf in self._holders]
        if odd := [name for name, kind in zip(draft.names, self._kinds, strict=True) if kind[:3] not in PLAIN]:
            self._obstacle = f"{odd[0]} is no plain tensor of the CPU"
            return
        self._draft = draft

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

    def plan(self, program: Program, inputs: Sequence[Tensor]) -> runtime_plan.Plan | None:
        """The plan for a call, with the weights as they are now; None for a call that the graph has to run.

        A plan is for calls in eval mode, on plain tensors of the CPU, where nothing records gradients or looks at what
        is computed (hooks, modes, autocast, compilers), at sizes that the graph's shapes hold for.
        """
        draft = self._draft
        if draft is None or not all(map(_is_plain, inputs, program.signature.inputs)):
            return None
        if _watched() or _hooked(program) or native.chosen_isa() == native.REFERENCE:
            return None
        if not self._takes(draft, tuple(inputs[number].shape[axis] for number, axis in draft.plan.axes)):
            return None
        tensors = self._tensors()
        if tensors is None:
            return self._renewed(program, inputs)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return None
        state, made = _state(tensors), self._made
        if made is None or made[0] != state:
            with self._lock:
                made = self._made
                if made is not None and made[0] == state:
                    return made[1]  # another thread has made it
                if list(map(_kind, tensors)) != self._kinds:
                    return self._renewed(program, inputs)
                # The addresses of the tensors that it was made of are known for as long as these live.
                self._kept = tensors
                # Not those of the program, which another thread may be giving another task's.
                named = dict(zip(draft.names, tensors, strict=True))
                self._made = made = state, draft.finish(named.__getitem__)
        return made[1]

    def _takes(self, draft: Draft, sizes: tuple[int, ...]) -> bool:
        holds = self._holds.get(sizes)
        if holds is None:
            if len(self._holds) >= runtime_plan.MOST_SIZES:
                self._holds.clear()
            self._holds[sizes] = holds = draft.holds(*sizes)
        return holds

    def _tensors(self) -> list[Tensor] | None:
        """Those that the plan reads; None where a parameter has become a buffer, or one is gone."""
        try:
            return [holder[leaf] for holder, leaf in self._holders]
        except KeyError:
            return None

    def _renewed(self, program: Program, inputs: Sequence[Tensor]) -> runtime_plan.Plan | None:
        program.drop_plan()
        runner = program.runner
        return runner.plan(program, inputs) if runner is not None else None

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()


_DRAFTS: OrderedDict[Any, Draft] = OrderedDict()
MOST_DRAFTS = 16
"""Drafts that are kept: a base and its tasks share one, as they have one graph over other numbers."""


def _draft_of(program: Program) -> Draft:
    """The draft of the program, or of another one with the same graph and tensors of the same kinds."""
    names = sorted({str(node.target) for node in program.graph.find_nodes(op="get_attr")})
    try:
        kinds = tuple((name, _kind(program.tensor(name))) for name in names)
    except PrequantError as error:
        raise NoPlan(str(error)) from error
    key = program.code, repr(program.signature), kinds, native.chosen_isa()
    draft = _DRAFTS.pop(key, None) or draft_plan(program)
    _DRAFTS[key] = draft
    if len(_DRAFTS) > MOST_DRAFTS:
        _DRAFTS.popitem(last=False)
    return draft


PLAIN = [(kind, "cpu", torch.strided) for kind in (Tensor, Parameter)]


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    """What a plan is made for; values may change."""
    return type(tensor), tensor.device.type, tensor.layout, tensor.dtype, tensor.shape


def _state(tensors: Iterable[Tensor]) -> tuple[Any, ...]:
    """What changes when a tensor is replaced or written to."""
    try:
        versions = tuple(map(_version, tensors))
    except RuntimeError:  # those made in inference mode don't count their versions
        versions = tuple(map(version_of, tensors))
    return tuple(map(id, tensors)), versions, tuple(map(Tensor.data_ptr, tensors))


def _holder(program: Program, name: str) -> tuple[dict[str, Any], str]:
    path, _, leaf = name.rpartition(".")
    module = program.get_submodule(path)
    return (module._parameters if leaf in module._parameters else module._buffers), leaf


def _is_plain(tensor: Tensor, expected: Input) -> bool:
    return (
        type(tensor) is Tensor
        and tensor.dtype is expected.dtype
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not (tensor.requires_grad or tensor.is_neg())
    )


def _hooked(program: Program) -> bool:
    return bool(
        program._forward_hooks
        or program._forward_pre_hooks
        or torch_modules._has_any_global_hook()
        or "forward" in program.__dict__
    )


def _watched() -> bool:
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack()
        or torch.is_autocast_enabled("cpu")
        or torch._C._get_tracing_state()
        or forward_ad._current_level >= 0
    )
