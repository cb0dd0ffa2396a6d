"""Records of tiny models, and one with hostile names. Import with ``from .records import ...``."""

from functools import cache

import torch
from torch import Tensor, nn

from prequant.passes import Canonicalize, Input, Lower, Pipeline, Program, QuantizeWeights, Signature, SplitOutliers
from prequant.trace import trace
from prequant.view import Record, Recorder

from ...models import random_inputs, small_model

HOSTILE = "</script><img src=x onerror=alert(1)>"


def recorded(program: Program, pipeline: Pipeline, inputs: dict[str, Tensor] | None = None) -> Record:
    """What a pipeline makes of a Program, step by step."""
    recorder = Recorder("tiny", inputs, "a batch", progress=False)
    pipeline(program, [recorder])
    return recorder.record


def four_passes() -> Pipeline:
    return Pipeline([Canonicalize(), SplitOutliers(ratio=0.02), QuantizeWeights(bits=4), Lower()])


@cache
def bert_record() -> Record:
    """Four passes over a tiny BERT, measured. Leave it as it is."""
    model = small_model("Bert", "ForSequenceClassification", num_hidden_layers=2)
    inputs = random_inputs(model, 2, 6)
    return recorded(trace(model, inputs), four_passes(), inputs)


@cache
def deep_record() -> Record:
    """A decoder of 24 layers, not measured. Leave it as it is."""
    model = small_model("GPT2", "LMHeadModel", n_layer=24)
    program = trace(model, random_inputs(model, 2, 4))
    return recorded(program, Pipeline([Canonicalize()]))


@cache
def hostile_record() -> Record:
    """A model whose modules, axes and title are called like markup."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    program = trace(model.eval(), torch.zeros(2, 4))
    for node in program.graph.nodes:
        stack = node.meta.get("module_stack", ())
        node.meta["module_stack"] = tuple((f"{HOSTILE}&{path}" if path else "", HOSTILE) for path, _ in stack)
    program.update_info(signature=Signature((Input("input", torch.float32, (HOSTILE, 4)),), 0))
    record = recorded(program, Pipeline([Canonicalize(), QuantizeWeights(bits=4)]))
    record.title = HOSTILE
    record.notes.append(f"<!-- <script> {HOSTILE}")
    return record
