"""Generated tokens are those of the transformers model, in every way of generating, whatever form the weights have."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, TextIteratorStreamer, pipeline
from transformers.generation.streamers import BaseStreamer

from prequant import load, lower
from prequant.model import ModelProgram
from prequant.passes import (
    BinaryCode,
    Canonicalize,
    Pipeline,
    Program,
    QuantizeActivations,
    QuantizeWeights,
    SplitOutliers,
)
from prequant.runtime import Granularity
from prequant.trace import trace

from ...models import PAD, random_inputs, small_model
from ..tiny import make_model, make_tokenizer

HEADS = {
    "GPT2": "LMHeadModel",
    "OPT": "ForCausalLM",
    "Llama": "ForCausalLM",
    "Qwen2": "ForCausalLM",
    "T5": "ForConditionalGeneration",
}
POSITIONS = {"GPT2": "n_positions", "OPT": "max_position_embeddings"}
LONG = 96


@cache
def pair(family: str) -> tuple[PreTrainedModel, ModelProgram]:
    """A model with room for 96 positions, and its Program. Leave both as they are."""
    options = {POSITIONS[family]: LONG} if family in POSITIONS else {}
    model = small_model(family, HEADS[family], **options)
    return model, traced(model)


def traced(model: PreTrainedModel, **options: Any) -> Any:
    return trace(model, random_inputs(model, 2, 5), **options)


def prompts(model: PreTrainedModel, batch: int = 3, length: int = 6, padded: bool = True) -> dict[str, Tensor]:
    """Prompts of different lengths, padded on the left."""
    ids = random_inputs(model, batch, length)["input_ids"]
    mask = torch.ones_like(ids)
    if padded:
        for row in range(batch):
            mask[row, : row % length] = 0
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def generate(model: Any, inputs: dict[str, Tensor], new: int, **settings: Any) -> Any:
    """So many tokens, no fewer: an end token would end the comparison."""
    torch.manual_seed(7)
    return model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, pad_token_id=PAD, **settings)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
    "beam-sampling": {"do_sample": True, "num_beams": 3},
    "no-cache": {"do_sample": False, "use_cache": False},
    "chunked-prefill": {"do_sample": False, "prefill_chunk_size": 4},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", HEADS)
def test_the_tokens_are_the_models(family: str, way: str) -> None:
    model, program = pair(family)
    if way == "chunked-prefill" and family == "T5":
        way = "greedy"  # a decoder that starts from one token has nothing to cut up
    inputs = prompts(model)
    expected = generate(model, inputs, 20, **WAYS[way])
    actual = generate(program, inputs, 20, **WAYS[way])
    assert torch.equal(actual, expected)
    assert len({tuple(row.tolist()) for row in actual[:, -20:]}) > 1, "the rows are not all alike"


@pytest.mark.parametrize("family", HEADS)
def test_one_prompt_of_one_token(family: str) -> None:
    model, program = pair(family)
    inputs = prompts(model, 1, 1, padded=False)
    assert torch.equal(generate(program, inputs, 12), generate(model, inputs, 12))
    assert torch.equal(generate(program, {"inputs": inputs["input_ids"]}, 12), generate(model, inputs, 12)), (
        "by position"
    )


def test_a_prompt_that_is_not_there_starts_from_the_first_token() -> None:
    model, program = pair("Llama")
    assert torch.equal(generate(program, {}, 8), generate(model, {}, 8))


@pytest.mark.parametrize("family", HEADS)
def test_scores_and_the_cache_are_the_models(family: str) -> None:
    model, program = pair(family)
    wanted = {"return_dict_in_generate": True, "output_logits": True}
    ours, theirs = (generate(each, prompts(model), 6, **wanted) for each in (program, model))
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), rtol=0, atol=1e-4)
    caches = [ours.past_key_values, theirs.past_key_values]
    if family == "T5":
        crossed = [each.cross_attention_cache for each in caches]
        torch.testing.assert_close(keys_and_values(crossed[0]), keys_and_values(crossed[1]), rtol=0, atol=1e-4)
        caches = [each.self_attention_cache for each in caches]
    torch.testing.assert_close(keys_and_values(caches[0]), keys_and_values(caches[1]), rtol=0, atol=1e-4)


def keys_and_values(cache: Any) -> list[Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


@pytest.mark.parametrize("family", ["GPT2", "Llama"])
def test_a_cache_is_taken_up_again(family: str) -> None:
    """Two turns of a conversation: the second one computes what is new only."""
    model, program = pair(family)
    inputs, answers = prompts(model, 1, 6, padded=False), []
    for each in (program, model):
        cache = DynamicCache()
        first = generate(each, inputs, 5, past_key_values=cache)
        second = torch.cat([first, inputs["input_ids"]], dim=1)
        answers.append(generate(each, {"input_ids": second}, 7, past_key_values=cache))
        assert cache.get_seq_length() == answers[-1].shape[1] - 1
    assert torch.equal(*answers)


# ---- streams and pipelines -------------------------------------------------------------------------------------------


class Collected(BaseStreamer):
    def __init__(self) -> None:
        self.parts: list[list[int]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.parts.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_tokens_are_streamed_one_by_one() -> None:
    model, program = pair("GPT2")
    inputs, streamer = prompts(model, 1, 4, padded=False), Collected()
    tokens = generate(program, inputs, 9, streamer=streamer)[0].tolist()
    assert streamer.parts == [tokens[:4], *([token] for token in tokens[4:])]
    assert streamer.ended and tokens == generate(model, inputs, 9)[0].tolist()


def test_text_is_streamed() -> None:
    tokenizer, model = make_tokenizer(), make_model("GPT2", "LMHeadModel")
    program = traced(model)
    inputs = tokenizer("a good film", return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    tokens = generate(program, dict(inputs), 8, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :])


def test_a_pipeline_writes_the_models_text() -> None:
    tokenizer, model = make_tokenizer(), make_model("GPT2", "LMHeadModel")
    tokenizer.padding_side = "left"
    make: Any = pipeline
    texts = ["a good film", "not bad", "it"]
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "batch_size": 3}
    ours, theirs = (
        make("text-generation", model=each, tokenizer=tokenizer)(texts, **settings)
        for each in (lower(traced(model)), model)
    )
    assert ours == theirs and len(ours) == 3


# ---- compressed weights ----------------------------------------------------------------------------------------------

FORMS: dict[str, Pipeline] = {
    "4-bit-with-outliers": Pipeline([Canonicalize(), SplitOutliers(ratio=0.01), QuantizeWeights(bits=4)]),
    "3-bit-groups": Pipeline(
        [Canonicalize(), QuantizeWeights(bits=3, granularity=Granularity.GROUP, group_size=16, symmetric=False)]
    ),
    "binary-code": Pipeline([Canonicalize(), BinaryCode(bits=3)]),
    "8-bit-inputs": Pipeline([Canonicalize(), QuantizeWeights(bits=4), QuantizeActivations(bits=8)]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", HEADS)
def test_packed_tokens_are_the_simulated_ones(family: str, form: str, request: pytest.FixtureRequest) -> None:
    if form == "8-bit-inputs":
        # Sums that are rounded otherwise move a code of the next input now and then, and so a token in the end.
        request.getfixturevalue("reference_kernels")
    model, program = pair(family)
    simulated = FORMS[form](program)
    packed = lower(simulated)
    inputs = prompts(model, 4, 8)
    expected = generate(simulated, inputs, 64)
    assert torch.equal(generate(packed, inputs, 64), expected)
    assert not torch.equal(expected, generate(model, inputs, 64)), "compression shows"


@pytest.mark.parametrize("family", ["GPT2", "Llama", "T5"])
def test_a_loaded_folder_generates(family: str, tmp_path: Path) -> None:
    model, program = pair(family)
    packed: Any = lower(FORMS["4-bit-with-outliers"](program))
    packed.save_pretrained(tmp_path)
    loaded: Any = load(tmp_path)
    inputs = prompts(model)
    assert torch.equal(generate(loaded, inputs, 24), generate(packed, inputs, 24))
    settings = {"num_beams": 4, "do_sample": False}
    assert torch.equal(generate(loaded, inputs, 8, **settings), generate(packed, inputs, 8, **settings))


def test_without_canonicalize_weights_stay_as_they_are_stored() -> None:
    """GPT-2's products are no linears then, and its weights [in, out]."""
    model, program = pair("GPT2")
    changed: Program = Pipeline([QuantizeWeights(bits=4, include=("*wte*",))])(program)
    simulated = generate(changed, prompts(model), 24)
    assert torch.equal(generate(lower(changed), prompts(model), 24), simulated)
    model_with_codes = small_model("GPT2", "LMHeadModel", n_positions=LONG)
    with torch.no_grad():
        codes = changed.tensor("transformer.wte.weight.codes")
        scale = changed.tensor("transformer.wte.weight.scale")
        values = torch.ops.prequant.dequantize(codes, scale, None, format="affine4:row", columns=32)
        model_with_codes.transformer.wte.weight.copy_(values)
    assert torch.equal(simulated, generate(model_with_codes, prompts(model), 24))


# ---- other models ----------------------------------------------------------------------------------------------------


def test_eager_attention_is_kept() -> None:
    model, _ = pair("OPT")
    program = traced(model, attn_implementation="eager")
    assert torch.equal(generate(program, prompts(model), 16), generate(model, prompts(model), 16))


def test_a_sliding_window() -> None:
    model = small_model("Qwen2", "ForCausalLM", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    program, inputs = traced(model), prompts(model, 3, 9)
    expected = generate(model, inputs, 16)
    assert torch.equal(generate(program, inputs, 16), expected)
    full = small_model("Qwen2", "ForCausalLM")
    assert not torch.equal(generate(full, inputs, 16), expected), "the window shows"


def test_bfloat16() -> None:
    model = small_model("Llama", "ForCausalLM").to(torch.bfloat16)
    model.config.dtype = torch.float32  # what the configuration says is not what counts
    program, inputs = traced(model), prompts(model)
    cache = generate(program, inputs, 4, return_dict_in_generate=True).past_key_values
    assert cache.layers[0].keys.dtype is torch.bfloat16
    assert torch.equal(generate(program, inputs, 12), generate(model, inputs, 12))


def test_a_program_in_train_mode_generates_without_dropout() -> None:
    model, program = pair("GPT2")
    training: Any = program.copy().train()
    assert torch.equal(generate(training, prompts(model), 12), generate(model, prompts(model), 12))
    assert training.training, "and stays in train mode"
