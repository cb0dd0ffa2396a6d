"""AlphaTuning of a small GPT-2 on E2E, against fine-tuning all of it, LoRA, and quantizing what was fine-tuned.

PREQUANT_DATA names a folder with e2e. Rows that are done are kept; --only measures some, so that several processes can
share the work, a row each with one thread (OMP_NUM_THREADS=1)::

    python tests/benchmarks/alphatuning_e2e.py run --model MODEL --work DIR --steps 2000
    python tests/benchmarks/alphatuning_e2e.py table --model MODEL --work DIR
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from results_file import data_folder, threads_of, write  # type: ignore[import-not-found]

from prequant.compress import GIVEN, NONE, compress
from prequant.finetune import finetune_baseline
from prequant.measure import weight_bytes, write_json
from prequant.recipes import AlphaTuning
from prequant.report_file import REPORT_FILE
from prequant.sources import load_for, load_tokenizer
from prequant.tasks import Limits, Task, task
from prequant.training import TrainingSettings, finetune

SEED, MAX_LENGTH, BATCH = 42, 128, 8
LORA_RANKS = (2, 8)
"""On the joint projection of queries, keys and values: of gpt2-mini 18,432 and 73,728 numbers, where AlphaTuning trains
20,736 row-wise and 82,944 in groups of 128."""
MORE, MORE_RATE = ("first-alphas", "layer-norms", "biases"), 5e-3
"""What AlphaTuning trains in rows that train more, and at which rate what is no alpha."""
PLANES, GROUPS = (1, 2, 3, 4), (0, 128)

app = typer.Typer(add_completion=False)
Work = Annotated[Path, typer.Option(help="Where models and the figures of each row are kept.")]
Model = Annotated[str, typer.Option(help="A folder with a GPT-2, or a hub name.")]
Steps = Annotated[int, typer.Option(help="Of every row that trains, of 8 texts each; -1 for an epoch.", min=-1)]


def e2e() -> Task:
    """Greedy: beams cost ten times as much, for every row alike."""
    return replace(task("e2e"), beams=1)  # type: ignore[call-arg]


def training(steps: int, **others: Any) -> TrainingSettings:
    """What all rows have in common."""
    budget = TrainingSettings(epochs=1.0, batch_size=BATCH, max_steps=steps, seed=SEED, weight_decay=0.0, dropout=False)
    return replace(budget, **others)


# ---- rows ------------------------------------------------------------------------------------------------------------


def full(model: str, work: Path, steps: int) -> dict[str, Any]:
    """All weights fine-tuned in float32."""
    folder = work / "full-model"
    settings = training(steps, learning_rate=1e-3)
    score = finetune_baseline(model, e2e(), data_folder() / "e2e", folder, settings, max_length=MAX_LENGTH)
    report = json.loads((folder / REPORT_FILE).read_text())
    loaded, _ = load_for(folder, e2e(), SEED)
    trained = sum(p.numel() for p in loaded.parameters())
    return _row(score.scores, trained, weight_bytes(folder), report["training"], asdict(settings))


def lora(rank: int, model: str, work: Path, steps: int) -> dict[str, Any]:
    """LoRA of about as many numbers, by the library peft, on the float model."""
    from peft import LoraConfig, get_peft_model

    of, tokenizer = e2e(), load_tokenizer(model)
    settings = training(steps, learning_rate=5e-3)
    loaded, _ = load_for(model, of, SEED, tokenizer)
    torch.manual_seed(SEED)
    config = LoraConfig(r=rank, lora_alpha=32, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.0)
    tuned: Any = get_peft_model(loaded, config)
    rows = of.load(data_folder() / "e2e")
    train = of.encode(rows["train"], tokenizer, MAX_LENGTH)
    trained = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    result = finetune(tuned, train, of.collator(tokenizer), settings)
    tuned.save_pretrained(work / f"lora-{rank}-adapter")
    merged = tuned.merge_and_unload()
    merged.save_pretrained(work / f"lora-{rank}-model")
    score = of.evaluate(merged, rows["validation"], tokenizer, Limits(MAX_LENGTH))
    own = weight_bytes(work / f"lora-{rank}-adapter")
    return {
        **_row(score.scores, trained, weight_bytes(work / f"lora-{rank}-model"), asdict(result), asdict(settings)),
        "own": own,
    }


def coded(bits: int, group: int, model: str, work: Path, steps: int) -> dict[str, Any]:
    """What was fine-tuned in float32, binary-coded without data."""
    recipe = AlphaTuning(bits=bits, group_size=group, train=(), training=training(steps))
    name, out = f"coded-{bits}-{group}", work / f"coded-{bits}-{group}-model"
    source = work / "full-model"
    report = compress(source, recipe, e2e(), data_folder() / "e2e", out, baseline=NONE, max_length=MAX_LENGTH)
    return _row(report.compressed.scores, 0, weight_bytes(out), None, {"name": name})


def tuned(bits: int, group: int, train: Any, name: str, model: str, work: Path, steps: int) -> dict[str, Any]:
    """AlphaTuning."""
    usual = AlphaTuning().training
    settings = training(steps, learning_rate=MORE_RATE, scale_learning_rate=usual.scale_learning_rate)
    recipe = AlphaTuning(bits=bits, group_size=group, train=train, training=settings)
    out, adapter = work / f"{name}-model", work / f"{name}.safetensors"
    data = data_folder() / "e2e"
    report = compress(model, recipe, e2e(), data, out, baseline=NONE, adapter=adapter, max_length=MAX_LENGTH)
    ours = report.compressed
    assert ours.training is not None
    row = _row(ours.scores, ours.trainable, weight_bytes(out), asdict(ours.training), asdict(settings))
    return {**row, "own": adapter.stat().st_size}


def untuned(model: str, work: Path, steps: int) -> dict[str, Any]:
    """The model as it was given."""
    of, tokenizer = e2e(), load_tokenizer(model)
    loaded, _ = load_for(model, of, SEED, tokenizer)
    score = of.evaluate(loaded, of.load(data_folder() / "e2e")["validation"], tokenizer, Limits(MAX_LENGTH))
    return _row(score.scores, 0, sum(4 * p.numel() for p in loaded.parameters()), None, {"baseline": GIVEN})


def _row(scores: Any, trained: int, size: int, result: Any, settings: Any) -> dict[str, Any]:
    return {"scores": dict(scores), "trained": trained, "bytes": size, "training": result, "settings": settings}


ROWS: dict[str, Callable[[str, Path, int], dict[str, Any]]] = {
    "as given": untuned,
    "full": full,
    **{f"lora-{rank}": partial(lora, rank) for rank in LORA_RANKS},
    **{f"coded-{bits}-{group}": partial(coded, bits, group) for group in GROUPS for bits in PLANES},
    **{
        (name := f"tuned-{bits}-{group}"): partial(tuned, bits, group, AlphaTuning().train, name)
        for group in GROUPS
        for bits in PLANES
    },
    **{(name := f"more-3-{group}"): partial(tuned, 3, group, MORE, name) for group in GROUPS},
}


def _name(row: str) -> str:
    if row in ("full", "as given"):
        return {"full": "all weights, fp32"}.get(row, row)
    if row.startswith("lora-"):
        return f"LoRA, rank {row.removeprefix('lora-')}, fp32"
    kind, bits, group = row.split("-")
    width = f"q = {bits}, " + (f"groups of {group}" if group != "0" else "row-wise")
    more = " with layer norms and biases" if kind == "more" else ""
    return f"fine-tuned, then coded, {width}" if kind == "coded" else f"AlphaTuning{more}, {width}"


# ---- commands --------------------------------------------------------------------------------------------------------


@app.command()
def run(
    model: Model,
    work: Work,
    steps: Steps = -1,
    only: Annotated[list[str], typer.Option(help="A row; repeat for several.")] = list(ROWS),  # noqa: B006
) -> None:
    """Measure rows; those whose figures are in the work folder already are kept. Coded ones come after the full one."""
    work.mkdir(parents=True, exist_ok=True)
    for name in only:
        if name not in ROWS:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(ROWS)}")
        if not (work / f"{name}.json").is_file():
            print(f"---- {name}", flush=True)
            started = time.perf_counter()
            row = ROWS[name](model, work, steps)
            found = {
                **row,
                "steps": steps,
                "seconds": time.perf_counter() - started,
                "threads": torch.get_num_threads(),
            }
            write_json(work / f"{name}.json", found)


@app.command()
def table(model: Model, work: Work) -> None:
    """Write the results file from the rows that have been measured."""
    done = {name: json.loads((work / f"{name}.json").read_text()) for name in ROWS if (work / f"{name}.json").is_file()}
    steps = {row["steps"] for row in done.values()}
    if len(steps) > 1:
        raise typer.BadParameter(f"the rows in {work} were trained for different numbers of steps: {sorted(steps)}")
    rows = [
        {
            "": _name(name),
            **{metric: f"{score:.2f}" for metric, score in row["scores"].items()},
            "trained": f"{row['trained']:,}" if row["trained"] else "–",
            "bytes on disk": f"{row['bytes']:,}",
            "of the task": f"{row['own']:,}" if "own" in row else "–",
            "training loss": f"{row['training']['loss']:.3f}" if row["training"] else "–",
        }
        for name, row in done.items()
    ]
    budget = steps.pop()
    trained_for = "one epoch" if budget < 0 else f"{budget:,} steps"
    notes = f"""
{done["full"]["trained"]:,} parameters of `MODEL`; E2E, scored on the meanings of its validation set against all their
references. Every row that trains: {trained_for} of {BATCH} texts, seed {SEED}, the same order, linear decay, no
dropout, no weight decay; one run each, last step, nothing chosen on the validation set. Texts are searched for
greedily.
Learning rates: {_rates(done)}; norms and biases beside alphas {MORE_RATE:g}.
q: binary planes of a weight; row-wise: an alpha for each row of a plane; as given: before any training.
`of the task`: bytes of the file that holds what was trained, on a base that others share.
"""
    command = ["PREQUANT_DATA=DATA", "python", "tests/benchmarks/alphatuning_e2e.py", "run"]
    command += ["--model", "MODEL", "--work", "DIR"]
    if budget >= 0:
        command += ["--steps", str(budget)]
    threads = threads_of(done.values())
    print(write("alphatuning_e2e", "AlphaTuning on E2E", command, notes, {"Scores": rows}, threads=threads).read_text())


def _rates(done: dict[str, Any]) -> str:
    rates = {}
    for name, row in done.items():
        if row["training"]:
            ours = name.startswith(("tuned", "more"))
            key = "scale_learning_rate" if ours else "learning_rate"
            rates["AlphaTuning, relative to the alphas" if ours else _name(name)] = row["settings"][key]
    return ", ".join(f"{rate:g} ({name})" for name, rate in rates.items())


if __name__ == "__main__":
    app()
