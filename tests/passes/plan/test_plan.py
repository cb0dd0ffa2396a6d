"""Plans against the graphs that they were made of: node by node, and as a whole."""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from prequant.passes import (
    BinaryCode,
    Canonicalize,
    Pass,
    Pipeline,
    Program,
    QuantizeActivations,
    QuantizeWeights,
    Signature,
    SplitOutliers,
    calibrate,
    lower,
)
from prequant.passes.plan import NoPlan, compile_plan
from prequant.passes.plan.compile import _simplified, draft_plan
from prequant.passes.shapes import propagate_shapes
from prequant.runtime import Granularity, ops
from prequant.trace import trace

from ...models import FAMILIES, traced

aten = torch.ops.aten

MODELS = (
    "bert-sequence-classification",
    "roberta-masked-lm",
    "distilbert-question-answering",
    "albert-masked-lm",
    "mpnet-encoder",
    "t5-seq2seq-lm",
    "gpt2-causal-lm",
    "opt-causal-lm",
    "llama-causal-lm",
    "qwen2-sequence-classification",
)
SIZES = ((2, 7), (1, 1), (3, 30), (1, 30), (2, 7))
"""Of calls one after the other, so that memory that a call leaves behind is used by the next in other places."""


def graph_of(program: Program, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """The flat results of a graph, node by node."""
    with torch.no_grad():
        result = fx.Interpreter(program).run(*inputs)
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def assert_close(found: Any, expected: Any, name: str = "", bound: float = 1e-5) -> None:
    if not isinstance(expected, Tensor):
        assert found == expected, name
        return
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype), name
    if not expected.is_floating_point() or not expected.numel():
        assert torch.equal(found, expected), name
        return
    finite = expected.abs() < 1e30  # masks hold the lowest numbers that there are
    assert torch.equal(found[~finite], expected[~finite]), name
    largest = float(expected[finite].abs().max()) if finite.any() else 0.0
    error = float((found[finite] - expected[finite]).abs().max()) if finite.any() else 0.0
    assert error <= bound * max(largest, 1e-3), f"{name}: {error} of {largest}"


@cache
def lowered(name: str) -> Program:
    return lower(Pipeline([Canonicalize(), QuantizeWeights(bits=4)])(traced(name)))


def showing_all(program: Program) -> tuple[Program, list[str]]:
    """The graph that a plan is made of, with every tensor as a result; and their names."""
    shown = _simplified(program)
    propagate_shapes(shown)
    nodes = [n for n in shown.graph.nodes if n.op == "call_function" and isinstance(n.meta["val"], Tensor)]
    shown.graph.output_node().args = (tuple(nodes),)
    shown.update_info(signature=Signature(shown.signature.inputs, list(range(len(nodes)))))
    shown.recompile()
    return shown, [node.name for node in nodes]


@pytest.mark.parametrize("name", ["bert-sequence-classification", "gpt2-causal-lm", "llama-causal-lm"])
def test_every_node_of_a_model(name: str) -> None:
    program = lowered(name)
    shown, names = showing_all(program)
    plan = compile_plan(shown)
    for batch, length in SIZES[:3]:
        inputs = shown.bind((), FAMILIES[name]().make_inputs(batch, length, padded=length > 2))
        with torch.no_grad():
            found = plan(*inputs)
        for node, one, other in zip(names, found, graph_of(shown, inputs), strict=True):
            assert_close(one, other, node)


@pytest.mark.parametrize("name", MODELS)
def test_results_of_a_model(name: str) -> None:
    program = lowered(name)
    draft = draft_plan(program)
    assert len(draft.coverage.native) > 10
    plan, kept = draft.finish(program.tensor), []
    for batch, length in SIZES:
        inputs = program.bind((), FAMILIES[name]().make_inputs(batch, length, padded=True))
        with torch.no_grad():
            found, expected = plan(*inputs), graph_of(program, inputs)
        kept.append((found, expected))
    # Compared at the end: no call writes into what an earlier one gave.
    for found, expected in kept:
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)


# ---- formats


FORMATS: dict[str, tuple[list[Pass], float]] = {
    "outliers": ([SplitOutliers(ratio=0.02), QuantizeWeights(bits=3)], 1e-5),
    "groups": ([QuantizeWeights(bits=4, granularity=Granularity.GROUP, group_size=32, symmetric=False)], 1e-5),
    "bcq": ([BinaryCode(bits=2)], 1e-5),
    # A rounding of the float steps now and then moves an input over the middle between two levels of 8 bits.
    "activations": ([QuantizeWeights(bits=4), QuantizeActivations()], 2e-2),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str) -> None:
    steps, bound = FORMATS[name]
    family = FAMILIES["bert-sequence-classification"]()
    program = lower(Pipeline(steps)(traced("bert-sequence-classification")))
    plan = compile_plan(program)
    for batch, length in SIZES[:3]:
        inputs = program.bind((), family.make_inputs(batch, length, padded=True))
        with torch.no_grad():
            for one, other in zip(plan(*inputs), graph_of(program, inputs), strict=True):
                assert_close(one, other, bound=bound)


def test_static_scales_of_activations() -> None:
    family = FAMILIES["bert-sequence-classification"]()
    program = Pipeline([QuantizeWeights(bits=8), QuantizeActivations(granularity=Granularity.TENSOR, dynamic=False)])(
        traced("bert-sequence-classification")
    )
    program = calibrate(program, [family.make_inputs(2, 9)], progress=False)
    program = lower(program)
    inputs = program.bind((), family.make_inputs(2, 9))
    with torch.no_grad():
        assert_close(compile_plan(program)(*inputs)[0], graph_of(program, inputs)[0], bound=2e-2)


# ---- graphs


class Of(nn.Module):
    """A function of an input [batch, length, 8] behind a linear, which the plan computes in memory of its own."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("fixed", torch.randn(5))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x, self.first(x))


def program_of(function: Callable[..., Any]) -> Program:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = trace(Of(function).eval(), {"x": torch.randn(3, 11, 8)})
    return lower(Pipeline([QuantizeWeights(bits=8)])(program))


attention = nn.functional.scaled_dot_product_attention


def heads(x: Tensor) -> Tensor:
    """Two heads of four numbers, as attention takes them."""
    return x.view(*x.shape[:2], 2, 4).transpose(1, 2)


GRAPHS: dict[str, Callable[..., Any]] = {
    "a call in the middle": lambda m, x, y: m.second(torch.cumsum(y, 1)) + y,
    "calls between": lambda m, x, y: m.second(torch.sort(m.second(torch.sin(y)), -1).values) * y,
    "a list": lambda m, x, y: torch.unbind(y, -1)[3] + torch.unbind(y, -1)[5],
    "several results": lambda m, x, y: (torch.topk(y, 3, -1).values, torch.max(y, 1)),
    "a view of a call": lambda m, x, y: m.second(torch.movedim(y, 1, 0)).relu() + 1,
    "a view that lives long": lambda m, x, y: m.second(m.second(m.second(y).tanh()).tanh()) * y.mT.mean(),
    "a narrow part that lives long": lambda m, x, y: (
        m.second(m.second(m.second(y).tanh()).tanh()) + y.reshape(-1, 8).narrow(0, 0, 1)
    ),
    "an input": lambda m, x, y: (y, x),
    "only an input": lambda m, x, y: x,
    "a constant": lambda m, x, y: (y, m.fixed),
    "a copy of an input": lambda m, x, y: (y, x.clone()),
    "the same twice": lambda m, x, y: (y, y, y.clone()),
    "a slice": lambda m, x, y: y[:, 0],
    "a slice and all": lambda m, x, y: (y[:, 1:], y, y[..., 2:4]),
    "a transposed one": lambda m, x, y: y.transpose(1, 2),
    "a view": lambda m, x, y: y.reshape(-1, 2, 4),
    "the last ones": lambda m, x, y: m.second(y[:, -5:]),
    "the first ones": lambda m, x, y: m.second(y[:, :4]) - m.second(y[:, 1:5]),
    "every other": lambda m, x, y: m.second(y[:, ::2]),
    "the last": lambda m, x, y: m.second(y[:, -1]),
    "half": lambda m, x, y: m.second(y[:, : y.shape[1] // 2]),
    "sizes": lambda m, x, y: (y, y.shape[1], 2 * y.shape[0] * y.shape[1]),
    "a size in a sum": lambda m, x, y: y * y.shape[1] + x,
    "parts": lambda m, x, y: torch.cat([*y.chunk(2, -1)[::-1], *y.split([2, 3, 3], -1)[1:]], -1),
    "a concatenation": lambda m, x, y: m.second(torch.cat([y, x, m.second(y)], 1)),
    "stacked": lambda m, x, y: torch.stack([y, x], 2).sum(2) + m.second(y),
    "broadcasting": lambda m, x, y: (y[:, :1] * m.second(y) - m.fixed[2]) / (y[..., :1].abs() + 1),
    "five axes": lambda m, x, y: m.second(y.view(*y.shape[:2], 2, 2, 2).transpose(2, 4).reshape(*y.shape)),
    "of no axes": lambda m, x, y: y * (y.mean() + 1),
    "a number first": lambda m, x, y: 1 - y / 3 + 2 / (1 + y.exp()),
    "integers": lambda m, x, y: y * (x > 0) + torch.arange(y.shape[1])[:, None],
    "norms": lambda m, x, y: nn.functional.layer_norm(y, (8,)) + nn.functional.rms_norm(y, (8,)),
    "norms of a part": lambda m, x, y: nn.functional.layer_norm(y[..., 2:6], (4,)),
    "norms of columns": lambda m, x, y: nn.functional.layer_norm(heads(y).transpose(1, 3), (2,), eps=0.1),
    "attention": lambda m, x, y: attention(heads(y), heads(y), heads(y)),
    "causal attention": lambda m, x, y: attention(heads(y), heads(y), heads(y), is_causal=True),
    "attention to one": lambda m, x, y: attention(y[:, None], x[:, None], m.second(y)[:, None]),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs(name: str) -> None:
    program = program_of(GRAPHS[name])
    assert program.runner is not None
    assert program.runner.obstacle == ""
    kept = []
    for batch, length in ((3, 11), (1, 9), (2, 1), (2, 5), (1, 1), (4, 3), (0, 6), (3, 130)):
        x = torch.randn(batch, length, 8)
        inputs = (x.clone(),)
        with torch.no_grad():
            try:
                expected = graph_of(program, inputs)
            except (RuntimeError, IndexError) as error:
                with pytest.raises(type(error)):  # such sizes are not for this graph
                    program(x)
                continue
            flat: list[Any] = []
            nested = program(x)
            for value in nested if isinstance(nested, (list, tuple)) else [nested]:
                flat += value if isinstance(value, (list, tuple)) else [value]
        kept.append((flat, [e.clone() if isinstance(e, Tensor) else e for e in expected], (batch, length)))
    assert kept
    for flat, wanted, sizes in kept:
        for one, other in zip(flat, wanted, strict=True):
            assert_close(one, other, str(sizes))


def test_what_a_caller_gets_is_the_callers() -> None:
    program = program_of(GRAPHS["a copy of an input"])
    x = torch.randn(3, 11, 8)
    with torch.no_grad():
        first, copied = program(x)
        kept = first.clone()
        copied.zero_()
        assert x.all()
        program(torch.randn(3, 11, 8))
        assert torch.equal(first, kept)
    first.add_(torch.ones(8, requires_grad=True))  # no view that was made without gradients
    assert first.requires_grad


def test_a_copy_beside_the_original_is_another() -> None:
    with torch.no_grad():
        first, same, copied = program_of(GRAPHS["the same twice"])(torch.randn(3, 11, 8))
        copied.zero_()
    assert first.all()
    assert same.all()


NO_PLAN: dict[str, tuple[Callable[..., Any], str]] = {
    "sizes that hang on data": (lambda m, x, y: y[y > 0], "from data"),
}


@pytest.mark.parametrize("name", NO_PLAN)
def test_no_plan(name: str) -> None:
    function, why = NO_PLAN[name]
    program = program_of(function)
    assert program.runner is not None
    with pytest.raises(NoPlan, match=why):
        compile_plan(program)
    x = torch.randn(2, 4, 8)
    with torch.no_grad():
        assert torch.equal(program(x), graph_of(program, (x,))[0])


def test_no_plan_for_what_writes_into_tensors() -> None:
    program = program_of(lambda m, x, y: y.relu())
    node = next(iter(program.graph.find_nodes(op="call_function", target=ops.packed_linear)))
    with program.graph.inserting_after(node):
        program.graph.call_function(aten.zero_.default, (node,))
    program.recompile()
    with pytest.raises(NoPlan, match="writes into"):
        compile_plan(program)


def test_a_program_of_floats() -> None:
    program = trace(Of(lambda m, x, y: m.second(y.relu())).eval(), {"x": torch.randn(3, 11, 8)})
    x = torch.randn(2, 4, 8)
    with torch.no_grad():
        assert_close(compile_plan(program)(x)[0], graph_of(program, (x,))[0])
