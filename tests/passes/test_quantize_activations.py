from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prequant.passes import (
    PassError,
    Pipeline,
    Program,
    QuantizeActivations,
    QuantizeWeights,
    ScopeError,
    Train,
    calibrate,
)
from prequant.passes.lower import Lower
from prequant.runtime import Granularity, PrequantError, ops
from prequant.trace import trace

from .support import assert_golden, embedding_inputs, mlp_inputs, tiny_embedding_program, tiny_mlp, tiny_mlp_program

aten = torch.ops.aten
STATIC: dict[str, Any] = {"dynamic": False, "granularity": "tensor"}


class Attention(nn.Module):
    """One head over [batch, length, 8]; query, key and value read the same tensor."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.fused = fused

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.fused:
            mixed = nn.functional.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(
                1
            )
        else:
            mixed = torch.matmul(torch.softmax(torch.matmul(q, k.transpose(-1, -2)) * 0.4, -1), v)
        return {"logits": self.out(mixed)}


class Shared(nn.Module):
    """One linear, used twice: two inputs, one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.layer(torch.tanh(self.layer(x)))}


def attention_program(fused: bool = False) -> Program:
    torch.manual_seed(3)
    return trace(Attention(fused).eval(), mlp_inputs())


def rounded(x: Tensor, bits: int = 8, per_token: bool = True) -> Tensor:
    """Symmetric quantization and back, written out in float64."""
    x = x.double()
    extent = x.abs().amax(-1, keepdim=True) if per_token else x.abs().max()
    scale = extent / (2 ** (bits - 1) - 1)
    return torch.where(scale == 0, x, (x / scale).round() * scale)


def count(program: Program, op: Any) -> int:
    return len(program.graph.find_nodes(op="call_function", target=op))


# ---- golden


def test_dynamic_per_token() -> None:
    assert_golden(
        QuantizeActivations()(tiny_mlp_program()),
        """
        program(x: f32[batch, length, 8])
          %dynamic_scale_default = dynamic_scale<affine8:row>(%x)
          %fake_quantize_default = fake_quantize<affine8:row>(%x, %dynamic_scale_default)
          %linear = linear(%fake_quantize_default, first.weight [16×8 f32], first.bias [16 f32])
          %relu = relu(%linear)
          %dropout = dropout(%relu, 0.1, False)
          %dynamic_scale_default_1 = dynamic_scale<affine8:row>(%dropout)
          %fake_quantize_default_1 = fake_quantize<affine8:row>(%dropout, %dynamic_scale_default_1)
          %linear_1 = linear(%fake_quantize_default_1, second.weight [4×16 f32], second.bias [4 f32])
          return {logits: %linear_1}
        """,
    )


def test_static_before_calibration() -> None:
    quantized = QuantizeActivations(bits=4, observer="percentile:99.9", symmetric=False, exclude=("first",), **STATIC)(
        tiny_mlp_program()
    )
    assert_golden(
        quantized,
        """
        program(x: f32[batch, length, 8])
          %linear = linear(%x, first.weight [16×8 f32], first.bias [16 f32])
          %relu = relu(%linear)
          %dropout = dropout(%relu, 0.1, False)
          %uncalibrated_default = uncalibrated<affine4:tensor:asym>(%dropout, observer=percentile:99.9, name=second.input)
          %linear_1 = linear(%uncalibrated_default, second.weight [4×16 f32], second.bias [4 f32])
          return {logits: %linear_1}
        """,  # noqa: E501
    )
    assert [(kept.what, kept.why) for kept in quantized.reports[-1].kept] == [("first.weight", "out of scope")]


# ---- values


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_linear_sees_its_input_rounded(bits: int, granularity: Any) -> None:
    model, inputs = tiny_mlp(), mlp_inputs(2, 7)
    quantized = QuantizeActivations(bits=bits, granularity=granularity)(tiny_mlp_program(model))
    per_token = granularity == "row"
    eager = model.double()
    hidden = torch.relu(eager.first(rounded(inputs["x"], bits, per_token)))
    expected = eager.second(rounded(hidden, bits, per_token))
    error = (quantized(**inputs)["logits"] - expected).abs().max()
    assert float(error) < 1e-5
    unquantized = eager.second(torch.relu(eager.first(inputs["x"].double())))
    assert float((unquantized - expected).abs().max()) > 1e-3


def test_eight_bits_barely_change_the_result() -> None:
    program, inputs = tiny_embedding_program(), embedding_inputs(4, 9)
    difference = QuantizeActivations()(program)(**inputs)["logits"] - program(**inputs)["logits"]
    assert 0 < float(difference.abs().max()) < 0.05


def test_padding_and_other_tokens_do_not_change_a_token() -> None:
    quantized = QuantizeActivations()(tiny_mlp_program())
    x = mlp_inputs(2, 6)["x"]
    alone = quantized(x=x[:1, :3])["logits"]
    x[1] *= 1000
    assert torch.allclose(quantized(x=x)["logits"][:1, :3], alone, atol=1e-6)


def test_gradients_pass_straight_through() -> None:
    program = Train(biases=True)(QuantizeActivations()(tiny_mlp_program()))
    program(**mlp_inputs())["logits"].sum().backward()
    model = tiny_mlp()
    model(**mlp_inputs())["logits"].sum().backward()
    gradient, expected = program.tensor("first.bias").grad, model.first.bias.grad
    assert gradient is not None and expected is not None
    assert torch.allclose(gradient, expected, atol=1e-5)


# ---- structure


def test_linears_that_read_the_same_tensor_share_one_node() -> None:
    quantized = QuantizeActivations()(attention_program())
    assert count(quantized, ops.fake_quantize) == count(quantized, ops.dynamic_scale) == 2
    nodes = quantized.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert len({node.args[0] for node in nodes[:3]}) == 1
    assert len(quantized.reports[-1].changes) == 4


def test_a_second_pass_shares_with_the_first_whatever_their_order() -> None:
    program = attention_program()
    both = Pipeline([QuantizeActivations(include=("value",)), QuantizeActivations(include=("query",))])(program)
    assert count(both, ops.fake_quantize) == 1
    once = QuantizeActivations(include=("query", "value"))(program)
    assert torch.equal(both(**mlp_inputs())["logits"], once(**mlp_inputs())["logits"])


def test_what_is_quantized_already_is_kept() -> None:
    program = Pipeline([QuantizeActivations(), QuantizeActivations(bits=4)])(tiny_mlp_program())
    assert {kept.why for kept in program.reports[-1].kept} == {"already affine8:row"}
    assert not program.reports[-1].changes


def test_a_shared_layer_gets_a_scale_for_each_use() -> None:
    program = trace(Shared().eval(), mlp_inputs())
    quantized = calibrate(QuantizeActivations(**STATIC)(program), [mlp_inputs()], progress=False)
    scales = [name for name, _ in quantized.named_parameters() if name.endswith("scale")]
    assert sorted(scales) == ["layer.input.scale", "layer.input_2.scale"]
    assert float(quantized.tensor(scales[0])) != float(quantized.tensor(scales[1]))


def test_quantized_weights_and_activations_lower_together() -> None:
    simulated = Pipeline([QuantizeWeights(), QuantizeActivations()])(tiny_mlp_program())
    lowered = Lower()(simulated)
    assert count(lowered, ops.fake_quantize) == 0
    packed = lowered.graph.find_nodes(op="call_function", target=ops.packed_linear)
    assert [node.kwargs["input_format"] for node in packed] == ["affine8:row"] * 2
    assert torch.allclose(lowered(**mlp_inputs())["logits"], simulated(**mlp_inputs())["logits"], atol=1e-6)


# ---- attention


def test_products_of_activations_are_kept_by_default() -> None:
    kept = QuantizeActivations()(attention_program()).reports[-1].kept
    assert [item.what for item in kept] == ["matmul", "matmul_1"]
    assert all("operands='matmul'" in item.why for item in kept)


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_both_sides_of_attention_are_rounded_along_the_axis_that_is_is_not_summed(granularity: Any) -> None:
    program, inputs = attention_program(), mlp_inputs(2, 6)
    quantized = QuantizeActivations(granularity=granularity, operands="matmul", include=("matmul*",))(program)
    per_token = granularity == "row"
    model = Attention(False).double()
    model.load_state_dict({name: value.double() for name, value in program.named_parameters()})
    x = inputs["x"].double()
    q, k, v = model.query(x), model.key(x), model.value(x)
    scores = rounded(q, per_token=per_token) @ rounded(k, per_token=per_token).mT * 0.4
    # The rows of the right operand's transpose: tokens of the keys, channels of the values.
    values = rounded(v.mT, per_token=per_token).mT
    expected = model.out(rounded(torch.softmax(scores, -1), per_token=per_token) @ values)
    assert float((quantized(**inputs)["logits"] - expected).abs().max()) < 1e-5
    assert quantized(**mlp_inputs(3, 9))["logits"].shape == (3, 9, 8)


def test_fused_attention_quantizes_its_inputs_and_reports_its_probabilities() -> None:
    program = attention_program(fused=True)
    quantized = QuantizeActivations(granularity=Granularity.TENSOR, operands="matmul", exclude=("type:Linear",))(
        program
    )
    report = quantized.reports[-1]
    assert [change.what.rpartition(", ")[2] for change in report.changes] == ["query", "key", "value"]
    assert any("attention probabilities" in kept.why for kept in report.kept)
    q, k, v = (rounded(program_part, per_token=False).float() for program_part in _projections(program))
    expected = nn.functional.scaled_dot_product_attention(q, k, v)
    weight, bias = program.tensor("out.weight"), program.tensor("out.bias")
    difference = quantized(**mlp_inputs())["logits"] - nn.functional.linear(expected, weight, bias)
    assert float(difference.abs().max()) < 1e-5


def _projections(program: Program) -> list[Tensor]:
    x = mlp_inputs()["x"]
    parts = ("query", "key", "value")
    return [nn.functional.linear(x, program.tensor(f"{p}.weight"), program.tensor(f"{p}.bias")) for p in parts]


def test_static_scales_of_attention_are_named_by_their_role() -> None:
    quantized = QuantizeActivations(operands="matmul", include=("matmul*",), **STATIC)(attention_program())
    names = [node.kwargs["name"] for node in quantized.graph.find_nodes(op="call_function", target=ops.uncalibrated)]
    assert names == ["matmul.left", "matmul.right", "matmul_1.left", "matmul_1.right"]


# ---- asymmetric after a softmax or an activation


def formats(program: Program) -> dict[str, str]:
    """Format of each operand, by what the report calls it."""
    return {change.what: change.how for change in program.reports[-1].changes}


def test_only_what_comes_straight_from_an_activation_is_asymmetric() -> None:
    quantized = QuantizeActivations(asymmetric_after=("activation",), **STATIC)(tiny_mlp_program())
    assert_golden(
        quantized,
        """
        program(x: f32[batch, length, 8])
          %uncalibrated_default = uncalibrated<affine8:tensor>(%x, observer=minmax, name=first.input)
          %linear = linear(%uncalibrated_default, first.weight [16×8 f32], first.bias [16 f32])
          %relu = relu(%linear)
          %dropout = dropout(%relu, 0.1, False)
          %uncalibrated_default_1 = uncalibrated<affine8:tensor:asym>(%dropout, observer=minmax, name=second.input)
          %linear_1 = linear(%uncalibrated_default_1, second.weight [4×16 f32], second.bias [4 f32])
          return {logits: %linear_1}
        """,
    )
    report = quantized.reports[-1]
    assert formats(quantized) == {"first.weight": "affine8:tensor", "second.weight": "affine8:tensor:asym"}
    assert [change.figures.get("after") for change in report.changes] == [None, "activation"]
    assert not report.kept


def test_only_attention_probabilities_are_asymmetric_after_a_softmax() -> None:
    program = attention_program()
    quantized = QuantizeActivations(operands="matmul", asymmetric_after=("softmax", "activation"), **STATIC)(program)
    found = formats(quantized)
    assert found.pop("matmul_1, left") == "affine8:tensor:asym"
    assert set(found) == {
        *("query.weight", "key.weight", "value.weight", "out.weight"),
        *("matmul, left", "matmul, right", "matmul_1, right"),
    }
    assert set(found.values()) == {"affine8:tensor"}
    (kept,) = quantized.reports[-1].kept
    assert kept.what == "asymmetric_after=activation" and "no input comes straight from" in kept.why


@pytest.mark.parametrize(("fused", "operands"), [(True, "matmul"), (False, "linear")])
def test_where_there_are_no_probabilities_the_report_says_so(fused: bool, operands: Any) -> None:
    quantize = QuantizeActivations(operands=operands, asymmetric_after=("softmax",), **STATIC)
    quantized = quantize(attention_program(fused))
    assert set(formats(quantized).values()) == {"affine8:tensor"}
    reasons = {kept.what: kept.why for kept in quantized.reports[-1].kept}
    assert "graphs with eager attention, and operands='matmul'" in reasons["asymmetric_after=softmax"]


@pytest.mark.parametrize("bits", [3, 8])
def test_probabilities_use_all_levels_of_their_range(bits: int) -> None:
    program, inputs = attention_program(), mlp_inputs(2, 6)
    quantize = QuantizeActivations(
        bits=bits, operands="matmul", asymmetric_after=("softmax",), include=("matmul_1",), **STATIC
    )
    calibrated = calibrate(quantize(program), [inputs], progress=False)
    model = Attention(False).double()
    model.load_state_dict({name: value.double() for name, value in program.named_parameters()})
    x = inputs["x"].double()
    q, k, v = model.query(x), model.key(x), model.value(x)
    probabilities = torch.softmax(q @ k.mT * 0.4, -1)
    step = float(probabilities.max()) / (2**bits - 1)
    expected = model.out((probabilities / step).round() * step @ rounded(v, bits, per_token=False))
    assert float((calibrated(**inputs)["logits"] - expected).abs().max()) < 1e-5
    symmetric = calibrate(replace(quantize, asymmetric_after=())(program), [inputs], progress=False)
    assert float((symmetric(**inputs)["logits"] - expected).abs().max()) > 1e-4


# ---- refusals


def test_an_uncalibrated_program_refuses_to_run() -> None:
    program = QuantizeActivations(**STATIC)(tiny_mlp_program())
    with pytest.raises(PrequantError, match=r"'first\.input' has no scale yet: calibrate"):
        program(**mlp_inputs())
    with pytest.raises(PrequantError, match="calibrate"):
        Lower()(program)(**mlp_inputs())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dynamic": False}, "static activation scales are per tensor"),
        ({"symmetric": False}, "dynamic activation scales are symmetric"),
        ({"granularity": "group"}, "not per group"),
        ({"observer": "median"}, "'median' is unknown"),
        ({"bits": 9}, "bits=9"),
        ({"operands": "everything"}, "not one of 'linear', 'matmul'"),
        ({"asymmetric_after": "softmax"}, "it goes with dynamic=False and symmetric=True"),
        (
            {"asymmetric_after": "softmax", "symmetric": False, **STATIC},
            "it goes with dynamic=False and symmetric=True",
        ),
        ({"asymmetric_after": "tanh", **STATIC}, "'tanh' is not one of 'softmax', 'activation'"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PrequantError, match=message):
        QuantizeActivations(**options)


def test_a_pattern_that_matches_nothing_names_near_misses() -> None:
    with pytest.raises(PassError, match=r"'frist' matches none.*first") as raised:
        QuantizeActivations(include=("frist",))(tiny_mlp_program())
    assert isinstance(raised.value.__cause__, ScopeError)


def test_text_form() -> None:
    text = "quantize-activations{granularity=tensor,dynamic=false,observer=percentile:99.9,symmetric=false}"
    assert str(QuantizeActivations(observer="percentile:99.9", symmetric=False, **STATIC)) == text
    assert Pipeline.parse(text).passes == (QuantizeActivations(observer="percentile:99.9", symmetric=False, **STATIC),)
    after = QuantizeActivations(asymmetric_after=("softmax", "activation"), **STATIC)
    text = "quantize-activations{granularity=tensor,dynamic=false,asymmetric_after=[softmax,activation]}"
    assert str(after) == text and Pipeline.parse(text).passes == (after,)
    one = Pipeline.parse("quantize-activations{granularity=tensor,dynamic=false,asymmetric_after=softmax}")
    assert one.passes == (QuantizeActivations(asymmetric_after=("softmax",), **STATIC),)
