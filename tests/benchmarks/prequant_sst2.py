"""PreQuant on all-MiniLM-L6-v2 and the whole of SST-2, against the same encoder fine-tuned in float32 on the same
budget.

PREQUANT_DATA names a folder with glue/SST-2. Rows that are done are kept; --only measures some::

    python tests/benchmarks/prequant_sst2.py run --work DIR
    python tests/benchmarks/prequant_sst2.py run --work DIR --only fp32 --only 4-row-mse
    python tests/benchmarks/prequant_sst2.py table --work DIR
"""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from results_file import data_folder, encoder_folder, write  # type: ignore[import-not-found]
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from prequant.checkpoint import save
from prequant.compress import NONE, compress
from prequant.finetune import finetune_baseline
from prequant.measure import weight_bytes, write_json
from prequant.passes import Pipeline, Program, QuantizeWeights, SplitOutliers, lower, weights
from prequant.recipes import PreQuant
from prequant.report_file import REPORT_FILE
from prequant.runtime import Granularity
from prequant.sources import canonical_program
from prequant.tasks import Limits, task
from prequant.training import TrainingSettings

SST2 = task("sst2")
EPOCHS, SEED, MAX_LENGTH = 3.0, 42, 128
OUTLIERS = 0.0125
"""Share of each matrix that is kept: the most that leaves the trained parameters under 1 % of this model."""
STRATEGIES = ("mse", "sigma", "minmax", "hqq")
GRANULARITIES = ("row", "tensor")
HEAD = ("classifier.weight",)

TRAINED: dict[str, dict[str, Any]] = {
    f"{bits}-{granularity}-{strategy}": {"bits": bits, "granularity": granularity, "strategy": strategy}
    for bits, granularity, strategy in (
        *((bits, "row", "mse") for bits in (8, 4, 3, 2)),
        *((4, "row", strategy) for strategy in ("sigma", "minmax", "hqq")),
        (4, "tensor", "mse"),
    )
}

app = typer.Typer(add_completion=False)
Work = Annotated[Path, typer.Option(help="Where models and the figures of each row are kept.")]


# ---- rows ------------------------------------------------------------------------------------------------------------


def fp32(work: Path, dropout: bool = True) -> dict[str, Any]:
    """The encoder fine-tuned in float32."""
    folder = work / ("fp32-model" if dropout else "fp32-without-dropout-model")
    training = TrainingSettings(epochs=EPOCHS, seed=SEED, dropout=dropout)
    score = finetune_baseline(
        encoder_folder(), SST2, data_folder() / "glue/SST-2", folder, training, max_length=MAX_LENGTH
    )
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "accuracy": score.metric,
        "bytes": weight_bytes(folder),
        "parameters": parameters,
        "trained": parameters,
        "training": json.loads((folder / REPORT_FILE).read_text())["training"],
        "settings": asdict(training),
    }


def stage2(name: str) -> Callable[[Path], dict[str, Any]]:
    """PreQuant with stage 2."""

    def row(work: Path) -> dict[str, Any]:
        recipe = PreQuant(outlier_ratio=OUTLIERS, **TRAINED[name])
        recipe = replace(recipe, training=replace(recipe.training, epochs=EPOCHS, seed=SEED))
        report = compress(
            encoder_folder(),
            recipe,
            SST2,
            data_folder() / "glue/SST-2",
            work / f"{name}-model",
            baseline=NONE,
            max_length=MAX_LENGTH,
        )
        return report.to_json()

    return row


def untrained(work: Path) -> dict[str, Any]:
    """The fine-tuned encoder, quantized without data: every width, granularity and strategy, without and with outliers
    kept."""
    original, bench = _finetuned(work)
    rows = []
    for ratio in (0.0, 0.005):
        for granularity in GRANULARITIES:
            for strategy in STRATEGIES:
                row: dict[str, Any] = {"outliers": ratio, "granularity": granularity, "strategy": strategy}
                for bits in (8, 4, 3, 2):
                    program = _quantized(original, bits, granularity, strategy, ratio)
                    row[f"{bits} bits"] = SST2.evaluate(lower(program), *bench, progress=False).metric
                rows.append(row)
                print(row, flush=True)
    return {"rows": rows}


def equality(work: Path) -> dict[str, Any]:
    """Lowered against simulated over the validation set, and size against arithmetic."""
    original, bench = _finetuned(work)
    rows = []
    for bits in (8, 4, 3, 2):
        for ratio in (0.0, 0.005):
            program = _quantized(original, bits, "row", "mse", ratio)
            packed = lower(program)
            simulated = SST2.evaluate(program, *bench, progress=False).predictions.astype(np.float64)
            lowered = SST2.evaluate(packed, *bench, progress=False).predictions.astype(np.float64)
            save(packed, work / "size-model")
            on_disk = (work / "size-model/model.safetensors").stat().st_size
            rows.append(
                {
                    "bits": bits,
                    "outliers": ratio,
                    "max relative difference of logits": float(
                        np.max(np.abs(lowered - simulated) / np.abs(simulated).max())
                    ),
                    "predictions that differ": int((lowered.argmax(1) != simulated.argmax(1)).sum()),
                    "bytes of codes": sum(
                        packed.tensor(v.tensors["codes"]).numel() for v in weights(packed) if "codes" in v.tensors
                    ),
                    "model.safetensors": on_disk,
                    "predicted": _predicted_bytes(original, bits, ratio),
                }
            )
            print(rows[-1], flush=True)
    return {"rows": rows}


def _finetuned(work: Path) -> tuple[Program, tuple[Any, Any, Limits]]:
    folder = work / "fp32-model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    rows = SST2.load(data_folder() / "glue/SST-2")["validation"]
    return canonical_program(model, tokenizer), (rows, tokenizer, Limits(MAX_LENGTH))


def _quantized(original: Program, bits: int, granularity: str, strategy: str, ratio: float) -> Program:
    split = [SplitOutliers(ratio=ratio, dtype="float16", exclude=HEAD)] if ratio else []
    return Pipeline(
        [*split, QuantizeWeights(bits=bits, granularity=Granularity(granularity), strategy=strategy, exclude=HEAD)]
    )(original)


def _predicted_bytes(original: Program, bits: int, ratio: float) -> int:
    """Bytes by arithmetic: codes, a float32 scale per row, 4 bytes per outlier and per row of offsets, and floats as
    they were."""
    total = sum(p.numel() * 4 for p in original.parameters())
    for view in weights(original):
        if view.name in HEAD:
            continue
        rows, columns = view.shape
        total += rows * (-(-columns * bits // 8) + 4) - rows * columns * 4
        if ratio:
            total += round(ratio * rows * columns) * 4 + (rows + 1) * 4
    return total


# ---- commands --------------------------------------------------------------------------------------------------------

ROWS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "fp32": fp32,
    "fp32-without-dropout": partial(fp32, dropout=False),
    **{name: stage2(name) for name in TRAINED},
    "untrained": untrained,
    "equality": equality,
}


@app.command()
def run(work: Work, only: Annotated[list[str], typer.Option(help="A row; repeat for several.")] = list(ROWS)) -> None:  # noqa: B006
    """Measure rows; those whose figures are in the work folder already are kept."""
    work.mkdir(parents=True, exist_ok=True)
    for name in only:
        if name not in ROWS:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(ROWS)}")
        if not (work / f"{name}.json").is_file():
            print(f"---- {name}", flush=True)
            write_json(work / f"{name}.json", ROWS[name](work))


@app.command()
def table(work: Work) -> None:
    """Write the results file from the rows that have been measured."""
    done = {name: json.loads((work / f"{name}.json").read_text()) for name in ROWS if (work / f"{name}.json").is_file()}
    base = done["fp32"]
    rows = [_line("fp32 fine-tuning", base["accuracy"], base["bytes"], 1.0, base, base["training"])]
    if "fp32-without-dropout" in done:
        other = done["fp32-without-dropout"]
        rows.append(_line("fp32, no dropout", other["accuracy"], other["bytes"], 1.0, base, other["training"]))
    settings: Any = None
    for name in TRAINED:
        if name in done:
            report = done[name]
            ours, settings = report["compressed"], report["settings"]
            share = ours["trainable"] / ours["parameters"]
            bits, granularity, strategy = name.split("-")
            rows.append(
                _line(
                    f"{bits} bits, {granularity}, {strategy}",
                    ours["metric"],
                    ours["bytes_on_disk"],
                    share,
                    base,
                    ours["training"],
                )
            )
    tables = {"With stage 2": rows}
    if "untrained" in done:
        tables["Without stage 2: accuracy of the fine-tuned encoder, quantized without data"] = [
            {key: f"{100 * value:.2f}" if key.endswith("bits") else value for key, value in row.items()}
            for row in done["untrained"]["rows"]
        ]
    if "equality" in done:
        tables["Lowered against simulated, and size against arithmetic"] = [
            {
                **row,
                "max relative difference of logits": f"{row['max relative difference of logits']:.1e}",
                "size over predicted": f"{row['model.safetensors'] / row['predicted']:.4f}",
            }
            for row in done["equality"]["rows"]
        ]
    notes = f"""
all-MiniLM-L6-v2 (22.7 M parameters), SST-2: 67,349 training sentences, accuracy on the 872 of the validation set.
Every training row: {EPOCHS:g} epochs, batches of 32, at most {MAX_LENGTH} tokens, seed {SEED}, the same order of
examples and the same head to start from; one run each, last step, nothing chosen on the validation set. The standard
error of an accuracy near 90 % on 872 sentences is about 1 point. fp32 trains everything
({json.dumps(base["settings"])}). PreQuant, but for the bits, granularity and strategy that a row
names: {json.dumps(settings["recipe"]) if settings else ""}. Quantized are all
linear weights and embeddings, the classifier aside. Bytes are those of the safetensors files on disk; "predicted" are
those by arithmetic: codes, a float32 scale a row, 4 bytes an outlier and a row of offsets, floats as they were. Stage 2
is the training of the outliers and of what else `train` names. Differences are in points, to fp32 fine-tuning. Peak MB:
the model's tensors and what the process grew by.
"""
    command = ["PREQUANT_DATA=DATA", "python", "tests/benchmarks/prequant_sst2.py", "run", "--work", "DIR"]
    print(write("prequant_sst2", "PreQuant on SST-2", command, notes, tables).read_text())


def _line(name: str, accuracy: float, size: int, share: float, base: Any, training: Any) -> dict[str, Any]:
    return {
        "model": name,
        "accuracy": f"{100 * accuracy:.2f}",
        "difference": f"{100 * (accuracy - base['accuracy']):+.2f}",
        "trained": f"{100 * share:.2f} %",
        "bytes on disk": f"{size:,}",
        "smaller by": f"{base['bytes'] / size:.2f}x",
        "peak MB in training": f"{training['peak_memory'] / 1e6:.0f}" if training else "",
    }


if __name__ == "__main__":
    torch.manual_seed(SEED)
    app()
