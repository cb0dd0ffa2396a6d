"""Programs of all-MiniLM-L6-v2 through torch.compile: the time to compile, calls a second against eager ones, and how
often torch compiles again over twenty lengths. Simulated ones take training steps, lowered ones are called.

On an otherwise idle machine::

    python tests/benchmarks/compiled.py --threads 1
"""

import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from results_file import encoder_folder, write  # type: ignore[import-not-found]
from torch import Tensor
from torch._dynamo.utils import counters

from prequant.passes import Pipeline, Program, QuantizeActivations, QuantizeWeights, SplitOutliers, lower
from prequant.sources import canonical_program, load_for, load_tokenizer
from prequant.tasks import task

SHAPES = ((1, 16), (1, 128), (8, 64), (32, 32))
LENGTHS = range(5, 105, 5)
ROUNDS = 15
VOCABULARY = 30000
DROPOUT: dict[str, Any] = {"fallback_random": True}
"""Inductor's own random numbers take longer than PyTorch's, and are others."""


def programs() -> dict[str, tuple[Program, bool]]:
    """By name, with whether it is trained."""
    tokenizer = load_tokenizer(encoder_folder())
    original = canonical_program(load_for(encoder_folder(), task("cola"), 0, tokenizer)[0], tokenizer)
    weights, activations = QuantizeWeights(bits=4), QuantizeActivations(bits=8)
    latent = Pipeline([QuantizeWeights(bits=4, latent=True), activations])(original)
    return {
        "float32": (original, False),
        "lowered, 4 bits": (lower(weights(original)), False),
        "lowered, 4 bits, 8-bit inputs": (lower(activations(weights(original))), False),
        "float32, training step": (original.copy().train(), True),
        "codes and outliers, training step": (Pipeline([SplitOutliers(ratio=0.01), weights])(original).train(), True),
        "latent weights, 8-bit inputs, training step": (latent.train(), True),
    }


def inputs(batch: int, length: int, labels: bool) -> dict[str, Tensor]:
    """Random ids."""
    ids = torch.randint(1000, VOCABULARY, (batch, length))
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    return {**made, "labels": torch.arange(batch) % 2} if labels else made


def caller(program: Any, trained: bool) -> Callable[[dict[str, Tensor]], None]:
    """A call, or the forward and backward pass of a training step."""

    def step(given: dict[str, Tensor]) -> None:
        program(**given).loss.backward()

    def call(given: dict[str, Tensor]) -> None:
        with torch.no_grad():
            program(**given)

    return step if trained else call


def medians(calls: list[Callable[[dict[str, Tensor]], None]], given: dict[str, Tensor]) -> list[float]:
    """Milliseconds of each, in turns."""
    spent: list[list[float]] = [[] for _ in calls]
    for turn in range(ROUNDS + 2):
        for call, times in zip(calls, spent, strict=True):
            started = time.perf_counter()
            call(given)
            if turn >= 2:  # warm
                times.append(1e3 * (time.perf_counter() - started))
    return [statistics.median(times) for times in spent]


def measure(name: str, program: Program, trained: bool) -> dict[str, str]:
    """A row of the table."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(program, fullgraph=True, dynamic=True, options=DROPOUT if trained else None)
    eager, ours = caller(program, trained), caller(compiled, trained)
    started = time.perf_counter()
    ours(inputs(2, 9, trained))
    seconds = time.perf_counter() - started
    for length in LENGTHS:
        ours(inputs(3, length, trained))
    again = counters["stats"]["unique_graphs"] - 1
    row = {"": name, "seconds to compile": f"{seconds:.1f}", "compiled again": str(again)}
    for batch, length in SHAPES:
        before, after = medians([eager, ours], inputs(batch, length, trained))
        row[f"{batch} × {length}: eager, compiled, ms"] = f"{before:.2f}, {after:.2f} ({before / after:.2f} ×)"
    print(row, flush=True)
    return row


def main(threads: Annotated[int, typer.Option(help="Of PyTorch and of the kernels.")] = 1) -> None:
    """Measure and write the results file."""
    torch.set_num_threads(threads)
    torch._inductor.config.force_disable_caches = True  # what another run compiled would not be counted
    rows = [measure(name, *each) for name, each in programs().items()]
    notes = f"""
all-MiniLM-L6-v2 with a classifier, weights of 4 bits row by row, {threads} thread{"s" * (threads > 1)};
`torch.compile(program, fullgraph=True, dynamic=True)`, without a cache; training steps with
`options={{"fallback_random": True}}`, as Inductor's own random numbers for dropout take longer than PyTorch's.
"Compiled again": over {len(LENGTHS)} lengths, {LENGTHS[0]} to {LENGTHS[-1]}, after the first call. Times are medians of
{ROUNDS} calls, warm, eager and compiled in turns; in brackets how many times faster the compiled ones are.
"""
    command = ["python", "tests/benchmarks/compiled.py", "--threads", str(threads)]
    print(write("compiled", "torch.compile", command, notes, {"Programs": rows}).read_text())


if __name__ == "__main__":
    typer.run(main)
