import math
from typing import Any

import pytest
import torch
from torch import Tensor

from prequant.passes import CalibrationError, Pipeline, Program, QuantizeActivations, QuantizeWeights, calibrate
from prequant.passes.lower import Lower
from prequant.passes.properties import violation
from prequant.runtime import Granularity, WeightFormat, calibrator

from .support import assert_golden, embedding_inputs, mlp_inputs, tiny_embedding_program, tiny_mlp, tiny_mlp_program


def static(**options: Any) -> QuantizeActivations:
    return QuantizeActivations(dynamic=False, granularity=Granularity.TENSOR, **options)


def batches(count: int = 4) -> list[dict[str, Tensor]]:
    return [mlp_inputs(2 + i, 3 + 2 * i) for i in range(count)]


def seen(data: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    """What each linear of the eager model reads."""
    model = tiny_mlp()
    read: dict[str, list[Tensor]] = {"first": [], "second": []}
    for name, values in read.items():
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, values=values: values.append(args[0]))
    with torch.no_grad():
        for batch in data:
            model(**batch)
    return read


def test_golden() -> None:
    calibrated = calibrate(static(symmetric=False)(tiny_mlp_program()), batches(), progress=False)
    assert_golden(
        calibrated,
        """
        program(x: f32[batch, length, 8])
          %fake_quantize_default = fake_quantize<affine8:tensor:asym>(%x, first.input.scale [1×1 f32], zero_point=first.input.zero_point [1×1 f32])
          %linear = linear(%fake_quantize_default, first.weight [16×8 f32], first.bias [16 f32])
          %relu = relu(%linear)
          %dropout = dropout(%relu, 0.1, False)
          %fake_quantize_default_1 = fake_quantize<affine8:tensor:asym>(%dropout, second.input.scale [1×1 f32], zero_point=second.input.zero_point [1×1 f32])
          %linear_1 = linear(%fake_quantize_default_1, second.weight [4×16 f32], second.bias [4 f32])
          return {logits: %linear_1}
        """,  # noqa: E501
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("observer", ["minmax", "moving-average:0.5", "percentile:95", "entropy", "lsq"])
def test_scales_are_those_of_what_the_eager_model_reads(observer: str, symmetric: bool) -> None:
    data = batches()
    program = static(bits=4, observer=observer, symmetric=symmetric)(tiny_mlp_program())
    calibrated = calibrate(program, data, progress=False)
    format = WeightFormat.affine(4, "tensor", symmetric=symmetric)
    for name, values in seen(data).items():
        made = calibrator(observer)
        for value in values:
            made.observe(value)
        scale, zero_point = made.scale(format)
        assert torch.allclose(calibrated.tensor(f"{name}.input.scale"), scale, rtol=1e-5)
        if zero_point is not None:
            assert torch.equal(calibrated.tensor(f"{name}.input.zero_point"), zero_point)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_calibrated_program_stays_near_the_float_one(symmetric: bool) -> None:
    program = tiny_mlp_program()
    calibrated = calibrate(static(symmetric=symmetric)(program), batches(), progress=False)
    for batch in batches():
        with torch.no_grad():
            difference = calibrated(**batch)["logits"] - program(**batch)["logits"]
        assert 0 < float(difference.abs().max()) < 0.03


def test_values_beyond_the_calibrated_range_are_clipped() -> None:
    calibrated = calibrate(static()(tiny_mlp_program()), [mlp_inputs()], progress=False)
    bound = float(mlp_inputs()["x"].abs().max())
    wild = {"x": mlp_inputs()["x"] * 100}
    expected = tiny_mlp()
    with torch.no_grad():
        first = expected.first(wild["x"].clamp(-bound * 128 / 127, bound))
    hidden_bound = max(float(value.abs().max()) for value in seen([mlp_inputs()])["second"])
    with torch.no_grad():
        logits = expected.second(torch.relu(first).clamp(max=hidden_bound))
        assert float((calibrated(**wild)["logits"] - logits).abs().max()) < 0.1


def test_the_original_stays_uncalibrated_and_nothing_is_left_behind() -> None:
    program = static()(tiny_mlp_program())
    calibrated = calibrate(program, batches(), progress=False)
    assert violation("calibrated", program) == "%uncalibrated_default has no scale yet: calibrate first.input"
    assert violation("calibrated", calibrated) is None
    assert violation("no-orphans", calibrated) is None
    assert calibrated.reports[:-1] == program.reports
    assert {change.what for change in calibrated.reports[-1].changes} == {"first.input", "second.input"}
    assert calibrated.reports[-1].totals == {"batches": 4, "calibrated": 2}


def test_dropout_is_off_while_calibrating_and_back_afterwards() -> None:
    program = static()(tiny_mlp_program()).train()
    calibrated = calibrate(program, batches(), progress=False)
    in_eval_mode = calibrate(program.copy().eval(), batches(), progress=False)
    assert torch.equal(calibrated.tensor("second.input.scale"), in_eval_mode.tensor("second.input.scale"))
    assert calibrated.training and "dropout(%relu, 0.1, True)" in _text(calibrated)
    assert not in_eval_mode.training


def _text(program: Program) -> str:
    from prequant.passes.printing import readable

    return readable(program)


def test_calibration_runs_on_quantized_weights_and_embeddings() -> None:
    simulated = Pipeline([QuantizeWeights(), static()])(tiny_embedding_program())
    calibrated = calibrate(simulated, (embedding_inputs(2, n) for n in (3, 5)), progress=False)
    lowered = Lower()(calibrated)
    inputs = embedding_inputs(4, 6)
    assert torch.allclose(lowered(**inputs)["logits"], calibrated(**inputs)["logits"], atol=1e-6)
    assert violation("lowered", lowered) is None


def test_progress_shows_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    program = static()(tiny_mlp_program())
    calibrate(program, batches(), progress=True)
    assert "calibrating" in capsys.readouterr().err
    calibrate(program, batches(), progress=False)
    assert capsys.readouterr().err == ""


def test_what_can_not_calibrate_says_why() -> None:
    program = static()(tiny_mlp_program())
    with pytest.raises(CalibrationError, match="nothing to calibrate"):
        calibrate(tiny_mlp_program(), batches())
    with pytest.raises(CalibrationError, match="no batch"):
        calibrate(program, [], progress=False)
    with pytest.raises(CalibrationError, match="batch 1 is a Tensor, not a mapping"):
        calibrate(program, [mlp_inputs(), torch.ones(1)], progress=False)  # type: ignore[list-item]
    with pytest.raises(CalibrationError, match=r"batch 0: unexpected input 'labels'"):
        calibrate(program, [{**mlp_inputs(), "labels": torch.ones(1)}], progress=False)
    broken = mlp_inputs()
    broken["x"][0, 0, 0] = math.nan
    with pytest.raises(CalibrationError, match=r"first\.input: 1 of 120 values are NaN or infinite$"):
        calibrate(program, [broken], progress=False)
    with pytest.raises(CalibrationError, match=r"first\.input: no values were observed"):
        calibrate(program, [{"x": torch.empty(0, 5, 8)}], progress=False)
