"""MREM on all-MiniLM-L6-v2 fine-tuned for SST-2: modules in turn and at once, against rounding to the nearest and
quantization-aware training with all data; the size of the calibration set; teacher forcing.

PREQUANT_DATA names a folder with glue/SST-2. ``--teacher`` is a model that ``prequant finetune`` made. Rows that are
done are kept in results/mrem; --only measures some, so that several processes can share the work, a row each with one
thread (OMP_NUM_THREADS=1)::

    python tests/benchmarks/mrem.py run --teacher MODEL --work DIR --steps 500
    python tests/benchmarks/mrem.py table
"""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import psutil
import torch
import typer
from results_file import data_folder, row_file, threads_of, without_folders, write  # type: ignore[import-not-found]

from prequant.checkpoint import load, save
from prequant.measure import PeakMemory, weight_bytes, write_json
from prequant.recipes import MREM
from prequant.reconstruct import Job, prepared, read_source, reconstruct
from prequant.reconstruction import joined
from prequant.sources import load_scored, load_tokenizer
from prequant.tasks import Limits, task
from prequant.training import finetune

SEED, LENGTH, SIZES = 42, 128, (256, 1024, 4096)
TASK = task("sst2")
WIDTHS = {"W4A8": 4, "W2A8": 2}
FORCING = (250, 2000)
"""Steps of each module in the rows that compare teacher forcing."""

app = typer.Typer(add_completion=False)
Work = Annotated[Path, typer.Option(help="Where models are kept.")]
Teacher = Annotated[Path, typer.Option(help="The fine-tuned float model.")]
Steps = Annotated[int, typer.Option(help="Of each module.", min=1)]


def data() -> str:
    """What ``--data`` would say."""
    return str(data_folder() / "glue" / "SST-2")


def recipe(steps: int, **options: Any) -> MREM:
    """MREM with a budget for each module."""
    made = MREM(**options)
    return replace(made, training=replace(made.training, max_steps=steps, seed=SEED))


# ---- rows ------------------------------------------------------------------------------------------------------------


def fp32(teacher: Path, out: Path, steps: int) -> dict[str, Any]:
    """The model as it is."""
    model, tokenizer = load_scored(teacher, TASK)
    found = TASK.evaluate(model, TASK.load(data())["validation"], tokenizer, Limits(LENGTH))
    return {"score": found.metric, "bytes": weight_bytes(teacher), "seconds": 0.0, "steps": 0}


def untrained(bits: int, teacher: Path, out: Path, steps: int) -> dict[str, Any]:
    """What MREM begins with: weights rounded to the nearest level, static activations."""
    return _whole(bits, teacher, out, 0)


def with_labels(bits: int, teacher: Path, out: Path, steps: int) -> dict[str, Any]:
    """The same quantized model, trained as a whole on all labels of the training set: as many steps as all modules."""
    return _whole(bits, teacher, out, steps * MREM().modules)


def _whole(bits: int, teacher: Path, out: Path, steps: int) -> dict[str, Any]:
    method = recipe(max(steps, 1), bits=bits)
    read = read_source(Job(teacher, method, None, TASK, data(), LENGTH, True))
    modules, parts = prepared(read, method, True)
    program, seconds = joined(parts, modules), 0.0
    with PeakMemory() as memory:
        if steps:
            rows = TASK.encode(TASK.load(data())["train"], read.tokenizer, LENGTH)
            renew = _renewal(program) if method.scales_follow else None
            started = time.perf_counter()
            finetune(program, rows, TASK.collator(read.tokenizer), method.training, read.head, True, renew)
            seconds = time.perf_counter() - started
    finished = save(method.finish()(program), out, read.tokenizer)
    score = TASK.evaluate(load(finished), TASK.load(data())["validation"], read.tokenizer, Limits(LENGTH)).metric
    return {"score": score, "bytes": weight_bytes(out), "seconds": seconds, "steps": steps, "memory": memory.bytes}


def _renewal(program: Any) -> Callable[[], None]:
    from prequant.passes.latent_scales import following

    return following(program).renew


def mrem(options: dict[str, Any], own: int, teacher: Path, out: Path, steps: int) -> dict[str, Any]:
    """MREM; ``own``: steps of each module where they are not those of all rows."""
    method = recipe(own or steps, **options)
    with PeakMemory() as memory:
        report = reconstruct(teacher, method, out, task=TASK, data=data(), max_length=LENGTH)
    assert report is not None and report.compressed.training is not None
    return {
        "score": report.compressed.metric,
        "bytes": report.compressed.bytes_on_disk,
        "seconds": report.compressed.training.seconds,
        "steps": own or steps,
        "memory": memory.bytes,
        "modules": [module.last_loss for module in report.modules],
        "settings": without_folders(report.settings),
    }


def _rows() -> dict[str, Callable[[Path, Path, int], dict[str, Any]]]:
    found: dict[str, Callable[[Path, Path, int], dict[str, Any]]] = {"fp32": fp32}
    for width, bits in WIDTHS.items():
        found[f"{width}, rounded to the nearest"] = partial(untrained, bits)
        for size in reversed(SIZES):
            options: dict[str, Any] = {"bits": bits, "samples": size}
            found[f"{width}, MREM-S, {size:,} texts"] = partial(mrem, options, 0)
            if size == max(SIZES):
                found[f"{width}, MREM-P, {size:,} texts"] = partial(mrem, {**options, "parallel": True}, 0)
                inside = {**options, "attention": True}
                found[f"{width}, MREM-S, {size:,} texts, inside attention too"] = partial(mrem, inside, 0)
        found[f"{width}, trained on all labels"] = partial(with_labels, bits)
    for steps in FORCING:
        for share in (0.5, 0.0):
            options = {"bits": 2, "parallel": True, "forcing": share}
            how = "with" if share else "without"
            found[f"W2A8, MREM-P, {steps:,} steps, {how} teacher forcing"] = partial(mrem, options, steps)
    return found


ROWS = _rows()


def _file(row: str) -> Path:
    return cast(Path, row_file("mrem", row))


# ---- commands --------------------------------------------------------------------------------------------------------


@app.command()
def run(
    teacher: Teacher,
    work: Work,
    steps: Steps = 1000,
    only: Annotated[list[str], typer.Option(help="A row; repeat for several.")] = list(ROWS),  # noqa: B006
) -> None:
    """Measure rows; those whose figures are there already are kept."""
    work.mkdir(parents=True, exist_ok=True)
    load_tokenizer(teacher)
    if unknown := [row for row in only if row not in ROWS]:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {'; '.join(ROWS)}")
    for row in only:
        path = _file(row)
        if not path.is_file():
            print(f"---- {row}", flush=True)
            found = ROWS[row](teacher, work / path.stem, steps)
            threads = {"threads": torch.get_num_threads(), "processors": psutil.cpu_count()}
            write_json(path, {**found, **threads, "budget": steps})


@app.command()
def table() -> None:
    """Write the results file from the rows that have been measured."""
    done = {row: json.loads(_file(row).read_text()) for row in ROWS if _file(row).is_file()}
    budgets = {found["budget"] for found in done.values()}
    if len(budgets) > 1:
        raise typer.BadParameter(f"rows were measured with different --steps: {sorted(budgets)}")
    budget = budgets.pop()
    rows = [
        {
            "": row,
            "accuracy": f"{100 * found['score']:.2f}",
            "bytes on disk": f"{found['bytes']:,}",
            "steps of each module": f"{found['steps']:,}" if "MREM" in row else "–",
            "seconds of training": f"{found['seconds']:,.0f}" if found["seconds"] else "–",
            "peak MB of the process": f"{found['memory'] / 1e6:,.0f}" if found["seconds"] else "–",
        }
        for row, found in done.items()
    ]
    notes = f"""
all-MiniLM-L6-v2 (22.7 M parameters) fine-tuned for SST-2, accuracy on the 872 sentences of the validation set; four
modules, {budget:,} steps of 32 texts for each where nothing else is said, seed {SEED}, one run each, the last
state. MREM-P is interleaved in one process. "Inside attention too": queries, keys, probabilities and values also have
8 bits. Training on all labels takes as many steps as all modules together, on 67,349 sentences. W4A8: 4-bit weights
and 8-bit inputs with static scales; W2A8: ternary weights. Linears have a scale for each matrix, the table of words
one for each row. MREM-S trains the modules one after the other, MREM-P at once. One thread a row, several rows at once
on one machine: seconds compare within a few per cent at best.
"""
    command = ["PREQUANT_DATA=DATA", "python", "tests/benchmarks/mrem.py", "run", "--teacher", "MODEL", "--work", "DIR"]
    command += ["--steps", str(budget)]
    threads = threads_of(done.values())
    print(write("mrem", "MREM on SST-2", command, notes, {"Scores": rows}, threads=threads).read_text())


if __name__ == "__main__":
    app()
