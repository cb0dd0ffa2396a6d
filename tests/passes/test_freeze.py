import math
from typing import Any, Literal

import pytest
import torch

from prequant.passes import (
    Freeze,
    PassError,
    Pipeline,
    Program,
    QuantizeActivations,
    QuantizeWeights,
    Train,
    calibrate,
)
from prequant.passes.lower import Lower
from prequant.passes.properties import violation
from prequant.passes.sites import weight_sites
from prequant.passes.split_outliers import SplitOutliers
from prequant.runtime import Granularity

from .support import assert_golden, embedding_inputs, mlp_inputs, tiny_embedding_program, tiny_mlp_program
from .test_train import step, trainable

FORMATS: list[dict[str, Any]] = [
    {"bits": 4},
    {"bits": 3, "granularity": "tensor"},
    {"bits": 4, "granularity": "group", "group_size": 4, "symmetric": False},
    {"bits": 2, "ternary": True},
    {"bits": 2, "ternary": True, "granularity": "group", "group_size": 4, "base3": True},
    {"bits": 1},
]


def latent(**options: Any) -> Program:
    return QuantizeWeights(latent=True, **options)(tiny_mlp_program())


def trained(program: Program, steps: int = 4, rate: float = 0.5) -> Program:
    """Latent weights and scales after some steps that move codes as well."""
    program = Train(latents=True, scales=True)(program)
    for _ in range(steps):
        step(program, mlp_inputs(), rate)
    return program


# ---- latent weights


def test_golden_latent() -> None:
    assert_golden(
        latent(bits=2, ternary=True, clipped=False, include=("first",)),
        """
        program(x: f32[batch, length, 8])
          %fake_quantize_default = fake_quantize<ternary:row>(first.weight.latent [16×8 f32], first.weight.scale [16×1 f32], zero_point=first.weight.zero_point [16×1 f32], clipped=False)
          %linear = linear(%x, %fake_quantize_default, first.bias [16 f32])
          %relu = relu(%linear)
          %dropout = dropout(%relu, 0.1, False)
          %linear_1 = linear(%dropout, second.weight [4×16 f32], second.bias [4 f32])
          return {logits: %linear_1}
        """,  # noqa: E501
    )


@pytest.mark.parametrize("options", FORMATS)
def test_a_latent_weight_starts_at_the_value_of_the_codes(options: dict[str, Any]) -> None:
    codes, floats = QuantizeWeights(**options)(tiny_mlp_program()), latent(**options)
    for packed, site in zip(weight_sites(codes), weight_sites(floats), strict=True):
        assert torch.equal(packed.value(), site.value())
    assert torch.equal(codes(**mlp_inputs())["logits"], floats(**mlp_inputs())["logits"])
    sqnrs = [[change.figures["sqnr"] for change in program.reports[-1].changes] for program in (codes, floats)]
    assert sqnrs[0] == sqnrs[1]


@pytest.mark.parametrize("options", FORMATS)
def test_latent_weights_train(options: dict[str, Any]) -> None:
    program = Train(latents=True, scales=True)(latent(**options))
    losses = [step(program, mlp_inputs(), 0.5) for _ in range(10)]
    assert min(losses[1:]) < losses[0]
    untouched = tiny_mlp_program()
    assert not torch.equal(program.tensor("first.weight.latent"), untouched.tensor("first.weight"))


def test_the_original_weight_is_not_the_one_that_trains() -> None:
    program = tiny_mlp_program()
    before = program.tensor("first.weight").clone()
    trained(QuantizeWeights(latent=True)(program))
    assert torch.equal(program.tensor("first.weight"), before)


def test_unclipped_latent_weights_have_a_gradient_beyond_the_levels() -> None:
    def gradient(clipped: bool) -> torch.Tensor:
        program = Train(latents=True)(latent(bits=2, strategy="sigma:1", clipped=clipped))
        program(**mlp_inputs())["logits"].square().sum().backward()
        value = program.tensor("second.weight.latent").grad
        assert value is not None
        return value

    assert int((gradient(True) == 0).sum()) > int((gradient(False) == 0).sum())


# ---- freeze


def test_golden() -> None:
    program = trained(latent(bits=2, ternary=True, include=("first",)))
    assert_golden(
        Freeze()(program),
        """
        program(x: f32[batch, length, 8])
          %dequantize_default = dequantize<ternary:row>(first.weight.codes [16×2 u8], first.weight.scale [16×1 f32 frozen], columns=8, dtype=f32)
          %linear = linear(%x, %dequantize_default, first.bias [16 f32 frozen])
          %relu = relu(%linear)
          %dropout = dropout(%relu, 0.1, False)
          %linear_1 = linear(%dropout, second.weight [4×16 f32 frozen], second.bias [4 f32 frozen])
          return {logits: %linear_1}
        """,  # noqa: E501
    )


@pytest.mark.parametrize("options", FORMATS)
def test_values_are_the_same_to_the_bit(options: dict[str, Any]) -> None:
    program = trained(latent(**options))
    frozen = Freeze()(program)
    for before, after in zip(weight_sites(program), weight_sites(frozen), strict=True):
        assert torch.equal(before.value(), after.value())
    assert torch.equal(frozen(**mlp_inputs())["logits"], program(**mlp_inputs())["logits"])
    assert violation("no-latent-weights", frozen) is None and violation("no-orphans", frozen) is None
    lowered = Lower(strict=True)(frozen)
    assert torch.allclose(lowered(**mlp_inputs())["logits"], frozen(**mlp_inputs())["logits"], atol=1e-6)


def test_half_precision_latents_keep_their_dtype() -> None:
    program = latent()
    for site in weight_sites(program):
        program.set_tensor(site.tensors["latent"], program.tensor(site.tensors["latent"]).bfloat16())
    frozen = Freeze()(program)
    for before, after in zip(weight_sites(program), weight_sites(frozen), strict=True):
        assert after.value().dtype is torch.bfloat16
        assert torch.equal(before.value(), after.value())


@pytest.mark.parametrize("options", FORMATS)
def test_scales_that_crossed_zero_are_stored_by_magnitude(options: dict[str, Any]) -> None:
    program = latent(**options)
    scale = program.tensor("first.weight.scale").detach()
    program.set_tensor("first.weight.scale", -scale)
    frozen = Freeze()(program)
    assert torch.equal(frozen.tensor("first.weight.scale"), scale)
    assert torch.equal(frozen(**mlp_inputs())["logits"], program(**mlp_inputs())["logits"])


def test_static_input_scales_are_stored_by_magnitude() -> None:
    quantize = QuantizeActivations(dynamic=False, granularity=Granularity.TENSOR)
    program = calibrate(quantize(latent()), [mlp_inputs()], progress=False)
    scale = program.tensor("first.input.scale").detach()
    program.set_tensor("first.input.scale", -scale)
    frozen = Freeze()(program)
    assert torch.equal(frozen.tensor("first.input.scale"), scale)
    assert torch.equal(frozen(**mlp_inputs())["logits"], program(**mlp_inputs())["logits"])


def test_a_lowered_program_stores_its_input_scales_by_magnitude_too() -> None:
    after: Any = ("activation",)
    quantize = QuantizeActivations(dynamic=False, granularity=Granularity.TENSOR, asymmetric_after=after)
    calibrated = calibrate(Pipeline([QuantizeWeights(), quantize])(tiny_mlp_program()), [mlp_inputs()], progress=False)
    expected = calibrated(**mlp_inputs())["logits"]
    lowered = Lower()(calibrated)
    scales = {name: lowered.tensor(name).detach() for name in ("first.input.scale", "second.input.scale")}
    for name, scale in scales.items():
        lowered.set_tensor(name, -scale)
    frozen = Freeze()(lowered)
    for program in (lowered, frozen):
        with torch.no_grad():
            assert torch.allclose(program(**mlp_inputs())["logits"], expected, atol=1e-6)
    assert all(torch.equal(frozen.tensor(name), scale) for name, scale in scales.items())


def test_nothing_trains_afterwards_and_the_original_still_does() -> None:
    program = trained(latent())
    frozen = Freeze()(program)
    assert trainable(frozen) == set()
    assert len(trainable(program)) == 4
    assert frozen.reports[-1].totals["frozen"] == 16 * 8 + 16 + 4 * 16 + 4
    assert frozen.tensor("first.weight.codes").dtype is torch.uint8


def test_a_scope_freezes_its_weights_alone() -> None:
    program = trained(latent())
    frozen = Freeze(include=("first",))(program)
    assert [site.format for site in weight_sites(frozen)] == ["affine4:row", "affine4:row"]
    assert trainable(frozen) == {"second.weight.latent", "second.weight.scale"}
    assert [(kept.what, kept.why) for kept in frozen.reports[-1].kept] == [("second.weight", "out of scope")]
    assert torch.equal(frozen(**mlp_inputs())["logits"], program(**mlp_inputs())["logits"])


def test_tied_latent_weights_freeze_once() -> None:
    program = QuantizeWeights(latent=True)(tiny_embedding_program())
    frozen = Freeze()(program)
    assert [change.what for change in frozen.reports[-1].changes] == ["tokens.weight", "mix.weight"]
    assert torch.equal(frozen(**embedding_inputs())["logits"], program(**embedding_inputs())["logits"])


# ---- outliers


@pytest.mark.parametrize("mode", ["delta", "replace"])
@pytest.mark.parametrize("lowered", [False, True])
def test_outliers_are_stored_in_the_dtype_asked_for(mode: Literal["delta", "replace"], lowered: bool) -> None:
    program = Pipeline([SplitOutliers(ratio=0.1, mode=mode), QuantizeWeights(bits=3)])(tiny_mlp_program())
    program = Train(outliers=True)(Lower()(program) if lowered else program)
    step(program, mlp_inputs())
    frozen = Freeze(outlier_dtype="float16")(program)
    values = frozen.tensor("first.weight.outliers.values")
    assert values.dtype is torch.float16 and not values.requires_grad
    before = program.tensor("first.weight.outliers.values")
    assert torch.equal(values, before.half())
    change = frozen.reports[-1].changes[0]
    assert change.how == "outliers as float16"
    assert change.figures["largest_change"] == pytest.approx(float((values.float() - before).detach().abs().max()))
    assert 0 < change.figures["largest_change"] < 1e-3
    assert torch.allclose(frozen(**mlp_inputs())["logits"], program(**mlp_inputs())["logits"], atol=1e-2)
    assert Freeze()(program).tensor("first.weight.outliers.values").dtype is torch.float32


def test_latent_weights_under_outliers_freeze_to_the_same_bits() -> None:
    program = Pipeline([SplitOutliers(ratio=0.1), QuantizeWeights(latent=True), Train(latents=True, outliers=True)])(
        tiny_mlp_program()
    )
    step(program, mlp_inputs(), 0.5)
    frozen = Freeze()(program)
    assert torch.equal(frozen(**mlp_inputs())["logits"], program(**mlp_inputs())["logits"])
    assert violation("no-latent-weights", frozen) is None


def test_an_outlier_that_does_not_fit_is_an_error() -> None:
    program = SplitOutliers(ratio=0.1)(tiny_mlp_program())
    program.set_tensor("first.weight.outliers.values", torch.full((13,), 1e5))
    with pytest.raises(
        PassError, match=r"first\.weight\.outliers\.values: a value of 1e\+05 does not fit into float16"
    ):
        Freeze(outlier_dtype="float16")(program)


# ---- refusals


@pytest.mark.parametrize("name", ["first.weight.latent", "second.weight.scale", "first.bias"])
def test_values_that_are_not_finite_are_named(name: str) -> None:
    program = Train(latents=True, scales=True, biases=True)(latent())
    broken = program.tensor(name).detach().clone()
    broken.flatten()[0] = math.nan
    program.set_tensor(name, broken)
    with pytest.raises(PassError, match=rf"NaN or infinity in {name} \(1 of {broken.numel()}\)"):
        Freeze()(program)


def test_what_is_not_latent_is_kept() -> None:
    kept = Freeze()(QuantizeWeights(include=("first",))(tiny_mlp_program())).reports[-1].kept
    assert [(item.what, item.why) for item in kept] == [
        ("first.weight", "affine4:row: not latent"),
        ("second.weight", "float32: not latent"),
    ]
    assert str(Freeze(outlier_dtype="bfloat16")) == "freeze{outlier_dtype=bfloat16}"
    with pytest.raises(PassError, match="freeze it first"):
        Lower(strict=True)(latent())
