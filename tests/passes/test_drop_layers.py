"""DropLayers against transformers' own models with the same layers left out, and what can't be left out."""

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from prequant import load, lower
from prequant.model import ModelProgram
from prequant.passes import BinaryCode, Canonicalize, DropLayers, PassError, Pipeline, QuantizeWeights, SplitOutliers
from prequant.passes.properties import violation
from prequant.trace import trace

from ..models import FAMILIES, random_inputs, small_model

DEPTHS = {"DistilBert": "n_layers", "GPT2": "n_layer", "T5": "num_layers"}
HEADS = {
    "Bert": "ForSequenceClassification",
    "Roberta": "ForMaskedLM",
    "DistilBert": "ForQuestionAnswering",
    "Electra": "ForTokenClassification",
    "MPNet": "ForSequenceClassification",
    "GPT2": "LMHeadModel",
    "OPT": "ForCausalLM",
    "Llama": "ForCausalLM",
    "Qwen2": "ForCausalLM",
    "T5": "ForConditionalGeneration",
}
STACKS = {
    "Bert": ("bert.encoder.layer",),
    "Roberta": ("roberta.encoder.layer",),
    "DistilBert": ("distilbert.transformer.layer",),
    "Electra": ("electra.encoder.layer",),
    "MPNet": ("mpnet.encoder.layer",),
    "GPT2": ("transformer.h",),
    "OPT": ("model.decoder.layers",),
    "Llama": ("model.layers",),
    "Qwen2": ("model.layers",),
    "T5": ("encoder.block", "decoder.block"),
}
DEPTH = 4


def deep(family: str, **options: Any) -> Any:
    depth = {DEPTHS.get(family, "num_hidden_layers"): DEPTH}
    return small_model(family, HEADS[family], **{**depth, **options})


def traced(model: PreTrainedModel, **options: Any) -> ModelProgram:
    return cast(ModelProgram, trace(model, random_inputs(model, 2, 5), **options))


def without(model: Any, family: str, keep: list[int]) -> Any:
    """The transformers model with other layers taken out of its lists."""
    model = copy.deepcopy(model)
    for path in STACKS[family]:
        parent = model.get_submodule(path.rpartition(".")[0])
        blocks = getattr(parent, path.rpartition(".")[2])
        kept = nn.ModuleList(blocks[number] for number in keep)
        if family == "T5" and keep[0] != 0:  # which the first block holds for all
            lists: Any = kept, blocks
            attention, first = (each[0].layer[0].SelfAttention for each in lists)
            attention.relative_attention_bias = first.relative_attention_bias
            attention.has_relative_attention_bias = True
        setattr(parent, path.rpartition(".")[2], kept)
    return model


def outputs(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        found = model(**inputs, use_cache=False) if isinstance(model, PreTrainedModel) else model(**inputs)
    return [value for value in found.values() if isinstance(value, Tensor)]


@pytest.mark.parametrize("keep", [[0, 2], [1, 3], [3]], ids=str)
@pytest.mark.parametrize("family", HEADS)
def test_it_computes_what_the_model_does_without_the_layers(family: str, keep: list[int]) -> None:
    model = deep(family)
    shallow = DropLayers(keep=tuple(keep))(traced(model))
    inputs = random_inputs(model, 3, 8, padded=True)
    for one, other in zip(outputs(shallow, inputs), outputs(without(model, family, keep), inputs), strict=False):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", HEADS)
def test_the_saved_folder_is_an_ordinary_shallower_model(family: str, tmp_path: Path) -> None:
    model = deep(family)
    shallow: Any = DropLayers(keep=(1, 2))(traced(model))
    shallow.save_pretrained(tmp_path)
    inputs = random_inputs(model, 2, 6)
    expected = outputs(shallow, inputs)
    theirs, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert theirs.config.num_hidden_layers == 2
    assert {name for name, _ in theirs.named_parameters()} >= {name for name, _ in shallow.named_parameters()}
    for one, other, again in zip(
        expected, outputs(theirs.eval(), inputs), outputs(load(tmp_path), inputs), strict=False
    ):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-5)
        assert torch.equal(again, one)


def test_a_bare_model_loads_as_one_as_well(tmp_path: Path) -> None:
    model = small_model("Bert", "Model", num_hidden_layers=DEPTH)
    shallow: Any = DropLayers(count=2)(traced(model))
    shallow.save_pretrained(tmp_path)
    inputs = random_inputs(model, 2, 6)
    theirs = AutoModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(outputs(theirs, inputs)[0], outputs(shallow, inputs)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("depth", "options", "kept"),
    [
        (12, {"count": 6}, [1, 3, 5, 7, 9, 11]),
        (6, {"count": 3}, [1, 3, 5]),
        (6, {"count": 4}, [0, 2, 3, 5]),
        (6, {"count": 2, "rule": "top"}, [4, 5]),
        (6, {"count": 2, "rule": "bottom"}, [0, 1]),
        (6, {"count": 6}, [0, 1, 2, 3, 4, 5]),
        (6, {"keep": (1, 2, 5)}, [1, 2, 5]),
    ],
)
def test_rules(depth: int, options: dict[str, Any], kept: list[int]) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(depth)))
    program = DropLayers(**options)(trace(model, {"input": torch.randn(2, 4)}))
    assert {name for name, _ in program.named_parameters()} == {
        f"{number}.{part}" for number in range(len(kept)) for part in ("weight", "bias")
    }
    x = torch.randn(3, 4)
    torch.testing.assert_close(program(x), nn.Sequential(*(model[number] for number in kept))(x))


def test_only_one_of_two_stacks() -> None:
    model = deep("T5", num_decoder_layers=3)
    shallow = cast(ModelProgram, DropLayers(count=1, stack="decoder.*")(traced(model)))
    assert (shallow.config.num_layers, shallow.config.num_decoder_layers) == (DEPTH, 1)
    both = cast(ModelProgram, DropLayers(count=1)(traced(model)))
    assert (both.config.num_layers, both.config.num_decoder_layers) == (1, 1)
    assert (model.config.num_layers, model.config.num_decoder_layers) == (DEPTH, 3), "the model's own stays"


def test_what_the_configuration_lists_layer_by_layer_goes_along() -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    model = deep("Qwen2", use_sliding_window=True, sliding_window=3, layer_types=kinds)
    shallow = cast(ModelProgram, DropLayers(keep=(1, 2))(traced(model)))
    assert shallow.config.layer_types == ["sliding_attention", "full_attention"]
    theirs = without(model, "Qwen2", [1, 2])
    theirs.config.layer_types = ["sliding_attention", "full_attention"]
    inputs = random_inputs(model, 2, 9)
    torch.testing.assert_close(outputs(shallow, inputs)[0], outputs(theirs, inputs)[0], rtol=0, atol=1e-5)


FORMS = {
    "quantized": Pipeline([Canonicalize(), SplitOutliers(ratio=0.01), QuantizeWeights(bits=4)]),
    "coded": Pipeline([Canonicalize(), BinaryCode(bits=2)]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["Bert", "GPT2", "T5"])
def test_it_goes_with_compression_in_any_order(family: str, form: str) -> None:
    program, drop = traced(deep(family)), DropLayers(keep=(0, 3))
    before, after = FORMS[form](drop(program)), drop(FORMS[form](program))
    packed = drop(lower(FORMS[form](program)))
    inputs = random_inputs(deep(family), 2, 6)
    assert violation("canonical", before) is None
    for one, other, third in zip(outputs(before, inputs), outputs(after, inputs), outputs(packed, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
        torch.testing.assert_close(one, third, rtol=0, atol=1e-4)
    assert {name for name, _ in before.named_buffers()} == {name for name, _ in after.named_buffers()}


@pytest.mark.parametrize("family", ["GPT2", "T5"])
def test_a_shallower_model_generates(family: str) -> None:
    model = deep(family)
    shallow: Any = lower(FORMS["quantized"](DropLayers(keep=(1, 3))(traced(model))))
    reference: Any = FORMS["quantized"](traced(without_config(model, family)))
    inputs = {"input_ids": random_inputs(model, 1, 5)["input_ids"]}
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 1}
    assert torch.equal(shallow.generate(**inputs, **settings), reference.generate(**inputs, **settings))


def without_config(model: Any, family: str) -> Any:
    """The shallower model as one that was made so."""
    shallow = deep(family, **{DEPTHS[family]: 2})
    state = without(model, family, [1, 3]).state_dict()
    shallow.load_state_dict(state)
    return shallow


def test_what_it_drops_is_gone_and_the_original_stays() -> None:
    program = traced(deep("Bert"))
    before = {name for name, _ in program.named_parameters()}
    shallow = DropLayers(keep=(1, 3))(program)
    (report,) = shallow.reports
    assert [change.how for change in report.changes] == [
        "dropped",
        "now bert.encoder.layer.0",
        "dropped",
        "now bert.encoder.layer.1",
    ]
    assert report.totals["tensors dropped"] == 2 * 16
    assert {name for name, _ in program.named_parameters()} == before
    paths = {path for node in shallow.graph.nodes for path, _ in node.meta.get("module_stack", ())}
    assert "bert.encoder.layer.1" in paths and "bert.encoder.layer.2" not in paths
    kept = shallow.tensor("bert.encoder.layer.0.output.dense.weight")
    assert torch.equal(kept, program.tensor("bert.encoder.layer.1.output.dense.weight"))


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"give either keep or count, not keep=\[\], count=0"),
        ({"keep": (0,), "count": 1}, "give either keep or count"),
        ({"keep": (2, 1)}, r"keep=\[2, 1\].*expected numbers from 0, in order"),
        ({"keep": (-1,)}, "expected numbers from 0"),
        ({"count": -1}, "expected numbers from 0"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        DropLayers(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": (1, 4)}, r"keep=\[1, 4\]: bert.encoder.layer has the blocks 0 to 3"),
        ({"count": 5}, "count=5: bert.encoder.layer has 4 blocks"),
        ({"count": 1, "stack": "decoder.*"}, r"stack='decoder.\*' matches none .*: bert.encoder.layer"),
    ],
)
def test_blocks_that_there_are_not(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        DropLayers(**options)(traced(deep("Bert")))


def test_shared_layers_are_refused() -> None:
    program = trace(FAMILIES["albert-masked-lm"]().model, FAMILIES["albert-masked-lm"]().example_inputs)
    with pytest.raises(
        PassError, match=r"the blocks of albert.*albert_layers share weights \(.*query.weight is read by"
    ):
        DropLayers(count=1)(program)


def test_a_graph_without_blocks_is_refused() -> None:
    with pytest.raises(PassError, match="the Program has no repeated blocks"):
        DropLayers(count=1)(trace(nn.Linear(4, 4), {"input": torch.randn(2, 4)}))


def test_blocks_that_depend_on_their_place_are_refused() -> None:
    model = deep("GPT2", scale_attn_by_inverse_layer_idx=True)
    program = traced(model)
    with pytest.raises(PassError, match=r"transformer.h.2 computes something else than transformer.h.1, whose place"):
        DropLayers(keep=(0, 2))(program)
    DropLayers(keep=(0, 1))(program)  # where each stays in its place


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inner = self.first(x)
        return x + self.second(inner), inner


class Leaking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros_like(x)
        for layer in self.layers:
            x, inner = layer(x)
            total = total + inner
        return x, total


def test_blocks_that_give_more_than_one_value_are_refused() -> None:
    program = trace(Leaking(), {"x": torch.randn(2, 4)})
    with pytest.raises(PassError, match=r"layers.0 gives more than one value: linear goes to add"):
        DropLayers(keep=(0, 1))(program)
