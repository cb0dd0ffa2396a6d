"""Whole encoders on packed weights against other libraries: latency, throughput, memory, time to load, bytes on disk.

python tests/benchmarks/model.py --work DIR

BERT-base with random weights, and all-MiniLM-L6-v2 on sentences of SST-2 (PREQUANT_DATA names the folder with
glue/SST-2). The machine must be idle: whatever else runs on its cores is in the figures, and the load is written down
beside them. The peers come with the extra ``bench``. In DIR is kept what each contender loads.
"""

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from model_cells import Measurement, contenders, measure_source  # type: ignore[import-not-found]
from model_inputs import SOURCES  # type: ignore[import-not-found]
from results_file import RESULTS, write  # type: ignore[import-not-found]
from rich.console import Console
from stands import (  # type: ignore[import-not-found]
    REFERENCE,
    Found,
    Plan,
    absent_list,
    chosen_of,
    loading_table,
    milliseconds,
    ratio_columns,
    ratios,
    records,
)

from prequant.runtime import native

MODELS = ["bert-base", "minilm"]
_log = Console(stderr=True, highlight=False)


def main(
    work: Annotated[Path, typer.Option(help="Folder where what contenders load is kept.")],
    model: Annotated[list[str], typer.Option(help=f"Some of {', '.join(SOURCES)}.")] = MODELS,
    contender: Annotated[
        list[str], typer.Option(help=f"Only the one so called, or all with this in their name; {REFERENCE} always.")
    ] = [""],  # noqa: B006
    threads: Annotated[int, typer.Option(min=0, help="0 for all.")] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Turns.")] = 9,
    warmup: Annotated[int, typer.Option(min=0, help="Turns that don't count.")] = 1,
    lead_ms: Annotated[float, typer.Option(min=0, help="Of calls before a block, which don't count.")] = 100,
    block_ms: Annotated[float, typer.Option(min=0, help="Of calls that are timed, in a turn.")] = 300,
    timeout_s: Annotated[float, typer.Option(min=1, help="To prepare or to load a model.")] = 900,
    out: Annotated[
        Path, typer.Option(help="Folder for model.md and model.json.", show_default="tests/benchmarks/results")
    ] = RESULTS,
) -> None:
    """Measure, and write model.md and model.json."""
    if unknown := set(model) - set(SOURCES):
        raise typer.BadParameter(f"--model {sorted(unknown)}: expected some of {list(SOURCES)}")
    try:
        chosen = chosen_of(contenders(), contender)
    except ValueError as error:
        raise typer.BadParameter(f"--contender {error}") from None
    plan = Plan(threads or torch.get_num_threads(), repeats, warmup, lead_ms / 1000, block_ms / 1000, timeout_s)
    load = os.getloadavg()[0]
    if load > 0.5:
        _log.print(f"[bold]the load of this machine is {load:.1f}: what else runs on it will be in the figures")
    found = Found()
    for name in model:
        found.add(measure_source(plan, SOURCES[name], chosen, work.absolute(), _log.print))
        path = _write(plan, found, load, out)  # as far as it goes
    Console().print(path.read_text(encoding="utf-8"), markup=False, highlight=False, soft_wrap=True)


# ---- what is written -------------------------------------------------------------------------------------------------


def _write(plan: Plan, found: Found, load: float, out: Path) -> Path:
    cells: dict[tuple[str, str], list[Measurement]] = {}
    for m in found.measurements:
        cells.setdefault((m.model, m.cell), []).append(m)
    tables: dict[str, list[dict[str, str]]] = {}
    measurements = []
    for (model, cell_name), cell in cells.items():
        rows = []
        for m in cell:
            against = ratios(m, cell, "median")
            measurements.append({**asdict(m), **against})
            rows.append(
                {
                    "": m.name,
                    "ms a batch": f"{milliseconds(m.median)} ({milliseconds(m.p10)}–{milliseconds(m.p90)})",
                    "sentences/s": f"{m.throughput:,.1f}",
                    **ratio_columns(against),
                    "error": f"{m.error:.2g}",
                    "cosine": f"{m.cosine:.4f}",
                }
            )
        tables[f"{model}, {cell_name}"] = rows
    for model in dict.fromkeys(loaded.model for loaded in found.loaded):
        tables[f"{model}: loading"] = loading_table(model, found.loaded)
    return write(
        "model",
        "Whole encoders",
        ["python", "tests/benchmarks/model.py", *sys.argv[1:]],
        _notes(plan, found, load),
        tables,
        folder=out,
        threads=str(plan.threads),
        packages=("torchao", "onnx", "onnxruntime", "openvino", "nncf"),
        measurements=records(found, measurements, plan, load),
    )


def _notes(plan: Plan, found: Found, load: float) -> str:
    return f"""
Milliseconds a batch: the median over all batches of {plan.repeats} turns, in parentheses the 10th and 90th percentile;
sentences a second are over all of them. Each contender has a process of its own, bound to {plan.threads} cores and
stopped while another's turn is on. A turn is {plan.lead * 1000:g} ms of batches that don't count, then
{plan.block * 1000:g} ms, a whole pass at least, that do. Outputs are last hidden states; errors are relative to those
of `{REFERENCE}`, and the cosine is with them, on all tokens that are no padding. Load of the machine before:
{load:.2f}; prequant's kernels: {native.chosen_isa()}.

Ratios are the latency of `{REFERENCE}`, of the best peer at any width, and of the best of the same width (8 bits; 4
and fewer, but no fewer than ours) over this one's, so more is better. `bert-base` has random weights and tokens, so
its errors say that the arithmetic is right, not what quantization costs; `minilm` is all-MiniLM-L6-v2 on sentences of
SST-2.

Memory is what a process has over one that has only imported the libraries: at most while it loads and runs the first
batch of the first table of the model, and after that. Memory that a library's compiler takes in other processes does
not count. Seconds to load include compiling where it comes first; inductor compiles at the first batch.

- `prequant F, A`: weights and embeddings in format F; inputs of linears quantized as they come (`affine8:row`), or
  float and weight-only. `affine4:row`: 4-bit codes with a scale for each row, `:group64`: for 64 columns.
- torchao's peers are its `quantize_` for 8-bit dynamic linears and for 4-bit weights, and its quantization of exported
  graphs for x86 with calibrated scales; all compiled with frozen weights, as are the compiled float ones.
- ONNX Runtime: its optimizer for BERT, then its dynamic quantization or its 4-bit weights (accuracy level 4).
- OpenVINO: converted from torch, compiled for the shape of each cell; int8 is NNCF's post-training
  quantization.{absent_list(found)}
"""


if __name__ == "__main__":
    typer.run(main)
