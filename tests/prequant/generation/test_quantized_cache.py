"""A cache of 8-bit codes: tokens are those of the transformers model whose cache rounds keys and values likewise."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from prequant import lower
from prequant.generation import GenerationError, with_cache
from prequant.generation.caches import QuantizedCache, QuantizedLayer

from .test_generate import FORMS, HEADS, generate, pair, prompts

QUANTIZED: dict[str, Any] = {"cache_implementation": "quantized"}


class RoundedLayer(DynamicLayer):
    """Holds floats, but each position's as 255 levels around 0 would have them."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return super().update(rounded(key_states), rounded(value_states))


def rounded(rows: Tensor) -> Tensor:
    unit = rows.abs().amax(-1, keepdim=True) / 127
    unit = unit.where(unit > 0, 1.0)  # of a padding token's zeros
    return (rows / unit).round() * unit


def rounded_cache(model: Any, family: str) -> Any:
    config = model.config
    count = config.num_decoder_layers if family == "T5" else config.num_hidden_layers

    def cache() -> Cache:
        return Cache(layers=[RoundedLayer() for _ in range(count)])

    return EncoderDecoderCache(cache(), cache()) if family == "T5" else cache()


def own(cache: Any) -> Any:
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


@pytest.mark.parametrize("way", [{"do_sample": False}, {"num_beams": 3}, {"do_sample": True, "top_k": 20}], ids=str)
@pytest.mark.parametrize("family", HEADS)
def test_the_tokens_are_those_of_the_model_with_a_cache_that_rounds(family: str, way: dict[str, Any]) -> None:
    model, program = pair(family)
    inputs = prompts(model)
    expected = generate(model, inputs, 20, past_key_values=rounded_cache(model, family), **way)
    assert torch.equal(generate(program, inputs, 20, **QUANTIZED, **way), expected)


@pytest.mark.parametrize("family", HEADS)
def test_logits_show_that_the_cache_is_rounded(family: str) -> None:
    model, program = pair(family)
    wanted = {"return_dict_in_generate": True, "output_logits": True}
    inputs = prompts(model)
    plain = torch.stack(generate(program, inputs, 6, **wanted).logits)
    ours = torch.stack(generate(program, inputs, 6, **QUANTIZED, **wanted).logits)
    theirs = torch.stack(generate(model, inputs, 6, past_key_values=rounded_cache(model, family), **wanted).logits)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert float((plain - ours).abs().max()) > 1e-3


@pytest.mark.parametrize("family", HEADS)
def test_packed_tokens_are_the_simulated_ones(family: str) -> None:
    model, program = pair(family)
    simulated = FORMS["4-bit-with-outliers"](program)
    inputs = prompts(model, 2, 8)
    expected = generate(simulated, inputs, 40, **QUANTIZED)
    assert torch.equal(generate(lower(simulated), inputs, 40, **QUANTIZED), expected)


def test_it_takes_a_byte_a_number_and_a_scale_a_row() -> None:
    model, program = pair("GPT2")
    found = generate(program, prompts(model), 10, **QUANTIZED, return_dict_in_generate=True).past_key_values
    assert isinstance(found, QuantizedCache) and len(found.layers) == model.config.n_layer
    depth = model.config.n_embd // model.config.n_head
    layers: list[Any] = found.layers
    assert {type(layer) for layer in layers} == {QuantizedLayer}
    for layer in layers:
        assert layer.keys.dtype == layer.values.dtype == torch.uint8
        assert layer.keys.shape == layer.values.shape == (3, model.config.n_head, 15, depth)
        assert layer.key_scales.shape == layer.value_scales.shape == (3, model.config.n_head, 15, 1)


@pytest.mark.parametrize("family", ["GPT2", "T5"])
def test_a_step_runs_without_pytorch(family: str) -> None:
    """Nothing of it is left to a call that unpacks the whole cache."""
    packed: Any = lower(pair(family)[1])
    generative: Any = with_cache(packed)
    runner = generative._quantized_steps.graphs.decode.runner
    assert runner is not None
    reasons = dict(runner.coverage.torch)
    assert not [name for name in reasons if "quantize" in name or "scale" in name or "attention" in name], reasons


def test_a_cache_is_taken_up_again_and_cut() -> None:
    model, program = pair("Llama")
    inputs, answers = prompts(model, 2, 6, padded=False), []
    for each, cache in ((program, QuantizedCache()), (model, rounded_cache(model, "Llama"))):
        first = generate(each, inputs, 8, past_key_values=cache)
        cache.crop(-4)
        second = torch.cat([first[:, : cache.get_seq_length()], inputs["input_ids"]], dim=1)
        answers.append(generate(each, {"input_ids": second}, 7, past_key_values=cache))
        assert cache.get_seq_length() == answers[-1].shape[1] - 1
    assert torch.equal(*answers)


def test_rows_of_a_cache_move_with_their_scales() -> None:
    model, program = pair("GPT2")
    cache: Any = QuantizedCache()
    generate(program, prompts(model), 4, past_key_values=cache)
    layer: Any = cache.layers[0]
    before = {name: getattr(layer, name) for name in ("keys", "key_scales", "values", "value_scales")}
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([5, 0]))
    cache.reorder_cache(torch.tensor([1, 0, 0]))
    for name, tensor in before.items():
        assert torch.equal(getattr(layer, name), tensor[[0, 2, 2]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache_implementation": "offloaded_static"}, "cache_implementation=.offloaded_static."),
        ({**QUANTIZED, "cache_config": {"nbits": 4}}, r"cache_config=\{'nbits': 4\}: .* \{'nbits': 8\}"),
        ({**QUANTIZED, "past_key_values": DynamicCache()}, "give past_key_values, or cache_implementation='quantized'"),
    ],
)
def test_what_there_is_not_is_refused(settings: dict[str, Any], message: str) -> None:
    model, program = pair("GPT2")
    with pytest.raises(GenerationError, match=message):
        generate(program, prompts(model), 3, **settings)
    assert generate(program, prompts(model), 3, **QUANTIZED, cache_config={"nbits": 8}).shape == (3, 9)


def test_only_a_program_writes_it() -> None:
    layer = QuantizedLayer()
    with pytest.raises(GenerationError, match="written by the Program"):
        layer.update(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4))
