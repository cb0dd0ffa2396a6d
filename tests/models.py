"""A small random model of every family and head, with inputs. Import with ``from ..models import FAMILIES, traced``."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from prequant.passes import Program
from prequant.trace import trace

VOCABULARY = 97
PAD = 1
LAYERS = 2
"""Of models with a language model's head, and bare ones; those with other heads have one."""
MAX_LENGTH = 32


class Family(NamedTuple):
    model: PreTrainedModel
    """In eval mode, the same weights every time; biases and norms are random, too."""
    example_inputs: dict[str, Tensor]
    """One short text: what a model is traced with at the very least."""
    make_inputs: Callable[..., dict[str, Tensor]]
    """``make_inputs(batch, length, padded=False)``: random; padded ones have a row padded right and one padded left."""


_COMMON = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "num_labels": 3}
_BERT = {
    **_COMMON,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": MAX_LENGTH + 2,  # RoBERTa's count from the padding token's id
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "initializer_range": 0.3,
}
_LLAMA = {
    **_COMMON,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "attention_dropout": 0.1,
    "initializer_range": 0.3,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "Bert": _BERT,
    "Roberta": _BERT,
    "DistilBert": {
        **_COMMON,
        "dim": 32,
        "n_layers": LAYERS,
        "n_heads": 4,
        "hidden_dim": 48,
        "max_position_embeddings": MAX_LENGTH,
        "initializer_range": 0.3,
        "qa_dropout": 0.0,
    },
    "Electra": {**_BERT, "embedding_size": 16},
    "Albert": {**_BERT, "embedding_size": 16},
    "MPNet": _BERT,
    "T5": {
        **_COMMON,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": LAYERS,
        "num_heads": 4,
        "decoder_start_token_id": 0,
        "tie_word_embeddings": True,
        "dropout_rate": 0.1,
    },
    "GPT2": {
        **_COMMON,
        "n_embd": 32,
        "n_layer": LAYERS,
        "n_head": 4,
        "n_positions": MAX_LENGTH,
        "initializer_range": 0.3,
        "bos_token_id": 2,
        "eos_token_id": 3,
    },
    "OPT": {
        **_COMMON,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "max_position_embeddings": MAX_LENGTH,
        "init_std": 0.3,
        "attention_dropout": 0.1,
        "layerdrop": 0.5,
    },
    "Llama": _LLAMA,
    "Qwen2": {**_LLAMA, "tie_word_embeddings": True},
}
_HEADS = {
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "masked-lm",
    "Model": "encoder",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForConditionalGeneration": "seq2seq-lm",
    "EncoderModel": "encoder",
}
_ENCODER_HEADS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMaskedLM",
    "Model",
)
_DECODER_HEADS = ("ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
_CLASSES = {
    **dict.fromkeys(("Bert", "Roberta", "DistilBert", "Electra", "Albert", "MPNet"), _ENCODER_HEADS),
    "T5": ("ForConditionalGeneration", "EncoderModel"),
    "GPT2": ("LMHeadModel", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"),
    "OPT": ("ForCausalLM", "ForSequenceClassification", "ForQuestionAnswering"),
    "Llama": _DECODER_HEADS,
    "Qwen2": _DECODER_HEADS,
}


def small_model(prefix: str, head: str, **options: Any) -> Any:
    """A PreTrainedModel: ``small_model("Bert", "ForMaskedLM")``, with options for its config."""
    config_class = getattr(transformers, f"{prefix}Config")
    values = {**_CONFIGS[prefix], **options}
    if head.startswith(("ForSequence", "ForToken", "ForQuestion")):
        depth = next(key for key in ("num_hidden_layers", "num_layers", "n_layers", "n_layer") if key in values)
        values[depth] = options.get(depth, 1)
    if head == "ForQuestionAnswering":
        values["num_labels"] = 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, prefix + head)(config_class(**values))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval()
    return model


def random_inputs(model: PreTrainedModel, batch: int, length: int, padded: bool = False) -> dict[str, Tensor]:
    """Token ids and masks [batch, length]; for a decoder with its own inputs, these are a little shorter."""
    generator = torch.Generator().manual_seed(1000 * batch + length)

    def tokens(length: int) -> Tensor:
        return torch.randint(4, VOCABULARY, (batch, length), generator=generator)

    ids, mask = tokens(length), torch.ones(batch, length, dtype=torch.int64)
    if padded:
        mask[0, (length + 1) // 2 :] = 0
        if batch > 1:
            mask[1, : length // 3] = 0
        ids = ids.masked_fill(mask == 0, PAD)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens(max(1, length - 2))
    return inputs


def _family(prefix: str, head: str) -> Family:
    model = small_model(prefix, head)
    make_inputs = partial(random_inputs, model)
    _untouched[f"{prefix}{head}"] = (model, _versions(model))
    return Family(model, make_inputs(1, 4), make_inputs)


_untouched: dict[str, tuple[PreTrainedModel, tuple[int, ...]]] = {}


def _versions(model: PreTrainedModel) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in (*model.parameters(), *model.buffers()))


def written_into() -> list[str]:
    """The shared models whose tensors have been written to since this was last asked for: other tests would see it."""
    found = {name: _versions(model) for name, (model, before) in _untouched.items() if _versions(model) != before}
    _untouched.update({name: (_untouched[name][0], versions) for name, versions in found.items()})
    return list(found)


FAMILIES: dict[str, Callable[[], Family]] = {
    f"{prefix.lower()}-{_HEADS[head]}": cache(partial(_family, prefix, head))
    for prefix, heads in _CLASSES.items()
    for head in heads
}
"""Every family and head by name (``bert-masked-lm``). Each is made once: leave its model as it is, or copy it."""


@cache
def traced(name: str) -> Program:
    """The Program of a family, in eval mode, traced once: leave it as it is, or ``copy()`` it."""
    family = FAMILIES[name]()
    return trace(family.model, family.example_inputs)
