"""``torch.compile(model, backend="prequant", options={...})``: compress what the compiler sees, and run that.

The compiler's graph is traced as any module is, goes through a pipeline, and runs as any Program does: by its plan
where that covers it, and through Inductor where not. Where a graph is compiled again, for other sizes, it gets the
weights that the first one was given.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor, fx
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx

from prequant.passes import PassError, Pipeline, Program
from prequant.passes.options import near_misses
from prequant.passes.transplant import transplant
from prequant.runtime.versions import version_of
from prequant.trace import trace

from .lifted import Bound, CompileError, bind

Rest: TypeAlias = Literal["inductor", "eager"]
_RECIPE = re.compile(r"w([1-8])(a8)?")
_LOWERED = "lower,compose-ops,fuse-epilogue,fuse-parallel-linears,plan"


@dataclass(frozen=True)
class Options:
    """What ``options`` says.

    ``recipe``: bits of the weights, and of what they are multiplied with: ``w1`` to ``w8``, with 8-bit inputs ``w4a8``
    and so on. Weights of less than 8 bits have a scale for 64 of them, others for each row. ``pipeline``: any passes
    instead, as text. ``rest``: what runs a graph that no plan covers, Inductor or PyTorch as it is.
    Raises :class:`CompileError` for a recipe that is none, both, or another ``rest``.
    """

    recipe: str | None = None
    pipeline: str | None = None
    rest: Rest = "inductor"

    def __post_init__(self) -> None:
        for name, value in (("recipe", self.recipe), ("pipeline", self.pipeline)):
            if value is not None and not isinstance(value, str):
                raise CompileError(f"{name}={value!r}: expected text")
        if self.recipe is not None and self.pipeline is not None:
            raise CompileError(f"recipe={self.recipe!r} and pipeline={self.pipeline!r}: give one of them")
        if self.recipe is not None and not _RECIPE.fullmatch(self.recipe):
            raise CompileError(f"recipe={self.recipe!r}: expected w1 to w8, or with 8-bit inputs w1a8 to w8a8")
        if self.rest not in get_args(Rest):
            raise CompileError(f"rest={self.rest!r}: expected {' or '.join(get_args(Rest))}")

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> Options:
        """From a dictionary. Raises :class:`CompileError` for a key that is no option."""
        known = [*cls.__dataclass_fields__]
        for name in given or {}:
            if name not in known:
                raise CompileError(f"no option {name!r}{near_misses(name, known)}")
        return cls(**(given or {}))

    @property
    def passes(self) -> str:
        """The pipeline, as text."""
        if self.pipeline is not None:
            return self.pipeline
        match = _RECIPE.fullmatch(self.recipe or "w4")
        assert match is not None
        bits, activations = int(match[1]), bool(match[2])
        groups = "" if bits == 8 else ",granularity=group,group_size=64"
        quantize = f"quantize-weights{{bits={bits}{groups}}}" + (",quantize-activations{bits=8}" if activations else "")
        return f"canonicalize,{quantize},{_LOWERED}"


def backend(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compress Dynamo's graph and return what runs it. ``options``: see :class:`Options`.

    The compiled function is for running the model: its weights are read once, and no gradient reaches them (inputs get
    theirs). ``mode`` goes on to Inductor. Raises :class:`CompileError` for a model in train mode and inputs that can't
    be traced.
    """
    chosen = Options.of(options)
    if _drops(graph_module.graph):
        raise CompileError("the model is in train mode: this backend compresses it to run; call model.eval() before")
    bound = bind(graph_module, example_inputs)
    if not any(parameter.dim() > 1 for parameter in bound.module.parameters()):
        return graph_module if chosen.rest == "eager" else _inductor(graph_module, example_inputs, mode)
    program = _compressed(bound, chosen.passes)
    run = _runner(program, [example_inputs[position] for position in bound.positions], chosen.rest, mode)
    positions = bound.positions

    stored = [(position, name, weakref.ref(example_inputs[position])) for position, name in bound.stored]

    def call(*arguments: Any) -> Any:
        for position, name, compiled in stored:
            if arguments[position] is not compiled():
                raise CompileError(
                    f"{name} is another tensor than when the model was compiled, where weights and buffers are read "
                    "once: call torch.compiler.reset(), and compile the model again"
                )
        return run(*(arguments[position] for position in positions))

    return call


def _drops(graph: fx.Graph) -> bool:
    dropout = torch.nn.functional.dropout
    return any(
        node.target is dropout and bool(node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True))
        for node in graph.nodes
    )


# ---- compressing, once -----------------------------------------------------------------------------------------------

_Weights: TypeAlias = tuple[tuple[str, int, int, int], ...]
_made: dict[tuple[str, _Weights], tuple[weakref.ref[Program], list[weakref.ref[Tensor]]]] = {}
"""Programs that live, by their passes and the names, identities, addresses and versions of the float weights they were
made of."""


def _compressed(bound: Bound, passes: str) -> Program:
    """The graph after the passes, over the tensors of an earlier one of the same weights, if there is one."""
    parameters = dict(bound.module.named_parameters())
    key = passes, tuple((name, id(p), p.data_ptr(), version_of(p)) for name, p in parameters.items())
    with torch._guards.tracing(
        None
    ):  # what is traced here is no part of what Dynamo traces: its guards would be Dynamo's
        traced = trace(bound.module.eval(), bound.inputs, dynamic_axes=bound.axes)
        program = _with_weights_of(key, traced, {name for name, _ in bound.module.named_buffers()})
        if program is None:
            program = Pipeline.parse(passes)(traced)
            _made[key] = weakref.ref(program), [weakref.ref(value) for value in parameters.values()]
    return program


def _with_weights_of(key: tuple[str, _Weights], traced: Program, buffers: set[str]) -> Program | None:
    """The graph over the weights of an earlier one. ``buffers``, which the key does not tell of, are its own."""
    for known, (made, floats) in list(_made.items()):
        if made() is None or any(value() is None for value in floats):
            del _made[known]  # identities are those of living tensors
    if key not in _made or (source := _made[key][0]()) is None:
        return None
    try:
        return transplant(source, traced, buffers)
    except PassError:
        return None  # other calls of the same weights: their forms are chosen anew


# ---- running ---------------------------------------------------------------------------------------------------------


def _runner(program: Program, examples: Sequence[Tensor], rest: Rest, mode: str | None) -> Callable[..., Any]:
    if rest == "eager" or (not torch.is_grad_enabled() and _is_covered(program)):
        return lambda *inputs: program.nest_outputs(program.flat_results(inputs))
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    inner = _inductor(fx.GraphModule(program, graph), examples, mode)
    return lambda *inputs: program.nest_outputs(inner(*inputs))


def _is_covered(program: Program) -> bool:
    """Whether the plan computes all of the graph natively."""
    runner = program.runner
    return runner is not None and not runner.obstacle and not runner.coverage.torch


def _inductor(graph_module: fx.GraphModule, examples: Sequence[Any], mode: str | None) -> Callable[..., Any]:
    options = None if mode is None else list_mode_options(mode)
    return cast("Callable[..., Any]", compile_fx(graph_module, list(examples), config_patches=options))
