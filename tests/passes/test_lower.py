from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from prequant.passes import (
    BinaryCode,
    Canonicalize,
    Freeze,
    Lower,
    Pass,
    PassError,
    Pipeline,
    Program,
    QuantizeActivations,
    QuantizeWeights,
    SplitOutliers,
    calibrate,
    lower,
    readable,
    weight_sites,
)
from prequant.passes.sites import WEIGHT_OPERAND
from prequant.runtime import Granularity, ops
from prequant.trace import trace

from ..models import FAMILIES, traced
from . import truth
from .support import (
    assert_golden,
    embedding_inputs,
    mlp_inputs,
    tiny_embedding,
    tiny_embedding_program,
    tiny_mlp_program,
)
from .test_quantize_weights import changed, kept
from .test_sites import Odd, nested

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def reference_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    # Lowering computes the same expression: equal to the last bit where both sides run the definition of the ops.
    monkeypatch.setattr("prequant.runtime.backends._backends", {})


# ---- golden


def test_golden() -> None:
    steps = [SplitOutliers(ratio=0.05, include=("second",)), QuantizeWeights(bits=3), QuantizeActivations(), Lower()]
    assert_golden(
        Pipeline(steps)(tiny_mlp_program()),
        """
        program(x: f32[batch, length, 8])
          %packed_linear_default = packed_linear<affine3:row>(%x, first.weight.codes [16×3 u8], first.weight.scale [16×1 f32], bias=first.bias [16 f32], columns=8, input_format=affine8:row)
          %relu = relu(%packed_linear_default)
          %dropout = dropout(%relu, 0.1, False)
          %packed_linear_default_1 = packed_linear<affine3:row>(%dropout, second.weight.codes [4×6 u8], second.weight.scale [4×1 f32], outlier_values=second.weight.outliers.values [3 f32], outlier_columns=second.weight.outliers.columns [3 u16], outlier_row_offsets=second.weight.outliers.row_offsets [5 i32], bias=second.bias [4 f32], columns=16, input_format=affine8:row)
          return {logits: %packed_linear_default_1}
        """,  # noqa: E501
    )


def test_golden_tied() -> None:
    lowered = Pipeline([BinaryCode(bits=2, embeddings=True, include=("head",)), Lower()])(tiny_embedding_program())
    assert_golden(
        lowered,
        """
        program(input_ids: i64[batch, length])
          tokens.weight is tied to head.weight
          %packed_embedding_default = packed_embedding<bcq2:row>(%input_ids, tokens.weight.planes [2×12×1 u8], tokens.weight.alphas [2×12×1 f32], columns=8, dtype=f32, padding_idx=-1)
          %linear = linear(%packed_embedding_default, mix.weight [8×8 f32], mix.bias [8 f32])
          %tanh = tanh(%linear)
          %layer_norm = layer_norm(%tanh, [8], norm.weight [8 f32], norm.bias [8 f32], 1e-05, False)
          %packed_linear_default = packed_linear<bcq2:row>(%layer_norm, tokens.weight.planes [2×12×1 u8], tokens.weight.alphas [2×12×1 f32], columns=8)
          return {logits: %packed_linear_default}
        """,  # noqa: E501
    )
    assert changed(lowered) == ["tokens.weight", "tokens.weight"]
    assert [change.figures["op"] for change in lowered.reports[-1].changes] == ["embedding", "linear"]
    assert kept(lowered) == [("mix.weight", "float32: not quantized")]
    assert lowered.reports[-1].totals == {"lowered": 2, "kept": 1}


# ---- lowered equals simulated: every format, outliers, activations

SHARING: list[dict[str, Any]] = [{}, {"granularity": "tensor"}, {"granularity": "group", "group_size": 3}]
FORMATS: dict[str, Pass] = {}
for _options in SHARING:
    for _pass in (
        *(QuantizeWeights(bits=b, symmetric=s, **_options) for b in range(2, 9) for s in (True, False)),
        *(QuantizeWeights(bits=2, ternary=True, base3=base3, **_options) for base3 in (False, True)),
        QuantizeWeights(bits=1, **_options),
    ):
        FORMATS[str(_pass.format())] = _pass
for _bits, _group in ((1, 0), (2, 3), (3, 0), (4, 4)):
    FORMATS[f"bcq{_bits}{_group}"] = BinaryCode(bits=_bits, group_size=_group, embeddings=True)

OUTLIERS: dict[str, list[Pass]] = {
    "none": [],
    "delta": [SplitOutliers(ratio=0.07)],
    "replace": [SplitOutliers(ratio=0.07, mode="replace", dtype="float16")],
}
STATIC: dict[str, Any] = {"dynamic": False, "granularity": "tensor"}
ACTIVATIONS: dict[str, list[Pass]] = {
    "float": [],
    "token": [QuantizeActivations()],
    "tensor": [QuantizeActivations(bits=6, granularity=Granularity.TENSOR)],
    "static": [QuantizeActivations(bits=7, symmetric=False, **STATIC)],
}


class Case(NamedTuple):
    format: str
    outliers: str
    activations: str


def cases() -> list[Case]:
    """Every format with some outliers and activations, and some formats with all of these."""
    others = [(o, a) for o in OUTLIERS for a in ACTIVATIONS]
    some = [Case(name, *others[5 * i % len(others)]) for i, name in enumerate(FORMATS)]
    crossed = ("affine4:row", "affine3:group3:asym", "ternary:tensor:base3", "bcq23")
    return list(dict.fromkeys([*some, *(Case(name, *other) for name in crossed for other in others)]))


@cache
def tied_program() -> Program:
    return tiny_embedding_program()


def simulated_program(case: Case) -> Program:
    steps = [*OUTLIERS[case.outliers], FORMATS[case.format], *ACTIVATIONS[case.activations]]
    program = Pipeline(steps)(tied_program())
    return calibrate(program, [embedding_inputs(4, 9)], progress=False) if case.activations == "static" else program


def gradients(program: Program, result: Tensor) -> dict[str, Tensor]:
    loss = (result * torch.linspace(-1, 1, result.shape[-1])).square().sum()
    named = {name: value for name, value in program.named_parameters() if value.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: torch.zeros(()) if g is None else g for name, g in zip(named, found, strict=True)}


@pytest.mark.parametrize("case", cases(), ids=" ".join)
def test_lowered_equals_simulated(case: Case) -> None:
    simulated = simulated_program(case)
    lowered = Lower(strict=True)(simulated)
    assert lowered.reports[-1].totals == {"lowered": 3, "kept": 0}
    left = {str(node.target) for node in lowered.graph.nodes if node.op == "call_function"}
    packed = {"prequant.packed_embedding.default", "prequant.packed_linear.default"}
    assert left == packed | {"aten.tanh.default", "aten.layer_norm.default"}
    assert lowered.state_dict().keys() == simulated.state_dict().keys()
    for name, value in simulated.state_dict().items():
        assert lowered.state_dict()[name].data_ptr() == value.data_ptr()
        assert lowered.state_dict()[name].dtype is value.dtype
    inputs = embedding_inputs(3, 7)
    expected, result = simulated(**inputs)["logits"], lowered(**inputs)["logits"]
    assert torch.equal(result, expected)
    wanted, found = gradients(simulated, expected), gradients(lowered, result)
    assert wanted.keys() == found.keys() and any(name.startswith("tokens.weight.") for name in found)
    for name, gradient in wanted.items():
        clipped_only = name.endswith("input.zero_point")
        assert clipped_only or bool(gradient.any()), f"{name} has no gradient to compare"
        # Values in 16 bits have gradients in 16 bits, and the uses of a tied matrix add theirs up.
        digits = 16 * torch.finfo(gradient.dtype).eps
        assert torch.allclose(found[name], gradient, rtol=digits, atol=digits * float(gradient.abs().max())), name


@pytest.mark.parametrize(
    "case", [Case("affine4:row", "delta", "float"), Case("bcq23", "replace", "float")], ids=" ".join
)
def test_gradients_to_inputs_and_the_truth_of_outputs(case: Case) -> None:
    program = Pipeline([*OUTLIERS[case.outliers], FORMATS[case.format]])(tiny_mlp_program())
    lowered = lower(program, strict=True)
    leaves = [mlp_inputs()["x"].requires_grad_() for _ in range(2)]
    for each, x in zip((program, lowered), leaves, strict=True):
        each(x)["logits"].square().sum().backward()
    assert leaves[0].grad is not None and leaves[1].grad is not None and leaves[0].grad.any()
    assert torch.allclose(leaves[0].grad, leaves[1].grad, rtol=1e-5, atol=1e-6)
    replace, format = case.outliers == "replace", "affine4:row" if case.format == "affine4:row" else "bcq2:group3"
    weight = {
        name: truth.weight(lowered, f"{name}.weight", format, n, replace) for name, n in (("first", 8), ("second", 16))
    }
    x, bias = leaves[0].detach().double(), {name: lowered.tensor(f"{name}.bias").double() for name in weight}
    hidden = torch.relu(x @ weight["first"].T + bias["first"])
    expected = hidden @ weight["second"].T + bias["second"]
    assert torch.allclose(lowered(leaves[0])["logits"].double(), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision(dtype: torch.dtype) -> None:
    program = trace(tiny_embedding().to(dtype), embedding_inputs())
    simulated = QuantizeWeights()(program)
    lowered = Lower(strict=True)(simulated)
    inputs = embedding_inputs(2, 9)
    assert lowered(**inputs)["logits"].dtype is dtype
    assert torch.equal(lowered(**inputs)["logits"], simulated(**inputs)["logits"])
    # Outliers are added in float32 here, and in the model's own dtype there.
    split = Pipeline([SplitOutliers(ratio=0.1), QuantizeWeights()])(program)
    difference = Lower()(split)(**inputs)["logits"].float() - split(**inputs)["logits"].float()
    assert difference.abs().max().item() < 16 * torch.finfo(dtype).eps


def test_padding_gets_no_gradient() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(12, 8, padding_idx=3)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.tokens(input_ids).sin()

    model = Padded()
    nn.init.normal_(model.tokens.weight)
    simulated = QuantizeWeights()(trace(model.eval(), embedding_inputs()))
    lowered = Lower(strict=True)(simulated)
    (node,) = lowered.graph.find_nodes(op="call_function", target=ops.packed_embedding)
    assert node.kwargs["padding_idx"] == 3
    ids = torch.tensor([[3, 1, 3], [2, 3, 1]])
    wanted, found = (gradients(each, each(ids))["tokens.weight.scale"] for each in (simulated, lowered))
    assert torch.allclose(found, wanted, atol=1e-6) and not found[3].any() and found[1].any()


# ---- coverage: lowered, or kept and why


def test_lowering_again_finds_nothing_to_do() -> None:
    once = Pipeline([QuantizeWeights(), Lower()])(tiny_mlp_program())
    twice = Lower(strict=True)(once)
    assert readable(twice) == readable(once) and not changed(twice) and not kept(twice)


def test_reasons_for_weights() -> None:
    steps = [QuantizeWeights(latent=True, include=("first",)), Lower()]
    program = Pipeline(steps)(tiny_mlp_program())
    assert kept(program) == [
        ("first.weight", "a latent weight: freeze it first"),
        ("second.weight", "float32: not quantized"),
    ]
    with pytest.raises(PassError, match=r"first\.weight \(a latent.*; second\.weight \(float32: not quantized\)"):
        Lower(strict=True)(program)
    frozen = Pipeline([Freeze(), Lower(strict=True, include=("first",))])(program)
    assert changed(frozen) == ["first.weight"] and kept(frozen) == [("second.weight", "out of scope")]


def test_uncalibrated_activations_are_refused() -> None:
    program = QuantizeActivations(**STATIC)(QuantizeWeights()(tiny_mlp_program()))
    with pytest.raises(PassError, match=r"'calibrated'.*has no scale yet: calibrate first\.input"):
        Lower()(program)


class Lookup(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.tokens, self.options = nn.Embedding(12, 8), options

    def forward(self, input_ids: Tensor) -> Tensor:
        return nn.functional.embedding(input_ids, self.tokens.weight, **self.options)


@pytest.mark.parametrize("option", ["scale_grad_by_freq", "sparse"])
def test_gradients_that_the_packed_op_does_not_have(option: str) -> None:
    program = QuantizeWeights()(trace(Lookup(**{option: True}), embedding_inputs()))
    lowered = Lower()(program)
    ((what, why),) = kept(lowered)
    assert what == "embedding" and "tokens.weight: an embedding with scale_grad_by_freq or sparse" in why
    assert readable(lowered) == readable(program)
    with pytest.raises(PassError, match=r"tokens\.weight at embedding \(an embedding with"):
        Lower(strict=True)(program)


def test_more_outliers_than_a_packed_op_takes() -> None:
    program = Pipeline([SplitOutliers(ratio=0.1), QuantizeWeights()])(tiny_mlp_program())
    nested(program)
    lowered = Lower()(program)
    assert kept(lowered) == [("first.weight", "more than one set of outliers")]
    assert torch.equal(lowered(**mlp_inputs())["logits"], program(**mlp_inputs())["logits"])


def test_a_weight_in_another_form() -> None:
    raw = traced("gpt2-causal-lm")
    program = QuantizeWeights(strategy="minmax")(raw)
    lowered = Lower()(program)
    reasons = [why for what, why in kept(lowered) if what.startswith("addmm")]
    assert len(reasons) == 2 * 4
    assert "it reads the weight transformer.h.0.attn.c_attn.weight in another form: canonicalize comes first" in reasons
    with pytest.raises(PassError, match=r"addmm \(it reads the weight transformer\.h\.0.* and 3 more"):
        Lower(strict=True)(program)
    Lower(strict=True, include=("type:Embedding",))(program)
    Pipeline([Canonicalize(), QuantizeWeights(strategy="minmax"), Lower(strict=True)])(raw)


def test_a_quantized_weight_that_is_read_elsewhere() -> None:
    program = QuantizeWeights()(trace(Odd().eval(), mlp_inputs()))
    lowered = Lower()(program)
    assert [why for _, why in kept(lowered)] == ["float32: not quantized", "its weight is computed, not stored"]
    assert len(lowered.graph.find_nodes(op="call_function", target=ops.dequantize)) == 1
    assert torch.equal(lowered(**mlp_inputs()), program(**mlp_inputs()))

    class Turned(Odd):
        def forward(self, x: Tensor) -> Tensor:
            return torch.matmul(self.read(x), self.read.weight[:, :4]) @ torch.relu(x[0, :4])

    program = QuantizeWeights()(trace(Turned().eval(), mlp_inputs()))
    lowered = Lower()(program)
    assert changed(lowered) == ["read.weight"]
    assert [why.partition(":")[0] for _, why in kept(lowered)] == [
        "it reads the weight read.weight in another form",
        "a product of two activations",
    ]
    assert torch.equal(lowered(**mlp_inputs()), program(**mlp_inputs()))


def test_what_nothing_uses_stays_unless_lowering_replaced_it() -> None:
    program = Pipeline([QuantizeWeights(), QuantizeActivations()])(tiny_mlp_program())
    (relu,) = program.graph.find_nodes(op="call_function", target=aten.relu.default)
    with program.graph.inserting_after(relu):
        unused = program.graph.call_function(aten.neg.default, (relu,))
    assert unused.name in {node.name for node in Lower()(program).graph.nodes}


@pytest.mark.parametrize("option", ["clipped", "scale_gradient"])
def test_an_input_with_other_gradients_is_quantized_outside(option: str) -> None:
    program = Pipeline([QuantizeWeights(), QuantizeActivations()])(tiny_mlp_program())
    for node in program.graph.find_nodes(op="call_function", target=ops.fake_quantize):
        node.update_kwarg(option, False)
    program.recompile()
    lowered = Lower(strict=True)(program)
    assert len(lowered.graph.find_nodes(op="call_function", target=ops.fake_quantize)) == 2
    assert torch.equal(lowered(**mlp_inputs())["logits"], program(**mlp_inputs())["logits"])


def test_an_input_that_is_also_read_elsewhere_stays() -> None:
    program = Pipeline([QuantizeWeights(include=("second",)), QuantizeActivations(), Lower()])(tiny_mlp_program())
    assert len(program.graph.find_nodes(op="call_function", target=ops.fake_quantize)) == 1
    shared = Pipeline([QuantizeWeights(strategy="minmax", include=("*query",)), QuantizeActivations(), Lower()])
    lowered = shared(traced("bert-encoder"))
    assert len(lowered.graph.find_nodes(op="call_function", target=ops.packed_linear)) == 2
    assert len(lowered.graph.find_nodes(op="call_function", target=ops.fake_quantize)) == 2 * 4 + 1


def test_scopes_still_see_modules() -> None:
    program = Pipeline([QuantizeWeights(), Lower(include=("first",))])(tiny_mlp_program())
    (node,) = program.graph.find_nodes(op="call_function", target=ops.packed_linear)
    assert node.meta["module_stack"][-1] == ("first", "Linear") and node.meta["val"].shape[-1] == 16
    assert changed(Lower(include=("second",))(program)) == ["second.weight"]


def test_text_form() -> None:
    assert str(Lower(strict=True)) == "lower{strict=true}" and Pipeline.parse("lower").passes == (Lower(),)


# ---- every family


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str) -> None:
    family = FAMILIES[name]()
    prepare = Pipeline([Canonicalize(), SplitOutliers(ratio=0.01), QuantizeWeights(bits=4)])
    simulated = prepare(traced(name))
    lowered = Lower(strict=True)(simulated)
    modules = [
        m for m in family.model.modules() if isinstance(m, nn.Linear | nn.Embedding) or type(m).__name__ == "Conv1D"
    ]
    weights = {id(module.weight) for module in modules}
    sites = weight_sites(simulated)
    assert len(weights) == len(sites), [site.name for site in sites]
    uses = [node for node in simulated.graph.nodes if node.target in WEIGHT_OPERAND]
    report = lowered.reports[-1]
    assert report.totals["lowered"] == len(report.changes) == len(uses)
    assert {change.what for change in report.changes} == {site.name for site in sites}
    assert {kept.why for kept in report.kept} <= {"a product of two activations: it has no weight"}
    assert not [
        node for node in lowered.graph.nodes if node.target in (*WEIGHT_OPERAND, ops.dequantize, ops.add_outliers)
    ]
    inputs = family.make_inputs(2, 5, padded=True)
    for wanted, found in zip(tensors(simulated(**inputs)), tensors(lowered(**inputs)), strict=True):
        assert torch.equal(found, wanted)


def tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    values = result.values() if hasattr(result, "values") else result
    return [tensor for value in values if value is not None for tensor in tensors(value)]
