"""Scales that follow latent weights: after each step they are what quantizing the weight anew would choose."""

import pytest
import torch

from prequant.passes import Canonicalize, Freeze, PassError, Pipeline, QuantizeWeights, Train
from prequant.passes.latent_scales import following
from prequant.runtime import Granularity

from .support import mlp_inputs, tiny_mlp_program

OPTIONS = {
    "binary": {"bits": 1, "granularity": Granularity.TENSOR},
    "binary-rows": {"bits": 1},
    "ternary": {"bits": 2, "ternary": True, "granularity": Granularity.TENSOR},
    "ternary-rows": {"bits": 2, "ternary": True},
    "asymmetric": {"bits": 4, "symmetric": False, "strategy": "minmax"},
}


def latent(kind: str) -> Pipeline:
    quantize = QuantizeWeights(**OPTIONS[kind], latent=True)  # type: ignore[arg-type]
    return Pipeline([Canonicalize(), quantize, Train(latents=True, biases=True)])


@pytest.mark.parametrize("kind", OPTIONS)
def test_scales_are_those_that_quantizing_the_weight_now_would_choose(kind: str) -> None:
    program = latent(kind)(tiny_mlp_program())
    scales = following(program)
    names = [view.name for view in scales.views]
    assert names == ["first.weight", "second.weight"]
    optimizer = torch.optim.SGD([p for p in program.parameters() if p.requires_grad], lr=0.5)
    before = program.tensor("first.weight.scale").clone()
    for _ in range(3):
        optimizer.zero_grad()
        program(**mlp_inputs())["logits"].square().sum().backward()
        optimizer.step()
        scales.renew()
    assert not torch.equal(program.tensor("first.weight.scale"), before)
    for name in names:
        weight = program.tensor(f"{name}.latent").detach()
        if kind in ("binary", "ternary"):
            magnitude = weight.abs()
            large = magnitude > (0.7 * magnitude.mean() if kind == "ternary" else -1.0)
            torch.testing.assert_close(program.tensor(f"{name}.scale"), magnitude[large].mean().reshape(1, 1))
    # The same weights, quantized by the pass from the start.
    dense = tiny_mlp_program()
    for name in names:
        dense.set_tensor(name, program.tensor(f"{name}.latent").detach())
        dense.set_tensor(name.replace("weight", "bias"), program.tensor(name.replace("weight", "bias")).detach())
    expected = QuantizeWeights(**OPTIONS[kind])(Canonicalize()(dense))  # type: ignore[arg-type]
    frozen = Freeze()(program)
    torch.testing.assert_close(frozen(**mlp_inputs())["logits"], expected(**mlp_inputs())["logits"])


def test_a_scale_that_trains_does_not_follow() -> None:
    program = Train(latents=True, scales=True)(latent("binary")(tiny_mlp_program()))
    with pytest.raises(PassError, match=r"the scale of first\.weight trains"):
        following(program)


def test_without_latent_weights_there_is_nothing_to_follow() -> None:
    with pytest.raises(PassError, match="no weight is latent"):
        following(tiny_mlp_program())
