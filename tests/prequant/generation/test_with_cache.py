"""with_cache: graphs over a Program's own tensors, made anew when it changes, refused where they would differ."""

import inspect
from typing import Any
from weakref import WeakValueDictionary

import pytest
import torch
import transformers
from transformers import DynamicCache

from prequant import generation, lower
from prequant.generation import GenerationError, Graphs, with_cache
from prequant.generation.skeleton import model_class
from prequant.model import MODEL_CLASS, ModelProgram
from prequant.passes import (
    Canonicalize,
    Input,
    Pipeline,
    QuantizeActivations,
    QuantizeWeights,
    Verify,
    propagate_shapes,
)
from prequant.passes.packed import PackedUse, packed_uses, packed_weight_name
from prequant.runtime import PrequantError, ops
from prequant.trace import trace

from ...models import FAMILIES as MODELS
from ...models import PAD, VOCABULARY, random_inputs, small_model, traced

FAMILIES = ("gpt2-causal-lm", "opt-causal-lm", "llama-causal-lm", "qwen2-causal-lm", "t5-seq2seq-lm")
QUANTIZE = Pipeline([Canonicalize(), QuantizeWeights(bits=4)])


def quantized(name: str = "llama-causal-lm") -> Any:
    return QUANTIZE(traced(name))


def tokens(program: Any, new: int = 8, **settings: Any) -> Any:
    ids = torch.arange(4, 14).reshape(2, 5)
    return program.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=PAD, **settings)


# ---- the graphs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_the_graphs_read_the_very_tensors_of_the_program(name: str) -> None:
    packed = lower(quantized(name))
    graphs = with_cache(packed).graphs  # type: ignore[arg-type]
    for graph in filter(None, (graphs.prefill, graphs.decode, graphs.encoder)):
        read = {str(node.target) for node in graph.graph.find_nodes(op="get_attr")}
        assert read and all(graph.tensor(each) is packed.tensor(each) for each in read)
        assert {each for each, _ in (*graph.named_parameters(), *graph.named_buffers())} == read
        assert not graph.training and "meta" not in graph.code


@pytest.mark.parametrize("name", FAMILIES)
def test_every_linear_has_the_form_that_it_has_in_the_program(name: str) -> None:
    packed = lower(Pipeline([QuantizeActivations(bits=8)])(quantized(name)))
    forms = {packed_weight_name(use): form(use) for use in linears(packed)}
    graphs = with_cache(packed).graphs  # type: ignore[arg-type]
    found: dict[str, Any] = {}
    for graph in filter(None, (graphs.prefill, graphs.encoder)):
        assert not any(graph.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default))
        found |= {packed_weight_name(use): form(use) for use in linears(graph)}
    assert found == forms, "activations are fused into them as they were"
    assert len(linears(graphs.decode)) == len(linears(graphs.prefill)) - (4 if graphs.encoder else 0), (
        "keys and values of cross-attention are not computed again"
    )


def linears(program: Any) -> list[PackedUse]:
    return [use for use in packed_uses(program.graph) if use.kind == "linear"]


def form(use: PackedUse) -> tuple[Any, ...]:
    alone = use.node.target is ops.packed_linear
    return alone, *(use.operands[name] for name in ("format", "columns", "input_format", "activation"))


def test_the_cache_is_plain_tensors() -> None:
    graphs = with_cache(traced("llama-causal-lm")).graphs  # type: ignore[arg-type]
    past = ("batch", 2, "past", 8)
    integers = [
        Input("input_ids", torch.int64, ("batch", "query")),
        Input("attention_mask", torch.int64, ("batch", "total")),
    ]
    integers.append(Input("position_ids", torch.int64, ("batch", "query")))
    cache = [Input(f"past_{part}_{layer}", torch.float32, past) for layer in (0, 1) for part in ("key", "value")]
    assert list(graphs.prefill.signature.inputs) == [*integers, *cache]
    one = [Input(each.name, each.dtype, tuple(1 if s == "query" else s for s in each.shape)) for each in integers]
    assert list(graphs.decode.signature.inputs) == [*one, *cache]
    results: Any = graphs.decode.graph.output_node().args[0]
    inputs = list(graphs.decode.graph.find_nodes(op="placeholder"))[3:]
    for node, old in zip(results[1:], inputs, strict=True):
        assert node.target is torch.ops.aten.cat.default and node.args[0][0] is old, "a later pass can write in place"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_graphs_are_programs_like_any(name: str) -> None:
    """Other passes run over them, which ask for shapes, and for a graph in order."""
    graphs = with_cache(lower(quantized(name))).graphs  # type: ignore[arg-type]
    heads = graphs.decode.signature.inputs[-1].shape[1]
    for graph, length in ((graphs.prefill, 8), (graphs.decode, 6)):  # five positions before, and three or one
        again = Pipeline([Canonicalize()])(graph, [Verify()])
        logits, first, *_ = propagate_shapes(again).of_outputs()
        assert logits is not None and logits[1][-1] == VOCABULARY
        assert first == (torch.float32, (2, heads, length, 8))


@pytest.mark.parametrize("name", FAMILIES[:4])
def test_step_by_step_gives_the_logits_of_the_program(name: str) -> None:
    """Any cut into steps, the first of them of one position, with padding on the left."""
    program: Any = quantized(name)
    generative = with_cache(program)
    inputs = random_inputs(small_model("Bert", "Model"), 3, 9)
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[1, :1] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        given = trace_with_positions(name)
        expected = given(input_ids=inputs["input_ids"], attention_mask=mask, position_ids=positions).logits
        for cut in ([1, 2, 1, 5], [9], [4, 1, 1, 1, 1, 1]):
            cache, start = DynamicCache(), 0
            for length in cut:
                part = slice(start, start + length)
                start += length
                outputs = generative(
                    inputs["input_ids"][:, part], attention_mask=mask[:, :start], past_key_values=cache
                )
                assert outputs.past_key_values is cache and cache.get_seq_length() == start
                found, wanted = outputs.logits[:, -1], expected[:, start - 1]
                rows = [0, 2] if start == 1 else [0, 1, 2]
                torch.testing.assert_close(found[rows], wanted[rows], rtol=0, atol=1e-4)


def trace_with_positions(name: str) -> Any:
    model = MODELS[name]().model
    inputs = random_inputs(model, 2, 5)
    return QUANTIZE(trace(model, {**inputs, "position_ids": torch.arange(5).expand(2, -1)}))


# ---- made once, and again --------------------------------------------------------------------------------------------


def test_graphs_are_made_once_and_again_when_the_program_changed() -> None:
    program = quantized()
    first = with_cache(program)
    assert with_cache(program) is first
    program.set_tensor("model.norm.weight", torch.full((32,), 0.5))
    second = with_cache(program)
    assert second is not first
    assert torch.equal(tokens(program), tokens(program.copy()))
    assert with_cache(program) is second


@pytest.mark.parametrize("name", ["gpt2-causal-lm", "t5-seq2seq-lm"])
def test_programs_of_one_graph_have_one_trace(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = lower(quantized(name))
    other: Any = first.copy()
    for key, value in list(other.named_parameters()):
        if key.endswith(".scale"):
            other.set_tensor(key, value.detach() * (0.8 + 0.4 * torch.rand_like(value)), trainable=False)
    again: Any = other.copy()
    monkeypatch.setattr(generation, "_ALIKE", WeakValueDictionary())
    with_cache(first)  # type: ignore[arg-type]
    made = generation.make_graphs

    def fails(program: ModelProgram) -> Graphs:
        raise AssertionError("traced anew")

    monkeypatch.setattr(generation, "make_graphs", fails)
    graphs, found = with_cache(other).graphs, tokens(other)
    for graph in filter(None, (graphs.prefill, graphs.decode, graphs.encoder)):
        read = {str(node.target) for node in graph.graph.find_nodes(op="get_attr")}
        assert all(graph.tensor(each) is other.tensor(each) for each in read)
    monkeypatch.setattr(generation, "make_graphs", made)
    monkeypatch.setattr(generation, "_ALIKE", WeakValueDictionary())
    assert torch.equal(found, tokens(again)) and not torch.equal(found, tokens(first))


def test_training_in_place_shows_at_once() -> None:
    program = quantized()
    generative, before = with_cache(program), tokens(program)
    with torch.no_grad():
        for name, parameter in program.named_parameters():
            if name.endswith(".scale"):
                parameter.mul_(torch.linspace(0.2, 3.0, parameter.shape[0])[:, None])
    after = tokens(program)
    assert with_cache(program) is generative and not torch.equal(after, before)
    assert torch.equal(after, tokens(program.copy()))


def test_generation_config_is_the_programs() -> None:
    model = small_model("GPT2", "LMHeadModel")
    model.generation_config.max_new_tokens = 3
    program: Any = trace(model, random_inputs(model, 2, 4))
    ids = torch.tensor([[5, 6, 7]])
    assert program.generate(ids, pad_token_id=PAD, eos_token_id=None).shape == (1, 6)
    program.generation_config.max_new_tokens = 5
    assert program.generate(ids, pad_token_id=PAD, eos_token_id=None).shape == (1, 8)
    program.generation_config = transformers.GenerationConfig(max_new_tokens=1)
    assert program.generate(ids, pad_token_id=PAD).shape == (1, 4)
    assert model.generation_config.max_new_tokens == 3


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["bert-masked-lm", "gpt2-sequence-classification", "t5-encoder", "llama-question-answering"]
)
def test_models_without_a_language_models_head_do_not_generate(name: str) -> None:
    program: Any = traced(name)
    assert not program.can_generate() and program.generation_config is None
    with pytest.raises(GenerationError, match=r"does not generate text: trace a model with a language model's head"):
        program.generate(torch.tensor([[5, 6]]))


def test_can_generate() -> None:
    assert all(traced(name).can_generate() for name in FAMILIES)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"cache_implementation": "offloaded"},
            r"cache_implementation='offloaded': .*'dynamic', 'quantized' or 'static'",
        ),
        ({"output_attentions": True, "return_dict_in_generate": True}, r"can't generate with output_attentions"),
    ],
)
def test_what_graphs_can_not_do_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        tokens(traced("gpt2-causal-lm"), **settings)


@pytest.mark.parametrize("filled", [False, True])
def test_a_cache_that_forgets_is_refused(filled: bool) -> None:
    cache: Any = DynamicCache(config=transformers.MistralConfig(num_hidden_layers=2))
    for layer in cache.layers if filled else ():
        layer.update(torch.zeros(2, 4, 3, 8), torch.zeros(2, 4, 3, 8))
    with pytest.raises(GenerationError, match=r"a DynamicSlidingWindowLayer: give a DynamicCache\(\)"):
        tokens(traced("gpt2-causal-lm"), past_key_values=cache)


def test_a_seq2seq_step_takes_what_it_needs() -> None:
    generative, ids = with_cache(traced("t5-seq2seq-lm")), torch.tensor([[5, 6]])  # type: ignore[arg-type]
    for given in ({"input_ids": ids}, {"decoder_input_ids": ids}):
        with pytest.raises(GenerationError, match="takes decoder_input_ids, and input_ids or encoder_outputs"):
            generative(**given)
    with pytest.raises(GenerationError, match="a DynamicCache has no place for the encoder"):
        generative(input_ids=ids, decoder_input_ids=ids, past_key_values=DynamicCache())
    outputs = generative(input_ids=ids, decoder_input_ids=ids, use_cache=False)
    assert outputs.past_key_values is None and outputs.logits.shape == (1, 2, VOCABULARY)


def test_misspelt_settings_and_drafts_are_refused_by_transformers() -> None:
    program = traced("gpt2-causal-lm")
    with pytest.raises(ValueError, match=r"not used by the model: \['atention_mask'\]"):
        tokens(program, atention_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match="ASSISTED_GENERATION"):
        tokens(program, prompt_lookup_num_tokens=2)


def test_a_mask_of_another_length_is_refused() -> None:
    generative = with_cache(traced("gpt2-causal-lm"))  # type: ignore[arg-type]
    with pytest.raises(GenerationError, match=r"the attention mask is \[2, 4\]; .* has to be \[2, 5\]"):
        generative(torch.ones(2, 5, dtype=torch.int64), attention_mask=torch.ones(2, 4, dtype=torch.int64))


def test_positions_and_caches_of_other_sizes_are_refused() -> None:
    generative = with_cache(lower(Pipeline([Canonicalize(), QuantizeWeights(bits=8)])(traced("gpt2-causal-lm"))))  # type: ignore[arg-type]
    ids = torch.ones(2, 5, dtype=torch.int64)
    with torch.no_grad():
        with pytest.raises(
            PrequantError, match=r"has the shape \[2, 1\], which does not go with the sizes of the others"
        ):
            generative(ids, position_ids=torch.zeros(2, 1, dtype=torch.int64))
        cache = generative(torch.ones(4, 5, dtype=torch.int64)).past_key_values
        with pytest.raises(PrequantError, match="which does not go with the sizes of the others"):
            generative(ids[:, :1], past_key_values=cache)


def test_rewrites_of_more_than_weights_are_found_out() -> None:
    program = QUANTIZE(traced("opt-causal-lm"))
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default):
        node.target = torch.ops.aten.neg.default
    program.recompile()
    with pytest.raises(
        GenerationError, match=r"computes something else than its model with these weights: logits .* apart"
    ):
        tokens(program)


def test_quantized_attention_has_no_place_in_another_trace() -> None:
    model = small_model("GPT2", "LMHeadModel")
    program = trace(model, random_inputs(model, 2, 4), attn_implementation="eager")
    program = Pipeline([Canonicalize(), QuantizeActivations(bits=8, operands="matmul")])(program)
    with pytest.raises(PrequantError, match="stands at no linear or embedding"):
        tokens(program)


def test_another_configuration_is_found_out() -> None:
    program: Any = traced("gpt2-causal-lm").copy()
    config = transformers.GPT2Config(**{**program.config.to_dict(), "n_layer": 1})
    program.update_info(extra={**program.info.extra, "config": config})
    with pytest.raises(GenerationError, match=r"the Program reads 'transformer\.h\.1\..*model of its configuration"):
        tokens(program)
    config = transformers.GPT2Config(**{**program.config.to_dict(), "n_layer": 3})
    program.update_info(extra={**program.info.extra, "config": config})
    with pytest.raises(PrequantError, match=r"no linear or embedding 'transformer\.h\.2\.|does not have the tensor"):
        tokens(program)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("os.system", "is not one of transformers, nor of an imported module"),
        ("not_imported.Model", "is not one of transformers, nor of an imported module"),
        ("transformers.no_such_module.Model", "No module named"),
        ("transformers.BertModel", "does not generate text"),
        ("transformers.AutoTokenizer", "is not one of transformers"),
        ("", "is not one of"),
    ],
)
def test_model_classes_by_path(path: str, message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        model_class(path)


def test_a_model_class_of_ones_own_generates() -> None:
    model = OwnModel(small_model("GPT2", "LMHeadModel").config).eval()
    program: Any = trace(model, random_inputs(model, 2, 4))
    assert program.info.extra[MODEL_CLASS].endswith("OwnModel") and isinstance(program, ModelProgram)
    ids = torch.arange(4, 14).reshape(2, 5)
    expected = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=PAD)
    assert torch.equal(tokens(program, 6), expected)


class OwnModel(transformers.GPT2LMHeadModel):
    """Its logits are those of the vocabulary the other way round."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits.flip(-1)
        return outputs


OwnModel.forward.__signature__ = inspect.signature(transformers.GPT2LMHeadModel.forward)  # type: ignore[attr-defined]
