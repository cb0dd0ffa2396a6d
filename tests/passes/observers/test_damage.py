import io
import math

import pytest
import torch
from rich.console import Console

from prequant.passes import Damage, PassError, Pipeline, Program, QuantizeWeights, Signature, weight_sites
from prequant.passes.nesting import OutputTree

from ..support import mlp_inputs, tiny_mlp, tiny_mlp_program
from ..toys import Do, Nothing

aten = torch.ops.aten


def expected(program: Program) -> tuple[float, float]:
    """SQNR in dB and the largest error of the eager model with the weights of ``program``, in float64."""
    model, inputs = tiny_mlp().double(), {"x": mlp_inputs()["x"].double()}
    with torch.no_grad():
        original = model(**inputs)["logits"]
        for site in weight_sites(program):
            dict(model.named_parameters())[site.name].copy_(site.value())
        noise = original - model(**inputs)["logits"]
    return 10 * math.log10(float(original.square().sum() / noise.square().sum())), float(noise.abs().max())


def test_it_measures_against_the_program_before_the_pipeline() -> None:
    damage, program = Damage(mlp_inputs()), tiny_mlp_program()
    first, second = QuantizeWeights(bits=3, include=("first*",)), QuantizeWeights(bits=2)
    Pipeline([Nothing(), first, second])(program, [damage])
    unchanged, after_first, after_second = damage.results
    assert (unchanged.sqnr, unchanged.error) == (math.inf, 0.0)
    halfway = first(program)
    for row, state in ((after_first, halfway), (after_second, second(halfway))):
        quality, error = expected(state)
        assert row.output == "logits"
        assert row.sqnr == pytest.approx(quality, abs=1e-3) and row.error == pytest.approx(error, rel=1e-4)
    assert after_first.sqnr > after_second.sqnr
    assert after_first.pass_ == "quantize-weights{bits=3,include=[first*]}"


def test_dropout_is_off_while_it_measures_and_the_mode_stays() -> None:
    damage, program = Damage(mlp_inputs()), tiny_mlp_program().train()
    result = Pipeline([Nothing()])(program, [damage])
    assert damage.results[0].error == 0.0
    assert result.training and program.training
    assert next(node for node in result.graph.nodes if node.name == "dropout").args[2] is True


def test_each_result_of_floats_has_a_row() -> None:
    def more_results(program: Program) -> None:
        graph = program.graph
        nodes = {node.name: node for node in graph.nodes}
        with graph.inserting_before(graph.output_node()):
            best = graph.call_function(aten.argmax.default, (nodes["linear_1"], -1))
        graph.output_node().args = ((nodes["linear_1"], nodes["relu"], best),)
        tree: OutputTree = {"logits": 0, "hidden": (1, None), "best": 2}
        program.update_info(signature=Signature(program.signature.inputs, tree))

    damage = Damage(mlp_inputs())
    Pipeline([QuantizeWeights(bits=4, include=("second*",))])(Do(more_results)(tiny_mlp_program()), [damage])
    assert [row.output for row in damage.results] == ["logits", "hidden.0"]
    assert damage.results[0].error > 0 and damage.results[1].error == 0


def test_a_result_that_is_gone_or_changes_its_shape_is_an_error() -> None:
    def rename(program: Program) -> None:
        program.update_info(signature=Signature(program.signature.inputs, {"scores": 0}))

    def shorten(program: Program) -> None:
        output = program.graph.output_node()
        with program.graph.inserting_before(output):
            short = program.graph.call_function(aten.sum.dim_IntList, (*output.all_input_nodes, [1]))
        output.args = ((short,),)

    with pytest.raises(
        PassError, match=r"Damage after it: the result 'logits' had the shape \[3, 5, 4\] and is now gone"
    ):
        Pipeline([Do(rename)])(tiny_mlp_program(), [Damage(mlp_inputs())])
    with pytest.raises(PassError, match=r"'logits' had the shape \[3, 5, 4\] and is now the shape \[3, 4\]"):
        Pipeline([Do(shorten)])(tiny_mlp_program(), [Damage(mlp_inputs())])


def test_inputs_that_the_program_does_not_take() -> None:
    with pytest.raises(PassError, match=r"Damage before it: .*'y'"):
        Pipeline([Nothing()])(tiny_mlp_program(), [Damage({"y": torch.zeros(1)})])


def test_the_table() -> None:
    damage = Damage(mlp_inputs())
    Pipeline([Nothing(), QuantizeWeights(bits=2)])(tiny_mlp_program(), [damage])
    console = Console(file=io.StringIO(), width=120)
    console.print(damage.table())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line.startswith("│")]
    last = damage.results[-1]
    assert rows == [
        ["nothing", "logits", "equal", "0"],
        ["quantize-weights{bits=2}", "logits", f"{last.sqnr:.2f}", f"{last.error:.3g}"],
    ]
