"""A cache of 8-bit codes beside one of floats: its bytes, the time of a step, and what becomes of the perplexity.

python tests/benchmarks/quantized_cache.py --model GPT2_DIR

Sizes and times are of GPT-2's smallest shape with random weights; the perplexity is the given model's, on WikiText-2's
test set in the folder that PREQUANT_DATA names.
"""

import gzip
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from processes import apart  # type: ignore[import-not-found]
from results_file import RESULTS, data_folder, write  # type: ignore[import-not-found]
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from prequant.generation import GenerativeProgram, with_cache
from prequant.generation.caches import QuantizedCache, held_by
from prequant.measure import median_seconds
from prequant.model import ModelProgram
from prequant.passes import Canonicalize, Pipeline, QuantizeActivations, QuantizeWeights, lower
from prequant.sources import load_model, load_tokenizer
from prequant.trace import trace

CACHES: dict[str, type[DynamicCache]] = {"float32": DynamicCache, "8 bits": QuantizedCache}
BATCHES = (1, 8)
POSITIONS = (128, 512, 960)
FORMS = {
    "float weights": Pipeline([Canonicalize()]),
    "4-bit weights": Pipeline([Canonicalize(), QuantizeWeights(bits=4)]),
    "4-bit weights, 8-bit inputs": Pipeline([Canonicalize(), QuantizeWeights(bits=4), QuantizeActivations(bits=8)]),
}
WINDOW, TEXTS = 256, 16
"""Tokens of a text of which each is predicted from those before, and texts at once."""


def main(
    model: Annotated[str, typer.Option(help="A folder with a GPT-2, or a hub name: for the perplexity.")],
    threads: Annotated[list[int], typer.Option(min=1, help="1 and all, if not given.")] = [],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1)] = 31,
    windows: Annotated[int, typer.Option(min=1, help=f"Texts of {WINDOW} tokens.")] = 64,
    out: Annotated[
        Path, typer.Option(help="Folder for the results.", show_default="tests/benchmarks/results")
    ] = RESULTS,
) -> None:
    """Measure, and write quantized_cache.md and quantized_cache.json."""
    counts = threads or sorted({1, torch.get_num_threads()})
    speeds = [row for count in counts for row in apart(count, times, repeats)]
    quality = apart(max(counts), perplexities, model, windows)
    notes = f"""
GPT-2's smallest shape, 4 bits row by row, 8-bit inputs, random weights: a step adds a token to each text of the batch;
medians of {repeats}, the two caches in turns. Bytes are those of the whole cache. The perplexity of `MODEL` per token,
on the first {windows} texts of {WINDOW} tokens of WikiText-2's test set, one token at a time, so that every key and
value that is looked back at comes from the cache.
"""
    path = write(
        "quantized_cache",
        "A cache of 8-bit codes",
        ["PREQUANT_DATA=DATA", "python", "tests/benchmarks/quantized_cache.py", "--model", "MODEL"],
        notes,
        {"A step": speeds, "Perplexity": quality},
        folder=out,
        threads=" and ".join(map(str, counts)),
    )
    Console().print(path.read_text(encoding="utf-8"), markup=False, highlight=False, soft_wrap=True)


def packed(model: Any, form: str) -> GenerativeProgram:
    """The model in a form, lowered, ready to generate."""
    program: Any = lower(FORMS[form](trace(model, {"input_ids": torch.ones(2, 12, dtype=torch.int64)})))
    assert isinstance(program, ModelProgram)
    return with_cache(program)


# ---- times -----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def times(repeats: int) -> list[dict[str, str]]:
    """A step with each cache, by texts and positions."""
    torch.manual_seed(0)
    decoder: Any = packed(GPT2LMHeadModel(GPT2Config()).eval(), "4-bit weights, 8-bit inputs")
    rows = []
    for batch in BATCHES:
        for positions in POSITIONS:
            ids = torch.randint(0, 50257, (batch, positions))
            caches = [kind() for kind in CACHES.values()]
            for cache in caches:
                decoder(input_ids=ids, past_key_values=cache)
            held = [sum(tensor.nbytes for tensor in held_by(cache)) for cache in caches]
            steps = [_step(decoder, cache, ids[:, :1]) for cache in caches]
            plain, quantized = median_seconds(steps, repeats)
            rows.append(
                {
                    "threads": str(torch.get_num_threads()),
                    "batch": str(batch),
                    "positions": str(positions),
                    "float32, bytes": f"{held[0]:,}",
                    "8 bits, bytes": f"{held[1]:,} ({held[0] / held[1]:.2f}x fewer)",
                    "float32, ms": f"{1e3 * plain:.2f}",
                    "8 bits, ms": f"{1e3 * quantized:.2f} ({plain / quantized:.2f}x)",
                }
            )
    return rows


def _step(decoder: Any, cache: DynamicCache, ids: Tensor) -> Any:
    return lambda: decoder(input_ids=ids, past_key_values=cache)


# ---- perplexity ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def perplexities(source: str, windows: int) -> list[dict[str, str]]:
    """Of each form with each cache."""
    with gzip.open(data_folder() / "wikitext-2" / "test.txt.gz", "rt", encoding="utf-8") as file:
        text = file.read()
    tokens = load_tokenizer(source)(text, return_tensors="pt", verbose=False)["input_ids"][0]
    if len(tokens) < windows * WINDOW:
        sys.exit(f"the test set has {len(tokens) // WINDOW} texts of {WINDOW} tokens, fewer than {windows}")
    texts = tokens[: windows * WINDOW].view(windows, WINDOW)
    model = load_model(source).float()
    rows = []
    for form in FORMS:
        decoder = packed(model, form)
        found = [_perplexity(decoder, kind, texts, f"{form}, {name}") for name, kind in CACHES.items()]
        rows.append({"": form, **{name: f"{value:.3f}" for name, value in zip(CACHES, found, strict=True)}})
    return rows


def _perplexity(decoder: Any, kind: type[DynamicCache], texts: Tensor, name: str) -> float:
    total = 0.0
    for part in track(texts.split(TEXTS), description=name, console=Console(stderr=True)):
        cache = kind()
        for position in range(WINDOW - 1):
            logits = decoder(input_ids=part[:, position : position + 1], past_key_values=cache).logits[:, -1]
            total += float(torch.nn.functional.cross_entropy(logits, part[:, position + 1], reduction="sum"))
    return math.exp(total / (texts.shape[0] * (WINDOW - 1)))


if __name__ == "__main__":
    typer.run(main)
