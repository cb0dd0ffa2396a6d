"""A cache in buffers of a fixed length: the tokens are those of the transformers model, and of a cache that grows."""

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig
from transformers import StaticCache as TransformersCache

from prequant import lower
from prequant.generation import GenerationError, static_cache, with_cache
from prequant.generation.check import check_static
from prequant.generation.static_cache import IDLE_ROOMS, STEP, StaticCache, StaticDecoder

from .test_generate import FORMS, HEADS, generate, pair, prompts

STATIC: dict[str, Any] = {"cache_implementation": "static"}


@cache
def lowered(family: str = "GPT2") -> Any:
    """A packed Program. Leave it as it is."""
    return lower(FORMS["4-bit-with-outliers"](pair(family)[1]))


def cached(program: Any, inputs: dict[str, Tensor], new: int, **settings: Any) -> Any:
    """The tokens and the cache."""
    return generate(program, inputs, new, return_dict_in_generate=True, **settings)


@pytest.mark.parametrize("way", [{"do_sample": False}, {"num_beams": 3}, {"do_sample": True, "top_k": 20}], ids=str)
@pytest.mark.parametrize("family", HEADS)
def test_the_tokens_are_the_models(family: str, way: dict[str, Any]) -> None:
    model, program = pair(family)
    inputs = prompts(model)  # padded on the left
    assert torch.equal(generate(program, inputs, 20, **STATIC, **way), generate(model, inputs, 20, **way))


@pytest.mark.parametrize("family", ["GPT2", "Llama", "T5"])
def test_packed_tokens_are_those_of_a_cache_that_grows(family: str) -> None:
    model, packed = pair(family)[0], lowered(family)
    for inputs in (prompts(model, 2, 8), prompts(model, 1, 1, padded=False)):
        assert torch.equal(generate(packed, inputs, 40, **STATIC), generate(packed, inputs, 40))


def test_prompts_in_pieces_and_several_answers() -> None:
    model, program = pair("Llama")
    inputs = prompts(model)
    for way in ({"prefill_chunk_size": 4}, {"do_sample": True, "num_return_sequences": 2}):
        assert torch.equal(generate(program, inputs, 12, **STATIC, **way), generate(program, inputs, 12, **way))


def test_a_step_writes_in_place_and_makes_no_longer_tensors() -> None:
    model, packed = pair("GPT2")[0], lowered()
    cache: Any = cached(packed, prompts(model), 10, **STATIC).past_key_values
    assert isinstance(cache, StaticCache) and cache.get_seq_length() == 15 and cache.room.length == STEP
    depth = model.config.n_embd // model.config.n_head
    for layer in cache.layers:
        assert layer.keys.shape == layer.values.shape == (3, model.config.n_head, STEP, depth)
        assert bool(layer.keys[:, :, 14].any()) and not bool(layer.keys[:, :, 15:].any())
    (shapes,) = {tuple(item.shape) for item in cache.room.inputs.values() if item.dim() == 4}
    assert shapes == (3, model.config.n_head, STEP, depth)


def test_a_cache_is_taken_up_again_and_cut() -> None:
    model, program = pair("Llama")
    inputs, answers = prompts(model, 2, 6, padded=False), []
    for settings in ({**STATIC, "max_cache_len": 40}, {}):
        first = cached(program, inputs, 8, **settings)
        cache: Any = first.past_key_values
        cache.crop(-4)
        again = torch.cat([first.sequences[:, : cache.get_seq_length()], inputs["input_ids"]], dim=1)
        answers.append(generate(program, {"input_ids": again}, 7, past_key_values=cache))
        assert cache.get_seq_length() == answers[-1].shape[1] - 1
    assert torch.equal(*answers)


# ---- rooms -----------------------------------------------------------------------------------------------------------


def test_a_room_is_lent_to_one_cache_at_a_time() -> None:
    model, packed = pair("GPT2")[0], lowered()
    inputs = prompts(model, 2)
    first = cached(packed, inputs, 5, **STATIC)
    held: Any = first.past_key_values
    keys = held.layers[0].keys.clone()
    second: Any = cached(packed, prompts(model, 2, 9), 5, **STATIC).past_key_values
    assert second.room is not held.room and torch.equal(held.layers[0].keys, keys)
    rooms = [held.room, second.room]
    del held, second, first
    gc.collect()
    third: Any = cached(packed, inputs, 5, **STATIC).past_key_values
    assert third.room in rooms
    assert cached(packed, inputs, STEP, **STATIC).past_key_values.room.length == 2 * STEP


def test_threads_have_rooms_of_their_own() -> None:
    decoder: Any = with_cache(lowered()).static
    together, found = threading.Barrier(4), []

    def take() -> None:
        together.wait()
        found.append(decoder.cache(2, STEP))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(cache.room) for cache in found}) == 4


def test_few_rooms_are_kept() -> None:
    model, packed = pair("GPT2")[0], lowered()
    for batch in range(1, 6):
        generate(packed, prompts(model, batch), 2, **STATIC)
    gc.collect()
    assert [room.batch for room in with_cache(packed).static._rooms] == [4, 5] and IDLE_ROOMS == 2


def test_a_program_that_moves_takes_no_room_with_it() -> None:
    """Nor graphs that would keep its tensors where they were."""
    packed = copy.deepcopy(lowered())
    inputs = prompts(pair("GPT2")[0], 2)
    expected = generate(packed, inputs, 5, **STATIC)
    gone = weakref.ref(with_cache(packed).static._rooms[0]), weakref.ref(packed.tensor("transformer.wte.weight.codes"))
    packed.to("meta")
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    half = copy.deepcopy(lowered()).to(torch.float16)
    found: Any = cached(half, inputs, 5, **STATIC)
    assert found.sequences.shape == expected.shape and found.past_key_values.layers[0].keys.dtype is torch.float16
    assert torch.equal(found.sequences, generate(half, inputs, 5))


# ---- CUDA graphs -----------------------------------------------------------------------------------------------------


class Replayed:
    """What a CUDA graph does to its caller: the function runs on the same tensors, into the same results."""

    made = 0

    def __init__(self, function: Callable[[], Tensor], device: torch.device) -> None:
        Replayed.made += 1
        self._function, self._result = function, function()

    def __call__(self) -> Tensor:
        return self._result.copy_(self._function())


def record_on_the_cpu(monkeypatch: pytest.MonkeyPatch, decoder: StaticDecoder) -> None:
    """There is no graph to record there: here steps are, as if there were."""
    monkeypatch.setattr(static_cache, "Recording", Replayed)
    monkeypatch.setattr(static_cache, "records_on", lambda device: True)
    Replayed.made = 0
    decoder._rooms.clear()


def test_a_graph_is_recorded_once_for_each_batch_and_length(monkeypatch: pytest.MonkeyPatch) -> None:
    model, packed = pair("Llama")[0], lowered("Llama")
    record_on_the_cpu(monkeypatch, with_cache(packed).static)
    for batch, length, new, graphs in ((2, 6, 9, 1), (2, 8, 20, 1), (3, 6, 9, 2), (2, 6, STEP, 3), (2, 5, STEP, 3)):
        inputs = prompts(model, batch, length)
        wanted = {"return_dict_in_generate": True, "output_logits": True}
        ours, theirs = (generate(packed, inputs, new, **wanted, **kind) for kind in (STATIC, {}))
        assert torch.equal(ours.sequences, theirs.sequences) and Replayed.made == graphs
        torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), rtol=0, atol=1e-4)
        del ours, theirs
        gc.collect()


def test_the_encoders_keys_and_values_are_copied_to_where_a_graph_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, packed = pair("T5")[0], lowered("T5")
    record_on_the_cpu(monkeypatch, with_cache(packed).static)
    for way in ({}, {"num_beams": 3}):
        for seed in (1, 2):
            torch.manual_seed(seed)
            inputs = prompts(model, 2, 7)
            assert torch.equal(generate(packed, inputs, 12, **STATIC, **way), generate(packed, inputs, 12, **way))
            gc.collect()
    assert Replayed.made == 2, "the batch of beams is another one"


def test_steps_that_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's own tracing and functionalization, without the compilers behind it; rooms are for them alone."""
    model, packed = pair("Llama")[0], lowered("Llama")
    record_on_the_cpu(monkeypatch, with_cache(packed).static)
    inputs = prompts(model, 2, 6)
    compiled = {**STATIC, "compile_config": CompileConfig(backend="aot_eager")}
    expected = generate(packed, inputs, 6)
    for settings, graphs in ((STATIC, 1), (compiled, 2), (compiled, 2)):
        assert torch.equal(generate(packed, inputs, 6, **settings), expected) and Replayed.made == graphs
        gc.collect()
    assert [room.backend for room in with_cache(packed).static._rooms] == [None, "aot_eager"]


def test_a_graph_is_recorded_anew_when_a_weight_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What kernels made of the weights when it was recorded stands for what these were then."""
    model, packed = pair("GPT2")[0], lowered().copy()
    inputs, name = prompts(model, 2), "transformer.h.0.mlp.c_fc.weight.scale"
    packed.set_tensor(name, packed.tensor(name).clone())
    record_on_the_cpu(monkeypatch, with_cache(packed).static)
    before = generate(packed, inputs, 12, **STATIC)
    gc.collect()
    generate(packed, inputs, 12, **STATIC)
    assert Replayed.made == 1
    gc.collect()
    with torch.no_grad():
        packed.tensor(name).mul_(3.0)
    after = generate(packed, inputs, 12, **STATIC)
    assert Replayed.made == 2 and torch.equal(after, generate(packed, inputs, 12)) and not torch.equal(after, before)


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_what_has_no_place_is_refused() -> None:
    model, program = pair("GPT2")
    generative: Any = with_cache(program)
    cache = generative.static_cache(2, STEP - 1)
    ids = prompts(model, 2, 60, padded=False)["input_ids"]
    with pytest.raises(GenerationError, match="for a batch of 2 can't take one of 3"):
        generative(prompts(model, 3)["input_ids"], past_key_values=cache)
    generative(ids, past_key_values=cache)
    for _ in range(4):
        generative(ids[:, :1], past_key_values=cache)
    with pytest.raises(GenerationError, match="of 64 positions has 64, and no place for 1 more"):
        generative(ids[:, :1], past_key_values=cache)
    for unable in (
        lambda: cache.layers[0].update(ids, ids),
        lambda: cache.batch_repeat_interleave(2),
        lambda: cache.batch_select_indices(torch.tensor([0])),
    ):
        with pytest.raises(GenerationError):
            unable()


def test_other_caches_are_refused() -> None:
    model, program = pair("GPT2")
    theirs = TransformersCache(config=model.config, max_cache_len=32)
    with pytest.raises(GenerationError, match=r"a cache with a StaticLayer: .* cache_implementation='static'"):
        generate(program, prompts(model), 3, past_key_values=theirs)
    with pytest.raises(GenerationError, match="give past_key_values, or cache_implementation='static'"):
        generate(program, prompts(model), 3, **STATIC, past_key_values=with_cache(program).static_cache(3, 9))


def test_a_graph_that_computes_something_else_is_refused() -> None:
    """As one whose mask does not hide what is behind the position."""
    generative = with_cache(lowered().copy())
    decoder = StaticDecoder(generative.graphs, generative.device)
    check_static(generative, decoder)
    graph = decoder.program.graph
    (compared,) = graph.find_nodes(op="call_function", target=torch.ops.aten.le.Tensor)
    compared.target = torch.ops.aten.ge.Tensor
    decoder.program.recompile()
    decoder.function = decoder.program.forward
    with pytest.raises(GenerationError, match="with a static cache the Program computes something else"):
        check_static(generative, decoder)
