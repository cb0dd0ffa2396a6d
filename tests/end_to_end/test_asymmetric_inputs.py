"""Asymmetric static inputs among symmetric ones, all the way: calibrated, trained, frozen, lowered, saved, loaded."""

from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from torch import Tensor

import prequant
from prequant.passes import (
    Canonicalize,
    Freeze,
    Pipeline,
    Program,
    QuantizeActivations,
    QuantizeWeights,
    Train,
    calibrate,
    lower,
)
from prequant.passes.packed import packed_uses
from prequant.runtime import Granularity
from prequant.trace import trace

from ..models import random_inputs, small_model
from ..passes import truth
from ..passes.support import mlp_inputs, tiny_mlp_program

STATIC: dict[str, Any] = {"dynamic": False, "granularity": Granularity.TENSOR}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("Bert", "ForSequenceClassification", {}),
    "gpt2": ("GPT2", "LMHeadModel", {}),
    "t5": ("T5", "ForConditionalGeneration", {}),
    "t5-gated": ("T5", "ForConditionalGeneration", {"feed_forward_proj": "gated-gelu"}),
    "llama": ("Llama", "ForCausalLM", {}),
}
AFTER_ACTIVATIONS = {"bert": 1, "gpt2": 2, "t5": 4, "t5-gated": 0, "llama": 0}
"""Linears that read the result of an activation function."""
PROBABILITIES = {"bert": 1, "gpt2": 2, "t5": 6, "t5-gated": 6, "llama": 2}


def logits(program: Program, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        result: Tensor = program(**inputs)["logits"]
    return result


def difference(first: Program, second: Program, inputs: dict[str, Tensor]) -> float:
    """Of the median token's logits, over the largest of all: a sum that kernels round another way may move a code, and
    with it what is computed from this one token on. What is wrong is wrong for more.
    """
    expected = logits(second, inputs)
    return float((logits(first, inputs) - expected).abs().amax(-1).median() / expected.abs().max())


def trained(program: Program, inputs: dict[str, Tensor], target: Tensor, latents: bool) -> Program:
    """After some steps in which every scale and zero point with a gradient moves."""
    program = Train(input_scales=True, zero_points=True, scales=True, latents=latents)(program)
    optimizer = torch.optim.Adam([value for value in program.parameters() if value.requires_grad], lr=0.01)
    for _ in range(5):
        (program(**inputs)["logits"] - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return program


@cache
def model_and_program(name: str) -> tuple[Any, Program]:
    """A model with eager attention, traced: leave both as they are."""
    prefix, head, options = MODELS[name]
    model = small_model(prefix, head, attn_implementation="eager", **options)
    return model, trace(model, random_inputs(model, 1, 4))


def compressed(name: str, latent: bool = False, operands: Any = "linear") -> Program:
    """Calibrated: 8-bit weights, 8-bit inputs that are clipped, so that zero points have gradients."""
    model, program = model_and_program(name)
    after: Any = ("softmax", "activation")
    quantize = QuantizeActivations(observer="percentile:80", operands=operands, asymmetric_after=after, **STATIC)
    batches = [random_inputs(model, 3, length) for length in (5, 9)]
    simulated = Pipeline([Canonicalize(), QuantizeWeights(bits=8, latent=latent), quantize])(program)
    return calibrate(simulated, batches, progress=False)


@pytest.mark.parametrize(("name", "latent"), [*((name, False) for name in MODELS), ("bert", True), ("gpt2", True)])
def test_a_model_goes_all_the_way(name: str, latent: bool, tmp_path: Path) -> None:
    calibrated = compressed(name, latent, "matmul")
    inputs = random_inputs(model_and_program(name)[0], 3, 8)
    target = logits(model_and_program(name)[1], inputs)
    after = trained(calibrated, inputs, target, latent)

    zero_points = {name for name, value in after.named_parameters() if name.endswith(".zero_point")}
    assert len(zero_points) == AFTER_ACTIVATIONS[name] + PROBABILITIES[name]
    assert {name for name, value in after.named_parameters() if value.requires_grad} >= zero_points
    moved = {name for name in zero_points if float(after.tensor(name).detach().frac()) != 0}
    assert len(moved) > len(zero_points) / 2

    frozen = Freeze()(after)
    assert not any(value.requires_grad for value in frozen.parameters())
    assert torch.equal(logits(frozen, inputs), logits(after, inputs))

    lowered = lower(frozen, strict=True)
    formats = [use.operands["input_format"] for use in packed_uses(lowered.graph) if use.kind == "linear"]
    assert formats.count("affine8:tensor:asym") == AFTER_ACTIVATIONS[name]
    assert set(formats) <= {"affine8:tensor:asym", "affine8:tensor"}
    shifted = frozen.copy()
    for each in zero_points:
        shifted.set_tensor(each, frozen.tensor(each) - 128)
    assert difference(lowered, frozen, inputs) < 1e-5
    assert difference(shifted, frozen, inputs) > 1e-2

    for kind, saved in (("simulated", frozen), ("lowered", lowered)):
        prequant.save(saved, tmp_path / kind)
        loaded = prequant.load(tmp_path / kind)
        assert torch.equal(logits(loaded, inputs), logits(saved, inputs))
        for zero_point in zero_points:
            assert torch.equal(loaded.tensor(zero_point), frozen.tensor(zero_point))


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_without_attention_transformers_loads_the_folder_as_its_own_model(name: str, tmp_path: Path) -> None:
    model = model_and_program(name)[0]
    calibrated = compressed(name)
    inputs = random_inputs(model, 3, 8)
    prequant.save(calibrated, tmp_path)
    loaded = getattr(transformers, type(model).__name__).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.allclose(loaded(**inputs).logits, logits(calibrated, inputs), atol=1e-5)


def test_it_generates_what_its_graph_says() -> None:
    model = model_and_program("gpt2")[0]
    calibrated = compressed("gpt2")
    prompt = random_inputs(model, 2, 6)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1}
    ids = prompt["input_ids"]
    for _ in range(8):
        following = logits(calibrated, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})[:, -1:].argmax(-1)
        ids = torch.cat([ids, following], 1)
    for program in (calibrated, lower(calibrated)):
        assert torch.equal(cast(Any, program).generate(**prompt, **options), ids)


def test_the_truth_of_a_trained_and_lowered_one() -> None:
    """Two linears around a ReLU, against the formula of both formats in float64, with a zero point between codes."""
    quantize = QuantizeActivations(bits=4, observer="lsq", asymmetric_after=("activation",), **STATIC)
    steps = [QuantizeWeights(bits=8, strategy="lsq"), quantize]
    program = calibrate(Pipeline(steps)(tiny_mlp_program()), [mlp_inputs()], progress=False)
    assert float(program.tensor("second.input.zero_point").detach()) == 0
    program.set_tensor("second.input.zero_point", torch.full((1, 1), 1.37))
    lowered = lower(Freeze()(program), strict=True)
    x = mlp_inputs(4, 6)["x"]

    def part(name: str) -> Tensor:
        return lowered.tensor(name).detach().double()

    def linear(name: str, value: Tensor, columns: int) -> Tensor:
        weight = truth.weight(lowered, f"{name}.weight", "affine8:row", columns)
        return value @ torch.as_tensor(weight).T + part(f"{name}.bias")

    step, zero = part("second.input.scale"), part("second.input.zero_point")
    first = (x.double() / part("first.input.scale")).round().clamp(-8, 7) * part("first.input.scale")
    hidden = torch.relu(linear("first", first, 8))
    second = ((hidden / step + zero).round().clamp(0, 15) - zero) * step
    expected = linear("second", second, 16)
    assert float((logits(lowered, {"x": x}) - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    rounded = ((hidden / step + zero.round()).round().clamp(0, 15) - zero.round()) * step
    assert float((linear("second", rounded, 16) - expected).abs().max()) > 1e-2 * float(expected.abs().max())


def test_a_lowered_program_trains_like_the_simulated_one() -> None:
    program = compressed("gpt2")
    inputs = random_inputs(model_and_program("gpt2")[0], 3, 8)
    gradients = []
    for each in (program, lower(program)):
        each = Train(input_scales=True, zero_points=True)(each)
        each(**inputs)["logits"].square().mean().backward()
        gradients.append({name: value.grad for name, value in each.named_parameters() if value.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    zero_points = [name for name in gradients[0] if name.endswith(".zero_point")]
    assert zero_points == ["transformer.h.0.mlp.c_proj.input.zero_point", "transformer.h.1.mlp.c_proj.input.zero_point"]
    for name in zero_points:
        simulated, lowered = gradients[0][name], gradients[1][name]
        assert simulated is not None and lowered is not None
        assert float(simulated) != 0 and float(lowered) == pytest.approx(float(simulated), rel=0.05)
