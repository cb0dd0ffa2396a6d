"""Tiny model folders with a tokenizer, and a few labelled sentences. Import with ``from .tiny import ...``."""

import csv
from copy import deepcopy
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from prequant.model import ModelProgram
from prequant.sources import canonical_program
from prequant.tasks import Collator, Task, task

SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
LENGTH = 32
SST2: Task = task("sst2")


@cache
def sentences() -> list[dict[str, str]]:
    """The rows of the sample as the csv module reads them."""
    text = (resources.files("prequant") / "data" / "sentences.tsv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))


def make_tokenizer(padding: bool = True) -> PreTrainedTokenizerFast:
    """A word for a token, from the sample's own vocabulary; ``[CLS] text [SEP]``."""
    splitter = Whitespace()
    words = {word for row in sentences() for word, _ in splitter.pre_tokenize_str(row["sentence"].lower())}
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *sorted(words)])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    inner.normalizer = Lowercase()
    inner.pre_tokenizer = splitter
    ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    inner.post_processor = TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="[SEP]",
        pad_token="[PAD]" if padding else None,
        model_max_length=LENGTH,
        model_input_names=["input_ids", "attention_mask"],
    )


def vocabulary_size() -> int:
    return len(make_tokenizer())


BERT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": LENGTH + 2,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "Bert": BERT,
    "Roberta": BERT,
    "Electra": {**BERT, "embedding_size": 16},
    "Albert": {**BERT, "embedding_size": 16},
    "MPNet": BERT,
    "DistilBert": {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 48,
        "max_position_embeddings": LENGTH,
        "pad_token_id": 0,
        "initializer_range": 0.1,
    },
    "GPT2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": LENGTH,
        "initializer_range": 0.1,
        "eos_token_id": 2,
        "bos_token_id": 1,
    },
    "T5": {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
        "eos_token_id": 2,
    },
}


def make_model(family: str = "Bert", head: str = "ForSequenceClassification", **options: Any) -> PreTrainedModel:
    """A random model, the same every time."""
    config = getattr(transformers, f"{family}Config")(
        vocab_size=vocabulary_size(), **{**CONFIGS.get(family, {}), **options}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, family + head)(config).eval()


def make_program(family: str = "Bert", head: str = "ForSequenceClassification", **options: Any) -> ModelProgram:
    """The Program of :func:`make_model` in canonical form: traced once, and copied."""
    return deepcopy(_program(family, head, tuple(options.items())))


@cache
def _program(family: str, head: str, options: tuple[tuple[str, Any], ...]) -> ModelProgram:
    return cast(ModelProgram, canonical_program(make_model(family, head, **dict(options)), make_tokenizer()))


def save_folder(folder: Path, family: str = "Bert", head: str = "Model", **options: Any) -> Path:
    """A model folder as a user has it: by default an encoder without a task head."""
    make_model(family, head, **options).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_data(path: Path, train: int = 24, validation: int = 12) -> Path:
    """A file with the first rows of both splits of the sample."""
    wanted = {"train": train, "validation": validation}
    rows = [row for split, count in wanted.items() for row in [r for r in sentences() if r["split"] == split][:count]]
    lines = ["\t".join(row.values()) for row in [dict(zip(rows[0], rows[0], strict=True)), *rows]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def encoded(split: str = "train", count: int = 24) -> Any:
    """Tokenized rows of the sample."""
    rows = SST2.load("sample")[split].select(range(count))
    return SST2.encode(rows, make_tokenizer(), LENGTH, progress=False)


def collator() -> Collator:
    """What makes batches of them."""
    return SST2.collator(make_tokenizer())
