"""Packed linears that read one input, fused: what changes, what stays, and that nobody can tell from the results."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prequant.passes import (
    Canonicalize,
    Freeze,
    FuseEpilogue,
    FuseParallelLinears,
    Input,
    Lower,
    PassError,
    Pipeline,
    Program,
    QuantizeActivations,
    QuantizeWeights,
    Signature,
    SplitOutliers,
    Train,
    Verify,
    calibrate,
    lower,
    weights,
)
from prequant.passes.properties import violation
from prequant.runtime import Granularity, ops
from prequant.trace import trace

from ..models import FAMILIES, traced
from .support import assert_golden, mlp_inputs


class Attention(nn.Module):
    """Query, key and value of an input, and what ``gate`` and ``up`` make of the attention's result, 8 -> 8."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, size) for size in (8, 8, 4))
        self.gate, self.up, self.down = nn.Linear(4, 16), nn.Linear(4, 16, bias=False), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        seen = nn.functional.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
        return x + self.down(torch.relu(self.gate(seen)) * self.up(seen))


def lowered(model: nn.Module, *passes: Any) -> Program:
    torch.manual_seed(0)
    for value in model.parameters():
        nn.init.normal_(value)
    program = trace(model.eval(), mlp_inputs())
    return Pipeline([Canonicalize(), *(passes or (QuantizeWeights(),)), Lower(strict=True), FuseEpilogue()])(program)


def fused(program: Program) -> dict[str, str]:
    assert program.reports[-1].source.startswith("fuse-parallel-linears")
    return {change.what: change.how for change in program.reports[-1].changes}


def fuse(program: Program, **options: Any) -> Program:
    return Pipeline([FuseParallelLinears(**options)])(program, [Verify()])


ALL = {"query.weight": "with key.weight, value.weight", "gate.weight": "with up.weight"}


# ---- what changes ----------------------------------------------------------------------------------------------------


def test_golden() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 6, bias=False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return torch.relu(self.a(x)), self.b(x)

    program = fuse(lowered(Two(), QuantizeWeights(), QuantizeActivations()))
    # Written out, so that the text does not hang on how the tracer names axes.
    program.update_info(signature=Signature((Input("x", torch.float32, ("batch", "length", 8)),), (0, 1)))
    assert_golden(
        program,
        """
        program(x: f32[batch, length, 8])
          %packed_linears_default = packed_linears(%x, codes=[a.weight.codes [4×4 u8], b.weight.codes [6×4 u8]], scales=[a.weight.scale [4×1 f32], b.weight.scale [6×1 f32]], biases=[a.bias [4 f32], None], formats=[affine4:row, affine4:row], activations=[relu, ], columns=8, input_format=affine8:row)
          %getitem = operator.getitem(%packed_linears_default, 0)
          %getitem_1 = operator.getitem(%packed_linears_default, 1)
          return (%getitem, %getitem_1)
        """,  # noqa: E501
    )
    assert fused(program) == {"a.weight": "with b.weight"} and program.reports[-1].totals == {"fused": 1}


PIPELINES: dict[str, tuple[Any, ...]] = {
    "weights": (QuantizeWeights(),),
    "groups": (QuantizeWeights(bits=8, granularity=Granularity.GROUP, group_size=8, symmetric=False),),
    "outliers": (SplitOutliers(ratio=0.1), QuantizeWeights(bits=3), QuantizeActivations()),
    "dynamic": (QuantizeWeights(), QuantizeActivations()),
}


@pytest.mark.parametrize("passes", PIPELINES.values(), ids=PIPELINES.keys())
def test_fused_equals_apart(passes: tuple[Any, ...]) -> None:
    apart = lowered(Attention(), *passes)
    together = fuse(apart)
    assert fused(together) == ALL
    assert sum(node.target is ops.packed_linear for node in together.graph.nodes) == 1
    for shape in ((3, 5), (1, 1), (2, 7)):
        assert torch.equal(together(**mlp_inputs(*shape)), apart(**mlp_inputs(*shape)))


def test_static_inputs() -> None:
    simulated = Pipeline(
        [
            Canonicalize(),
            QuantizeWeights(),
            QuantizeActivations(granularity=Granularity.TENSOR, dynamic=False, symmetric=False),
        ]
    )(trace(Attention().eval(), mlp_inputs()))
    apart = Lower(strict=True)(calibrate(simulated, [mlp_inputs()], progress=False))
    together = fuse(apart)
    assert fused(together) == ALL
    assert torch.equal(together(**mlp_inputs()), apart(**mlp_inputs()))


@pytest.mark.parametrize("name", ["bert-sequence", "llama-causal-lm", "t5-seq2seq"])
def test_models(name: str) -> None:
    name = next(key for key in FAMILIES if key.startswith(name.partition("-")[0]))
    simulated = Pipeline([Canonicalize(), QuantizeWeights(), QuantizeActivations()])(traced(name))
    apart = Pipeline([Lower(strict=True), FuseEpilogue()])(simulated)
    together = fuse(apart)
    layers = sum(view.name.endswith(("query.weight", "q_proj.weight", ".q.weight")) for view in weights(apart))
    assert layers and len(fused(together)) >= layers, fused(together)
    inputs = FAMILIES[name]().make_inputs(2, 9, padded=True)
    for one, other in zip(tensors(together(**inputs)), tensors(apart(**inputs)), strict=True):
        assert torch.equal(one, other)


def tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    values = result.values() if hasattr(result, "values") else result
    return [tensor for value in values if value is not None for tensor in tensors(value)]


# ---- what stays ------------------------------------------------------------------------------------------------------


def test_a_scope_chooses() -> None:
    apart = lowered(Attention())
    without_key = fuse(apart, exclude=("key",))
    assert fused(without_key) == {"query.weight": "with value.weight", "gate.weight": "with up.weight"}
    assert [kept.what for kept in without_key.reports[-1].kept] == ["key.weight"]
    assert fused(fuse(apart, include=("gate", "up"))) == {"gate.weight": "with up.weight"}
    assert torch.equal(without_key(**mlp_inputs()), apart(**mlp_inputs()))
    with pytest.raises(PassError, match="'qeury' matches none of the 6 candidates; near misses: query"):
        FuseParallelLinears(include=("qeury",))(apart)


def test_the_scope_of_an_epilogue() -> None:
    apart = Pipeline([Canonicalize(), QuantizeWeights(), Lower()])(trace(Attention().eval(), mlp_inputs()))
    program = FuseEpilogue(exclude=("down",))(apart)
    assert {change.what for change in program.reports[-1].changes} == {"gate.weight"}
    assert [(kept.what, kept.why) for kept in program.reports[-1].kept] == [("down.weight", "out of scope")]


class Branches(nn.Module):
    """``a`` and ``b`` of one input, joined as a test says."""

    def __init__(self, join: Any) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self, x)


def test_what_can_not_be_fused_stays() -> None:
    nothing: dict[str, str] = {}

    def of(join: Any, *passes: Any) -> dict[str, str]:
        apart = lowered(Branches(join), *passes)
        together = fuse(apart)
        assert torch.equal(together(**mlp_inputs()), apart(**mlp_inputs()))
        return fused(together)

    assert of(lambda m, x: torch.tanh(m.a(x)) * m.b(x) * m.c(x)) == {"a.weight": "with b.weight, c.weight"}
    assert of(lambda m, x: m.b(m.a(x)) * m.c(m.a(x))) == nothing, "a product of the first result in between"
    assert of(lambda m, x: m.a(x) * m.b(x + 1) * m.c(x + 2)) == nothing, "other inputs"
    assert of(lambda m, x: m.a(x) * m.c(m.b(x))) == {"a.weight": "with b.weight"}
    assert of(lambda m, x: m.a(x) * torch.tanh(m.c(x + 1)) * m.b(x)) == nothing, "a product in between"
    assert of(lambda m, x: torch.tanh(m.a(x) @ x.mT) @ (m.b(x) * m.c(x))) == {"b.weight": "with c.weight"}
    # A sum of two linears is the residual of one, which then waits for the other.
    assert of(lambda m, x: (m.a(x) + m.b(x)) * m.c(x)) == {"b.weight": "with c.weight"}
    some = (QuantizeWeights(), QuantizeActivations(include=("a", "b")))
    assert of(lambda m, x: m.a(x) * m.b(x) * m.c(x), *some) == {"a.weight": "with b.weight"}


def test_an_operand_that_comes_later_keeps_its_linear_apart() -> None:
    program = lowered(Branches(lambda m, x: m.a(x) * m.b(x)))
    first, second = program.graph.find_nodes(op="call_function", target=ops.packed_linear)
    with program.graph.inserting_before(second):
        bias = program.graph.call_function(torch.ops.aten.sum.dim_IntList, (first, [0, 1]))
    second.args = (*second.args[:8], bias, *second.args[9:])
    program.recompile()
    together = FuseParallelLinears()(program)
    assert fused(together) == {}
    (kept,) = together.reports[-1].kept
    assert kept.what == "b.weight" and kept.why == "its operand sum_dim_int_list is computed after a.weight is read"


# ---- who reads the graph ---------------------------------------------------------------------------------------------


def test_weights_are_the_same() -> None:
    apart = lowered(Attention(), *PIPELINES["outliers"])
    together = fuse(apart)
    for one, other in zip(weights(together), weights(apart), strict=True):
        for field in ("name", "kind", "format", "shape", "tensors", "input_format", "lowered", "bytes"):
            assert getattr(one, field) == getattr(other, field)
        assert torch.equal(one.value(), other.value())
        assert one.consumers[0].meta["module_stack"] == other.consumers[0].meta["module_stack"]


def test_properties_hold_and_see_what_is_wrong() -> None:
    program = fuse(lowered(Attention(), *PIPELINES["outliers"]))
    for name in ("valid-formats", "no-orphans", "lowered", "canonical"):
        assert violation(name, program) is None
    program.set_tensor("key.weight.scale", torch.ones(7, 1))
    assert "the scale of affine3:row should have the shape [8, 1], not [7, 1]" in str(
        violation("valid-formats", program)
    )
    program.set_tensor("key.weight.scale", torch.ones(8, 1))
    program.set_tensor("key.weight.outliers.values", torch.ones(1))
    assert "1 outlier values with" in str(violation("valid-formats", program))


def test_it_trains_as_before() -> None:
    apart = lowered(Attention(), *PIPELINES["outliers"])
    together = fuse(apart)
    train = Train(scales=True, biases=True, outliers=True, include=("key", "up", "down"), head=("query.bias",))
    programs = [train(apart), train(together)]
    for program in programs:
        program(**mlp_inputs()).square().sum().backward()
    learned = [{n: v.grad for n, v in program.named_parameters() if v.requires_grad} for program in programs]
    assert learned[0].keys() == learned[1].keys() >= {"key.weight.scale", "key.bias", "up.weight.outliers.values"}
    for name, gradient in learned[0].items():
        assert gradient is not None
        torch.testing.assert_close(learned[1][name], gradient, rtol=1e-5, atol=1e-6)
    frozen = Freeze(outlier_dtype="float16")(programs[1])
    assert frozen.tensor("key.weight.outliers.values").dtype is torch.float16
    assert not any(value.requires_grad for value in frozen.parameters())


def test_a_static_input_scale_trains() -> None:
    steps = [Canonicalize(), QuantizeWeights(), QuantizeActivations(granularity=Granularity.TENSOR, dynamic=False)]
    simulated = Pipeline(steps)(trace(Attention().eval(), mlp_inputs()))
    program = fuse(Lower()(calibrate(simulated, [mlp_inputs()], progress=False)))
    trained = Train(input_scales=True)(program)
    trained(**mlp_inputs()).sum().backward()
    scales = {name: value for name, value in trained.named_parameters() if value.requires_grad}
    assert len(scales) == 3 and all(value.grad is not None for value in scales.values())


def test_lower_fuses() -> None:
    program = lower(Pipeline([Canonicalize(), QuantizeWeights()])(trace(Attention().eval(), mlp_inputs())))
    names = [report.source.partition("{")[0] for report in program.reports]
    assert names[-3:] == ["fuse-epilogue", "fuse-parallel-linears", "plan"]
    assert {change.what: change.how for change in program.reports[-2].changes} == ALL


def test_text_form() -> None:
    text = "fuse-parallel-linears{include=[*.attention.*]}"
    assert str(Pipeline.parse(text)) == text
    assert Pipeline.parse(text).passes == (FuseParallelLinears(include=("*.attention.*",)),)
