import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from prequant.passes import (
    Canonicalize,
    Input,
    Lower,
    Pipeline,
    Program,
    QuantizeWeights,
    Signature,
    SplitOutliers,
    readable,
    weight_sites,
)
from prequant.passes.nesting import leaves, nest
from prequant.passes.program import attribute_node
from prequant.runtime import PrequantError, ops
from prequant.trace import trace

from ..models import traced
from .support import (
    embedding_inputs,
    mlp_inputs,
    tiny_embedding,
    tiny_embedding_program,
    tiny_mlp,
    tiny_mlp_program,
)

aten = torch.ops.aten
PACK = Pipeline([SplitOutliers(ratio=0.1), QuantizeWeights(), Lower()])


class TwoInputs(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> dict[str, Any]:
        return {"sum": a + b, "parts": (a, [b, None])}


def two_inputs() -> Program:
    program = trace(TwoInputs(), {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)})
    inputs = tuple(Input(name, torch.float32, ("rows", 3)) for name in ("a", "b"))
    program.update_info(signature=Signature(inputs, program.signature.outputs))
    return program


def state(program: Program) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in program.state_dict().items()}


def calls(program: Program) -> list[fx.Node]:
    return [
        node for node in program.graph.nodes if node.target is aten.linear.default or node.target is ops.packed_linear
    ]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


# ---- calling


def test_inputs_by_position_or_name() -> None:
    program, (a, b) = two_inputs(), torch.randn(2, 4, 3)
    for result in (program(a, b), program(a, b=b), program(b=b, a=a)):
        assert torch.equal(result["sum"], a + b)
        assert torch.equal(result["parts"][0], a) and torch.equal(result["parts"][1][0], b)
        assert isinstance(result["parts"], tuple) and result["parts"][1][1] is None


@pytest.mark.parametrize(
    ("args", "kwargs", "kind", "message"),
    [
        ((1, 2, 3), {}, TypeError, "3 positional inputs given; this Program takes 2: a, b"),
        ((), {"a": 1, "c": 2}, TypeError, "unexpected input 'c'; this Program was traced with a, b"),
        ((torch.zeros(1, 3),), {"a": torch.zeros(1, 3)}, TypeError, "input 'a' given twice"),
        ((torch.zeros(1, 3),), {}, TypeError, "input 'b' is missing; this Program takes a, b"),
        ((torch.zeros(1, 3), None), {}, TypeError, "input 'b' is missing"),
        (([[0.0] * 3], torch.zeros(1, 3)), {}, TypeError, "the input 'a' is a list; it takes a tensor"),
        (
            (torch.zeros(1, 4), torch.zeros(1, 4)),
            {},
            PrequantError,
            r"'a' has the shape \[1, 4\]; it takes \[rows, 3\]",
        ),
        ((torch.zeros(3), torch.zeros(3)), {}, PrequantError, r"'a' has the shape \[3\]; it takes \[rows, 3\]"),
        (
            (torch.zeros(2, 3), torch.zeros(1, 3)),
            {},
            PrequantError,
            r"'b' has the shape \[1, 3\]; it takes \[rows, 3\], rows = 2",
        ),
    ],
)
def test_bad_inputs(args: Any, kwargs: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        two_inputs()(*args, **kwargs)


def test_nesting() -> None:
    tree: Any = {"a": 1, "b": (0, [None, 2])}
    flat = ("x", "y", "z")
    assert nest(tree, flat) == {"a": "y", "b": ("x", [None, "z"])}
    assert nest(0, flat) == "x" and nest(None, flat) is None
    assert list(leaves(tree)) == [1, 0, 2] and list(leaves(None)) == [] and list(leaves(3)) == [3]


def test_gradients_reach_parameters() -> None:
    program, model = tiny_embedding_program(), tiny_embedding()
    program(**embedding_inputs())["logits"].square().sum().backward()
    model(**embedding_inputs())["logits"].square().sum().backward()
    for name, parameter in model.named_parameters():
        gradient = program.tensor(name).grad
        assert gradient is not None and parameter.grad is not None
        assert torch.allclose(gradient, parameter.grad, atol=1e-4), name


# ---- tensors


def test_tensors_by_name() -> None:
    program = tiny_mlp_program()
    assert torch.equal(program.tensor("first.weight"), tiny_mlp().first.weight)
    for name in ("first", "first.weights", "third.weight", "first.weight.codes", "", "code", "forward"):
        with pytest.raises(PrequantError, match=f"no tensor '{name}'"):
            program.tensor(name)
        with pytest.raises(PrequantError, match=f"no tensor '{name}'"):
            program.delete_tensor(name)


def test_floats_become_parameters_and_the_rest_buffers() -> None:
    program = tiny_mlp_program()
    program.set_tensor("a.b.scale", torch.ones(2, requires_grad=True) * 2)
    program.set_tensor("a.b.codes", torch.ones(2, dtype=torch.uint8))
    scale = program.tensor("a.b.scale")
    assert isinstance(scale, nn.Parameter) and scale.is_leaf and scale.requires_grad
    assert "a.b.codes" in dict(program.named_buffers()) and "a.b.codes" in program.state_dict()
    program.set_tensor("a.b.scale", torch.zeros(3), trainable=False)
    assert not program.tensor("a.b.scale").requires_grad
    program.set_tensor("a.b.scale", torch.ones(4))  # stays what it was
    assert not program.tensor("a.b.scale").requires_grad
    program.set_tensor("a.b.scale", torch.ones(4, dtype=torch.int32))
    assert "a.b.scale" not in dict(program.named_parameters()) and "a.b.scale" in dict(program.named_buffers())


def test_a_replaced_tensor_keeps_its_place() -> None:
    program = tiny_mlp_program()
    names = [name for name, _ in program.named_parameters()]
    program.set_tensor(names[0], program.tensor(names[0]) * 2)
    assert [name for name, _ in program.named_parameters()] == names


def test_a_buffer_stays_one() -> None:
    program = tiny_mlp_program()
    first = program.get_submodule("first")
    first.register_buffer("table", torch.ones(2))
    first.register_buffer("cache", torch.ones(2), persistent=False)
    for name in ("first.table", "first.cache"):
        program.set_tensor(name, torch.zeros(3))
        assert torch.equal(dict(program.named_buffers())[name], torch.zeros(3))
    assert "first.table" in program.state_dict() and "first.cache" not in program.state_dict()
    program.set_tensor("first.table", torch.zeros(3), trainable=True)
    assert program.tensor("first.table").requires_grad and "first.table" not in dict(program.named_buffers())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("first.weight.codes", "'weight' on its way is not a module"),
        ("code.weight", "'code' on its way is not a module"),
        ("first", "something else of that name"),
        ("graph", "something else of that name"),
        ("first.forward", "something else of that name"),
    ],
)
def test_names_that_are_taken(name: str, message: str) -> None:
    program = tiny_mlp_program()
    before = state(program)
    with pytest.raises(PrequantError, match=f"can't create '{name}': .*{message}"):
        program.set_tensor(name, torch.zeros(2))
    assert same(state(program), before)


def test_deleting_leaves_no_empty_modules() -> None:
    program = tiny_mlp_program()
    program.set_tensor("a.b.c.scale", torch.ones(1))
    program.set_tensor("a.zero", torch.ones(1))
    program.delete_tensor("a.b.c.scale")
    assert not hasattr(program.a, "b") and program.tensor("a.zero").numel() == 1
    program.delete_tensor("a.zero")
    assert not hasattr(program, "a")


def test_pruning() -> None:
    program = tiny_embedding_program()
    program.update_info(aliases={**program.info.aliases, "spare": ("other",), "head": ("tail",)})
    assert program.prune() == () and program.info.aliases == {"tokens.weight": ("head.weight",)}
    spare = nn.Parameter(torch.ones(1))
    for name in ("spare", "twin"):
        program.register_parameter(name, spare)
    program.set_tensor("more.codes", torch.ones(1, dtype=torch.uint8))
    assert sorted(program.prune()) == ["more.codes", "spare", "twin"]
    assert sorted(program.state_dict()) == sorted(
        ["tokens.weight", "mix.weight", "mix.bias", "norm.weight", "norm.bias"]
    )
    packed = PACK(program)
    assert packed.prune() == ()
    assert packed.names_of("tokens.weight") == ("tokens.weight", "head.weight")
    assert packed.names_of("mix.weight") == ("mix.weight",)


def test_one_attribute_node_for_a_tensor() -> None:
    program = tiny_mlp_program()
    first, second = program.graph.find_nodes(op="call_function", target=aten.linear.default)
    bias = attribute_node(program, "second.bias", second)
    assert attribute_node(program, "second.bias", second) is bias and bias in second.all_input_nodes
    assert attribute_node(program, "second.bias", first) is bias and bias < first  # moved up
    program.graph.lint()
    assert torch.equal(program(**mlp_inputs())["logits"], tiny_mlp_program()(**mlp_inputs())["logits"])


# ---- copies


def packed_and_plain() -> list[Program]:
    return [tiny_embedding_program(), PACK(tiny_embedding_program()), traced("bert-masked-lm"), traced("t5-seq2seq-lm")]


@pytest.mark.parametrize("index", range(4))
def test_a_copy_shares_tensors_and_nothing_else(index: int) -> None:
    program = packed_and_plain()[index]
    text, before = readable(program), state(program)
    copied = program.copy()
    assert type(copied).__mro__[1] is type(program).__mro__[1] and isinstance(copied, Program)
    assert readable(copied) == text and copied.info == program.info
    assert copied.reports == program.reports and copied.training is program.training
    assert copied.state_dict().keys() == before.keys()
    for name in before:
        assert copied.tensor(name).data_ptr() == program.tensor(name).data_ptr()
        assert copied.tensor(name).requires_grad == program.tensor(name).requires_grad
    for node, original in zip(copied.graph.nodes, program.graph.nodes, strict=True):
        assert node.graph is copied.graph
        assert node.meta == original.meta and node.meta is not original.meta
    # Rewrite everything in the copy.
    for name in list(before):
        copied.set_tensor(name, torch.zeros_like(copied.tensor(name)))
    calls(copied)[0].meta["module_stack"] = ()
    copied.update_info(aliases={})
    copied.reports = ()
    copied.train()
    assert readable(program) == text and same(state(program), before) and not program.training
    assert program.info.aliases
    assert calls(program)[0].meta["module_stack"]


def test_what_is_written_into_a_shared_tensor_shows_in_both() -> None:
    program = tiny_mlp_program()
    copied = program.copy()
    with torch.no_grad():
        copied.tensor("first.bias").fill_(3)
    assert program.tensor("first.bias").unique().item() == 3


def test_a_copy_leaves_out_what_no_node_reads() -> None:
    program = tiny_mlp_program()
    program.set_tensor("spare", torch.ones(1))
    assert "spare" not in program.copy().state_dict() and "spare" in program.state_dict()


def test_a_copy_of_a_training_program_trains() -> None:
    program = tiny_mlp_program().train()
    copied = program.copy()
    assert copied.training
    inputs = mlp_inputs(4, 30)
    assert not torch.equal(copied(**inputs)["logits"], copied(**inputs)["logits"])


@pytest.mark.parametrize("index", range(4))
def test_a_deep_copy_shares_nothing(index: int) -> None:
    program = packed_and_plain()[index]
    program = program if index < 2 else program.copy()
    frozen = next(name for name, _ in program.named_parameters())
    program.set_tensor(frozen, program.tensor(frozen), trainable=False)
    copied = copy.deepcopy(program)
    assert readable(copied) == readable(program) and copied.signature == program.signature
    assert same(state(copied), state(program)) and copied.training is program.training
    assert [str(report) for report in copied.reports] == [str(report) for report in program.reports]
    assert not copied.tensor(frozen).requires_grad
    for name, value in copied.state_dict().items():
        assert value.data_ptr() != program.tensor(name).data_ptr() or not value.numel()
    if index < 2:
        assert torch.equal(copied(**embedding_inputs())["logits"], program(**embedding_inputs())["logits"])
        assert readable(PACK(copied)) == readable(PACK(program))


def test_state_dicts_go_back_and_forth() -> None:
    program, other = PACK(tiny_embedding_program()), PACK(tiny_embedding_program(tiny_embedding(seed=5)))
    assert not torch.equal(program(**embedding_inputs())["logits"], other(**embedding_inputs())["logits"])
    other.load_state_dict(program.state_dict())
    assert torch.equal(program(**embedding_inputs())["logits"], other(**embedding_inputs())["logits"])


# ---- the rest


def test_a_pipeline_leaves_its_input_alone() -> None:
    program = Canonicalize()(traced("gpt2-causal-lm"))
    text, before = readable(program), state(program)
    versions = {name: value._version for name, value in program.named_parameters()}
    result = PACK(program)
    assert readable(result) != text and readable(program) == text and same(state(program), before)
    assert versions == {name: value._version for name, value in program.named_parameters()}
    assert len(program.reports) == 1 and len(result.reports) == 4
    for name in result.state_dict().keys() & before.keys():
        assert result.tensor(name).data_ptr() == program.tensor(name).data_ptr()


def test_aliases() -> None:
    program = tiny_embedding_program()
    assert program.names_of("tokens.weight") == ("tokens.weight", "head.weight")
    assert program.names_of("mix.bias") == ("mix.bias",)


def test_moving_devices() -> None:
    class Creates(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.arange(8, device=x.device)

    model = nn.Sequential(nn.Linear(8, 8), Creates())
    program = trace(model, {"input": mlp_inputs()["x"]})
    moved = program.to("meta")
    assert moved is program
    assert program(torch.zeros(2, 3, 8, device="meta")).device.type == "meta"
    assert [site.value().device.type for site in weight_sites(program)] == ["meta"]
