"""XTC on all-MiniLM-L6-v2 fine-tuned for CoLA and SST-2: fewer layers and fewer bits, learnt from the teacher and from
the labels alone; short and long trainings.

PREQUANT_DATA names a folder with glue/{CoLA,SST-2}; WORK has ``cola-teacher`` and ``sst2-teacher``, which ``prequant
finetune`` made of the encoder. Rows that are done are kept in results/xtc, and a training that was ended goes
on; --only measures some, so that several processes can share the work, a row each with one thread
(OMP_NUM_THREADS=1)::

    python tests/benchmarks/xtc.py run --work DIR --task cola --steps 1000
    python tests/benchmarks/xtc.py run --work DIR --task sst2 --steps 2000
    python tests/benchmarks/xtc.py table
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from results_file import data_folder, row_file, threads_of, without_folders, write  # type: ignore[import-not-found]

from prequant.compress import GIVEN, compress
from prequant.measure import write_json
from prequant.recipes import XTC
from prequant.tasks import task
from prequant.training import TrainingSettings

SEED, BATCH, RATE, LONG = 42, 32, 2e-4, 4
"""``LONG``: how many times the steps of the others a long training has."""
PLACES = {"cola": "glue/CoLA", "sst2": "glue/SST-2"}
ALL_LAYERS, FLOAT = 6, 32

app = typer.Typer(add_completion=False)
Work = Annotated[Path, typer.Option(help="Where teachers and models are kept.")]


@dataclass(frozen=True)
class Row:
    """A student: how many layers and bits it has, what it learns from, and how many times the usual steps."""

    layers: int
    bits: int
    distil: bool = True
    times: int = 1

    @property
    def name(self) -> str:
        """In words, which also name its files."""
        bits = "32 bits" if self.bits == FLOAT else f"{self.bits} bit{'s' * (self.bits > 1)}"
        how = "" if self.distil else ", labels alone"
        return f"{self.layers} layers, {bits}{how}{f', {self.times} times the steps' if self.times > 1 else ''}"


def rows(name: str) -> list[Row]:
    """The students on a task."""
    if name == "sst2":
        return [Row(6, 2), Row(6, 1), Row(6, 1, times=LONG), Row(3, 1)]
    found = [Row(layers, bits) for layers in (6, 4, 3) for bits in (32, 2, 1) if (layers, bits) != (6, 32)]
    return [*found, *(replace(row, distil=False) for row in found), Row(6, 1, times=LONG)]


def measure(name: str, row: Row, work: Path, steps: int) -> dict[str, Any]:
    """Train a student and compare it with its teacher."""
    training = TrainingSettings(
        max_steps=row.times * steps, batch_size=BATCH, learning_rate=RATE, seed=SEED, eval_steps=max(1, steps // 10)
    )
    count = row.layers if row.layers < ALL_LAYERS else 0
    recipe = XTC(bits=row.bits, count=count, distil=row.distil, training=training)
    out = work / _file(name, row).stem
    report = compress(
        work / f"{name}-teacher",
        recipe,
        task(name),
        str(data_folder() / PLACES[name]),
        out,
        baseline=GIVEN,
        save_steps=max(1, steps // 5),
    )
    assert report.baseline is not None
    return {
        "metric": report.metric_name,
        "teacher": report.baseline.metric,
        "score": report.compressed.metric,
        "steps": row.times * steps * recipe.stages,
        "bytes": report.compressed.bytes_on_disk,
        "comparison": report.comparison(),
        "settings": without_folders(report.settings),
    }


def _file(name: str, row: Row) -> Path:
    return cast(Path, row_file("xtc", name, row.name))


# ---- commands --------------------------------------------------------------------------------------------------------


@app.command()
def run(
    work: Work,
    of: Annotated[str, typer.Option("--task", help="cola or sst2.")],
    steps: Annotated[int, typer.Option(help=f"Of each stage, of {BATCH} examples.", min=10)] = 1000,
    only: Annotated[list[str], typer.Option(help="A row; repeat for several; all if none.")] = [],  # noqa: B006
) -> None:
    """Measure rows; those whose figures are there already are kept."""
    known = {row.name: row for row in rows(of)}
    if unknown := [name for name in only if name not in known]:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {'; '.join(known)}")
    for name in only or known:
        path = _file(of, known[name])
        if not path.is_file():
            print(f"---- {of}: {name}", flush=True)
            found = measure(of, known[name], work, steps)
            write_json(path, {**found, "budget": steps, "threads": torch.get_num_threads()})


@app.command()
def table() -> None:
    """Write the results file from the rows that have been measured."""
    tables, budgets = {}, {}
    measured: list[dict[str, Any]] = []
    for name in PLACES:
        done = {row: json.loads(_file(name, row).read_text()) for row in rows(name) if _file(name, row).is_file()}
        if not done:
            continue
        found = {figures["budget"] for figures in done.values()}
        if len(found) > 1:
            raise typer.BadParameter(f"rows of {name} were measured with different --steps: {sorted(found)}")
        budgets[name] = found.pop()
        measured += done.values()
        teachers = {(figures["metric"], figures["teacher"]) for figures in done.values()}
        if len(teachers) > 1:
            raise typer.BadParameter(f"rows of {name} have different teachers: {sorted(teachers)}")
        metric, teacher = teachers.pop()
        tables[name] = [
            {"": "the teacher", metric: f"{100 * teacher:.2f}", **dict.fromkeys(_COLUMNS, "–")},
            *(_cells(row, figures) for row, figures in done.items()),
        ]
    spent = ", ".join(f"{steps:,} on {name}" for name, steps in budgets.items())
    notes = f"""
all-MiniLM-L6-v2 (22.7 M parameters), fine-tuned, as the teacher. Steps of {BATCH} examples for each stage (a student of
fewer layers and fewer bits has two): {spent};
peak rate {RATE:g}, seed {SEED}, one run each; the best of the states that were scored on the validation set every tenth
of the steps, with its own score there. Linears are binary or ternary per tensor, rows of the table of words each for
themselves, inputs have 8 bits per token. "Labels alone": the same student from the teacher's weights, without
distillation. "As the paper counts": 32 bits over the bits, times the teacher's parameters over the student's; on disk
nothing is left out. Speed is that of a padded batch of 32, measured at the end of a row against the float model
of all layers in turns, on one thread, beside other rows.
"""
    command = ["PREQUANT_DATA=DATA", "python", "tests/benchmarks/xtc.py", "run", "--work", "DIR"]
    command += ["--task", "TASK", "--steps", "STEPS"]
    path = write("xtc", "XTC on CoLA and SST-2", command, notes, tables, threads=threads_of(measured))
    print(path.read_text())


_COLUMNS = (
    "below the teacher",
    "steps in all",
    "bytes on disk",
    "times smaller on disk",
    "as the paper counts",
    "times faster",
)


def _cells(row: Row, found: dict[str, Any]) -> dict[str, str]:
    versus = found["comparison"]
    values = (
        f"{100 * (found['teacher'] - found['score']):.2f}",
        f"{found['steps']:,}",
        f"{found['bytes']:,}",
        f"{versus['size']:.1f}",
        f"{versus['nominal_size']:.1f}" if "nominal_size" in versus else "–",
        f"{versus['latency']:.1f}",
    )
    return {"": row.name, found["metric"]: f"{100 * found['score']:.2f}", **dict(zip(_COLUMNS, values, strict=True))}


if __name__ == "__main__":
    app()
