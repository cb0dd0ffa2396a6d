"""Operands and targets of nodes as text, and back."""

import json
import math
import operator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from prequant.checkpoint.arguments import DTYPES, decode, encode
from prequant.checkpoint.errors import CheckpointError
from prequant.checkpoint.targets import FUNCTIONS, check_call, find_target, target_name

VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(1 << 63), (1 << 63) - 1),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from([*DTYPES.values(), torch.strided, torch.channels_last, torch.preserve_format]),
        st.sampled_from([torch.device("cpu"), torch.device("cuda:1")]),
        st.builds(slice, st.integers(0, 5), st.none(), st.none()),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)


def same(first: Any, second: Any) -> bool:
    if type(first) is not type(second):
        return False
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    if isinstance(first, float) and math.isnan(first):
        return math.isnan(second)
    return bool(first == second)


@given(VALUES)
def test_operands_come_back(value: Any) -> None:
    text = json.dumps(encode(value), allow_nan=False)
    assert same(decode(json.loads(text), {}), value)


def test_nodes_come_back_by_name() -> None:
    graph = fx.Graph()
    node = graph.placeholder("x")
    assert encode([node, (node, 1)]) == [{"node": "x"}, {"tuple": [{"node": "x"}, 1]}]
    assert decode({"tuple": [{"node": "x"}]}, {"x": node}) == (node,)


@pytest.mark.parametrize("value", [torch.zeros(1), object(), 1 << 70, 1j, {"a": 1}])
def test_what_has_no_text_is_refused(value: Any) -> None:
    with pytest.raises(CheckpointError):
        encode(value)


@pytest.mark.parametrize(
    "value", [{"node": "y"}, {"node": 3}, {"slice": [1]}, {"slice": 1}, {"tuple": {}}, {"float": "1"}, {}]
)
def test_what_is_no_operand_is_refused(value: Any) -> None:
    with pytest.raises(CheckpointError):
        decode(value, {})


@pytest.mark.parametrize(
    "target",
    [
        torch.ops.aten.linear.default,
        torch.ops.aten.add.Tensor,
        torch.ops.aten.sym_size.int,
        torch.ops.aten._to_copy.default,
        torch.ops.aten.__and__.Tensor,
        torch.ops.prequant.packed_linear.default,
        torch.ops.prequant.uncalibrated.default,
        operator.floordiv,
        operator.getitem,
        math.ceil,
        torch.sym_max,
        max,
    ],
)
def test_targets_come_back(target: Any) -> None:
    assert find_target(target_name(target)) is target


@pytest.mark.parametrize(
    "name",
    [
        "aten::from_file.default",
        "aten::set_.source_Storage",
        "aten::resize_.default",
        "aten::_foreach_add.Scalar",
        "aten::_cudnn_rnn.default",
        "aten::mkldnn_linear.default",
        "aten::embedding_dense_backward.default",
        "aten::record_stream.default",
        "aten::linear.nothing",
        "aten::linear",
        "aten::linear.default.default",
        "aten::line ar.default",
        "torch.load",
        "os.system",
        "builtins.eval",
        "builtins.getattr",
        "operator.attrgetter",
        "higher_order::cond.default",
        "quantized::linear.default",
        "",
    ],
)
def test_targets_that_are_not_on_the_list(name: str) -> None:
    with pytest.raises(CheckpointError):
        find_target(name)


def test_no_listed_operator_opens_a_file_or_touches_a_storage() -> None:
    """Independent of the list: every schema of ATen that it lets through takes tensors, numbers and options only."""
    allowed = 0
    for qualified in torch._C._dispatch_get_all_op_names():
        name, _, overload = qualified.partition(".")
        if not name.startswith("aten::"):
            continue
        try:
            target: Any = find_target(f"{name}.{overload or 'default'}")
        except CheckpointError:
            continue
        allowed += 1
        for argument in target._schema.arguments:
            assert not any(word in str(argument.type) for word in ("Storage", "Stream", "Any", "__torch__")), qualified
            assert "file" not in argument.name, qualified
    assert allowed > 1000


@pytest.mark.parametrize(
    ("target", "args", "kwargs", "message"),
    [
        (torch.ops.aten.add.Tensor, (1,), {}, "lacks its operand 'other'"),
        (torch.ops.aten.add.Tensor, (1, 2, 3), {}, "takes 2 operands by position, not 3"),
        (torch.ops.aten.add.Tensor, (1, 2), {"self": 1}, "gets its operand 'self' twice"),
        (torch.ops.aten.add.Tensor, (1, 2), {"beta": 1}, "has no operand 'beta'"),
        (torch.ops.aten.add.Tensor, ("a", 2), {}, "self is 'a'"),
        (torch.ops.aten.view.default, (1, ["a"]), {}, "size is"),
        (torch.ops.aten.gelu.default, (1,), {"approximate": 3}, "approximate is 3"),
        (torch.ops.aten.dropout.default, (1, 0.5, 1), {}, "train is 1"),
        (operator.add, (1,), {}, "operator.add takes 2 operands"),
        (operator.neg, (1,), {"a": 2}, "operator.neg takes 1 operands"),
    ],
)
def test_operands_that_do_not_fit(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message.replace("(", r"\(")):
        check_call(target, args, kwargs, lambda value: isinstance(value, fx.Node))


def test_every_function_on_the_list_takes_as_many_operands_as_it_says() -> None:
    examples: dict[str, tuple[Any, ...]] = {
        "operator.getitem": ([1, 2], 1),
        "torch.sym_ite": (True, 2, 3),
        "torch.sym_not": (True,),
    }
    for name, (function, count) in FUNCTIONS.items():
        args = examples.get(name, (6, 3)[:count])
        assert len(args) == count
        function(*args)
