from typing import Any

import pytest
import torch

from prequant.passes import (
    BinaryCode,
    Canonicalize,
    Lower,
    Pass,
    Pipeline,
    Program,
    QuantizeActivations,
    QuantizeWeights,
    SplitOutliers,
    calibrate,
    weight_sites,
    weights,
)
from prequant.passes.weights import WeightView, float_bytes
from prequant.runtime import Granularity
from prequant.trace import trace

from ..models import traced
from .support import embedding_inputs, mlp_inputs, tiny_embedding_program, tiny_mlp, tiny_mlp_program
from .test_sites import Odd

FORMS: dict[str, list[Pass]] = {
    "dense": [],
    "split": [SplitOutliers(ratio=0.1)],
    "affine4:row": [QuantizeWeights()],
    "affine3:group5:asym": [QuantizeWeights(bits=3, granularity=Granularity.GROUP, group_size=5, symmetric=False)],
    "ternary:row:base3": [QuantizeWeights(bits=2, ternary=True, base3=True)],
    "bcq2:row": [BinaryCode(bits=2, embeddings=True)],
    "latent": [QuantizeWeights(bits=2, latent=True)],
    "delta": [SplitOutliers(ratio=0.1), QuantizeWeights(bits=2)],
    "replace": [SplitOutliers(ratio=0.1, mode="replace"), QuantizeWeights(bits=2)],
}


def view(program: Program, name: str) -> WeightView:
    (found,) = (view for view in weights(program) if view.name == name)
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lowered", [False, True])
def test_every_form(form: str, lowered: bool) -> None:
    simulated = Pipeline(FORMS[form])(tiny_embedding_program())
    program = Lower()(simulated) if lowered else simulated
    views = weights(program)
    assert [(v.name, v.kind, v.shape) for v in views] == [
        ("tokens.weight", "linear+embedding", (12, 8)),
        ("mix.weight", "linear", (8, 8)),
    ]
    for found, site in zip(views, weight_sites(simulated), strict=True):
        assert found.tensors == site.tensors and found.format == site.format
        assert torch.allclose(found.value(), site.value(), atol=1e-7)
        assert not found.value().requires_grad
        assert found.lowered is (lowered and form not in ("dense", "split", "latent"))
        assert found.outliers_replace is (form == "replace") and found.input_format == ""
        assert len(found.consumers) == len(site.consumers)
        stored = {name: program.state_dict()[name] for name in found.tensors.values()}
        assert found.bytes == sum(value.numel() * value.element_size() for value in stored.values())
        assert float_bytes(found) == 4 * found.shape[0] * 8
    if form not in ("dense", "split", "latent") and lowered:
        assert weight_sites(program) == []


def test_bytes_by_hand() -> None:
    program = Pipeline([SplitOutliers(ratio=0.1, dtype="float16"), QuantizeWeights(bits=3)])(tiny_mlp_program())
    # 16 × 8 codes of 3 bits, 16 scales; 13 values and columns of 2 bytes each, 17 offsets.
    assert view(program, "first.weight").bytes == 16 * 3 + 16 * 4 + 13 * (2 + 2) + 17 * 4
    assert view(tiny_mlp_program(), "first.weight").bytes == 16 * 8 * 4


def test_input_formats() -> None:
    steps: list[Any] = [QuantizeWeights(), QuantizeActivations(include=("first",))]
    program = Pipeline([*steps, QuantizeActivations(bits=4, granularity=Granularity.TENSOR, include=("second",))])(
        tiny_mlp_program()
    )
    for each in (program, Lower()(program)):
        assert [v.input_format for v in weights(each)] == ["affine8:row", "affine4:tensor"]
    static = QuantizeActivations(dynamic=False, granularity=Granularity.TENSOR)(tiny_mlp_program())
    assert [v.input_format for v in weights(static)] == ["affine8:tensor"] * 2
    calibrated = calibrate(static, [mlp_inputs()], progress=False)
    assert [v.input_format for v in weights(calibrated)] == ["affine8:tensor"] * 2


def test_the_weight_of_an_embedding_is_not_its_input() -> None:
    latent = QuantizeWeights(bits=2, latent=True)(tiny_embedding_program())
    assert [v.input_format for v in weights(latent)] == ["", ""]
    both = QuantizeActivations(include=("head",))(latent)
    assert [v.input_format for v in weights(both)] == ["affine8:row", ""]


def test_different_inputs_of_one_weight() -> None:
    program = Canonicalize()(traced("albert-encoder"))
    query = "encoder.albert_layer_groups.0.albert_layers.0.attention.query.weight"
    (site,) = (site for site in weight_sites(program) if site.name == query)
    first, _ = site.consumers
    steps = [QuantizeActivations(include=(lambda node: node.name == first.name,)), QuantizeActivations(bits=4)]
    quantized = Pipeline(steps)(program)
    for each in (quantized, Pipeline([QuantizeWeights(strategy="minmax"), Lower()])(quantized)):
        assert view(each, query).input_format == "affine4:row+affine8:row"


def half_lowered() -> Program:
    """The tied matrix packed where it is looked up, and unpacked before the head."""
    program = QuantizeWeights()(tiny_embedding_program())
    lowered = Lower()(program)
    (packed,) = lowered.graph.find_nodes(op="call_function", target=torch.ops.prequant.packed_embedding.default)
    (codes, scale), (_, head) = (
        packed.args[1:3],
        lowered.graph.find_nodes(op="call_function", target=torch.ops.prequant.packed_linear.default),
    )
    options: dict[str, Any] = {"format": "affine4:row", "columns": 8, "dtype": torch.float32}
    with lowered.graph.inserting_before(head):
        dense = lowered.graph.call_function(torch.ops.prequant.dequantize.default, (codes, scale, None), options)
        linear = lowered.graph.call_function(torch.ops.aten.linear.default, (head.args[0], dense))
    head.replace_all_uses_with(linear)
    lowered.graph.erase_node(head)
    lowered.recompile()
    assert torch.equal(lowered(**embedding_inputs())["logits"], program(**embedding_inputs())["logits"])
    return lowered


def test_a_weight_that_is_lowered_at_one_of_its_uses() -> None:
    program = half_lowered()
    tokens, mix = weights(program)
    assert (tokens.name, tokens.kind, tokens.lowered) == ("tokens.weight", "linear+embedding", False)
    assert [node.name for node in tokens.consumers] == ["packed_embedding_default", "linear_default"]
    assert mix.lowered
    assert all(v.lowered for v in weights(Lower(strict=True)(program)))


def test_order_of_first_use() -> None:
    names = [v.name for v in weights(traced("bert-sequence-classification"))]
    assert names[0] == "bert.embeddings.word_embeddings.weight" and names[-1] == "classifier.weight"
    lowered = Pipeline([QuantizeWeights(strategy="minmax", include=("*query", "*output.dense")), Lower()])
    assert [v.name for v in weights(lowered(traced("bert-sequence-classification")))] == names


def test_half_precision() -> None:
    program = trace(tiny_mlp().bfloat16(), {"x": mlp_inputs()["x"].bfloat16()})
    assert view(program, "first.weight").format == "bfloat16"
    assert view(program, "first.weight").value().dtype is torch.bfloat16
    quantized = QuantizeWeights()(program)
    found = view(quantized, "first.weight")
    assert found.value().dtype is torch.float32
    assert torch.equal(found.value().bfloat16(), weight_sites(quantized)[0].value())


def test_a_vector() -> None:
    views = weights(trace(Odd().eval(), mlp_inputs()))
    assert [(v.name, v.shape) for v in views] == [("read.weight", (8, 8)), ("vector", (1, 8))]
