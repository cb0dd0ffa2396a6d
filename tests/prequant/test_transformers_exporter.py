"""prequant among the exporters of transformers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.exporters import DynamoConfig, DynamoExporter, ExportedModel, OnnxConfig

from prequant.passes import Pipeline, calibrate
from prequant.runtime import PrequantError, ops
from prequant.trace import trace
from prequant.transformers_exporter import (
    DEFAULT_PIPELINE,
    PrequantConfig,
    PrequantExporter,
    PrequantQuantizer,
    PrequantRunner,
    program_of,
)

from ..models import FAMILIES

BERT = "bert-sequence-classification"
WAYS: dict[str, tuple[type[DynamoExporter], type[DynamoConfig]]] = {
    "dynamo": (DynamoExporter, DynamoConfig),
    "prequant": (PrequantExporter, PrequantConfig),
}


def exported(name: str, way: str, folder: Path, quantizer: PrequantQuantizer | None = None) -> Any:
    exporter, config = WAYS[way]
    made = exporter().export(
        FAMILIES[name]().model,
        dict[str, Any](FAMILIES[name]().make_inputs(2, 9)),
        config(dynamic=True, quantizer=quantizer or PrequantQuantizer()),
    )
    made.save_pretrained(folder)
    return ExportedModel.from_pretrained(folder)


def runner_of(model: Any) -> Any:
    return next(iter(model.runners.values()))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [BERT, "gpt2-causal-lm", "llama-causal-lm", "t5-seq2seq-lm"])
def test_an_export_computes_what_the_program_does(name: str, way: str, tmp_path: Path) -> None:
    model, example, make_inputs = FAMILIES[name]()
    wanted = Pipeline.parse(DEFAULT_PIPELINE)(trace(model, example))
    ours = exported(name, way, tmp_path)
    for batch, length in ((2, 9), (3, 5)):
        inputs = make_inputs(batch, length, padded=True)
        with torch.no_grad():
            found = ours(**inputs)
            assert type(found) is type(model(**inputs))
            for key, value in wanted(**inputs).items():
                torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4)


def test_its_own_format_runs_by_a_plan(tmp_path: Path) -> None:
    runner = runner_of(exported(BERT, "prequant", tmp_path))
    assert isinstance(runner, PrequantRunner)
    assert runner.program.runner is not None and not runner.program.runner.obstacle
    with pytest.raises(TypeError, match=r"input 'input_ids' is missing; the export takes .*attention_mask"):
        runner(attention_mask=torch.ones(2, 5, dtype=torch.int64))
    assert json.loads((tmp_path / "export.json").read_text())["export_format"] == "prequant"


def test_a_step_with_a_cache() -> None:
    """Both components of a decoder, against the model with the same weights simulated."""
    model, _, make_inputs = FAMILIES["gpt2-causal-lm"]()
    inputs = make_inputs(2, 6)
    pipeline = "canonicalize,quantize-weights{bits=8}"
    config = PrequantConfig(dynamic=True, quantizer=PrequantQuantizer(pipeline))
    with torch.no_grad():
        made = PrequantExporter().export_for_generation(model, dict(inputs), config)
        plain = DynamoExporter().export_for_generation(model, dict(inputs), DynamoConfig(dynamic=True))
    assert set(made.components) == set(plain.components) and "decode" in made.components
    for name, component in made.components.items():
        targets = {node.target for node in component.program.graph.nodes}
        assert targets & {ops.packed_linear, ops.packed_linears}, name
        assert torch.ops.aten.linear.default not in targets and torch.ops.aten.addmm.default not in targets


def test_static_activations_are_calibrated(tmp_path: Path) -> None:
    text = "canonicalize,quantize-weights{bits=4},quantize-activations{dynamic=false,granularity=tensor}"
    model, example, make_inputs = FAMILIES[BERT]()
    batches = [make_inputs(3, length) for length in (5, 8)]
    wanted = calibrate(Pipeline.parse(text)(trace(model, example)), batches, progress=False)
    ours = exported(BERT, "dynamo", tmp_path, PrequantQuantizer(text, calibration_dataset=batches))
    inputs = make_inputs(2, 7)
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).logits, wanted(**inputs).logits, rtol=1e-3, atol=1e-3)


def test_other_formats_are_refused() -> None:
    with pytest.raises(ValueError, match="quantizes dynamo, prequant exports, not onnx ones"):
        PrequantQuantizer().validate_environment(OnnxConfig().export_format)
    with pytest.raises(PrequantError, match="no pass"):
        PrequantQuantizer("canonicalise")


def test_graphs_with_modules_in_them_are_refused() -> None:
    class Inner(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    graph = torch.fx.Graph()
    graph.output((graph.call_module("inner", (graph.placeholder("x"),)),))
    module = torch.fx.GraphModule({"inner": Inner()}, graph)
    with pytest.raises(PrequantError, match="calls a module, 'inner'"):
        program_of(module)


def test_a_fresh_process_needs_to_import_prequant_alone(tmp_path: Path) -> None:
    exported(BERT, "prequant", tmp_path / "export")
    code = """
import prequant, torch
from transformers.exporters import ExportedModel
model = ExportedModel.from_pretrained("export")
logits = model(input_ids=torch.ones(3, 4, dtype=torch.int64), attention_mask=torch.ones(3, 4, dtype=torch.int64)).logits
assert logits.shape == (3, 3) and logits.isfinite().all()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, cwd=tmp_path)
