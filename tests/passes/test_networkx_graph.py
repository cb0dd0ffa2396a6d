"""to_networkx: the graph of a tiny model, written out by hand."""

import networkx as nx
import pytest

from prequant.passes import Canonicalize, Pipeline, QuantizeWeights, SplitOutliers, lower, to_networkx

from ..models import traced
from .support import tiny_embedding_program, tiny_mlp_program


def test_a_tiny_model_is_its_nodes_and_what_they_read() -> None:
    graph = to_networkx(Canonicalize()(tiny_mlp_program()))
    values = [name for name, op in graph.nodes(data="op") if op != "get_attr"]
    assert values == ["x", "linear", "relu", "dropout", "linear_1", "output"]
    assert set(graph.edges) == {
        ("x", "linear"),
        ("first_weight", "linear"),
        ("first_bias", "linear"),
        ("linear", "relu"),
        ("relu", "dropout"),
        ("dropout", "linear_1"),
        ("second_weight", "linear_1"),
        ("second_bias", "linear_1"),
        ("linear_1", "output"),
    }
    assert graph.edges["first_weight", "linear"]["operands"] == ("weight",)
    linear = graph.nodes["linear"]
    assert linear == {
        "op": "call_function",
        "target": "linear",
        "text": "linear(%x, first.weight [16×8 f32], first.bias [16 f32])",
        "module": "first",
        "module_class": "Linear",
        "modules": (("", "TinyMLP"), ("first", "Linear")),
        "shape": ("batch", "length", 16),
        "dtype": "f32",
        "data": True,
        "bytes": 0,
        "weight": "first.weight",
        "format": "float32",
        "bits": 32.0,
        "lowered": False,
        "fused": False,
    }
    assert graph.nodes["first_weight"]["bytes"] == 16 * 8 * 4
    assert graph.nodes["first_weight"]["weight"] == "first.weight"
    assert graph.nodes["relu"]["weight"] is None and graph.nodes["relu"]["shape"] == ("batch", "length", 16)


def test_compressed_weights_have_their_format_wherever_they_are_made() -> None:
    program = Pipeline([Canonicalize(), SplitOutliers(ratio=0.1), QuantizeWeights(bits=4)])(tiny_mlp_program())
    graph = to_networkx(program)
    # 16 × 8 weights: 64 bytes of codes, 16 scales, 13 outliers of 4 bytes with 2-byte columns, 17 row offsets of 4.
    bits = 8 * (64 + 64 + 13 * 6 + 17 * 4) / 128
    for name in ("dequantize_default", "add_outliers_default", "linear"):
        facts = graph.nodes[name]
        assert (facts["weight"], facts["format"], facts["bits"]) == ("first.weight", "affine4:row", bits), name
    packed = to_networkx(lower(program))
    readers = [facts for _, facts in packed.nodes(data=True) if facts["target"] == "prequant.packed_linear"]
    assert [facts["fused"] for facts in readers] == [True, False]  # the first with its ReLU
    assert [facts["weight"] for facts in readers] == ["first.weight", "second.weight"]
    assert all(facts["lowered"] for facts in readers)


def test_a_tied_weight_is_read_at_both_ends() -> None:
    graph = to_networkx(tiny_embedding_program())
    tied = {name for name, weight in graph.nodes(data="weight") if weight == "tokens.weight"}
    assert {graph.nodes[name]["target"] for name in tied} == {"tokens.weight", "embedding", "linear"}


@pytest.mark.parametrize("name", ["gpt2-causal-lm", "t5-encoder"])
def test_every_edge_of_a_lowered_model_is_an_operand(name: str) -> None:
    program = lower(Pipeline([Canonicalize(), QuantizeWeights(bits=4)])(traced(name)))
    graph = to_networkx(program)
    assert list(graph) == [node.name for node in program.graph.nodes]
    for node in program.graph.nodes:
        assert set(graph.predecessors(node.name)) == {source.name for source in node.all_input_nodes}
    assert nx.is_directed_acyclic_graph(graph)
    assert all(operands for _, _, operands in graph.edges(data="operands"))
    assert not any(path.startswith("_") for _, path in graph.nodes(data="module"))


def test_the_program_stays_what_it_was() -> None:
    program = tiny_mlp_program()
    before = {node.name: dict(node.meta) for node in program.graph.nodes}
    to_networkx(program)
    assert {node.name: node.meta for node in program.graph.nodes} == before
