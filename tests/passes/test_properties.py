from collections.abc import Callable

import pytest
import torch

from prequant.passes import BinaryCode, Program, QuantizeWeights, Signature, define_property
from prequant.passes.lower import Lower
from prequant.passes.program import attribute_node
from prequant.passes.properties import property_names, violation
from prequant.passes.split_outliers import SplitOutliers
from prequant.runtime import PrequantError, ops

from .support import tiny_embedding_program, tiny_mlp_program

aten = torch.ops.aten


def node(program: Program, name: str) -> torch.fx.Node:
    return next(item for item in program.graph.nodes if item.name == name)


@pytest.mark.parametrize("make", [tiny_mlp_program, tiny_embedding_program])
@pytest.mark.parametrize(
    "name", ["canonical", "valid-signature", "no-orphans", "no-latent-weights", "lowered", "valid-formats"]
)
def test_a_traced_program_has_them_all(make: Callable[[], Program], name: str) -> None:
    assert name in property_names()
    assert violation(name, make()) is None


def test_canonical_finds_hidden_linears_and_assertions() -> None:
    program = tiny_mlp_program()
    relu = node(program, "relu")
    relu.target, relu.args = aten._assert_async.default, relu.args
    assert violation("canonical", program) == "%relu is an assertion (aten::_assert_async)"

    program = tiny_mlp_program()
    linear = node(program, "linear")
    linear.target, linear.args = aten.addmm.default, (linear.args[2], linear.args[0], linear.args[1])
    assert violation("canonical", program) == "%linear is a linear layer in another form (aten::addmm)"

    program = tiny_mlp_program()
    linear = node(program, "linear")
    with program.graph.inserting_before(linear):
        turned = program.graph.call_function(aten.t.default, (linear.args[1],))
    linear.update_arg(1, turned)
    assert violation("canonical", program) == "%t_default is a transposed weight (aten::t)"

    program = tiny_mlp_program()
    program.set_tensor("first.weight", torch.zeros(2, 16, 8))
    assert violation("canonical", program) == "%linear reads a weight that is no matrix (first_weight)"


def test_products_of_two_activations_are_canonical() -> None:
    program = tiny_mlp_program()
    relu = node(program, "relu")
    with program.graph.inserting_after(relu):
        program.graph.call_function(aten.transpose.int, (relu, 1, 2))
    assert violation("canonical", program) is None


def test_valid_signature() -> None:
    program = tiny_mlp_program()
    inputs = program.signature.inputs
    program.update_info(signature=Signature(inputs, {"logits": 0, "hidden": [1]}))
    assert violation("valid-signature", program) == "the signature names result 1, the graph returns 1"
    program.update_info(signature=Signature((), {"logits": 0}))
    assert violation("valid-signature", program) == "the graph takes (x), the signature says ()"


def test_orphans() -> None:
    program = tiny_mlp_program()
    program.set_tensor("spare.scale", torch.ones(1))
    program.set_tensor("spare.codes", torch.ones(1, dtype=torch.uint8))
    assert violation("no-orphans", program) == "no node reads 'spare.codes' (and 1 more)"

    program = tiny_mlp_program()
    program.delete_tensor("first.bias")
    assert violation("no-orphans", program) == "%first_bias reads 'first.bias', which the Program does not have"

    program = tiny_mlp_program()
    linear = node(program, "linear")
    linear.update_arg(2, None)
    assert violation("no-orphans", program) == "no node uses 'first.bias'"

    program = tiny_mlp_program()
    linear = node(program, "linear_1")
    with program.graph.inserting_before(linear):
        program.graph.call_function(aten.t.default, (program.graph.create_node("get_attr", "second.weight"),))
    assert "'second.weight' is read through more than one get_attr node" in str(violation("no-orphans", program))


def test_latent_weights() -> None:
    program = tiny_mlp_program()
    linear = node(program, "linear")
    program.set_tensor("first.scale", torch.ones(16, 1))
    scale = attribute_node(program, "first.scale", linear)
    with program.graph.inserting_before(linear):
        fake = program.graph.call_function(ops.fake_quantize, (linear.args[1], scale, None), {"format": "affine4:row"})
    linear.update_arg(1, fake)
    assert violation("no-latent-weights", program) == "%fake_quantize_default quantizes the latent weight first.weight"
    assert violation("valid-formats", program) is None
    program.set_tensor("first.scale", torch.ones(1, 1))
    assert "scale of affine4:row should have the shape [16, 1], not [1, 1]" in str(violation("valid-formats", program))


def test_an_activation_is_no_latent_weight() -> None:
    program = tiny_mlp_program()
    relu = node(program, "relu")
    with program.graph.inserting_after(relu):
        scale = program.graph.call_function(ops.dynamic_scale, (relu,), {"format": "affine8:row"})
    with program.graph.inserting_after(scale):
        program.graph.call_function(ops.fake_quantize, (relu, scale, None), {"format": "affine8:row"})
    assert violation("no-latent-weights", program) is None and violation("valid-formats", program) is None


def quantized(lowered: bool) -> Program:
    program = QuantizeWeights(bits=3, symmetric=False)(SplitOutliers(ratio=0.1)(tiny_mlp_program()))
    return Lower()(program) if lowered else program


def planes(lowered: bool) -> Program:
    program = BinaryCode(bits=2)(tiny_mlp_program())
    return Lower()(program) if lowered else program


@pytest.mark.parametrize("lowered", [False, True], ids=["simulated", "lowered"])
@pytest.mark.parametrize("make", [quantized, planes])
def test_compressed_programs_have_them_too(make: Callable[[bool], Program], lowered: bool) -> None:
    program = make(lowered)
    for name in ("canonical", "valid-signature", "no-orphans", "no-latent-weights", "valid-formats"):
        assert violation(name, program) is None
    found = violation("lowered", program)
    assert found is None if lowered else found is not None and "first.weight" in found


@pytest.mark.parametrize("lowered", [False, True], ids=["simulated", "lowered"])
@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        (
            "codes",
            torch.zeros(16, 4, dtype=torch.uint8),
            "the codes of affine3:row:asym should have the shape [16, 3], not [16, 4]",
        ),
        ("codes", torch.zeros(16, 3, dtype=torch.int8), "codes are torch.int8, not torch.uint8"),
        ("codes", torch.zeros(48, dtype=torch.uint8), "affine3:row:asym codes have 2 dimensions, not the shape [48]"),
        ("scale", torch.ones(1, 1), "the scale of affine3:row:asym should have the shape [16, 1], not [1, 1]"),
        ("scale", torch.ones(16, 1, dtype=torch.int32), "the scale is torch.int32, not a float"),
        (
            "zero_point",
            torch.ones(16, 2),
            "the zero point of affine3:row:asym should have the shape [16, 1], not [16, 2]",
        ),
        ("outliers.values", torch.ones(13, 1), "outlier values are a float vector, not torch.float32 [13, 1]"),
        ("outliers.columns", torch.zeros(5, dtype=torch.int32), "13 outlier values with 5 columns"),
        (
            "outliers.row_offsets",
            torch.arange(17, dtype=torch.int32),
            "outlier row offsets run from 0 to 16, not from 0 to 13",
        ),
    ],
)
def test_tensors_that_do_not_fit_their_format(lowered: bool, tensor: str, value: torch.Tensor, message: str) -> None:
    program = quantized(lowered)
    program.set_tensor(f"first.weight.{tensor}", value)
    assert message in str(violation("valid-formats", program))


def test_planes_that_do_not_fit_their_format() -> None:
    program = planes(False)
    program.set_tensor("first.weight.alphas", torch.ones(16, 1))
    assert "the scale of bcq2:row should have the shape [2, 16, 1], not [16, 1]" in str(
        violation("valid-formats", program)
    )


def test_a_zero_point_where_there_is_none() -> None:
    program = QuantizeWeights(bits=4)(tiny_mlp_program())
    dequantize = program.graph.find_nodes(op="call_function", target=ops.dequantize)[0]
    dequantize.update_arg(2, dequantize.args[1])
    assert "affine4:row weights have no zero point" in str(violation("valid-formats", program))
    dequantize.update_kwarg("format", "affine9:row")
    assert "affine" in str(violation("valid-formats", program))


@define_property("at-most-one-linear")
def few(program: Program) -> str | None:
    found = program.graph.find_nodes(op="call_function", target=aten.linear.default)
    return f"there are {len(found)}" if len(found) > 1 else None


def test_a_package_can_define_its_own() -> None:
    assert violation("at-most-one-linear", tiny_mlp_program()) == "there are 2"
    with pytest.raises(PrequantError, match="there is a property 'canonical' already"):
        define_property("canonical")(lambda program: None)
    with pytest.raises(PrequantError, match="there is no property 'canonicle'; did you mean canonical"):
        violation("canonicle", tiny_mlp_program())
