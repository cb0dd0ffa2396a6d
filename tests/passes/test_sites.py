from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from prequant.passes import BinaryCode, Pipeline, Program, QuantizeWeights, SplitOutliers, readable, weight_sites
from prequant.passes.program import attribute_node
from prequant.passes.sites import WeightSite, expression_leaf, outlier_positions
from prequant.runtime import PrequantError, ops
from prequant.trace import trace

from ..models import FAMILIES, traced
from . import truth
from .support import embedding_inputs, mlp_inputs, tiny_embedding_program, tiny_mlp, tiny_mlp_program

aten = torch.ops.aten


def site(program: Program, name: str = "first.weight") -> WeightSite:
    (found,) = (site for site in weight_sites(program) if site.name == name)
    return found


# ---- finding


def test_a_tied_matrix_is_one_site() -> None:
    tokens, mix = weight_sites(tiny_embedding_program())
    assert (tokens.name, tokens.kind, tokens.shape) == ("tokens.weight", "linear+embedding", (12, 8))
    assert tokens.names == ("tokens.weight", "head.weight")
    assert [node.name for node in tokens.consumers] == ["embedding", "linear_1"]
    assert tokens.module_types == ("TinyEmbedding", "Embedding", "Linear")
    assert (mix.name, mix.kind, mix.shape, mix.names) == ("mix.weight", "linear", (8, 8), ("mix.weight",))


@pytest.mark.parametrize("name", ["bert-masked-lm", "albert-masked-lm", "t5-seq2seq-lm", "llama-causal-lm"])
def test_every_linear_and_embedding_of_a_model_is_found(name: str) -> None:
    model, program = FAMILIES[name]().model, traced(name)
    modules = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding))]
    sites = weight_sites(program)
    assert {id(m.weight) for m in modules} == {id(model.get_parameter(s.name)) for s in sites}
    assert len(sites) == len({id(m.weight) for m in modules})
    for found in sites:
        assert torch.equal(found.value(), model.get_parameter(found.name))


def test_shared_layers_are_one_site_with_more_uses() -> None:
    query = site(traced("albert-encoder"), "encoder.albert_layer_groups.0.albert_layers.0.attention.query.weight")
    assert len(query.consumers) == 2 and query.kind == "linear"


class Odd(nn.Module):
    """A weight that is computed, one that is a vector, one that is read elsewhere as well, and one nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.computed, self.read, self.unread = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.vector = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(x, self.computed.weight.abs())
        x = self.read(x) * self.read.weight.sum()
        return nn.functional.linear(x, self.vector)


def test_odd_uses() -> None:
    program = trace(Odd().eval(), mlp_inputs())
    read, vector = weight_sites(program)
    assert (read.name, read.shape, vector.name, vector.shape) == ("read.weight", (8, 8), "vector", (1, 8))
    report = QuantizeWeights()(program).reports[-1]
    assert [kept.what for kept in report.kept] == ["vector"] and "2" in report.kept[0].why
    # Whatever else reads a weight reads the quantized one.
    quantized = QuantizeWeights(bits=2)(program)
    value = truth.weight(quantized, "read.weight", "affine2:row", 8).float()
    expected = trace(Odd().eval(), mlp_inputs())
    for name, tensor in program.named_parameters():
        expected.set_tensor(name, value if name == "read.weight" else tensor)
    assert torch.allclose(quantized(**mlp_inputs()), expected(**mlp_inputs()), atol=1e-5)


def test_what_is_no_weight_expression() -> None:
    graph = tiny_mlp_program().graph
    (relu,) = graph.find_nodes(op="call_function", target=aten.relu.default)
    (x,) = graph.find_nodes(op="placeholder")
    assert expression_leaf(relu) is None and expression_leaf(x) is None and expression_leaf(None) is None
    rounded = graph.call_function(ops.fake_quantize, (x, x, None), {"format": "affine8:row"})
    assert expression_leaf(rounded) is None


# ---- reading


def test_the_forms_of_a_site() -> None:
    dense = site(tiny_mlp_program())
    assert dense.is_dense and dense.format == "float32" and dense.tensors == {"dense": "first.weight"}
    assert dense.outliers is None and dense.bulk.data_ptr() == dense.dense.data_ptr()

    split = site(SplitOutliers(ratio=0.1)(tiny_mlp_program()))
    sparse = {f"outliers.{p}": f"first.weight.outliers.{p}" for p in ("values", "columns", "row_offsets")}
    assert split.is_dense and split.format == "float32" and split.shape == (16, 8)
    assert split.tensors == {"dense": "first.weight.dense", **sparse}

    steps = [SplitOutliers(ratio=0.1), QuantizeWeights(bits=3, symmetric=False)]
    codes = site(Pipeline(steps)(tiny_mlp_program()))
    parts = ("codes", "scale", "zero_point")
    assert not codes.is_dense and codes.format == "affine3:row:asym" and codes.shape == (16, 8)
    assert codes.tensors == {**{p: f"first.weight.{p}" for p in parts}, **sparse}

    latent = site(QuantizeWeights(bits=2, latent=True)(tiny_mlp_program()))
    assert latent.tensors == {"latent": "first.weight.latent", "scale": "first.weight.scale"}
    assert (latent.format, latent.shape) == ("affine2:row", (16, 8))

    planes = site(BinaryCode(bits=2)(tiny_mlp_program()))
    assert planes.tensors == {"planes": "first.weight.planes", "alphas": "first.weight.alphas"}
    assert (planes.format, planes.shape) == ("bcq2:row", (16, 8))

    for found in (codes, latent, planes):
        assert found.name == "first.weight" and [node.name for node in found.consumers] == ["linear"]
        for member in ("dense", "bulk"):
            with pytest.raises(PrequantError, match=rf"first\.weight is already {found.format}"):
                getattr(found, member)


def test_positions_of_outliers() -> None:
    split = SplitOutliers(ratio=0.1)(tiny_mlp_program())
    rows, columns = outlier_positions(site(split))
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == list(truth.outliers_of(split, "first.weight"))
    with pytest.raises(PrequantError, match=r"first\.weight has no outliers"):
        outlier_positions(site(tiny_mlp_program()))


def test_a_value_has_no_gradient() -> None:
    assert not site(QuantizeWeights()(tiny_mlp_program())).value().requires_grad


# ---- rewriting


def test_replace_by_hand() -> None:
    program = tiny_mlp_program()
    codes = torch.arange(16 * 8, dtype=torch.uint8).reshape(16, 8)
    options: dict[str, Any] = {"format": "affine8:row", "columns": 8}
    scale = torch.full((16, 1), 0.5)
    new = site(program).replace(ops.dequantize, {"codes": codes, "scale": scale, "zero_point": None}, **options)
    assert torch.equal(new.value(), (codes.float() - 128) / 2)
    assert new.consumers[0].args[1] is new.root is new.leaf
    assert sorted(n for n in program.state_dict() if n.startswith("first.weight")) == [
        "first.weight.codes",
        "first.weight.scale",
    ]
    assert isinstance(program.tensor("first.weight.scale"), nn.Parameter)
    assert not isinstance(program.tensor("first.weight.codes"), nn.Parameter)
    program.graph.lint()
    program.recompile()
    model = tiny_mlp()
    model.first.weight.data = new.value()
    assert torch.allclose(program(**mlp_inputs())["logits"], model(**mlp_inputs())["logits"], atol=1e-5)
    # Another leaf in its place: what no longer has a meaning goes.
    again = new.replace(
        ops.fake_quantize, {"latent": torch.ones(16, 8), "scale": scale, "zero_point": None}, format="affine4:row"
    )
    assert again.tensors == {"latent": "first.weight.latent", "scale": "first.weight.scale"}
    assert not [name for name, _ in program.named_buffers()]


def test_replace_keeps_what_a_value_knows_of_itself() -> None:
    program = SplitOutliers(ratio=0.1)(tiny_mlp_program())
    root = site(program).root
    (linear, _) = program.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert root.meta["module_stack"] == linear.meta["module_stack"]
    assert root.meta["val"].shape == (16, 8) and root.meta["val"].dtype is torch.float32


def test_sums_at_outliers_stay_when_the_leaf_changes_again() -> None:
    program = Pipeline([SplitOutliers(ratio=0.1), QuantizeWeights(bits=2)])(tiny_mlp_program())
    before = site(program).value()
    rows, columns = outlier_positions(site(program))
    finer = BinaryCode(from_affine=True)(program)
    assert torch.allclose(site(finer).value(), before, atol=1e-6)
    zeros = {"codes": torch.zeros(16, 2, dtype=torch.uint8), "scale": torch.ones(16, 1), "zero_point": None}
    coarse = site(program).replace(ops.dequantize, zeros, format="affine2:row", columns=8)
    assert torch.allclose(coarse.value()[rows, columns], before[rows, columns], atol=1e-6)
    assert int((coarse.value() == -2).sum()) == 128 - 13


def test_a_second_set_of_outliers_is_refused() -> None:
    split = SplitOutliers(ratio=0.1)(tiny_mlp_program())
    text = readable(split)
    operands = {"dense": torch.zeros(16, 8), "values": torch.zeros(0)}
    with pytest.raises(PrequantError, match=r"first\.weight has outliers already"):
        site(split).replace(ops.add_outliers, operands, replace=False)
    assert readable(split) == text


def nested(program: Program) -> fx.Node:
    """By hand: a second set of outliers, at the first weight's corner."""
    inner = site(program).root
    values = {"values": torch.ones(1), "columns": torch.zeros(1, dtype=torch.int32)}
    values["row_offsets"] = torch.ones(17, dtype=torch.int32).index_fill_(0, torch.tensor([0]), 0)
    nodes = []
    for part, value in values.items():
        program.set_tensor(f"more.{part}", value)
        nodes.append(attribute_node(program, f"more.{part}", inner))
    with program.graph.inserting_after(inner):
        outer = program.graph.call_function(ops.add_outliers, (), {"replace": True})
    inner.replace_all_uses_with(outer)
    outer.args = (inner, *nodes)
    program.recompile()
    return outer


def test_nested_outliers_are_read() -> None:
    program = Pipeline([SplitOutliers(ratio=0.1), QuantizeWeights()])(tiny_mlp_program())
    value = site(program).value().clone()
    outer = nested(program)
    found = site(program)
    assert found.root is outer and found.leaf.target is ops.dequantize
    value[0, 0] = 1.0
    assert torch.equal(found.value(), value)


def test_names_do_not_collide() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.scale, self.codes = nn.Linear(8, 8), nn.Linear(8, 8), nn.Embedding(12, 8)
            self.weight = nn.Parameter(torch.randn(4, 8))
            self.outliers, self.alphas = nn.Module(), nn.Module()
            self.outliers.add_module("values", nn.Linear(8, 8))
            self.alphas.register_parameter("dense", nn.Parameter(torch.randn(8, 8)))

        def forward(self, input_ids: Tensor) -> Tensor:
            hidden = self.get_submodule("outliers.values")(self.scale(self.dense(self.codes(input_ids))))
            hidden = nn.functional.linear(hidden, self.get_parameter("alphas.dense"))
            return nn.functional.linear(hidden, self.weight)

    model = Named().eval()
    program = trace(model, embedding_inputs())
    packed = Pipeline([SplitOutliers(ratio=0.1), QuantizeWeights(bits=8)])(program)
    names = ["codes.weight", "dense.weight", "scale.weight", "outliers.values.weight", "alphas.dense", "weight"]
    assert [found.name for found in weight_sites(packed)] == names
    assert {"weight.codes", "dense.weight.codes", "codes.weight.codes"} < set(packed.state_dict())
    for found in weight_sites(packed):
        assert torch.allclose(found.value(), model.get_parameter(found.name), atol=0.05)
    assert torch.allclose(packed(**embedding_inputs()), model(**embedding_inputs()), atol=0.3)
