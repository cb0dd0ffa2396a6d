"""PreQuant on all-MiniLM-L6-v2 and four tasks, against fine-tuning in float32, quantizing what was fine-tuned, LoRA on
the same quantized base, and PreQuant that trains other weights.

PREQUANT_DATA names a folder with glue/{SST-2,CoLA,STS-B} and squad. Rows that are done are kept in
results/prequant_tasks; --only and --task measure some, so that several processes can share the work, a row each with
one thread (OMP_NUM_THREADS=1)::

    python tests/benchmarks/prequant_tasks.py run --work DIR --steps 1000 --task sst2 --task cola --task stsb
    python tests/benchmarks/prequant_tasks.py run --work DIR --steps 400 --task squad
    python tests/benchmarks/prequant_tasks.py table
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from results_file import data_folder, encoder_folder, row_file, threads_of, write  # type: ignore[import-not-found]

from prequant.checkpoint import save
from prequant.compress import NONE, compress
from prequant.finetune import finetune_baseline
from prequant.measure import weight_bytes, write_json
from prequant.recipes import PreQuant
from prequant.sources import AUTO_CLASSES, canonical_program, head_of, load_for, load_tokenizer
from prequant.tasks import Limits, task
from prequant.training import TrainingSettings, finetune
from prequant.training.precision import Precision

SEED, BATCH = 42, 32


@dataclass(frozen=True)
class Setup:
    """Where a task's data are, how many tokens are read, what training computes products in (in bfloat16 long texts
    take half the time, short ones the same), and peak rates: of all weights, of LoRA and its head, of PreQuant and its
    head.
    """

    place: str
    length: int = 128
    precision: Precision = "float32"
    all_weights: float = 1e-4
    lora: tuple[float, float] = (5e-4, 5e-4)
    prequant: tuple[float, float] = (1.5e-3, 1e-3)

    @property
    def data(self) -> str:
        """What ``--data`` would say."""
        return self.place.replace("{}", str(data_folder())) if "=" in self.place else str(data_folder() / self.place)


SQUAD = "train={}/squad/train_subset.parquet,validation={}/squad/validation.parquet"
TASKS = {
    "sst2": Setup("glue/SST-2"),
    "cola": Setup("glue/CoLA"),
    "stsb": Setup("glue/STS-B"),
    "squad": Setup(SQUAD, 256, "bfloat16", 3e-4, lora=(2e-3, 3e-3), prequant=(6e-3, 6e-3)),
}
OUTLIERS = 0.0125
BIAS_RATES = (6e-3, 3e-3)
"""Of biases and head where they train alone: at the rates of all parts they learn nothing."""
LORA_RANK = 12
"""On the projections of all attention layers: about as many numbers as PreQuant trains of this model."""

app = typer.Typer(add_completion=False)
Work = Annotated[Path, typer.Option(help="Where models are kept.")]
Steps = Annotated[int, typer.Option(help=f"Of every row that trains, of {BATCH} examples each.", min=1)]


# ---- rows ------------------------------------------------------------------------------------------------------------


def fp32(name: str, work: Path, steps: int) -> dict[str, Any]:
    """All weights fine-tuned in float32."""
    folder, of = work / f"{name}-fp32-model", task(name)
    budget = TrainingSettings(batch_size=BATCH, max_steps=steps, seed=SEED, precision=TASKS[name].precision)
    settings = replace(budget, learning_rate=TASKS[name].all_weights)
    score = finetune_baseline(encoder_folder(), of, TASKS[name].data, folder, settings, max_length=TASKS[name].length)
    model, _ = load_for(folder, of, SEED)
    return _row(score.scores, sum(p.numel() for p in model.parameters()), weight_bytes(folder), asdict(settings))


def coded(bits: int, name: str, work: Path, steps: int) -> dict[str, Any]:
    """What was fine-tuned in float32, quantized without data."""
    out, recipe = work / f"{name}-ptq-{bits}-model", PreQuant(bits=bits, outlier_ratio=OUTLIERS, train=())
    source = work / f"{name}-fp32-model"
    report = compress(source, recipe, task(name), TASKS[name].data, out, baseline=NONE, max_length=TASKS[name].length)
    return _row(report.compressed.scores, 0, weight_bytes(out), None)


def tuned(
    slug: str, options: dict[str, Any], name: str, work: Path, steps: int, rates: tuple[float, float] | None = None
) -> dict[str, Any]:
    """PreQuant; ``slug`` names the folder, ``rates`` are others than the task's."""
    recipe = PreQuant(outlier_ratio=OUTLIERS, **options)
    rate, head_rate = rates or TASKS[name].prequant
    budget = replace(recipe.training, batch_size=BATCH, max_steps=steps, seed=SEED, precision=TASKS[name].precision)
    recipe = replace(recipe, training=replace(budget, learning_rate=rate, head_learning_rate=head_rate))
    out, adapter, length = work / f"{name}-{slug}-model", work / f"{name}-{slug}.safetensors", TASKS[name].length
    report = compress(
        encoder_folder(), recipe, task(name), TASKS[name].data, out, baseline=NONE, adapter=adapter, max_length=length
    )
    row = _row(report.compressed.scores, report.compressed.trainable, weight_bytes(out), asdict(recipe.training))
    return {**row, "own": adapter.stat().st_size}


def lora(bits: int, name: str, work: Path, steps: int) -> dict[str, Any]:
    """LoRA by the library peft on the model that PreQuant starts from."""
    from peft import LoraConfig, get_peft_model

    of, tokenizer, setup = task(name), load_tokenizer(encoder_folder()), TASKS[name]
    model, _ = load_for(encoder_folder(), of, SEED, tokenizer)
    head = head_of(model, of)
    original = canonical_program(model, tokenizer)
    recipe = PreQuant(bits=bits, outlier_ratio=OUTLIERS, train=())
    folder = save(recipe.finish()(recipe.prepare(original, head)(original)), work / f"{name}-base-{bits}", tokenizer)
    base = AUTO_CLASSES[of.kind].from_pretrained(folder)
    modules = sorted({key.partition(".")[0] for key in head})
    rate, head_rate = setup.lora
    budget = TrainingSettings(batch_size=BATCH, max_steps=steps, seed=SEED, dropout=False, precision=setup.precision)
    settings = replace(budget, learning_rate=rate, head_learning_rate=head_rate, weight_decay=0.0)
    torch.manual_seed(SEED)
    targets = ["query", "key", "value", "attention.output.dense"]
    own: Any = get_peft_model(
        base, LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=targets, modules_to_save=modules)
    )
    trained = sum(p.numel() for p in own.parameters() if p.requires_grad)
    rows = of.load(TASKS[name].data)
    train = of.encode(rows["train"], tokenizer, setup.length)
    heads = [key for key, p in own.named_parameters() if p.requires_grad and "lora_" not in key]
    finetune(own, train, of.collator(tokenizer), settings, heads)
    own.save_pretrained(work / f"{name}-lora-{bits}")
    score = of.evaluate(own, rows["validation"], tokenizer, Limits(setup.length))
    size = weight_bytes(work / f"{name}-lora-{bits}")
    return {**_row(score.scores, trained, weight_bytes(folder), asdict(settings)), "own": size}


def _row(scores: Any, trained: int, size: int, settings: Any) -> dict[str, Any]:
    return {"scores": dict(scores), "trained": trained, "bytes": size, "settings": settings}


ROWS: dict[str, Callable[[str, Path, int], dict[str, Any]]] = {
    "all weights, fp32": fp32,
    **{f"fine-tuned, then {bits} bits": partial(coded, bits) for bits in (4, 3)},
    **{f"LoRA, rank {LORA_RANK}, on {bits} bits": partial(lora, bits) for bits in (4, 3)},
    **{f"PreQuant, {bits} bits": partial(tuned, f"prequant-{bits}", {"bits": bits}) for bits in (4, 3)},
    "random weights in the place of outliers, 4 bits": partial(tuned, "random", {"outlier_choice": "random"}),
    "outliers alone, 4 bits": partial(tuned, "outliers", {"train": ("outliers", "head")}),
    "biases alone, 4 bits": partial(tuned, "biases", {"train": ("biases", "head")}, rates=BIAS_RATES),
    "layer norms alone, 4 bits": partial(tuned, "norms", {"train": ("layer-norms", "head")}),
}


def _file(row: str, name: str) -> Path:
    return cast(Path, row_file("prequant_tasks", name, row))


# ---- commands --------------------------------------------------------------------------------------------------------


@app.command()
def run(
    work: Work,
    steps: Steps = 1000,
    only: Annotated[list[str], typer.Option(help="A row; repeat for several.")] = list(ROWS),  # noqa: B006
    of: Annotated[list[str], typer.Option("--task", help="A task; repeat for several.")] = list(TASKS),  # noqa: B006
) -> None:
    """Measure rows; those whose figures are there already are kept. Fine-tuning comes first."""
    work.mkdir(parents=True, exist_ok=True)
    if unknown := [name for name in only if name not in ROWS] + [name for name in of if name not in TASKS]:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join((*ROWS, *TASKS))}")
    for name in of:
        for row in only:
            if not _file(row, name).is_file():
                print(f"---- {name}: {row}", flush=True)
                found = ROWS[row](name, work, steps)
                write_json(_file(row, name), {**found, "steps": steps, "threads": torch.get_num_threads()})


@app.command()
def table() -> None:
    """Write the results file from the rows that have been measured."""
    done: dict[str, dict[str, Any]] = {}
    for row in ROWS:
        for name in TASKS:
            if (path := _file(row, name)).is_file():
                done.setdefault(row, {})[name] = json.loads(path.read_text())
    budget: dict[str, int] = {}
    for row, figures in done.items():
        for name, found in figures.items():
            if budget.setdefault(name, found["steps"]) != found["steps"]:
                raise typer.BadParameter(f"{row}, {name}: {found['steps']} steps, others {budget[name]}")
    rows = []
    for row, found in done.items():
        scores = {name: next(iter(found[name]["scores"].items())) for name in TASKS if name in found}
        mean = sum(100 * score if name != "squad" else score for name, (_, score) in scores.items()) / len(TASKS)
        some = next(iter(found.values()))
        rows.append(
            {
                "": row,
                **{
                    name: " ".join((scores[name][0], f"{scores[name][1]:.4f}")) if name in scores else "–"
                    for name in TASKS
                },
                "mean": f"{mean:.2f}" if len(scores) == len(TASKS) else "–",
                "trained": f"{some['trained']:,}" if some["trained"] else "–",
                "bytes on disk": f"{some['bytes']:,}",
                "of the task": f"{some['own']:,}" if "own" in some else "–",
            }
        )
    spent = ", ".join(f"{steps:,} steps of {name}" for name, steps in budget.items())
    notes = f"""
all-MiniLM-L6-v2 (22.7 M parameters). Every row that trains: {spent}, of {BATCH} examples each, seed {SEED}, the same
order, one run, last step; on SQuAD products in bfloat16 while training. {100 * OUTLIERS:g} % of each matrix are
outliers. SQuAD: the 11,877 questions on 44 articles of its training set, the full validation set.

Rates were looked for on the validation set, for fewer rows than there are: on SQuAD, with 300 steps, the best of three
or four a factor of two or three apart, for all weights, LoRA and PreQuant; on the others PreQuant's is its recipe's (of
half and twice as much, where they were tried, none was better by more than 0.4 points), LoRA's a quarter of one at
which it learnt nothing, that of all weights a usual one; biases alone want a higher one.

`trained`, sizes: of the first task of the row. The mean counts scores from 0 to 1 as percents.
"""
    command = ["PREQUANT_DATA=DATA", "python", "tests/benchmarks/prequant_tasks.py", "run", "--work", "DIR"]
    command += ["--task", "TASK", "--steps", "STEPS"]
    threads = threads_of(found for figures in done.values() for found in figures.values())
    path = write("prequant_tasks", "PreQuant on four tasks", command, notes, {"Scores": rows}, threads=threads)
    print(path.read_text())


if __name__ == "__main__":
    app()
