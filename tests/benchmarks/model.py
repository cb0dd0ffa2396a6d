"""Whole encoders on packed weights against other libraries: latency, throughput, memory, time to load, bytes on disk.

python tests/benchmarks/model.py --work DIR

BERT-base with random weights, and all-MiniLM-L6-v2 on sentences of SST-2 (PREQUANT_DATA names the folder with
glue/SST-2). The machine must be idle: whatever else runs on its cores is in the figures, and the load is written down
beside them. The peers come with the extra ``bench``. In DIR is kept what each contender loads.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from model_cells import REFERENCE, Found, Measurement, Plan, contenders, measure_source  # type: ignore[import-not-found]
from model_contenders import PREQUANT  # type: ignore[import-not-found]
from model_inputs import SOURCES  # type: ignore[import-not-found]
from results_file import RESULTS, write  # type: ignore[import-not-found]
from rich.console import Console

from prequant.runtime import native

MODELS = ["bert-base", "minilm"]
MIB = 1 << 20
_log = Console(stderr=True, highlight=False)


def main(
    work: Annotated[Path, typer.Option(help="Folder where what contenders load is kept.")],
    model: Annotated[list[str], typer.Option(help=f"Some of {', '.join(SOURCES)}.")] = MODELS,
    contender: Annotated[
        list[str], typer.Option(help=f"Only those with this in their name; {REFERENCE} is always there.")
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
    everybody = contenders()
    chosen = [c for c in everybody if c.name == REFERENCE or any(part in c.name for part in contender)]
    for part in contender:
        if not any(part in c.name for c in everybody):
            raise typer.BadParameter(
                f"--contender {part!r}: no one has it in their name: {[c.name for c in everybody]}"
            )
    plan = Plan(threads or torch.get_num_threads(), repeats, warmup, lead_ms / 1000, block_ms / 1000, timeout_s)
    load = os.getloadavg()[0]
    if load > 0.5:
        _log.print(f"[bold]the load of this machine is {load:.1f}: what else runs on it will be in the figures")
    found = Found()
    for name in model:
        part = measure_source(plan, SOURCES[name], chosen, work.absolute(), _log.print)
        found.loaded += part.loaded
        found.measurements += part.measurements
        found.absent |= part.absent
        path = _write(plan, found, load, out)  # as far as it goes
    Console().print(path.read_text(encoding="utf-8"), markup=False, highlight=False, soft_wrap=True)


# ---- what is written -------------------------------------------------------------------------------------------------


def compared(one: Measurement, cell: Sequence[Measurement]) -> dict[str, Any]:
    """Latencies of others over this one's: the reference, and for prequant the fastest peer and the fastest of its
    width (8 bits, or up to 4 but no fewer than ours). ``cell`` is all that was measured on one cell."""
    reference = next(m for m in cell if m.name == REFERENCE)
    ratios: dict[str, Any] = {"over_fp32": reference.median / one.median}
    if one.library != PREQUANT:
        return ratios
    peers = [m for m in cell if m.library != PREQUANT]
    widths = range(8, 9) if one.bits > 4 else range(one.bits, 5)
    for key, rivals in (("peer", peers), ("peer_of_width", [m for m in peers if m.bits in widths])):
        best = min(rivals, key=lambda m: m.median, default=None)
        ratios[f"best_{key}"] = best.name if best else None
        ratios[f"over_best_{key}"] = best.median / one.median if best else None
    return ratios


def _write(plan: Plan, found: Found, load: float, out: Path) -> Path:
    cells: dict[tuple[str, str], list[Measurement]] = {}
    for m in found.measurements:
        cells.setdefault((m.model, m.cell), []).append(m)
    tables: dict[str, list[dict[str, str]]] = {}
    records = []
    for (model, cell_name), cell in cells.items():
        rows = []
        for m in cell:
            ratios = compared(m, cell)
            records.append({**asdict(m), **ratios})
            rows.append(
                {
                    "": m.name,
                    "ms a batch": f"{_ms(m.median)} ({_ms(m.p10)}–{_ms(m.p90)})",
                    "sentences/s": f"{m.throughput:,.1f}",
                    "fp32 / it": _ratio(ratios["over_fp32"]),
                    "best peer / it": _ratio(ratios.get("over_best_peer")),
                    "best of width / it": _ratio(ratios.get("over_best_peer_of_width")),
                    "error": f"{m.error:.2g}",
                    "cosine": f"{m.cosine:.4f}",
                }
            )
        tables[f"{model}, {cell_name}"] = rows
    for model in dict.fromkeys(loaded.model for loaded in found.loaded):
        tables[f"{model}: loading"] = [
            {
                "": loaded.name,
                "peak MiB": f"{loaded.peak / MIB:,.0f}",
                "MiB after": f"{loaded.resident / MIB:,.0f}",
                "MiB on disk": f"{loaded.disk / MIB:,.1f}",
                "peak / disk": f"{loaded.peak / loaded.disk:.2f}",
                "s to load": f"{loaded.load:.2f}",
                "s for the first batch": f"{loaded.first_call:.2f}",
            }
            for loaded in found.loaded
            if loaded.model == model
        ]
    return write(
        "model",
        "Whole encoders",
        ["python", "tests/benchmarks/model.py", *sys.argv[1:]],
        _notes(plan, found, load),
        tables,
        folder=out,
        threads=str(plan.threads),
        packages=("torchao", "onnx", "onnxruntime", "openvino", "nncf"),
        measurements={
            "plan": asdict(plan),
            "load": load,
            "absent": found.absent,
            "loaded": [asdict(loaded) for loaded in found.loaded],
            "measurements": records,
        },
    )


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f}" if seconds < 0.1 else f"{1000 * seconds:,.0f}"


def _ratio(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}"


def _notes(plan: Plan, found: Found, load: float) -> str:
    absent = "".join(f"\n- absent: {name}: {reason}" for name, reason in found.absent.items())
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
  float and weight-only.
- torchao's peers are its `quantize_` for 8-bit dynamic linears and for 4-bit weights, and its quantization of exported
  graphs for x86 with calibrated scales; all compiled with frozen weights, as are the compiled float ones.
- ONNX Runtime: its optimizer for BERT, then its dynamic quantization or its 4-bit weights (accuracy level 4).
- OpenVINO: converted from torch, compiled for the shape of each cell; int8 is NNCF's post-training
  quantization.{absent}
"""


if __name__ == "__main__":
    typer.run(main)
