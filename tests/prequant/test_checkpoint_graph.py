"""Graphs that are damaged, or made to do harm: a clear error that names the node, and nothing runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from prequant.checkpoint import CheckpointError, load, save

from .checkpoint_models import edit_json, inputs, traced
from .hostile_folders import (
    WORDS,
    assert_refused,
    fresh_folder,
    set_entry,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fresh_folder(tmp_path)


def node_of(graph: dict[str, Any], target: str) -> dict[str, Any]:
    return next(node for node in graph["nodes"] if node.get("target") == target)


def edit_node(target: str, /, **changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda graph: node_of(graph, target).update(changes)


def edit_operand(target: str, position: int | str, value: Any) -> Callable[[dict[str, Any]], Any]:
    def change(graph: dict[str, Any]) -> None:
        node = node_of(graph, target)
        operands = node["args"] if isinstance(position, int) else node.setdefault("kwargs", {})
        operands[position] = value

    return change


def last_node_first(graph: dict[str, Any]) -> None:
    graph["nodes"].insert(0, graph["nodes"].pop())


def tensor_twice(graph: dict[str, Any]) -> None:
    files = graph["files"]
    files["prequant-constants.safetensors"]["tensors"][f"{WORDS}.codes"] = {"dtype": "uint8", "shape": [60, 16]}


def smaller_table(graph: dict[str, Any]) -> None:
    """The table and the op agree on fewer columns than the scale and the codes are for."""
    node_of(graph, "prequant::packed_embedding.default")["kwargs"]["columns"] = 20


def write_codes(graph: dict[str, Any]) -> None:
    """Before they are looked at: after the checks, and before a kernel follows them."""
    nodes = graph["nodes"]
    codes = next(node for node in nodes if node.get("target") == f"{WORDS}.codes")
    call = {"op": "call_function", "target": "aten::fill_.Scalar", "args": [{"node": codes["name"]}, 255]}
    nodes.insert(nodes.index(codes) + 1, {"name": "written", **call})


LINEAR, PARALLEL, EMBEDDING, NORM = (
    "prequant::packed_linear.default",
    "prequant::packed_linears.default",
    "prequant::packed_embedding.default",
    "aten::layer_norm.default",
)
GRAPHS: dict[str, tuple[Callable[[dict[str, Any]], Any], tuple[str, ...]]] = {
    "another version": (set_entry("version", value=99), ("version 99", "reads version 1")),
    "another layout": (set_entry("layout", value=2), ("layout 2", "reads layout 1")),
    "a version that is a text": (set_entry("version", value="1"), ("version", "'1'", "int")),
    "an unknown key": (set_entry("run", value="rm"), ("unknown key 'run'",)),
    "no nodes": (set_entry("nodes", value=[]), ("output",)),
    "nodes that are no list": (set_entry("nodes", value={}), ("nodes", "list")),
    "a node that is no object": (set_entry("nodes", 3, value=7), ("node 3", "7")),
    "an operator that opens files": (
        edit_node(NORM, target="aten::from_file.default", args=["/etc/passwd"]),
        ("aten::from_file.default", "not one that a graph from a file may call"),
    ),
    "an operator of another package": (
        edit_node(NORM, target="evil::run.default"),
        ("evil::run.default", "trusted_ops=('evil',)"),
    ),
    "an operator that may be told to check nothing": (
        edit_node(NORM, target="aten::segment_reduce.default"),
        ("aten::segment_reduce.default", "not one that a graph from a file may call"),
    ),
    "codes that the graph writes into": (write_codes, (f"{WORDS}.codes", "prequant's operators alone", "written")),
    "a function of Python": (
        edit_node(NORM, target="os.system", args=["true"]),
        ("'os.system'", "nothing that a graph may"),
    ),
    "a path into a module": (
        edit_node(NORM, target="aten::__class__.__init__"),
        ("aten::__class__.__init__", "not one that a graph from a file may call"),
    ),
    "an internal operator": (edit_node(NORM, target="aten::_foreach_add.Scalar"), ("_foreach_add",)),
    "an operator that does not exist": (edit_node(NORM, target="aten::layer_morn.default"), ("has no operator",)),
    "a method": (edit_node(NORM, op="call_method", target="save"), ("op 'call_method'",)),
    "a module": (edit_node(NORM, op="call_module", target="bert"), ("op 'call_module'",)),
    "a name that is code": (
        edit_node(NORM, name="x = __import__('os').system('true')"),
        ("no Python identifier", "__import__"),
    ),
    "a doubled name": (edit_node(NORM, name="input_ids"), ("an earlier node has that name",)),
    "a node that reads itself": (
        lambda graph: node_of(graph, NORM)["args"].__setitem__(0, {"node": node_of(graph, NORM)["name"]}),
        ("which no earlier node defines",),
    ),
    "an unknown node": (edit_operand(NORM, 0, {"node": "nobody"}), ("'nobody'", "which no earlier node defines")),
    "output first": (last_node_first, ("the output is not the last node",)),
    "operands missing": (edit_node(LINEAR, args=[]), ("packed_linear", "lacks its operand 'input'")),
    "too many operands": (edit_node(NORM, args=[None] * 9), ("layer_norm", "not 9")),
    "an operand of another type": (edit_operand(NORM, 4, "yes"), ("layer_norm", "eps", "'yes'")),
    "an unknown operand": (edit_operand(NORM, "x); import os; (", 1), ("has no operand",)),
    "an operand of an unknown kind": (edit_operand(NORM, 4, {"pickle": "gASV"}), ("unknown kind 'pickle'",)),
    "a huge integer": (edit_operand(NORM, 1, [1 << 80]), ("does not fit into 64 bits",)),
    "operands nested deeply": (edit_operand(NORM, 1, [[[[[[[[1]]]]]]]]), ("nested",)),
    "a device that is none": (edit_operand(NORM, 4, {"device": "cpu'); import os"}), ("is no device",)),
    "a dtype that is none": (edit_operand(NORM, 4, {"dtype": "__doc__"}), ("is no dtype",)),
    "a tensor that is not there": (
        edit_node(f"{WORDS}.codes", target="bert.nobody"),
        ("'bert.nobody'", "not in the list of tensors"),
    ),
    "a tensor's name that is code": (
        lambda graph: graph["files"]["model.safetensors"]["tensors"].update({'a"); import os': {}}),
        ("is no name of a tensor",),
    ),
    "a tensor's name with two underscores": (
        lambda graph: graph["files"]["model.safetensors"]["tensors"].update({"__class__.x": {}}),
        ("is no name of a tensor",),
    ),
    "a tensor in two files": (tensor_twice, (f"{WORDS}.codes", "more than one file")),
    "a tensor with many dimensions": (
        set_entry("files", "model.safetensors", "tensors", f"{WORDS}.codes", "shape", value=[1] * 99),
        (f"{WORDS}.codes", "not a shape"),
    ),
    "a negative size": (
        set_entry("files", "model.safetensors", "tensors", f"{WORDS}.codes", "shape", value=[-60, 16]),
        (f"{WORDS}.codes", "not a shape"),
    ),
    "a file with a path": (
        lambda graph: graph["files"].update({"../../secret.safetensors": {"tensors": {}, "sha256": ""}}),
        ("secret.safetensors", "in the same folder"),
    ),
    "no such format": (edit_operand(EMBEDDING, "format", "affine9:row"), ("affine9:row", "use 2 to 8")),
    "a format that does not fit": (
        edit_operand(EMBEDDING, "format", "affine2:row"),
        (f"{WORDS}.codes", "affine2:row", "[60, 8]"),
    ),
    "an asymmetric format without zero point": (
        edit_operand(EMBEDDING, "format", "affine4:row:asym"),
        (f"{WORDS}.codes: its zero_point is missing",),
    ),
    "a group size beyond reason": (
        edit_operand(EMBEDDING, "format", "affine4:group999999999999"),
        ("999999999999", "larger than"),
    ),
    "columns that don't fit": (smaller_table, (f"{WORDS}.codes", "[60, 20]", "takes [60, 10]")),
    "columns below one": (edit_operand(EMBEDDING, "columns", 0), ("columns is 0",)),
    "columns beyond reason": (
        edit_operand(EMBEDDING, "columns", 1 << 40),
        (f"{WORDS}.codes", "takes [60, 549755813888]"),
    ),
    "computed codes": (edit_operand(EMBEDDING, 1, {"node": "input_ids"}), ("no stored tensor",)),
    "outliers without positions": (edit_operand(EMBEDDING, 5, None), ("outliers.columns is missing",)),
    "no format at all": (
        lambda graph: node_of(graph, LINEAR)["kwargs"].pop("format"),
        ("'' is no weight format",),
    ),
    "no columns": (lambda graph: node_of(graph, LINEAR)["kwargs"].pop("columns"), ("columns is 0",)),
    "one of several linears without a format": (
        lambda graph: node_of(graph, PARALLEL)["kwargs"]["formats"].pop(),
        ("lists of different lengths", "'formats': 2"),
    ),
    "one of several linears with computed codes": (
        lambda graph: node_of(graph, PARALLEL)["args"][1].__setitem__(2, {"node": "input_ids"}),
        ("no stored tensor",),
    ),
    "one of several linears with another's scale": (
        lambda graph: node_of(graph, PARALLEL)["args"][2].__setitem__(2, node_of(graph, PARALLEL)["args"][2][0]),
        ("query.weight.scale", "takes [32, 4]"),
    ),
    "an input scale of nothing": (
        edit_operand(LINEAR, "input_format", "affine8:row:asym"),
        ("dynamic scales are symmetric",),
    ),
    "inputs that the graph does not have": (
        lambda graph: graph["signature"]["inputs"].pop(),
        ("the inputs", "not those of the graph"),
    ),
    "an output that the graph does not have": (
        set_entry("signature", "outputs", value={"dict": {"logits": 5}}),
        ("output 5", "has 1 results"),
    ),
    "an exposed value that the graph does not have": (
        set_entry("signature", "exposed", value={"hidden_states.0": 5}),
        ("output 5", "has 1 results"),
    ),
    "an exposed value that is no index": (
        set_entry("signature", "exposed", value={"hidden_states.0": True}),
        ("exposed is {'hidden_states.0': True}", "a name and an index"),
    ),
    "an exposed value with a name that is none": (
        set_entry("signature", "exposed", value={"__class__": 0}),
        ("exposed is {'__class__': 0}", "a name and an index"),
    ),
    "exposed values of another kind": (set_entry("signature", "exposed", value=[0]), ("exposed is [0] where dict",)),
    "outputs of another kind": (set_entry("signature", "outputs", value={"eval": "1"}), ("outputs hold",)),
    "a stack that is not there": (edit_node(NORM, stack=10_000), ("stack 10000",)),
    "a class to import": (
        set_entry("extra", "model", "output_class", value="os.system"),
        ("'os.system'", "ModelOutput"),
    ),
    "an unknown task": (set_entry("extra", "model", "task", value="mining"), ("'mining'", "known are")),
    "a digest that is none": (set_entry("files", "model.safetensors", "sha256", value=5), ("sha256", "5")),
}


@pytest.mark.parametrize(("change", "words"), GRAPHS.values(), ids=GRAPHS.keys())
def test_graphs_that_make_no_sense(
    folder: Path, change: Callable[[dict[str, Any]], Any], words: tuple[str, ...]
) -> None:
    edit_json(folder / "prequant.json", change)
    assert_refused(folder, *words)


def test_a_number_of_nodes_beyond_reason(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prequant.checkpoint.graph_file.MAX_NODES", 20)
    assert_refused(folder, "prequant.json", "at most 20")


def test_operators_of_a_package_that_is_trusted(tmp_path: Path) -> None:
    library = torch.library.Library("prequant_checkpoint_test", "DEF")
    library.define("double(Tensor x) -> Tensor")
    library.impl("double", lambda x: x * 2, "CompositeExplicitAutograd")
    model, original = traced("bert")
    program = original.copy()
    output = program.graph.output_node()
    with program.graph.inserting_before(output):
        doubled = program.graph.call_function(
            torch.ops.prequant_checkpoint_test.double.default, (cast(Any, output.args[0])[0],)
        )
    output.args = ((doubled,),)
    program.recompile()
    folder = save(program, tmp_path / "model")
    assert_refused(folder, "prequant_checkpoint_test::double.default", "trusted_ops=('prequant_checkpoint_test',)")
    loaded = load(folder, trusted_ops=("prequant_checkpoint_test",))
    with torch.no_grad():
        expected = 2 * model(**inputs(model)).logits
    torch.testing.assert_close(loaded(**inputs(model)).logits.detach(), expected)
    with pytest.raises(CheckpointError, match=r"prequant_checkpoint_test\.double.*prequant\.load"):
        AutoModelForSequenceClassification.from_pretrained(folder)
