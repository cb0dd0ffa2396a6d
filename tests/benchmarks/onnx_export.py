"""Exports to ONNX over SST-2: accuracy and time of ONNX Runtime beside those of the Program.

A classifier that was fine-tuned on SST-2 (``prequant finetune`` makes one), compressed without training, reads the
sentences of the development set (PREQUANT_DATA). All on one thread; Program and ONNX Runtime take the batches in
turn::

    python tests/benchmarks/onnx_export.py --model FINE-TUNED --work DIR
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime
import torch
import typer
from results_file import data_folder, write  # type: ignore[import-not-found]
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from prequant.export import export_onnx
from prequant.passes import Canonicalize, Pipeline, Program, QuantizeActivations, QuantizeWeights, lower
from prequant.runtime import Granularity
from prequant.tasks import task
from prequant.trace import trace

BATCHES = (1, 32)
GROUP: dict[str, Any] = {"granularity": Granularity.GROUP, "group_size": 64}

app = typer.Typer(add_completion=False)


def session(path: Path) -> Any:
    """ONNX Runtime on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


WAYS = {"float32": None, "4-bit weights": False, "4-bit weights, 8-bit inputs": True}
"""Whether inputs are quantized; None for the model as it is."""
EXPORTS: dict[str, dict[str, Any]] = {
    "qdq": {"style": "qdq"},
    "matmulnbits": {"style": "matmulnbits"},
    "matmulnbits, level 4": {"style": "matmulnbits", "accuracy_level": 4},
    "matmulnbits, opset 23": {"style": "matmulnbits", "opset": 23},
}


def batches(model: Path, size: int) -> list[dict[str, np.ndarray[Any, Any]]]:
    """The development set in order, padded batch by batch, with its labels."""
    sst2, tokenizer = task("sst2"), AutoTokenizer.from_pretrained(model)
    longest = min(128, tokenizer.model_max_length)
    rows = sst2.encode(
        sst2.load(str(data_folder() / "glue" / "SST-2"))["validation"], tokenizer, longest, progress=False
    )
    collate = sst2.collator(tokenizer)
    names = ("input_ids", "attention_mask", "labels")
    made = []
    for start in range(0, len(rows), size):
        batch = collate([rows[i] for i in range(start, min(start + size, len(rows)))])
        made.append({name: batch[name].numpy() for name in names})
    return made


def runner(program: Program) -> Callable[[dict[str, Any]], np.ndarray[Any, Any]]:
    """The Program, from arrays to logits."""

    def run(batch: dict[str, Any]) -> np.ndarray[Any, Any]:
        with torch.no_grad():
            return np.asarray(program(**{key: torch.from_numpy(value) for key, value in batch.items()}).logits)

    return run


def of_session(running: Any) -> Callable[[dict[str, Any]], np.ndarray[Any, Any]]:
    """ONNX Runtime, from arrays to logits."""
    return lambda batch: np.asarray(running.run(["logits"], batch)[0])


def compressed(traced: Program, way: str) -> Program:
    """The program in one of :data:`WAYS`."""
    if WAYS[way] is None:
        return traced
    passes = [QuantizeWeights(**GROUP), *([QuantizeActivations()] if WAYS[way] else [])]
    return lower(Pipeline(passes)(traced))


def score_rows(model: Path, work: Path, limit: int | None, chosen: list[str]) -> Iterator[dict[str, Any]]:
    """Accuracy and time of the Program and of each export of it."""
    classifier = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32).eval()
    example = torch.zeros(2, 7, dtype=torch.int64)
    traced = Canonicalize()(trace(classifier, {"input_ids": example, "attention_mask": example + 1}))
    sizes = {size: batches(model, size)[: limit and -(-limit // size)] for size in BATCHES}
    for way in WAYS:
        program = compressed(traced, way)
        contenders = {"prequant": runner(program)}
        for name in chosen if WAYS[way] is not None else ():
            path = work / "sst2.onnx"
            export_onnx(program, path, **EXPORTS[name])
            contenders[f"ONNX Runtime, {name}"] = of_session(session(path))
        seconds = {name: dict[int, list[float]]() for name in contenders}
        right = dict.fromkeys(contenders, 0)
        apart = dict.fromkeys(contenders, 0.0)
        for size, all_batches in sizes.items():
            for batch in all_batches:
                feed = {name: value for name, value in batch.items() if name != "labels"}
                reference = None
                for name, call in contenders.items():
                    started = time.perf_counter()
                    logits = call(feed)
                    seconds[name].setdefault(size, []).append(time.perf_counter() - started)
                    if size == BATCHES[0]:
                        right[name] += int((logits.argmax(-1) == batch["labels"]).sum())
                        reference = logits if reference is None else reference
                        apart[name] = max(apart[name], float(np.abs(logits - reference).max()))
        count = sum(len(batch["labels"]) for batch in sizes[BATCHES[0]])
        for name in contenders:
            medians = {size: float(np.median(values)) for size, values in seconds[name].items()}
            first = {size: float(np.median(values)) for size, values in seconds["prequant"].items()}
            yield {
                "weights and inputs": way,
                "run by": name,
                "accuracy": f"{100 * right[name] / count:.2f}",
                "largest difference of logits": f"{apart[name]:.1e}",
                **{f"ms, batch {size}": f"{1000 * medians[size]:.2f}" for size in BATCHES},
                **{f"× prequant's, batch {size}": f"{medians[size] / first[size]:.2f}" for size in BATCHES},
            }


@app.command()
def run(
    model: Annotated[Path, typer.Option(help="A classifier that was fine-tuned on SST-2.")],
    work: Annotated[Path, typer.Option(help="Where models are written.")],
    export: Annotated[list[str] | None, typer.Option(help="; ".join(EXPORTS) + ".")] = None,
    limit: Annotated[int | None, typer.Option(help="So many sentences at most.", min=1)] = None,
    out: Annotated[Path | None, typer.Option(help="The folder of the results file.")] = None,
) -> None:
    """Measure, and write the results file."""
    torch.set_num_threads(1)
    if unknown := set(export or ()) - set(EXPORTS):
        raise typer.BadParameter(f"no export is called {unknown.pop()!r}")
    work.mkdir(parents=True, exist_ok=True)
    scores = list(score_rows(model, work, limit, export or list(EXPORTS)))
    notes = """
all-MiniLM-L6-v2 fine-tuned for SST-2, the 872 sentences of its validation set. 4-bit weights, a scale for each group
of 64, without any training; opset 21 where nothing else is said. The difference of logits is absolute, from the Program
of the same weights, at batch 1. Times are medians over batches, which all took in turn, with tokens padded batch by
batch. ONNX Runtime rounds the inputs of what it
fuses out of QDQ to 8 bits (its default), and those of MatMulNBits at level 4.
"""
    command = ["PREQUANT_DATA=DATA", "python", "tests/benchmarks/onnx_export.py", "--model", "MODEL", "--work", "DIR"]
    where = {} if out is None else {"folder": out}
    tables = {"SST-2": scores}
    packages = ("onnx", "onnxscript", "onnxruntime")
    title = "Exports to ONNX on SST-2"
    print(write("onnx_export", title, command, notes, tables, threads="1", packages=packages, **where).read_text())


if __name__ == "__main__":
    app()
