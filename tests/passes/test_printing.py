import operator

import torch

from prequant.passes import Program, QuantizeWeights, readable
from prequant.passes.program import attribute_node
from prequant.runtime import ops

from .support import assert_golden, tiny_embedding_program, tiny_mlp_program


def test_a_traced_program_reads_one_line_a_node() -> None:
    assert_golden(
        tiny_mlp_program(),
        """
        program(x: f32[batch, length, 8])
          %linear = linear(%x, first.weight [16×8 f32], first.bias [16 f32])
          %relu = relu(%linear)
          %dropout = dropout(%relu, 0.1, False)
          %linear_1 = linear(%dropout, second.weight [4×16 f32], second.bias [4 f32])
          return {logits: %linear_1}
        """,
    )


def test_formats_absent_operands_and_ties_are_shown() -> None:
    assert_golden(
        QuantizeWeights(bits=4, symmetric=False, exclude=("mix*",))(tiny_embedding_program()),
        """
        program(input_ids: i64[batch, length])
          tokens.weight is tied to head.weight
          %dequantize_default = dequantize<affine4:row:asym>(tokens.weight.codes [12×4 u8], \
tokens.weight.scale [12×1 f32], zero_point=tokens.weight.zero_point [12×1 f32], columns=8, dtype=f32)
          %embedding = embedding(%dequantize_default, %input_ids)
          %linear = linear(%embedding, mix.weight [8×8 f32], mix.bias [8 f32])
          %tanh = tanh(%linear)
          %layer_norm = layer_norm(%tanh, [8], norm.weight [8 f32], norm.bias [8 f32], 1e-05, False)
          %linear_1 = linear(%layer_norm, %dequantize_default)
          return {logits: %linear_1}
        """,
    )


def test_packed_ops_name_the_operands_that_they_have() -> None:
    program = QuantizeWeights(bits=8)(tiny_mlp_program())
    second = next(n for n in program.graph.nodes if n.name == "linear_1")
    codes, scale = (attribute_node(program, f"second.weight.{part}", second) for part in ("codes", "scale"))
    second.target = ops.packed_linear
    second.args = (second.args[0], codes, scale, None, None, None, None, False, None, None, None)
    second.kwargs = {"format": "affine8:row", "columns": 16, "input_format": ""}
    assert (
        "%linear_1 = packed_linear<affine8:row>"
        "(%dropout, second.weight.codes [4×16 u8], second.weight.scale [4×1 f32], columns=16)\n" in readable(program)
    )
    second.args = (*second.args[:7], True, *second.args[8:])
    assert "outliers_replace=True" in readable(program)


def test_the_text_is_the_same_every_time_and_for_a_copy() -> None:
    first, second = tiny_embedding_program(), tiny_embedding_program()
    assert readable(first) == readable(second) == readable(first.copy())


def test_a_parameter_that_does_not_train_says_so() -> None:
    program = tiny_mlp_program()
    program.set_tensor("first.bias", program.tensor("first.bias"), trainable=False)
    assert "first.bias [16 f32 frozen]" in readable(program)


def test_a_read_of_a_tensor_that_is_not_there_is_shown_instead_of_raising() -> None:
    program = tiny_mlp_program()
    program.delete_tensor("first.bias")
    assert "first.bias [missing]" in readable(program)


def test_other_callables_lists_slices_and_numbers() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    size = graph.call_function(torch.ops.aten.sym_size.int, (x, 0))
    doubled = graph.call_function(operator.mul, (size, 2))
    item = graph.call_function(operator.getitem, (x, (slice(None, 3), None)))
    full = graph.call_function(torch.ops.aten.full.default, ([doubled, 4], 1 / 3), {"dtype": torch.float16})
    graph.output(((item, full),))
    program = tiny_mlp_program()
    shown = readable(Program(torch.nn.Module(), graph, program.info))
    assert "%mul = operator.mul(%sym_size_int, 2)" in shown
    assert "%getitem = operator.getitem(%x, [:3, None])" in shown
    assert "%full_default = full([%mul, 4], 0.333333, dtype=f16)" in shown
