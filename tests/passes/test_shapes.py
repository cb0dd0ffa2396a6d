from dataclasses import replace
from typing import Any

import pytest
import torch

from prequant.passes import Input, PassError, Program, QuantizeWeights, Signature, propagate_shapes
from prequant.runtime import PrequantError

from .support import embedding_inputs, mlp_inputs, tiny_embedding_program, tiny_mlp_program

aten = torch.ops.aten


def insert_after(program: Program, name: str, op: object, *rest: object) -> None:
    node = next(item for item in program.graph.nodes if item.name == name)
    with program.graph.inserting_after(node):
        made = program.graph.call_function(op, (node, *rest))  # type: ignore[arg-type]
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    program.recompile()


@pytest.mark.parametrize("inputs", ["traced", "fresh"])
def test_every_node_gets_the_shape_that_running_it_gives(inputs: str) -> None:
    program = QuantizeWeights(bits=4)(tiny_embedding_program())
    if inputs == "fresh":  # as after loading: nothing is known of the trace
        for node in program.graph.nodes:
            node.meta.pop("val", None)
    shapes = propagate_shapes(program)
    batch, length = (int(size) for size in shapes.outputs[0].shape[:2] if size.node.hint)
    found: dict[torch.fx.Node, Any] = {}

    class Record(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            found[n] = super().run_node(n)
            return found[n]

    Record(program).run(*program.bind((), embedding_inputs(batch, length)))
    assert len(found) == len(program.graph.nodes)
    for node, value in found.items():
        if isinstance(value, torch.Tensor):
            fake = node.meta["val"]
            assert fake.dtype == value.dtype and tuple(map(int, fake.shape)) == tuple(value.shape), node.name
    assert shapes.of_outputs() == ((torch.float32, (batch, length, 12)),)


def test_axes_of_one_name_share_a_symbol_and_stay_dynamic() -> None:
    shapes = propagate_shapes(tiny_mlp_program())
    assert set(shapes.axes) == {"batch", "length"}
    output = shapes.outputs[0]
    assert [size.node.expr for size in output.shape[:2]] == [shapes.axes["batch"], shapes.axes["length"]]
    assert int(output.shape[2]) == 4


def test_the_tensors_themselves_stay_real() -> None:
    program = tiny_mlp_program()
    before = program(**mlp_inputs())["logits"]
    propagate_shapes(program)
    assert torch.equal(program(**mlp_inputs())["logits"], before)


def test_a_node_that_refuses_its_operands_is_named() -> None:
    program = tiny_mlp_program()
    program.set_tensor("second.weight", torch.zeros(4, 15))
    with pytest.raises(
        PassError, match=r"linear does not take \(%dropout f32\[\w+, \w+, 16\], %second_weight f32\[4, 15\]"
    ) as caught:
        propagate_shapes(program)
    assert caught.value.node is not None and caught.value.node.name == "linear_1"  # type: ignore[union-attr]


def test_an_axis_that_is_no_longer_dynamic_is_found() -> None:
    program = tiny_mlp_program()
    insert_after(program, "relu", aten.reshape.default, [3, 5, 16])
    with pytest.raises(PrequantError):
        propagate_shapes(program)

    program = tiny_mlp_program()
    program.set_tensor("shift", torch.zeros(5, 16))
    relu = next(item for item in program.graph.nodes if item.name == "relu")
    with program.graph.inserting_before(relu):
        shift = program.graph.create_node("get_attr", "shift")
    insert_after(program, "relu", aten.add.Tensor, shift)
    with pytest.raises(
        PrequantError, match="the axis 'length' is dynamic in the signature, but the graph only takes the size 5"
    ):
        propagate_shapes(program)


def test_axes_that_are_forced_to_be_equal_are_found() -> None:
    program = tiny_mlp_program()
    x = next(iter(program.graph.nodes))
    with program.graph.inserting_after(x):
        y = program.graph.placeholder("y")
    with program.graph.inserting_after(y):
        total = program.graph.call_function(aten.add.Tensor, (x, y))
    x.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    y.meta["val"] = x.meta["val"]
    first = Input("x", torch.float32, ("batch", "length", 8))

    program.update_info(signature=Signature((first, replace(first, name="y")), {"logits": 0}))
    assert set(propagate_shapes(program).axes) == {"batch", "length"}

    second = Input("y", torch.float32, ("batch", "other", 8))
    program.update_info(signature=Signature((first, second), {"logits": 0}))
    with pytest.raises(PrequantError, match="the graph only takes equal sizes of the axes 'length' and 'other'"):
        propagate_shapes(program)

    for node in program.graph.nodes:  # without a trace whose sizes happen to be equal
        node.meta.pop("val", None)
    with pytest.raises(PassError, match=r"add\.Tensor does not take \(%x .*, %y .*\): The size of tensor a"):
        propagate_shapes(program)
