import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prequant.passes import (
    BinaryCode,
    Canonicalize,
    PassError,
    Pipeline,
    Program,
    QuantizeWeights,
    SplitOutliers,
    readable,
    weight_sites,
)
from prequant.runtime import Granularity, PrequantError
from prequant.trace import trace

from ..models import traced
from . import truth
from .support import (
    assert_golden,
    embedding_inputs,
    mlp_inputs,
    tiny_embedding,
    tiny_embedding_program,
    tiny_mlp,
    tiny_mlp_program,
)

FORMATS: dict[str, dict[str, Any]] = {
    "affine4:row": {},
    "affine2:tensor": {"bits": 2, "granularity": "tensor"},
    "affine3:row:asym": {"bits": 3, "symmetric": False},
    "affine4:group3": {"granularity": "group", "group_size": 3},
    "affine5:group8:asym": {"bits": 5, "granularity": "group", "group_size": 8, "symmetric": False},
    "affine6:tensor:asym": {"bits": 6, "granularity": "tensor", "symmetric": False},
    "affine7:row": {"bits": 7},
    "affine8:group32": {"bits": 8, "granularity": "group", "group_size": 32},
    "ternary:row": {"bits": 2, "ternary": True},
    "ternary:group3:base3": {"bits": 2, "ternary": True, "granularity": "group", "group_size": 3, "base3": True},
    "binary:tensor": {"bits": 1, "granularity": "tensor"},
    "binary:group5": {"bits": 1, "granularity": "group", "group_size": 5},
}


def kept(program: Program) -> list[tuple[str, str]]:
    return [(item.what, item.why) for item in program.reports[-1].kept]


def changed(program: Program) -> list[str]:
    return [change.what for change in program.reports[-1].changes]


# ---- golden


def test_golden() -> None:
    assert_golden(
        QuantizeWeights(include=("second",))(tiny_mlp_program()),
        """
        program(x: f32[batch, length, 8])
          %linear = linear(%x, first.weight [16×8 f32], first.bias [16 f32])
          %relu = relu(%linear)
          %dropout = dropout(%relu, 0.1, False)
          %dequantize_default = dequantize<affine4:row>(second.weight.codes [4×8 u8], second.weight.scale [4×1 f32], columns=16, dtype=f32)
          %linear_1 = linear(%dropout, %dequantize_default, second.bias [4 f32])
          return {logits: %linear_1}
        """,  # noqa: E501
    )


def test_golden_tied() -> None:
    options: dict[str, Any] = {"bits": 3, "granularity": "group", "group_size": 5, "symmetric": False}
    assert_golden(
        QuantizeWeights(exclude=("mix",), **options)(tiny_embedding_program()),
        """
        program(input_ids: i64[batch, length])
          tokens.weight is tied to head.weight
          %dequantize_default = dequantize<affine3:group5:asym>(tokens.weight.codes [12×3 u8], tokens.weight.scale [12×2 f32], zero_point=tokens.weight.zero_point [12×2 f32], columns=8, dtype=f32)
          %embedding = embedding(%dequantize_default, %input_ids)
          %linear = linear(%embedding, mix.weight [8×8 f32], mix.bias [8 f32])
          %tanh = tanh(%linear)
          %layer_norm = layer_norm(%tanh, [8], norm.weight [8 f32], norm.bias [8 f32], 1e-05, False)
          %linear_1 = linear(%layer_norm, %dequantize_default)
          return {logits: %linear_1}
        """,  # noqa: E501
    )


def test_golden_latent() -> None:
    assert_golden(
        QuantizeWeights(latent=True, bits=2, granularity=Granularity.TENSOR, exclude=("second",))(tiny_mlp_program()),
        """
        program(x: f32[batch, length, 8])
          %fake_quantize_default = fake_quantize<affine2:tensor>(first.weight.latent [16×8 f32], first.weight.scale [1×1 f32])
          %linear = linear(%x, %fake_quantize_default, first.bias [16 f32])
          %relu = relu(%linear)
          %dropout = dropout(%relu, 0.1, False)
          %linear_1 = linear(%dropout, second.weight [4×16 f32], second.bias [4 f32])
          return {logits: %linear_1}
        """,  # noqa: E501
    )


# ---- numbers


@pytest.mark.parametrize(("format", "options"), FORMATS.items(), ids=str)
def test_the_program_computes_with_what_the_codes_mean(format: str, options: dict[str, Any]) -> None:
    quantized = QuantizeWeights(**options)(tiny_mlp_program())
    assert [site.format for site in weight_sites(quantized)] == [format] * 2
    weights = {
        "first.weight": truth.weight(quantized, "first.weight", format, 8),
        "second.weight": truth.weight(quantized, "second.weight", format, 16),
    }
    for site in weight_sites(quantized):
        assert torch.allclose(site.value().double(), weights[site.name], atol=1e-7)
    expected = truth.with_weights(tiny_mlp(), weights)(mlp_inputs()["x"].double())["logits"]
    assert torch.allclose(quantized(**mlp_inputs())["logits"].double(), expected, atol=1e-5)
    for change, original in zip(quantized.reports[-1].changes, ("first", "second"), strict=True):
        exact = tiny_mlp().get_parameter(f"{original}.weight").detach().double()
        noise = (weights[f"{original}.weight"] - exact).square().sum()
        assert change.figures["sqnr"] == pytest.approx(float(10 * torch.log10(exact.square().sum() / noise)), abs=1e-3)


@pytest.mark.parametrize("format", [name for name in FORMATS if name.startswith("affine")])
def test_every_weight_takes_its_nearest_level(format: str) -> None:
    quantized = QuantizeWeights(**FORMATS[format])(tiny_mlp_program())
    chosen = truth.weight(quantized, "second.weight", format, 16)
    exact = tiny_mlp().second.weight.detach().double()
    bits = int(format[6])
    size = int(format.split(":")[1].removeprefix("group")) if "group" in format else 0
    scale = truth.spread(quantized.tensor("second.weight.scale"), size, 4, 16)
    zero: Any = 2 ** (bits - 1)
    if format.endswith("asym"):
        zero = truth.spread(quantized.tensor("second.weight.zero_point"), size, 4, 16)
    levels = torch.from_numpy(np.stack([(code - zero) * scale for code in range(2**bits)]))
    nearest = (levels - exact).abs().amin(0)
    assert torch.allclose((chosen - exact).abs(), nearest, atol=1e-7)


def test_the_range_of_minmax() -> None:
    weight = tiny_mlp().first.weight.detach().double()
    rows = QuantizeWeights(bits=5, strategy="minmax")(tiny_mlp_program())
    assert torch.allclose(rows.tensor("first.weight.scale").double(), weight.abs().amax(1, keepdim=True) / 15)
    whole = QuantizeWeights(bits=3, strategy="minmax", granularity=Granularity.TENSOR)(tiny_mlp_program())
    assert whole.tensor("first.weight.scale").item() == pytest.approx(float(weight.abs().max()) / 3)
    options: dict[str, Any] = {"strategy": "minmax", "symmetric": False, "granularity": "group", "group_size": 4}
    groups = QuantizeWeights(bits=4, **options)(tiny_mlp_program())
    blocks = weight.reshape(16, 2, 4)
    width = blocks.amax(-1).clamp(min=0) - blocks.amin(-1).clamp(max=0)
    assert torch.allclose(groups.tensor("first.weight.scale").double(), width / 15)


def test_binary_and_ternary_rules() -> None:
    model = tiny_mlp()
    model.first.weight.data[0] = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 0.0, 0.0])
    model.first.weight.data[1] = 0.0
    weight = model.first.weight.detach().double()
    binary = QuantizeWeights(bits=1)(tiny_mlp_program(model))
    sign = torch.where(weight >= 0, 1.0, -1.0)
    expected = sign * weight.abs().mean(1, keepdim=True)
    assert torch.allclose(truth.weight(binary, "first.weight", "binary:row", 8), expected, atol=1e-7)
    ternary = QuantizeWeights(bits=2, ternary=True)(tiny_mlp_program(model))
    large = weight.abs() > 0.7 * weight.abs().mean(1, keepdim=True)
    scale = torch.where(large, weight.abs(), 0).sum(1, keepdim=True) / large.sum(1, keepdim=True).clamp(min=1)
    expected = weight.sign() * large * scale
    assert torch.allclose(truth.weight(ternary, "first.weight", "ternary:row", 8), expected, atol=1e-7)
    assert torch.equal(expected[1], torch.zeros(8, dtype=torch.float64))


def test_searching_for_the_range_pays() -> None:
    def damage(strategy: str) -> float:
        report = QuantizeWeights(bits=3, strategy=strategy)(tiny_mlp_program()).reports[-1]
        return float(report.changes[0].figures["sqnr"])

    assert damage("mse") > damage("minmax")


@pytest.mark.parametrize("fill", [0.0, 1.0, -3e-39, 1e30])
def test_a_matrix_of_one_value(fill: float) -> None:
    model = tiny_mlp()
    model.first.weight.data.fill_(fill)
    quantized = QuantizeWeights(strategy="minmax")(tiny_mlp_program(model))
    value = truth.weight(quantized, "first.weight", "affine4:row", 8)
    assert torch.allclose(value, torch.full((16, 8), fill, dtype=torch.float64), rtol=1e-6, atol=1e-38)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision(dtype: torch.dtype) -> None:
    model = tiny_mlp().to(dtype)
    program = trace(copy.deepcopy(model), {"x": mlp_inputs()["x"].to(dtype)})
    quantized = QuantizeWeights(bits=3)(program)
    assert quantized.tensor("first.weight.scale").dtype is torch.float32
    first, second = weight_sites(quantized)
    assert first.value().dtype is second.value().dtype is dtype
    weights = {
        site.name: truth.weight(quantized, site.name, "affine3:row", site.shape[1]).to(dtype)
        for site in (first, second)
    }
    assert torch.equal(first.value(), weights["first.weight"])
    model.load_state_dict(weights, strict=False)
    inputs = {"x": mlp_inputs(2, 9)["x"].to(dtype)}
    assert torch.equal(quantized(**inputs)["logits"], model(**inputs)["logits"])


# ---- what it leaves alone


def test_reasons() -> None:
    model = tiny_mlp()
    model.first.weight.data[3, 3] = float("inf")
    program = QuantizeWeights()(tiny_mlp_program(model))
    assert changed(program) == ["second.weight"]
    ((what, why),) = kept(program)
    assert what == "first.weight" and "NaN or infinity" in why


def test_twice_changes_nothing() -> None:
    once = QuantizeWeights(bits=3)(tiny_mlp_program())
    twice = QuantizeWeights(bits=8, granularity=Granularity.TENSOR)(once)
    assert kept(twice) == [("first.weight", "already affine3:row"), ("second.weight", "already affine3:row")]
    assert not changed(twice) and readable(twice) == readable(once)


def test_a_weight_that_is_computed_is_no_site() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain, self.normed = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.plain(x), torch.tanh(self.normed.weight))

    program = QuantizeWeights()(trace(Computed().eval(), mlp_inputs()))
    assert changed(program) == ["plain.weight"] and kept(program) == []


def test_scope_says_what_is_quantized_how() -> None:
    steps = [QuantizeWeights(bits=8, include=("*tokens*",)), QuantizeWeights(bits=3, exclude=("type:Embedding",))]
    program = Pipeline(steps)(tiny_embedding_program())
    assert [(site.name, site.format) for site in weight_sites(program)] == [
        ("tokens.weight", "affine8:row"),
        ("mix.weight", "affine3:row"),
    ]
    assert [(item.what, item.why) for item in program.reports[0].kept] == [("mix.weight", "out of scope")]
    assert kept(program) == [("tokens.weight", "out of scope")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "bits=9"),
        ({"bits": 0}, "bits=0"),
        ({"bits": 4.5}, "'bits'.*4.5"),
        ({"group_size": 32}, "group_size=32 with granularity='row'"),
        ({"granularity": "group"}, "group_size=0 with granularity='group'"),
        ({"granularity": "group", "group_size": -1}, "group_size=-1"),
        ({"granularity": "column"}, "'column'.*row"),
        ({"strategy": "median"}, "'median' is unknown.*minmax"),
        ({"strategy": "sigma:wide"}, "'wide' is not a number"),
        ({"ternary": True}, "ternary weights go with bits=2, not bits=4"),
        ({"ternary": True, "bits": 2, "symmetric": False}, "ternary weights are symmetric"),
        ({"bits": 1, "symmetric": False}, "binary weights are symmetric"),
        ({"base3": True, "bits": 2}, "goes with ternary=True"),
        ({"clipped": False}, "goes with latent=True"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PrequantError, match=message):
        QuantizeWeights(**options)


def test_a_bad_parameter_of_a_strategy_names_the_weight() -> None:
    with pytest.raises(PassError, match=r"sigma:-1.*multiple -1.*first\.weight"):
        QuantizeWeights(strategy="sigma:-1")(tiny_mlp_program())


def test_text_form() -> None:
    text = "quantize-weights{bits=2,granularity=group,group_size=64,ternary=true,exclude=[head]}"
    pass_ = QuantizeWeights(bits=2, granularity=Granularity.GROUP, group_size=64, ternary=True, exclude=("head",))
    assert str(pass_) == text and Pipeline.parse(text).passes == (pass_,)


# ---- with the rest of a program


def test_a_tied_matrix_is_packed_once() -> None:
    program = QuantizeWeights(bits=3)(tiny_embedding_program())
    assert changed(program) == ["tokens.weight", "mix.weight"]
    assert sorted(name for name, _ in program.named_buffers()) == ["mix.weight.codes", "tokens.weight.codes"]
    (site, _) = weight_sites(program)
    assert site.kind == "linear+embedding" and site.names == ("tokens.weight", "head.weight")
    table = truth.weight(program, "tokens.weight", "affine3:row", 8)
    model = tiny_embedding()
    expected = truth.with_weights(
        model, {"tokens.weight": table, "mix.weight": truth.weight(program, "mix.weight", "affine3:row", 8)}
    )(**embedding_inputs())["logits"]
    assert torch.allclose(program(**embedding_inputs())["logits"].double(), expected, atol=1e-5)


def test_layers_that_share_their_weights_are_packed_once() -> None:
    program = Canonicalize()(traced("albert-encoder"))
    linears = program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    quantized = QuantizeWeights(strategy="minmax", include=("type:AlbertLayer",))(program)
    report = quantized.reports[-1]
    shared = [site for site in weight_sites(quantized) if len(site.consumers) > 1]
    assert len(report.changes) == len(shared) == 6
    assert len({name for name, _ in quantized.named_buffers() if name.endswith(".codes")}) == 6
    assert sum(len(site.consumers) for site in shared) == 12 < len(linears)


def test_the_input_stays_what_it_was() -> None:
    program = tiny_embedding_program()
    text = readable(program)
    before = {name: value.clone() for name, value in program.state_dict().items()}
    steps: list[Callable[[Program], Program]] = [
        QuantizeWeights(),
        QuantizeWeights(latent=True, bits=2),
        Pipeline([SplitOutliers(ratio=0.1), QuantizeWeights(bits=2)]),
        Pipeline([SplitOutliers(ratio=0.1, mode="replace"), BinaryCode(embeddings=True)]),
    ]
    for step in steps:
        assert readable(step(program)) != text
        assert readable(program) == text and not program.reports
        assert before.keys() == program.state_dict().keys()
        assert all(torch.equal(value, before[name]) for name, value in program.state_dict().items())


def test_what_trains_and_what_does_not() -> None:
    program = tiny_mlp_program()
    program.set_tensor("first.weight", program.tensor("first.weight"), trainable=False)
    for latent in (False, True):
        quantized = QuantizeWeights(latent=latent, symmetric=False)(program)
        flags = {name: value.requires_grad for name, value in quantized.named_parameters()}
        assert flags.pop("first.weight.latent", False) is False
        assert all(flags.values())
        assert {"first.weight.scale", "first.weight.zero_point"} < flags.keys()
        assert ("second.weight.latent" in flags) is latent
