"""What comes straight from a softmax or an activation function: in toys that are one way or another, and in models."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from prequant.passes import Canonicalize, ComposeOps, Pipeline, Program, QuantizeActivations, calibrate
from prequant.passes.packed import operands_of
from prequant.passes.straight import straight_from
from prequant.trace import trace

from ..models import LAYERS, random_inputs, small_model
from .support import mlp_inputs

aten = torch.ops.aten


class Before(nn.Module):
    """A linear that reads what a function or a module makes of another's result."""

    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.step = step

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.second(self.step(self.first(x)))}


def origin(step: Callable[[Tensor], Tensor]) -> str | None:
    """What the second linear reads comes straight from."""
    program = trace(Before(step).eval(), mlp_inputs())
    linear = program.graph.find_nodes(op="call_function", target=aten.linear.default)[-1]
    return straight_from(operands_of(linear)["input"], linear)


# ---- ops


@pytest.mark.parametrize(
    "step",
    [
        functional.gelu,
        lambda x: functional.gelu(x, approximate="tanh"),
        functional.relu,
        functional.relu6,
        functional.silu,
        functional.mish,
        functional.hardswish,
        nn.GELU(),
        nn.ReLU(),
        nn.ReLU6(),
        nn.SiLU(),
    ],
)
def test_functions_of_torch(step: Callable[[Tensor], Tensor]) -> None:
    assert origin(step) == "activation"


def test_a_softmax() -> None:
    assert origin(lambda x: torch.softmax(x, -1)) == "softmax"
    assert origin(nn.Softmax(-1)) == "softmax"
    assert origin(lambda x: torch.softmax(x, -1, dtype=torch.float64).float()) == "softmax"


@pytest.mark.parametrize(
    "through",
    [
        nn.Dropout(0.1),
        lambda x: x.reshape(-1, 2, 4).view(x.shape),
        lambda x: x.transpose(0, 1),
        lambda x: x.permute(1, 0, 2),
        lambda x: x.unsqueeze(1).expand(-1, 3, -1, -1),
        lambda x: x.unsqueeze(1).squeeze(1),
        lambda x: x.flatten(0, 1).unflatten(0, (x.shape[0], -1)),
        lambda x: x.clone(),
        lambda x: x.transpose(0, 1).contiguous(),
        lambda x: x.bfloat16().float(),
        lambda x: x.double().type_as(x),
        lambda x: functional.dropout(x.transpose(0, 1).contiguous().double(), 0.5, False).float(),
    ],
)
def test_what_changes_no_value_is_seen_through(through: Callable[[Tensor], Tensor]) -> None:
    assert origin(lambda x: through(torch.relu(x))) == "activation"
    assert origin(lambda x: through(torch.softmax(x, -1))) == "softmax"
    assert origin(lambda x: through(torch.tanh(x))) is None
    assert origin(through) is None


@pytest.mark.parametrize(
    "step",
    [
        torch.tanh,
        torch.sigmoid,
        functional.leaky_relu,
        functional.elu,
        lambda x: torch.log_softmax(x, -1),
        lambda x: functional.gelu(x) * x,
        lambda x: functional.gelu(x) + x,
        lambda x: functional.gelu(x) - 1,
        lambda x: -torch.relu(x),
        lambda x: torch.softmax(x, -1) @ torch.softmax(x, -1).mT @ x,
        lambda x: functional.layer_norm(functional.silu(x), (8,)),
        nn.LeakyReLU(),
        nn.PReLU(),
        nn.Tanh(),
    ],
)
def test_other_values_come_straight_from_neither(step: Callable[[Tensor], Tensor]) -> None:
    assert origin(step) is None


# ---- modules that write a function out


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ReLUSquared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.square(torch.clamp(x, min=0)).to(x.dtype)


class Unnamed(nn.Module):
    """The same as :class:`QuickGELU` under a name that says nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class SplitGELU(nn.Module):
    """A gate: one half of the channels times an activation of the other."""

    def forward(self, x: Tensor) -> Tensor:
        gate, value = torch.cat([x, x + 1], -1).chunk(2, -1)
        return functional.gelu(gate) * value


class GELULayer(nn.Module):
    """A linear is a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x * torch.sigmoid(x), self.weight) * 2


class ScaledGELU(nn.Module):
    """Two values meet in it: a parameter may turn the sign around."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return functional.gelu(x) * self.factor


class GELUBlock(nn.Module):
    """The linear that reads the value is inside: nothing is this module's result."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x * 3, self.weight)


def test_modules_are_known_by_their_class_and_by_what_they_do() -> None:
    assert origin(QuickGELU()) == "activation"
    assert origin(nn.Sequential(ReLUSquared(), nn.Dropout(0.1))) == "activation"
    for other in (Unnamed(), SplitGELU(), GELULayer(), ScaledGELU()):
        assert origin(other) is None, other


def test_a_value_inside_of_a_module_is_not_its_result() -> None:
    program = trace(Before(GELUBlock()).eval(), mlp_inputs())
    inner = program.graph.find_nodes(op="call_function", target=aten.linear.default)[1]
    value = operands_of(inner)["input"]
    assert value.target is aten.mul.Tensor and straight_from(value, inner) is None


# ---- models

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("Bert", "Model", {}),
    "gpt2": ("GPT2", "LMHeadModel", {}),
    "t5": ("T5", "ForConditionalGeneration", {}),
    "t5-gated": ("T5", "ForConditionalGeneration", {"feed_forward_proj": "gated-gelu"}),
    "llama": ("Llama", "ForCausalLM", {}),
    "opt": ("OPT", "ForCausalLM", {}),
}
AFTER_ACTIVATIONS = {
    "bert": [f"encoder.layer.{i}.output.dense.weight" for i in range(LAYERS)],
    "gpt2": [f"transformer.h.{i}.mlp.c_proj.weight" for i in range(LAYERS)],
    "t5": [
        *(f"encoder.block.{i}.layer.1.DenseReluDense.wo.weight" for i in range(LAYERS)),
        *(f"decoder.block.{i}.layer.2.DenseReluDense.wo.weight" for i in range(LAYERS)),
    ],
    "t5-gated": [],
    "llama": [],
    "opt": [f"model.decoder.layers.{i}.fc2.weight" for i in range(LAYERS)],
}
ATTENTIONS = {"t5": 3 * LAYERS, "t5-gated": 3 * LAYERS}
"""How many, where not one a layer."""


@cache
def model_of(name: str) -> Any:
    prefix, head, options = FAMILIES[name]
    return small_model(prefix, head, attn_implementation="eager", **options)


@cache
def canonical(name: str) -> Program:
    """Traced with eager attention: leave it as it is."""
    model = model_of(name)
    return Canonicalize()(trace(model, random_inputs(model, 1, 4)))


def quantize(**options: Any) -> QuantizeActivations:
    return QuantizeActivations(
        granularity="tensor",  # type: ignore[arg-type]
        dynamic=False,
        operands="matmul",
        asymmetric_after=("softmax", "activation"),
        **options,
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_in_models(name: str) -> None:
    program = quantize()(canonical(name))
    report = program.reports[-1]
    asymmetric = {change.what: change.figures["after"] for change in report.changes if change.how.endswith(":asym")}
    others = {change.how for change in report.changes if change.what not in asymmetric}
    assert [what for what, after in asymmetric.items() if after == "activation"] == AFTER_ACTIVATIONS[name]
    probabilities = [what for what, after in asymmetric.items() if after == "softmax"]
    assert len(probabilities) == ATTENTIONS.get(name, LAYERS)
    assert all(what.endswith(", left") for what in probabilities)
    assert others == {"affine8:tensor"}
    assert bool(report.kept) is (not AFTER_ACTIVATIONS[name])
    assert all(kept.what == "asymmetric_after=activation" for kept in report.kept)


def test_a_function_that_was_composed_is_the_same() -> None:
    composed = ComposeOps()(canonical("gpt2"))
    assert composed.graph.find_nodes(op="call_function", target=aten.gelu.default)
    found = [change.what for change in quantize()(composed).reports[-1].changes if change.how.endswith(":asym")]
    assert len(found) == 2 * LAYERS and set(AFTER_ACTIVATIONS["gpt2"]) < set(found)


def test_one_kind_leaves_the_other_symmetric() -> None:
    static = {"granularity": "tensor", "dynamic": False, "operands": "matmul"}
    for kind, count in (("softmax", LAYERS), ("activation", LAYERS)):
        made = Pipeline.parse(str(QuantizeActivations(asymmetric_after=(kind,), **static)))  # type: ignore[arg-type]
        changes = made(canonical("bert")).reports[-1].changes
        found = {change.figures["after"] for change in changes if change.how.endswith(":asym")}
        assert found == {kind}
        assert sum(change.how.endswith(":asym") for change in changes) == count


@pytest.mark.parametrize(
    ("name", "module", "input_of"),
    [
        ("bert", "encoder.layer.{}.intermediate", "encoder.layer.{}.output.dense"),
        ("gpt2", "transformer.h.{}.mlp.act", "transformer.h.{}.mlp.c_proj"),
        ("t5", "encoder.block.{}.layer.1.DenseReluDense.act", "encoder.block.{}.layer.1.DenseReluDense.wo"),
    ],
)
def test_scales_cover_what_the_eager_model_has_there(name: str, module: str, input_of: str) -> None:
    model = model_of(name)
    values = random_inputs(model, 3, 9)
    seen: dict[int, Tensor] = {}
    hooks = []
    for i in range(LAYERS):
        hook = lambda _, __, result, i=i: seen.update({i: result})  # noqa: E731
        hooks.append(model.get_submodule(module.format(i)).register_forward_hook(hook))
    with torch.no_grad():
        outputs = model(**values, output_attentions=True)
    for each in hooks:
        each.remove()
    attentions = outputs.encoder_attentions if name == "t5" else outputs.attentions
    calibrated = calibrate(quantize()(canonical(name)), [values], progress=False)
    found = {name: value.item() for name, value in calibrated.named_parameters() if value.numel() == 1}
    zero_points = [name for name in found if name.endswith(".left_2.zero_point")]
    for i in range(LAYERS):
        low, high = min(float(seen[i].min()), 0.0), float(seen[i].max())
        scale = (high - low) / 255
        assert found[f"{input_of.format(i)}.input.scale"] == pytest.approx(scale, rel=1e-4)
        assert found[f"{input_of.format(i)}.input.zero_point"] == round(-low / scale)
        assert found[zero_points[i]] == 0.0
        probability = found[zero_points[i].replace("zero_point", "scale")]
        assert probability == pytest.approx(float(attentions[i].max()) / 255, rel=1e-4)
