from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import fx

from prequant.passes import BinaryCode, PassError, Pipeline, Program, QuantizeWeights, Signature, Verify
from prequant.passes.lower import Lower
from prequant.passes.program import attribute_node
from prequant.passes.split_outliers import SplitOutliers
from prequant.runtime import ops

from ..support import tiny_embedding_program, tiny_mlp_program
from ..toys import Do, Nothing

aten = torch.ops.aten


def node(program: Program, name: str) -> fx.Node:
    return next(item for item in program.graph.nodes if item.name == name)


def insert_after(program: Program, name: str, op: Any, *rest: Any) -> None:
    at = node(program, name)
    with program.graph.inserting_after(at):
        made = program.graph.call_function(op, (at, *rest))
    at.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)


@pytest.mark.parametrize("make", [tiny_mlp_program, tiny_embedding_program])
@pytest.mark.parametrize(
    "passes",
    [
        [QuantizeWeights(bits=4, symmetric=False)],
        [SplitOutliers(ratio=0.05), QuantizeWeights(bits=3), Lower()],
        [BinaryCode(bits=2, embeddings=True), Lower()],
        [QuantizeWeights(bits=1), Nothing()],
    ],
    ids=str,
)
def test_what_passes_make_is_well_formed(make: Callable[[], Program], passes: list[Any]) -> None:
    program = Pipeline(passes)(make(), [Verify()])
    values = [item.meta.get("val") for item in program.graph.nodes if item.op == "call_function"]
    assert values and all(isinstance(value, torch.Tensor) for value in values)


def test_the_values_that_nodes_remember_are_renewed() -> None:
    def widen(program: Program) -> None:
        insert_after(program, "relu", aten.mul.Tensor, 2.0)

    program = Pipeline([Do(widen)])(tiny_mlp_program(), [Verify()])
    batch, length, width = node(program, "mul_tensor").meta["val"].shape
    assert width == 16 and isinstance(batch, torch.SymInt) and isinstance(length, torch.SymInt)


def spare(program: Program) -> None:
    program.set_tensor("spare", torch.zeros(1))


def dangling(program: Program) -> None:
    linear = node(program, "linear_1")
    with program.graph.inserting_before(linear):
        linear.update_arg(2, program.graph.create_node("get_attr", "second.bias"))
    program.delete_tensor("second.bias")


def foreign_op(program: Program) -> None:
    insert_after(program, "relu", torch.tanh)


def method(program: Program) -> None:
    relu = node(program, "relu")
    with program.graph.inserting_after(relu):
        made = program.graph.call_method("tanh", (relu,))
    relu.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)


def wrong_width(program: Program) -> None:
    program.set_tensor("second.weight", torch.zeros(4, 15))


def other_type(program: Program) -> None:
    insert_after(program, "linear_1", aten.to.dtype, torch.float64)


def other_shape(program: Program) -> None:
    insert_after(program, "linear_1", aten.sum.dim_IntList, [1])


def fixed_axis(program: Program) -> None:
    program.set_tensor("shift", torch.zeros(5, 16))
    relu = node(program, "relu")
    with program.graph.inserting_before(relu):
        shift = program.graph.create_node("get_attr", "shift")
    insert_after(program, "relu", aten.add.Tensor, shift)


def lost_output(program: Program) -> None:
    program.graph.output_node().args = ((),)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (spare, r"Verify after it: no-orphans: no node reads 'spare'"),
        (dangling, r"the graph it left: RuntimeError: Node second_bias target second\.bias references nonexistent"),
        (foreign_op, r"known ops: %tanh calls <built-in method tanh .* of none of aten, prequant"),
        (method, r"known ops: %tanh is a call_method"),
        (wrong_width, r"linear does not take \(.*%second_weight f32\[4, 15\].* \(at linear_1\)"),
        (other_type, r"the results were torch.float32 \[3, 5, 4\] and are now torch.float64 \[3, 5, 4\]"),
        (other_shape, r"the results were torch.float32 \[3, 5, 4\] and are now torch.float32 \[3, 4\]"),
        (fixed_axis, r"the axis 'length' is dynamic in the signature, but the graph only takes the size 5"),
        (lost_output, r"valid-signature: the signature names result 0, the graph returns 0"),
    ],
)
def test_a_pass_that_damages_the_program_is_named(damage: Callable[[Program], None], message: str) -> None:
    with pytest.raises(PassError, match=rf"(?s)^pass 2 of 2, do.*{message}"):
        Pipeline([Nothing(), Do(damage)])(tiny_mlp_program(), [Verify()])


def test_a_codes_tensor_of_the_wrong_shape_is_found() -> None:
    def shorten(program: Program) -> None:
        program.set_tensor("first.weight.codes", torch.zeros(16, 3, dtype=torch.uint8))

    with pytest.raises(
        PassError, match=r"valid-formats: %dequantize\w*: the codes of affine4:row should have the shape"
    ):
        Pipeline([QuantizeWeights(), Do(shorten)])(tiny_mlp_program(), [Verify()])


def test_what_was_wrong_before_is_no_passes_fault() -> None:
    program = tiny_mlp_program()
    foreign_op(program)
    with pytest.raises(
        PassError, match="Verify before it: the Program given is not well-formed: known ops: %tanh calls"
    ):
        Pipeline([Nothing()])(program, [Verify()])


def test_results_may_change_with_the_signature() -> None:
    def narrow(program: Program) -> None:
        other_shape(program)
        program.update_info(signature=Signature(program.signature.inputs, {"summed": 0}))

    Pipeline([Do(narrow), Nothing()])(tiny_mlp_program(), [Verify()])


def test_ops_of_other_packages_can_be_allowed() -> None:
    library = torch.library.Library("verify_test", "FRAGMENT")
    library.define("double(Tensor x) -> Tensor")
    library.impl("double", lambda x: x * 2, "CompositeExplicitAutograd")
    torch.library.register_fake("verify_test::double", torch.empty_like, lib=library)

    def insert(program: Program) -> None:
        insert_after(program, "relu", torch.ops.verify_test.double.default)

    with pytest.raises(PassError, match=r"known ops: %double\w* calls verify_test.double.default"):
        Pipeline([Do(insert)])(tiny_mlp_program(), [Verify()])
    Pipeline([Do(insert)])(tiny_mlp_program(), [Verify(namespaces=["verify_test"])])


def add_latent(program: Program) -> None:
    linear = node(program, "linear")
    program.set_tensor("first.scale", torch.ones(16, 1))
    scale = attribute_node(program, "first.scale", linear)
    with program.graph.inserting_before(linear):
        fake = program.graph.call_function(ops.fake_quantize, (linear.args[1], scale, None), {"format": "affine4:row"})
    linear.update_arg(1, fake)


@dataclass(frozen=True)
class Ensures(Nothing):
    name: ClassVar[str] = "ensures-it"
    ensures: ClassVar[tuple[str, ...]] = ("no-latent-weights",)


@dataclass(frozen=True)
class Breaks(Do):
    name: ClassVar[str] = "breaks-it"
    breaks: ClassVar[tuple[str, ...]] = ("no-latent-weights",)


def test_what_one_pass_ensured_a_later_one_must_not_break_unless_it_says_so() -> None:
    program = tiny_mlp_program()
    with pytest.raises(
        PassError,
        match=r"pass 2 of 2, do.*'no-latent-weights', which ensures-it ensured, does not hold any more: %fake",
    ):
        Pipeline([Ensures(), Do(add_latent)])(program, [Verify()])
    Pipeline([Ensures(), Breaks(add_latent), Nothing()])(program, [Verify()])
    Pipeline([Do(add_latent)])(program, [Verify()])


def test_one_observer_serves_several_runs() -> None:
    verify = Verify()
    Pipeline([Ensures()])(tiny_mlp_program(), [verify])
    Pipeline([Do(add_latent)])(tiny_mlp_program(), [verify])
    Pipeline([Nothing()])(tiny_embedding_program(), [verify])
