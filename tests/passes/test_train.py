from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from prequant.passes import (
    BinaryCode,
    PassError,
    Pipeline,
    Program,
    QuantizeActivations,
    QuantizeWeights,
    Train,
    calibrate,
)
from prequant.passes.lower import Lower
from prequant.passes.sites import outlier_positions, weight_sites
from prequant.passes.split_outliers import SplitOutliers
from prequant.runtime import Granularity
from prequant.trace import trace

from .support import assert_golden, embedding_inputs, mlp_inputs, tiny_embedding_program, tiny_mlp_program


def trainable(program: Program) -> set[str]:
    return {name for name, value in program.named_parameters() if value.requires_grad}


def step(program: Program, inputs: dict[str, Tensor], rate: float = 0.1) -> float:
    """One step of plain gradient descent; returns the loss before it."""
    loss = program(**inputs)["logits"].square().mean()
    loss.backward()
    with torch.no_grad():
        for value in program.parameters():
            if value.grad is not None:
                value.sub_(rate * value.grad)
                value.grad = None
    return float(loss.detach())


def with_outliers(**options: Any) -> Program:
    return Pipeline([SplitOutliers(ratio=0.05, **options), QuantizeWeights(bits=3)])(tiny_mlp_program())


def test_golden() -> None:
    assert_golden(
        Train(outliers=True, head=("second.bias",))(with_outliers(dtype="float16")),
        """
        program(x: f32[batch, length, 8])
          %dequantize_default = dequantize<affine3:row>(first.weight.codes [16×3 u8], first.weight.scale [16×1 f32 frozen], columns=8, dtype=f32)
          %add_outliers_default = add_outliers(%dequantize_default, first.weight.outliers.values [6 f32], first.weight.outliers.columns [6 u16], first.weight.outliers.row_offsets [17 i32], replace=False)
          %linear = linear(%x, %add_outliers_default, first.bias [16 f32 frozen])
          %relu = relu(%linear)
          %dropout = dropout(%relu, 0.1, False)
          %dequantize_default_1 = dequantize<affine3:row>(second.weight.codes [4×6 u8], second.weight.scale [4×1 f32 frozen], columns=16, dtype=f32)
          %add_outliers_default_1 = add_outliers(%dequantize_default_1, second.weight.outliers.values [3 f32], second.weight.outliers.columns [3 u16], second.weight.outliers.row_offsets [5 i32], replace=False)
          %linear_1 = linear(%dropout, %add_outliers_default_1, second.bias [4 f32])
          return {logits: %linear_1}
        """,  # noqa: E501
    )


def test_nothing_changes_until_something_trains() -> None:
    program = with_outliers()
    chosen = Train(scales=True, outliers=True, biases=True)(program)
    assert torch.equal(chosen(**mlp_inputs())["logits"], program(**mlp_inputs())["logits"])


def test_training_changes_what_was_chosen_and_only_here() -> None:
    program = with_outliers()
    before = {name: value.clone() for name, value in program.state_dict().items()}
    flags = trainable(program)
    chosen = Train(outliers=True, biases=True, include=("first",))(program)
    losses = [step(chosen, mlp_inputs()) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert trainable(chosen) == {"first.weight.outliers.values", "first.bias"}
    for name, value in before.items():
        assert torch.equal(program.state_dict()[name], value), f"{name} of the original moved"
        moved = not torch.equal(chosen.state_dict()[name], value)
        assert moved == (name in trainable(chosen)), name
    assert trainable(program) == flags and "second.bias" in flags


def test_frozen_tensors_are_shared_and_trained_ones_are_not() -> None:
    program = with_outliers()
    chosen = Train(scales=True)(program)
    for name, value in chosen.named_parameters():
        shared = value.data_ptr() == program.tensor(name).data_ptr()
        assert shared != name.endswith("scale"), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_outliers_train_in_float32(dtype: str) -> None:
    program = with_outliers(dtype=dtype)
    chosen = Train(outliers=True)(program)
    for site in weight_sites(chosen):
        name = site.tensors["outliers.values"]
        assert chosen.tensor(name).dtype is torch.float32
        assert torch.equal(chosen.tensor(name), program.tensor(name).float())
    step(chosen, mlp_inputs(), rate=1e-6)
    assert not torch.equal(chosen.tensor(name), program.tensor(name).float())


@pytest.mark.parametrize("mode", ["delta", "replace"])
def test_reset_outliers_start_at_the_quantized_value(mode: Literal["delta", "replace"]) -> None:
    program = Pipeline([SplitOutliers(ratio=0.1, mode=mode), QuantizeWeights(bits=3)])(tiny_mlp_program())
    reset = Train(outliers=True, reset_outliers=True)(program)
    for site, original in zip(weight_sites(reset), weight_sites(program), strict=True):
        positions = outlier_positions(original)
        codes, scale = program.tensor(site.tensors["codes"]), program.tensor(site.tensors["scale"])
        under = torch.ops.prequant.dequantize(codes, scale, None, format="affine3:row", columns=site.shape[1])
        assert torch.allclose(site.value()[positions], under[positions], atol=1e-6)
        assert not torch.allclose(original.value()[positions], under[positions], atol=1e-3)
    before = [site.value() for site in weight_sites(reset)]
    step(reset, mlp_inputs())
    assert any(not torch.equal(site.value(), old) for site, old in zip(weight_sites(reset), before, strict=True))


# ---- kinds


def test_every_kind() -> None:
    def chosen(program: Program, **options: Any) -> set[str]:
        return trainable(Train(**options)(program))

    program = Pipeline([QuantizeWeights(symmetric=False, include=("first",)), BinaryCode(include=("second",))])(
        tiny_mlp_program()
    )
    assert chosen(program, scales=True) == {"first.weight.scale"}
    assert chosen(program, zero_points=True) == {"first.weight.zero_point"}
    assert chosen(program, alphas=True) == {"second.weight.alphas"}
    assert chosen(program, biases=True) == {"first.bias", "second.bias"}
    latent = QuantizeWeights(latent=True, bits=2, ternary=True)(tiny_mlp_program())
    assert chosen(latent, latents=True) == {"first.weight.latent", "second.weight.latent"}
    static = QuantizeActivations(dynamic=False, granularity=Granularity.TENSOR, symmetric=False)(program)
    calibrated = calibrate(static, [mlp_inputs()], progress=False)
    assert chosen(calibrated, input_scales=True) == {"first.input.scale", "second.input.scale"}
    assert chosen(calibrated, zero_points=True, exclude=("second",)) == {
        "first.weight.zero_point",
        "first.input.zero_point",
    }
    embedding = QuantizeWeights()(tiny_embedding_program())
    assert chosen(embedding, layer_norms=True) == {"norm.weight", "norm.bias"}
    assert chosen(embedding, biases=True) == {"mix.bias"}
    assert chosen(embedding, scales=True, include=("head",)) == {"tokens.weight.scale"}  # an alias of the tied weight


class WrittenOutNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class TinyRMSNorm(WrittenOutNorm):
    pass


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.out, self.gain = TinyRMSNorm(), nn.Linear(8, 4), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.out(self.before(x) * self.gain)}


def test_norms_that_are_written_out_are_known_by_their_module() -> None:
    program = trace(Normed().eval(), mlp_inputs())
    assert trainable(Train(layer_norms=True)(program)) == {"before.weight"}


class TokensAndKinds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.kinds = nn.Embedding(12, 8), nn.Embedding(12, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.tokens(input_ids) + self.kinds(input_ids))


@pytest.mark.parametrize("lowered", [False, True])
def test_outliers_of_embeddings_may_be_left_out_but_not_of_those_that_a_linear_reads(lowered: bool) -> None:
    program = trace(TokensAndKinds(), {"input_ids": torch.arange(12).reshape(3, 4)})
    coded = Pipeline([SplitOutliers(ratio=0.05), QuantizeWeights(bits=3)])(program)
    coded = Lower()(coded) if lowered else coded
    every = trainable(Train(scales=True, outliers=True)(coded))
    without = trainable(Train(scales=True, outliers=True, embedding_outliers=False)(coded))
    assert every - without == {"kinds.weight.outliers.values"}
    assert {name.partition(".")[0] for name in without} & {"tokens", "head"}


def test_the_head_is_named_by_patterns() -> None:
    program = QuantizeWeights(include=("first",))(tiny_mlp_program())
    chosen = Train(scales=True, head=("second*",))(program)
    assert trainable(chosen) == {"first.weight.scale", "second.weight", "second.bias"}
    counts = {change.what: (change.how, change.figures["parameters"]) for change in chosen.reports[-1].changes}
    assert counts == {"first.weight.scale": ("scales", 16), "second.weight": ("head", 64), "second.bias": ("head", 4)}


def test_a_quantized_head_is_reported() -> None:
    chosen = Train(head=("second*",))(QuantizeWeights()(tiny_mlp_program()))
    assert [(kept.what, kept.why) for kept in chosen.reports[-1].kept] == [
        ("second.weight", "its codes do not train: exclude the head from quantization")
    ]
    assert trainable(chosen) == {"second.weight.scale", "second.bias"}


# ---- counts


def test_counts_and_shares_are_of_the_original_model() -> None:
    elements = sum(value.numel() for value in tiny_mlp_program().parameters())
    program = Pipeline([SplitOutliers(ratio=0.05), QuantizeWeights(bits=3), QuantizeActivations()])(tiny_mlp_program())
    totals = Train(scales=True, outliers=True, head=("second.bias",))(program).reports[-1].totals
    assert elements == 16 * 8 + 16 + 4 * 16 + 4 == totals["model"]
    assert (totals["scales"], totals["outliers"], totals["head"]) == (16 + 4, 6 + 3, 4)
    assert totals["trainable"] == 20 + 9 + 4
    assert totals["share"] == pytest.approx(33 / 212)
    assert totals["outliers share"] == pytest.approx(9 / 212)


def test_a_tied_weight_counts_once_and_static_scales_not_at_all() -> None:
    program = tiny_embedding_program()
    elements = sum(value.numel() for value in program.parameters())
    static = Pipeline([QuantizeWeights(), QuantizeActivations(dynamic=False, granularity=Granularity.TENSOR)])(program)
    calibrated = calibrate(static, [embedding_inputs()], progress=False)
    assert Train(input_scales=True)(calibrated).reports[-1].totals["model"] == elements == 12 * 8 + 8 * 8 + 8 + 2 * 8


# ---- lowered


def test_a_lowered_program_trains_the_same_parameters_to_the_same_values() -> None:
    options: dict[str, Any] = {"scales": True, "outliers": True, "biases": True, "head": ("second.bias",)}
    base = Pipeline([QuantizeActivations()])(with_outliers())
    first_lowered = Train(**options)(Lower()(base))
    lowered_last = Lower()(Train(**options)(base))
    assert trainable(first_lowered) == trainable(lowered_last) and len(trainable(lowered_last)) == 6
    for _ in range(3):
        assert step(first_lowered, mlp_inputs()) == pytest.approx(step(lowered_last, mlp_inputs()), rel=1e-5)
    for name in trainable(lowered_last):
        assert torch.allclose(first_lowered.tensor(name), lowered_last.tensor(name), atol=1e-6), name
    assert first_lowered.reports[-1].totals["model"] == 212


# ---- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outliers": True}, "outliers=True, but no weight has outliers: split-outliers comes first"),
        ({"alphas": True}, "alphas=True, but no weight has alphas"),
        ({"latents": True}, "no weight is latent"),
        ({"input_scales": True}, "no activation has a static scale"),
        ({"zero_points": True}, "nothing has a zero point"),
        ({"layer_norms": True}, "there is no normalisation layer"),
        (
            {"scales": True, "biases": True, "include": ("second",), "exclude": ("*.weight",)},
            "scales=True, but none is in",
        ),
        ({"scales": True, "include": ("thrid",)}, "'thrid' matches none"),
        ({"head": ("clasifier*",)}, r"the head 'clasifier\*' matches no parameter"),
        ({"head": ("secnd.bias",)}, "did you mean second.bias"),
    ],
)
def test_what_can_not_train_says_why(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        Train(**options)(QuantizeWeights()(tiny_mlp_program()))


def test_options_that_do_not_go_together() -> None:
    with pytest.raises(PassError, match="nothing is to train"):
        Train()
    with pytest.raises(PassError, match="reset_outliers goes with outliers=True"):
        Train(scales=True, reset_outliers=True)
    train = Train(outliers=True, head=("classifier*", "pooler.*"))
    assert str(train) == "train{outliers=true,head=[classifier*,pooler.*]}"
