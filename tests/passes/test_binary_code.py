from typing import Any

import pytest
import torch

from prequant.passes import BinaryCode, PassError, Pipeline, QuantizeWeights
from prequant.passes.lower import Lower
from prequant.passes.sites import weight_sites
from prequant.passes.split_outliers import SplitOutliers
from prequant.runtime import PrequantError, WeightFormat, binary_code, sqnr
from prequant.runtime.reference import dequantize

from .support import (
    assert_golden,
    embedding_inputs,
    mlp_inputs,
    tiny_embedding,
    tiny_embedding_program,
    tiny_mlp,
    tiny_mlp_program,
)


def test_golden() -> None:
    assert_golden(
        BinaryCode(bits=2, group_size=8)(tiny_mlp_program()),
        """
        program(x: f32[batch, length, 8])
          %dequantize_bcq_default = dequantize_bcq<bcq2:group8>(first.weight.planes [2×16×1 u8], first.weight.alphas [2×16×1 f32], columns=8, dtype=f32)
          %linear = linear(%x, %dequantize_bcq_default, first.bias [16 f32])
          %relu = relu(%linear)
          %dropout = dropout(%relu, 0.1, False)
          %dequantize_bcq_default_1 = dequantize_bcq<bcq2:group8>(second.weight.planes [2×4×2 u8], second.weight.alphas [2×4×2 f32], columns=16, dtype=f32)
          %linear_1 = linear(%dropout, %dequantize_bcq_default_1, second.bias [4 f32])
          return {logits: %linear_1}
        """,  # noqa: E501
    )


@pytest.mark.parametrize("refine", [0, 4])
@pytest.mark.parametrize("group_size", [0, 8])
def test_the_program_computes_with_the_coded_weights(group_size: int, refine: int) -> None:
    coded = BinaryCode(bits=3, group_size=group_size, refine=refine)(tiny_mlp_program())
    model, format = tiny_mlp(), WeightFormat.bcq(3, group_size)
    for layer in (model.first, model.second):
        planes, alphas, _ = binary_code(layer.weight, format, refine)
        layer.weight.data = dequantize(planes, alphas, None, format, layer.in_features)
    assert torch.allclose(coded(**mlp_inputs())["logits"], model(**mlp_inputs())["logits"], atol=1e-6)


def test_more_planes_and_refinement_come_nearer() -> None:
    weight = tiny_mlp().second.weight

    def error(**options: Any) -> float:
        site = weight_sites(BinaryCode(**options)(tiny_mlp_program()))[1]
        return sqnr(weight, site.value())

    assert error(bits=1) < error(bits=2) < error(bits=3) < error(bits=4)
    assert error(bits=3) < error(bits=3, refine=5)
    report = BinaryCode(bits=3)(tiny_mlp_program()).reports[-1]
    assert report.changes[1].figures["sqnr"] == pytest.approx(error(bits=3))


def test_embeddings_stay_float_unless_asked_for() -> None:
    program = tiny_embedding_program()
    coded = BinaryCode()(program)
    assert [change.what for change in coded.reports[-1].changes] == ["mix.weight"]
    (kept,) = coded.reports[-1].kept
    assert kept.what == "tokens.weight" and "embeddings=True" in kept.why
    assert torch.equal(coded.tensor("tokens.weight"), program.tensor("tokens.weight"))

    everything = BinaryCode(embeddings=True)(program)
    model = tiny_embedding()
    format = WeightFormat.bcq(3)
    for weight in (model.tokens.weight, model.mix.weight):
        weight.data = dequantize(*binary_code(weight, format)[:2], None, format, 8)
    inputs = embedding_inputs(2, 9)
    assert torch.allclose(everything(**inputs)["logits"], model(**inputs)["logits"], atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"bits": 4}, {"bits": 3, "granularity": "tensor"}, {"bits": 5, "symmetric": False}]
)
def test_affine_codes_become_planes_of_the_same_values(options: dict[str, Any]) -> None:
    quantized = QuantizeWeights(**options)(tiny_mlp_program())
    planes = BinaryCode(from_affine=True)(quantized)
    bits = int(options["bits"]) + 1
    assert [site.format for site in weight_sites(planes)] == [f"bcq{bits}:row"] * 2
    for before, after in zip(weight_sites(quantized), weight_sites(planes), strict=True):
        assert torch.allclose(before.value(), after.value(), atol=1e-6)
    assert torch.allclose(planes(**mlp_inputs())["logits"], quantized(**mlp_inputs())["logits"], atol=1e-5)


def test_from_affine_leaves_everything_else_alone() -> None:
    passes = [QuantizeWeights(bits=8, include=("first",)), BinaryCode(from_affine=True)]
    kept = Pipeline(passes)(tiny_mlp_program()).reports[-1].kept
    assert [(item.what, item.why) for item in kept] == [
        ("first.weight", "8 bits would take 9 planes; there are at most 8"),
        ("second.weight", "float32: from_affine rewrites affine codes alone"),
    ]
    passes = [QuantizeWeights(bits=1), BinaryCode(from_affine=True)]
    kept = Pipeline(passes)(tiny_mlp_program()).reports[-1].kept
    assert {item.why for item in kept} == {"binary:row: from_affine rewrites affine codes alone"}


def test_codes_are_not_coded_again() -> None:
    kept = Pipeline([QuantizeWeights(), BinaryCode()])(tiny_mlp_program()).reports[-1].kept
    assert {item.why for item in kept} == {"already affine4:row"}


def test_outliers_stay_exact() -> None:
    program = tiny_mlp_program()
    coded = Pipeline([SplitOutliers(ratio=0.1), BinaryCode(bits=1)])(program)
    exact = (weight_sites(coded)[0].value() - program.tensor("first.weight")).abs() < 1e-6
    assert int(exact.sum()) >= round(0.1 * 128)


def test_lowered_equals_simulated() -> None:
    simulated = BinaryCode(refine=2)(tiny_mlp_program())
    assert torch.allclose(Lower(strict=True)(simulated)(**mlp_inputs())["logits"], simulated(**mlp_inputs())["logits"])


def test_bad_options_and_weights() -> None:
    with pytest.raises(PassError, match="refine=-1"):
        BinaryCode(refine=-1)
    with pytest.raises(PrequantError, match="bits=9"):
        BinaryCode(bits=9)
    model = tiny_mlp()
    model.first.weight.data[0, 0] = float("nan")
    coded = BinaryCode()(tiny_mlp_program(model))
    assert [(kept.what, kept.why) for kept in coded.reports[-1].kept] == [("first.weight", "it holds NaN or infinity")]
    assert str(BinaryCode(bits=2, refine=3)) == "binary-code{bits=2,refine=3}"
