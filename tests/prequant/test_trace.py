"""Transformers models of every family and head: traced once, equal to the eager model whatever the sizes."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from prequant.passes import Program
from prequant.trace import BOUND, UNREAD, TraceError, trace

from ..models import FAMILIES, LAYERS, random_inputs, small_model, traced

SIZES = [(1, 1, False), (4, 1, False), (1, 9, True), (5, 12, True)]


def assert_same(actual: ModelOutput, expected: ModelOutput) -> None:
    assert type(actual) is type(expected)
    tensors = {key: value for key, value in expected.items() if isinstance(value, Tensor)}  # but no caches
    assert list(actual) == list(tensors)
    for key, value in tensors.items():
        torch.testing.assert_close(actual[key], value, rtol=0, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_eager_model_at_other_sizes_and_masks(name: str) -> None:
    model, example, make_inputs = FAMILIES[name]()
    program = traced(name)
    assert next(iter(example.values())).shape[0] == 1
    for batch, length, padded in SIZES:
        inputs = make_inputs(batch, length, padded)
        with torch.no_grad():
            assert_same(program(**inputs), model(**inputs))


@pytest.mark.parametrize("name", FAMILIES)
def test_tensors_keep_their_names_and_ties(name: str) -> None:
    model, program = FAMILIES[name]().model, traced(name)
    ours = dict(program.named_parameters())
    theirs = dict(model.named_parameters())
    assert set(ours) <= set(theirs)
    assert set(theirs) - set(ours) <= set(program.info.extra[UNREAD])
    for key, value in ours.items():
        assert value.data_ptr() == theirs[key].data_ptr() and value.requires_grad == theirs[key].requires_grad
    every = dict(model.named_parameters(remove_duplicate=False))
    tied = {alias: key for key, aliases in program.info.aliases.items() for alias in aliases}
    assert tied.keys() == every.keys() - theirs.keys()
    assert all(every[alias] is theirs[key] for alias, key in tied.items())
    buffers = dict(program.named_buffers())
    assert set(program.info.constants) == set(buffers) - set(model.state_dict())
    storages = [t.untyped_storage().data_ptr() for t in (*ours.values(), *buffers.values())]
    assert len(set(storages)) == len(storages)
    reads = [str(node.target) for node in program.graph.find_nodes(op="get_attr")]
    assert sorted(reads) == sorted((*ours, *buffers))


@pytest.mark.parametrize(
    ("name", "tied"),
    [
        ("bert-masked-lm", {"bert.embeddings.word_embeddings.weight": ("cls.predictions.decoder.weight",)}),
        ("gpt2-causal-lm", {"transformer.wte.weight": ("lm_head.weight",)}),
        (
            "t5-seq2seq-lm",
            {"shared.weight": ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")},
        ),
        ("llama-causal-lm", {}),
    ],
)
def test_a_tied_matrix_has_the_name_of_the_embedding(name: str, tied: dict[str, tuple[str, ...]]) -> None:
    aliases = {key: value for key, value in traced(name).info.aliases.items() if key.endswith("weight")}
    assert aliases == tied


def test_nodes_know_their_modules_and_values() -> None:
    program = traced("albert-masked-lm")
    linears = [node for node in program.graph.nodes if node.target is torch.ops.aten.linear.default]
    queries = [node for node in linears if node.meta["module_stack"][-1][0].endswith("attention.query")]
    assert len(queries) == LAYERS, "the one shared layer is called for each of the layers"
    layer = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    assert queries[0].meta["module_stack"] == queries[1].meta["module_stack"]
    assert queries[0].meta["module_stack"][0] == ("", "AlbertForMaskedLM")
    assert queries[0].meta["module_stack"][-1] == (f"{layer}.attention.query", "Linear")
    assert queries[0].args[1] is queries[1].args[1]
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    assert all(
        "module_stack" in node.meta and "val" in node.meta for node in calls if "_assert" not in str(node.target)
    )


def test_the_signature_names_inputs_and_dynamic_axes() -> None:
    signature = traced("t5-seq2seq-lm").signature
    assert [(item.name, item.dtype, item.shape) for item in signature.inputs] == [
        ("input_ids", torch.int64, ("batch", "length")),
        ("attention_mask", torch.int64, ("batch", "length")),
        ("decoder_input_ids", torch.int64, ("batch", "decoder_length")),
    ]
    assert signature.outputs == {"logits": 0, "encoder_last_hidden_state": 1}


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (2, 2), (3, 3), (4, 4)])
def test_the_size_of_the_example_does_not_matter(shape: tuple[int, int]) -> None:
    """Neither a size of one (constants to the exporter), nor equal sizes (one symbol), nor the number of heads."""
    model = small_model("Bert", "Model", num_hidden_layers=1)
    program = trace(model, random_inputs(model, *shape))
    inputs = random_inputs(model, 3, 8, padded=True)
    assert_same(program(**inputs), model(**inputs))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_can_be_chosen(attention: str) -> None:
    model = small_model("Qwen2", "ForCausalLM", num_hidden_layers=1)
    model.set_attn_implementation("sdpa" if attention == "eager" else "eager")
    program = trace(model, random_inputs(model, 1, 3), attn_implementation=attention)
    assert model.config._attn_implementation != attention
    targets = {node.target for node in program.graph.nodes}
    assert (torch.ops.aten.softmax.int in targets) == (attention == "eager")
    assert (torch.ops.aten.scaled_dot_product_attention.default in targets) == (attention == "sdpa")
    inputs = random_inputs(model, 3, 7)
    torch.testing.assert_close(program(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)


def test_without_a_mask() -> None:
    for prefix, head, depth in (("Bert", "Model", "num_hidden_layers"), ("GPT2", "LMHeadModel", "n_layer")):
        model = small_model(prefix, head, **{depth: 1})
        program = trace(model, {"input_ids": random_inputs(model, 1, 1)["input_ids"]})
        for batch, length in ((1, 1), (3, 8)):
            ids = random_inputs(model, batch, length)["input_ids"]
            with torch.no_grad():
                torch.testing.assert_close(program(ids)[0], model(ids)[0], rtol=0, atol=1e-5)
        with pytest.raises(
            TypeError, match="unexpected input 'attention_mask'; this Program was traced with input_ids"
        ):
            program(ids, attention_mask=torch.ones_like(ids))


def test_embeddings_as_inputs() -> None:
    model = small_model("Bert", "Model", num_hidden_layers=1)
    program = trace(model, {"inputs_embeds": torch.randn(1, 3, 32), "attention_mask": torch.ones(1, 3)})
    assert [item.shape for item in program.signature.inputs] == [("batch", "length"), ("batch", "length", 32)]
    embeddings = torch.randn(2, 6, 32)
    assert_same(program(inputs_embeds=embeddings), model(inputs_embeds=embeddings))


def test_constants_are_bound() -> None:
    model = small_model("Bert", "ForMaskedLM")
    example = {**random_inputs(model, 1, 3), "output_hidden_states": True, "return_dict": None, "use_cache": False}
    program = trace(model, example)
    assert program.signature.names == ("input_ids", "attention_mask")
    assert program.info.extra[BOUND] == {"output_hidden_states": True, "return_dict": None, "use_cache": False}
    assert program.signature.outputs == {"logits": 0, "hidden_states": tuple(range(1, LAYERS + 2))}
    inputs = random_inputs(model, 3, 7, padded=True)
    expected = model(**inputs, output_hidden_states=True)
    assert len(program(**inputs).hidden_states) == LAYERS + 1
    for ours, theirs in zip(program(**inputs).hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_labels_are_no_inputs() -> None:
    model = small_model("Bert", "ForSequenceClassification")
    program = trace(model, {**random_inputs(model, 1, 3), "labels": torch.tensor([1])})
    assert program.signature.names == ("input_ids", "attention_mask")


# ---- the model is left as it was -------------------------------------------------------------------------------------


def state_of(model: PreTrainedModel) -> object:
    attributes = ("training", "layerdrop", "gradient_checkpointing")
    return (
        [[(name, vars(module).get(name)) for name in attributes] for module in model.modules()],
        [vars(module)["config"].to_dict() for module in model.modules() if "config" in vars(module)],
        "forward" in vars(model),
    )


@pytest.mark.parametrize("name", ["opt-causal-lm", "t5-seq2seq-lm"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(name: str, fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES[name]()
    model = copy.deepcopy(family.model)
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            vars(module)["gradient_checkpointing"] = True
    model.train()
    next(model.children()).eval()
    assert model.config.use_cache
    before = state_of(model)
    if fails:

        def broken(self: nn.Module, x: Tensor) -> Tensor:
            raise RuntimeError("broken on purpose")

        monkeypatch.setattr(nn.Linear, "forward", broken)
        with pytest.raises(TraceError, match="broken on purpose"):
            trace(model, family.example_inputs, attn_implementation="eager")
    else:
        program = trace(model, family.example_inputs, attn_implementation="eager")
        assert program.training
    assert state_of(model) == before


def test_parameters_are_shared_but_not_their_flags() -> None:
    model = small_model("Bert", "ForSequenceClassification", num_hidden_layers=1)
    model.bert.embeddings.requires_grad_(False)
    program = trace(model, random_inputs(model, 1, 3))
    name = "classifier.weight"
    assert not program.tensor("bert.embeddings.word_embeddings.weight").requires_grad
    program.requires_grad_(False)
    assert model.get_parameter(name).requires_grad
    with torch.no_grad():
        program.tensor(name).zero_()
    assert not model.get_parameter(name).any()


def test_moving_a_program_moves_what_its_graph_creates() -> None:
    model = small_model("GPT2", "LMHeadModel", num_hidden_layers=1)
    program = trace(model, random_inputs(model, 1, 3))
    program.to("meta")
    logits = program(torch.zeros(2, 5, dtype=torch.int64, device="meta")).logits
    assert logits.is_meta and logits.shape == (2, 5, model.config.vocab_size)
    assert not any(parameter.is_meta for parameter in model.parameters())


# ---- train and eval --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("where", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_train_and_eval_switch_dropout(where: str, attention: str) -> None:
    """In train mode outputs scatter around those of eval mode; dropout in the layers alone, and in attention alone."""
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, where: 0.2}
    model = small_model("Bert", "Model", num_hidden_layers=1, attn_implementation=attention, **rates)
    program = trace(model, random_inputs(model, 1, 3))
    inputs = random_inputs(model, 1, 6)
    rows = {key: value.expand(2000, -1) for key, value in inputs.items()}
    with torch.no_grad():
        expected = model(**inputs)[0]
        assert torch.equal(program(**rows)[0][:1], program(**rows)[0][-1:])
        ours = program.train()(**rows)[0]
        model.train()
        theirs = model(**rows)[0]
        standard_error = ((ours.var(0) + theirs.var(0)) / len(ours)).sqrt()
        assert ((ours.mean(0) - theirs.mean(0)).abs() < 6 * standard_error).all()
        torch.testing.assert_close(ours.std(0), theirs.std(0), rtol=0.2, atol=0)
        assert theirs.std(0).mean() > 0.05
        torch.testing.assert_close(program.eval()(**inputs)[0], expected, rtol=0, atol=1e-6)


def test_the_share_of_dropped_values_is_the_probability() -> None:
    """With one embedding and nothing behind it the values are either 0 or scaled by 1 / (1 - p)."""

    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.3)

        def forward(self, x: Tensor) -> Tensor:
            return self.dropout(x)

    program = trace(Dropped().eval(), torch.ones(2, 5))
    x = torch.ones(400, 500)
    assert torch.equal(program(x), x)
    dropped = program.train()(x)
    zeros = (dropped == 0).float().mean().item()
    deviation = math.sqrt(0.3 * 0.7 / x.numel())
    assert abs(zeros - 0.3) < 5 * deviation
    torch.testing.assert_close(dropped[dropped != 0].unique(), torch.tensor([1 / 0.7]))


def test_a_program_in_train_mode_draws_what_the_model_draws() -> None:
    model = small_model("GPT2", "LMHeadModel")
    program = trace(model, random_inputs(model, 1, 3)).train()
    model.train()
    inputs = random_inputs(model, 3, 7)
    outputs = []
    for callable_ in (program, model):
        torch.manual_seed(5)
        outputs.append(callable_(**inputs).logits)
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)


def test_layerdrop_is_no_part_of_the_graph() -> None:
    """OPT would leave out whole layers at random."""
    program: Program = traced("opt-causal-lm")
    model = FAMILIES["opt-causal-lm"]().model
    assert model.model.decoder.layerdrop == 0.5
    attentions = program.graph.find_nodes(
        op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default
    )
    assert len(attentions) == LAYERS
