"""transplant: linears and embeddings of another trace get the form that they have in a Program."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prequant.passes import (
    BinaryCode,
    Canonicalize,
    FuseEpilogue,
    Input,
    Lower,
    PassError,
    Pipeline,
    Program,
    QuantizeActivations,
    QuantizeWeights,
    Signature,
    SplitOutliers,
    calibrate,
    lower,
)
from prequant.passes.transplant import transplant
from prequant.runtime import Granularity, ops
from prequant.trace import trace

from .support import (
    TinyEmbedding,
    TinyMLP,
    embedding_inputs,
    mlp_inputs,
    tiny_embedding_program,
    tiny_mlp_program,
)


class Doubled(TinyMLP):
    """The same layers, called otherwise: on twice the input, and only at the last position."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.second(self.dropout(torch.relu(self.first(2 * x))))[:, -1:]}


class Backwards(TinyEmbedding):
    """The same layers over the tokens from the last to the first."""

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return super().forward(input_ids.flip(1))


def on_meta(make: Callable[[], nn.Module], name: str, example: Tensor) -> Program:
    """The trace of a model whose tensors have no memory."""
    with torch.device("meta"):
        model = make().eval()
    return trace(model, {name: example.to("meta")})


def other_mlp() -> Program:
    return on_meta(Doubled, "x", mlp_inputs()["x"])


def other_embedding() -> Program:
    return on_meta(Backwards, "input_ids", embedding_inputs()["input_ids"])


FORMS: dict[str, Pipeline] = {
    "as-traced": Pipeline(),
    "canonical": Pipeline([Canonicalize()]),
    "codes": Pipeline([Canonicalize(), QuantizeWeights(bits=4)]),
    "groups": Pipeline(
        [Canonicalize(), QuantizeWeights(bits=3, granularity=Granularity.GROUP, group_size=4, symmetric=False)]
    ),
    "outliers": Pipeline([Canonicalize(), SplitOutliers(ratio=0.1), QuantizeWeights(bits=2)]),
    "float-outliers": Pipeline([Canonicalize(), SplitOutliers(ratio=0.1)]),
    "binary": Pipeline([Canonicalize(), BinaryCode(bits=2)]),
    "latent": Pipeline([Canonicalize(), QuantizeWeights(bits=2, latent=True)]),
    "inputs": Pipeline([Canonicalize(), QuantizeWeights(bits=4), QuantizeActivations(bits=8)]),
    "lowered": Pipeline([Canonicalize(), QuantizeWeights(bits=4), QuantizeActivations(bits=8), Lower()]),
    "fused": Pipeline([Canonicalize(), QuantizeWeights(bits=4), Lower(), FuseEpilogue()]),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_other_trace_computes_on_the_same_weights(form: str) -> None:
    program = FORMS[form](tiny_mlp_program())
    result = transplant(program, other_mlp())
    x = mlp_inputs(2, 4)["x"]
    expected = program(2 * x)["logits"][:, -1:]
    torch.testing.assert_close(result(x)["logits"], expected, rtol=0, atol=1e-6)
    assert targets(result) == targets(program)
    for name, tensor in result.named_parameters():
        assert tensor is program.tensor(name)


@pytest.mark.parametrize("form", FORMS)
def test_a_tied_weight_is_one_in_the_other_trace(form: str) -> None:
    program = FORMS[form](tiny_embedding_program())
    result = transplant(program, other_embedding())
    ids = embedding_inputs(2, 4)["input_ids"]
    torch.testing.assert_close(result(ids)["logits"], program(ids.flip(1))["logits"], rtol=0, atol=1e-6)
    names = {name for name, _ in (*result.named_parameters(), *result.named_buffers())}
    assert names == {name for name, _ in (*program.named_parameters(), *program.named_buffers())}
    assert result.info.aliases == {"tokens.weight": ("head.weight",)}


def targets(program: Program) -> set[str]:
    """The operators of prequant in a graph."""
    return {str(node.target) for node in program.graph.nodes if getattr(node.target, "namespace", "") == "prequant"}


def test_one_quantized_input_serves_all_its_readers() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    model = Two()
    program = FORMS["inputs"](trace(model, mlp_inputs()))
    result = transplant(program, on_meta(Two, "x", mlp_inputs()["x"]))
    assert len(list(result.graph.find_nodes(op="call_function", target=ops.fake_quantize))) == 1
    assert len(list(result.graph.find_nodes(op="call_function", target=ops.dynamic_scale))) == 1
    assert torch.equal(result(**mlp_inputs()), program(**mlp_inputs()))


@pytest.mark.parametrize("lowered", [False, True])
def test_static_scales_are_shared(lowered: bool) -> None:
    options: dict[str, Any] = {"dynamic": False, "granularity": Granularity.TENSOR, "symmetric": False}
    program = Pipeline([Canonicalize(), QuantizeWeights(bits=4), QuantizeActivations(bits=8, **options)])(
        tiny_mlp_program()
    )
    program = calibrate(program, [mlp_inputs(4, 6)])
    program = lower(program) if lowered else program
    result, x = transplant(program, other_mlp()), mlp_inputs(2, 4)["x"]
    torch.testing.assert_close(result(x)["logits"], program(2 * x)["logits"][:, -1:], rtol=0, atol=1e-6)
    assert result.tensor("second.input.scale") is program.tensor("second.input.scale")


def test_the_other_trace_may_have_constants_of_its_own() -> None:
    class Shifted(TinyMLP):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return super().forward(x + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]))

    program = FORMS["codes"](tiny_mlp_program())
    result = transplant(program, trace(Shifted().eval(), mlp_inputs()))
    x = mlp_inputs()["x"]
    torch.testing.assert_close(result(x)["logits"], program(x + torch.arange(1.0, 9.0))["logits"], rtol=0, atol=1e-5)


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_a_layer_that_is_not_there() -> None:
    class More(TinyMLP):
        def __init__(self) -> None:
            super().__init__()
            self.third = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.third(super().forward(x)["logits"])}

    with pytest.raises(PassError, match=r"no linear or embedding 'third' over third\.weight"):
        transplant(tiny_mlp_program(), on_meta(More, "x", mlp_inputs()["x"]))


def test_a_tensor_that_is_not_there_or_of_another_shape_or_dtype() -> None:
    program = FORMS["canonical"](tiny_mlp_program())
    with pytest.raises(PassError, match=r"'first\.weight' is float32\[16, 8\] in the Program, and float64\[16, 8\]"):
        transplant(program, on_meta(lambda: TinyMLP().double(), "x", mlp_inputs()["x"].double()))

    class Scaled(TinyMLP):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.factor * super().forward(x)["logits"]}

    with pytest.raises(PassError, match="does not have the tensor 'factor'"):
        transplant(program, on_meta(Scaled, "x", mlp_inputs()["x"]))


def test_quantized_values_at_no_linear() -> None:
    class Product(TinyMLP):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            hidden = self.first(x)
            return {"logits": hidden @ hidden.transpose(1, 2)}

    program = Pipeline([Canonicalize(), QuantizeActivations(bits=8, operands="matmul")])(trace(Product(), mlp_inputs()))
    with pytest.raises(PassError, match="stands at no linear or embedding"):
        transplant(program, on_meta(Product, "x", mlp_inputs()["x"]))


def test_calls_of_one_module_in_different_forms() -> None:
    class Twice(TinyMLP):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.first(x) + self.first(x * x)}

    program = FORMS["codes"](trace(Twice(), mlp_inputs()))
    first = next(iter(program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)))
    with program.graph.inserting_before(first):
        scale = program.graph.call_function(ops.dynamic_scale, (first.args[0],), {"format": "affine8:row"})
        quantized = program.graph.call_function(
            ops.fake_quantize, (first.args[0], scale, None), {"format": "affine8:row"}
        )
    first.update_arg(0, quantized)
    program.recompile()
    with pytest.raises(PassError, match="quantize weight or input in different ways"):
        transplant(program, on_meta(Twice, "x", mlp_inputs()["x"]))


def test_the_source_and_the_target_stay_as_they_are() -> None:
    program, other = FORMS["fused"](tiny_mlp_program()), other_mlp()
    before, other_before = program.code, other.code
    transplant(program, other)
    assert (program.code, other.code) == (before, other_before)
    assert other.signature == Signature(other.signature.inputs, {"logits": 0})
    assert isinstance(other.signature.inputs[0], Input)
