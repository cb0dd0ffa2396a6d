"""Training steps of all-MiniLM-L6-v2 with products in float32 and in bfloat16 (``--precision``): forward, backward and
AdamW, for three ways to train and three lengths of texts.

On an otherwise idle machine::

    python tests/benchmarks/precision.py --threads 1
"""

import statistics
import time
from typing import Annotated, Any

import torch
import typer
from results_file import encoder_folder, write  # type: ignore[import-not-found]

from prequant.passes import Pipeline, Program, QuantizeActivations, QuantizeWeights, Train
from prequant.recipes import PreQuant
from prequant.sources import canonical_program, head_of, load_for, load_tokenizer
from prequant.tasks import task
from prequant.training.precision import PRECISIONS, Precision, computing_in

BATCH, LENGTHS, VOCABULARY = 32, (32, 128, 256), 30000
TASK = task("cola")


def trained() -> dict[str, Program]:
    """What is trained, by name: Programs in training mode."""
    tokenizer = load_tokenizer(encoder_folder())
    model, _ = load_for(encoder_folder(), TASK, 0, tokenizer)
    head, original = head_of(model, TASK), canonical_program(model, tokenizer)
    latent = Pipeline(
        [QuantizeWeights(bits=2, ternary=True, latent=True), QuantizeActivations(bits=8), Train(latents=True)]
    )
    return {
        "all weights": original.copy().train(),
        "PreQuant, 4 bits": PreQuant().prepare(original, head)(original).train(),
        "latent ternary weights, 8-bit inputs": latent(original).train(),
    }


class Step:
    """A training step on random ids."""

    def __init__(self, program: Program, length: int) -> None:
        self.program, ids = program, torch.randint(1000, VOCABULARY, (BATCH, length))
        self.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        self.labels = torch.arange(BATCH) % 2
        self.optimizer = torch.optim.AdamW([p for p in program.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def seconds(self, precision: Precision) -> float:
        """How long one takes."""
        started = time.perf_counter()
        with computing_in(precision, torch.device("cpu")):
            loss: Any = self.program(**self.inputs, labels=self.labels).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - started


def run(
    threads: Annotated[int, typer.Option(help="Of torch and of the kernels.", min=1)] = 1,
    repeats: Annotated[int, typer.Option(help="Steps in each precision, which take turns.", min=1)] = 7,
) -> None:
    """Measure, and write the results file."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    rows = []
    for name, program in trained().items():
        for length in LENGTHS:
            step = Step(program, length)
            taken: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
            for turn in range(repeats + 1):
                for precision in PRECISIONS:
                    seconds = step.seconds(precision)
                    if turn:  # the first of each is warm-up
                        taken[precision].append(seconds)
            exact, half = (statistics.median(taken[precision]) for precision in ("float32", "bfloat16"))
            row = {"trained": name, "tokens": length, "float32, s": f"{exact:.3f}", "bfloat16, s": f"{half:.3f}"}
            rows.append({**row, "bfloat16 / float32": f"{half / exact:.2f}"})
            print(rows[-1], flush=True)
    notes = f"""
Seconds of one step of {BATCH} random texts of so many tokens each, in training mode, medians of {repeats}. In bfloat16
matrix products and attention round what they read (``torch.autocast``); parameters, optimizer, losses and the rounding
to codes stay in float32.
"""
    command = ["python", "tests/benchmarks/precision.py", "--threads", str(threads)]
    print(write("precision", "Training in bfloat16", command, notes, {"A step": rows}).read_text())


if __name__ == "__main__":
    typer.run(run)
