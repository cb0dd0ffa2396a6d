"""What the recorder collects along a pipeline, against figures worked out apart from it."""

import math

import pytest
import torch

from prequant.inspection import other_bytes
from prequant.measure import tensor_bytes
from prequant.passes import (
    Canonicalize,
    DropLayers,
    Lower,
    Pipeline,
    QuantizeWeights,
    SplitOutliers,
    lower,
    weights,
)
from prequant.runtime import sqnr
from prequant.view import Recorder, record_of
from prequant.view.recorder import FEW_ERRORS, NO_BATCH, NO_ORIGINAL

from ...models import FAMILIES, traced
from ...passes.support import mlp_inputs, tiny_mlp_program
from .records import bert_record, four_passes, recorded


def test_stages_are_the_program_before_and_after_each_pass() -> None:
    record = bert_record()
    titles = [stage.title for stage in record.stages]
    assert titles == ["as traced", "canonicalize", "split-outliers", "quantize-weights", "lower"]
    assert record.stages[2].source == "split-outliers{ratio=0.02}"
    assert record.pipeline == str(four_passes())
    assert record.notes == [] and record.batch == "a batch"
    for stage in record.stages:
        names = [record.nodes[place].name for place in stage.nodes]
        assert len(names) == len(set(names)) and set(stage.added) | set(stage.rewritten) <= set(names)
        assert {source for place in stage.nodes for source in record.nodes[place].inputs} <= set(names)


def test_bytes_and_bits_are_those_of_the_tensors() -> None:
    inputs = mlp_inputs()
    record = recorded(tiny_mlp_program(), Pipeline([Canonicalize(), QuantizeWeights(bits=4)]), inputs)
    first, _, last = record.stages
    # 16×8 and 4×16 weights, 16 and 4 biases; then half a byte a weight and a scale a row.
    assert first.bytes == first.float_bytes == record.original_bytes == 4 * (128 + 64 + 20)
    assert last.bytes == (64 + 64) + (32 + 16) + 4 * 20 and last.float_bytes == first.bytes
    assert first.mean_bits == 32 and last.mean_bits == 8 * (128 + 48) / 192


def test_nothing_is_counted_twice_in_a_real_model() -> None:
    program = traced("bert-masked-lm")
    record = record_of(program)
    assert record.stages[0].bytes == tensor_bytes(program)
    assert record.stages[0].bytes == sum(w.bytes for w in record.weights) + other_bytes(program)


def test_errors_of_weights_and_values_are_sqnr_against_the_original() -> None:
    program, inputs = tiny_mlp_program(), mlp_inputs()
    pipeline = Pipeline([Canonicalize(), QuantizeWeights(bits=3), Lower()])
    record = recorded(program, pipeline, inputs)
    result = pipeline(program)
    originals = {view.name: view.value() for view in weights(program)}
    for place in record.stages[-1].weights:
        weight = record.weights[place]
        (view,) = (view for view in weights(result) if view.name == weight.name)
        assert weight.sqnr == pytest.approx(sqnr(originals[weight.name], view.value()))
    with torch.no_grad():
        exact, close = program(**inputs)["logits"], result(**inputs)["logits"]
        hidden = torch.nn.functional.linear(inputs["x"], originals["first.weight"], program.tensor("first.bias"))
        quantized = weights(result)[0].value()
        hidden_close = torch.nn.functional.linear(inputs["x"], quantized, program.tensor("first.bias"))
    last = record.stages[-1]
    assert last.results == {"logits": pytest.approx(sqnr(exact, close), abs=0.01)}
    assert last.errors["packed_linear_default"] == pytest.approx(sqnr(hidden, hidden_close), abs=0.01)
    assert record.stages[0].errors == record.stages[0].results == {}
    assert set(record.stages[1].errors.values()) == {math.inf} == set(record.stages[1].results.values())


def test_every_node_that_runs_has_a_time() -> None:
    for stage in bert_record().stages:
        names = {bert_record().nodes[place].name for place in stage.nodes}
        assert names <= set(stage.times) and all(seconds > 0 for seconds in stage.times.values())


def test_figures_that_a_pass_leaves_are_those_of_the_stage_before() -> None:
    record = bert_record()
    canonical, split, quantized, lowered = record.stages[1:]
    assert canonical.weights == record.stages[0].weights
    assert not set(split.weights) & set(canonical.weights)
    # Lowering keeps the codes: only that they are packed now is another thing.
    for before, after in zip(quantized.weights, lowered.weights, strict=True):
        one, other = record.weights[before], record.weights[after]
        assert (one.sqnr, one.codes, one.histogram) == (other.sqnr, other.codes, other.histogram)
        assert not one.lowered and other.lowered


def test_weights_of_layers_that_move_up_are_compared_with_their_own() -> None:
    program = traced("bert-encoder")
    pipeline = Pipeline([Canonicalize(), DropLayers(keep=(1,)), QuantizeWeights(bits=8)])
    record = recorded(program, pipeline, FAMILIES["bert-encoder"]().make_inputs(2, 5))
    names = [record.weights[place].name for place in record.stages[-1].weights]
    assert "encoder.layer.0.output.dense.weight" in names and not any("layer.1." in name for name in names)
    assert all(float(record.weights[place].sqnr or 0) > 35 for place in record.stages[-1].weights)


def test_a_conv1d_is_a_weight_once_it_is_canonical() -> None:
    record = recorded(traced("gpt2-causal-lm"), Pipeline([Canonicalize(), QuantizeWeights(bits=8)]))
    assert len(record.stages[0].weights) == 2 and len(record.stages[1].weights) == 10
    assert all(float(record.weights[place].sqnr or 0) > 35 for place in record.stages[2].weights)


def test_without_a_batch_and_an_original_the_record_says_so() -> None:
    packed = lower(Pipeline([Canonicalize(), SplitOutliers(ratio=0.01), QuantizeWeights(bits=4)])(tiny_mlp_program()))
    record = record_of(packed)
    assert record.notes == [NO_ORIGINAL, NO_BATCH] and record.stages[0].title == "as saved"
    assert [weight.sqnr for weight in record.weights] == [None, None]
    assert record.stages[0].errors == record.stages[0].times == {}
    assert record.original_bytes == record.stages[0].float_bytes == 4 * (128 + 64 + 20)


def test_recorded_errors_stand_in_for_measured_ones() -> None:
    packed = QuantizeWeights(bits=4)(Canonicalize()(tiny_mlp_program()))
    record = record_of(packed, Recorder(recorded={"first.weight": 12.0}, progress=False))
    assert [(weight.sqnr, weight.recorded) for weight in record.weights] == [(12.0, True), (None, False)]
    assert NO_ORIGINAL not in record.notes


def test_with_an_original_errors_are_against_that() -> None:
    program, inputs = Canonicalize()(tiny_mlp_program()), mlp_inputs()
    packed = Lower()(QuantizeWeights(bits=3)(program))
    measured = record_of(packed, Recorder("", inputs, "a batch", original=program, progress=False))
    along = recorded(program, Pipeline([QuantizeWeights(bits=3), Lower()]), inputs)
    for one, other in zip(measured.weights, along.stages[-1].weights, strict=True):
        assert one.sqnr == along.weights[other].sqnr
    assert measured.stages[0].results == along.stages[-1].results
    errors = sorted(measured.stages[0].errors.values())
    assert errors == sorted(
        along.stages[-1].errors[name] for name in ("packed_linear_default", "packed_linear_default_1")
    )


def test_a_linear_with_a_fused_activation_is_not_compared_with_the_product_alone() -> None:
    program, inputs = Canonicalize()(tiny_mlp_program()), mlp_inputs()
    packed = lower(QuantizeWeights(bits=8)(program))
    (fused,) = (node.name for node in packed.graph.nodes if node.kwargs.get("activation"))
    measured = record_of(packed, Recorder("", inputs, "a batch", original=program, progress=False))
    assert fused not in measured.stages[0].errors and len(measured.stages[0].errors) == 1
    assert FEW_ERRORS in measured.notes


def test_the_programs_stay_what_they_were() -> None:
    program, inputs = tiny_mlp_program(), mlp_inputs()
    program.train(True)
    before = program.code
    recorded(program, four_passes(), inputs)
    assert program.code == before and program.training
