"""One linear layer on packed weights against other libraries: microseconds a call, and how far from the floor.

python tests/benchmarks/linear.py

The machine must be idle: whatever else runs on its cores is in the figures, and the load is written down beside them.
Everything takes long; the options choose parts. The peers come with the extra ``bench``.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from ceilings import Ceilings, measure  # type: ignore[import-not-found]
from contenders import GROUP  # type: ignore[import-not-found]
from linear_cells import Found, Measurement, Plan, measure_shape  # type: ignore[import-not-found]
from processes import apart  # type: ignore[import-not-found]
from results_file import RESULTS, write  # type: ignore[import-not-found]
from rich.console import Console

from prequant.runtime import native
from prequant.runtime.errors import FormatError
from prequant.runtime.formats import WeightFormat

SHAPES = ["768x768", "3072x768", "768x3072", "2304x768", "4096x4096", "11008x4096"]
TOKENS = [1, 8, 32, 128, 512]
ROWS, GROUPS = [f"affine{bits}:row" for bits in (8, 4, 3, 2)], [f"affine{bits}:group{GROUP}" for bits in (8, 4, 2)]
FORMATS = [*ROWS, *GROUPS, "ternary:row", "binary:row", "bcq3:row"]
ACTIVATIONS = ["float32", "affine8:row"]
LIBRARIES = ["torch", "onnxruntime", "openvino"]
NONE = "none"
FLOATS = {"fp32": "torch fp32", "bf16": "torch bf16"}
MIB = 1 << 20

_log = Console(stderr=True, highlight=False)


def main(
    shape: Annotated[list[str], typer.Option(help="Rows x columns of the weight, NxK.")] = SHAPES,
    tokens: Annotated[list[int], typer.Option(min=1, help="Rows of the input, M.")] = TOKENS,
    format: Annotated[list[str], typer.Option(help="Weight formats of prequant.")] = FORMATS,
    activations: Annotated[
        list[str], typer.Option(help="float32, bfloat16, or the format that inputs are quantized to.")
    ] = ACTIVATIONS,
    threads: Annotated[list[int], typer.Option(min=1, help="1 and all, if not given.")] = [],  # noqa: B006
    peers: Annotated[list[str], typer.Option(help=f"Libraries: {', '.join(LIBRARIES)}, or none.")] = LIBRARIES,
    repeats: Annotated[int, typer.Option(min=1)] = 21,
    warmup: Annotated[int, typer.Option(min=0, help="Turns that don't count.")] = 3,
    lead_ms: Annotated[float, typer.Option(min=0, help="Of calls before a block, which don't count.")] = 10,
    block_ms: Annotated[float, typer.Option(min=0, help="Of calls that are timed as one.")] = 10,
    rotated_mib: Annotated[int, typer.Option(min=0, help="Of weights that each contender goes through.")] = 40,
    memory_mib: Annotated[int, typer.Option(min=1, help="That the memory's speed is measured on.")] = 1024,
    product_size: Annotated[int, typer.Option(min=16, help="Of the matrices that peaks are measured on.")] = 4096,
    out: Annotated[
        Path, typer.Option(help="Folder for linear.md and linear.json.", show_default="tests/benchmarks/results")
    ] = RESULTS,
) -> None:
    """Measure, and write linear.md and linear.json."""
    shapes = [_shape(text) for text in shape]
    counts = threads or sorted({1, torch.get_num_threads()})
    libraries = [] if peers == [NONE] else peers
    if unknown := set(libraries) - set(LIBRARIES):
        raise typer.BadParameter(f"--peers {sorted(unknown)}: expected some of {LIBRARIES}, or {NONE} alone")
    for text in (*format, *(a for a in activations if a not in ("float32", "bfloat16"))):
        try:
            WeightFormat.parse(text)
        except FormatError as error:
            raise typer.BadParameter(str(error)) from None
    chosen = (tuple(tokens), tuple(format), tuple(activations), tuple(libraries))
    plan = Plan(*chosen, repeats, warmup, rotated_mib * MIB, lead_ms / 1000, block_ms / 1000)
    load = os.getloadavg()[0]
    if load > 0.5:
        _log.print(f"[bold]the load of this machine is {load:.1f}: what else runs on it will be in the figures")

    found, ceilings = Found(), []
    for count in counts:
        ceilings.append(apart(count, measure, count, memory_mib * MIB, max(1, rotated_mib) * MIB, product_size))
        for one in shapes:
            _log.print(f"{one[0]} × {one[1]}, {count} threads")
            part = measure_shape(plan, one, ceilings[-1])
            found.measurements += part.measurements
            found.absent |= part.absent
            path = _write(plan, found, ceilings, load, counts, out)  # as far as it goes
    Console().print(path.read_text(encoding="utf-8"), markup=False, highlight=False, soft_wrap=True)


def _shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdigit() and columns.isdigit() and int(rows) and int(columns)) or int(columns) % GROUP:
        raise typer.BadParameter(f"--shape {text}: expected NxK, such as 768x3072, with K a multiple of {GROUP}")
    return int(rows), int(columns)


# ---- what is written -------------------------------------------------------------------------------------------------


def best_peer(ours: Measurement, cell: Sequence[Measurement]) -> Measurement | None:
    """The fastest peer of the same width: 8 bits, or up to 4 but no fewer than ours. ``cell`` is all on one layer."""
    widths = range(8, 9) if ours.bits > 4 else range(ours.bits, 5)
    return min((m for m in cell if m.library != "prequant" and m.bits in widths), key=lambda m: m.time, default=None)


def compared(ours: Measurement, cell: Sequence[Measurement]) -> dict[str, Any]:
    """Times of others over ours: the best peer of its width and its name, torch's float linears, the floors."""
    best = best_peer(ours, cell)
    others = {m.name: m.time for m in cell}
    floats = {f"over_{key}": others[name] / ours.time if name in others else None for key, name in FLOATS.items()}
    return {
        "best_peer": best.name if best else None,
        "over_best_peer": best.time / ours.time if best else None,
        **floats,
        "of_floor": ours.time / ours.floor,
        "of_memory_floor": ours.time / ours.memory_floor,
    }


def _write(
    plan: Plan, found: Found, ceilings: Sequence[Ceilings], load: float, counts: Sequence[int], out: Path
) -> Path:
    cells: dict[tuple[int, int, int], dict[int, list[Measurement]]] = {}
    for measurement in found.measurements:
        m = measurement
        cells.setdefault((m.threads, m.N, m.K), {}).setdefault(m.M, []).append(m)
    tables: dict[str, list[dict[str, str]]] = {"Ceilings": [_ceilings_row(c) for c in ceilings]}
    records = []
    for (threads, rows, columns), by_tokens in cells.items():
        heading = f"{rows} × {columns}, {threads} thread{'s' if threads > 1 else ''}"
        times: dict[str, dict[str, str]] = {}
        ratios: dict[str, dict[str, str]] = {}
        for tokens, cell in by_tokens.items():
            for m in cell:
                times.setdefault(m.name, {})[f"M = {tokens}"] = f"{_short(m.time)} ({_short(m.p10)}–{_short(m.p90)})"
                against = compared(m, cell) if m.library == "prequant" else {}
                records.append({**asdict(m), **against})
                if against:
                    keys = ("over_best_peer", "over_fp32", "over_bf16", "of_floor", "of_memory_floor")
                    text = " / ".join("–" if against[key] is None else f"{against[key]:.2f}" for key in keys)
                    ratios.setdefault(m.name, {})[f"M = {tokens}"] = text
        for title, named in ((f"{heading}: µs a call", times), (f"{heading}: ratios", ratios)):
            if named:
                tables[title] = [
                    {"": name, **{f"M = {tokens}": row.get(f"M = {tokens}", "–") for tokens in by_tokens}}
                    for name, row in named.items()
                ]
    return write(
        "linear",
        "One linear layer",
        ["python", "tests/benchmarks/linear.py", *sys.argv[1:]],
        _notes(plan, found, load),
        tables,
        folder=out,
        threads=" and ".join(map(str, counts)),
        packages=("onnx", "onnxruntime", "openvino", "nncf"),
        measurements={
            "plan": asdict(plan),
            "load": load,
            "ceilings": [asdict(c) for c in ceilings],
            "absent": found.absent,
            "measurements": records,
        },
    )


def _ceilings_row(ceilings: Ceilings) -> dict[str, str]:
    return {
        "threads": str(ceilings.threads),
        "memory, GB/s": f"{ceilings.memory / 1e9:.1f}",
        "as many bytes as rotate, GB/s": f"{ceilings.rotated / 1e9:.1f}",
        **{f"{kind}, 10⁹ operations/s": f"{value / 1e9:,.0f}" for kind, value in ceilings.operations.items()},
    }


def _short(microseconds: float) -> str:
    return f"{microseconds:.1f}" if microseconds < 100 else f"{microseconds:,.0f}"


def _notes(plan: Plan, found: Found, load: float) -> str:
    absent = "".join(f"\n- absent: {name}: {reason}" for name, reason in found.absent.items())
    return f"""
Microseconds of `Y = X Wᵀ`, `X [M, K]`, `W [N, K]`, no bias: the median of {plan.repeats} repeats, in parentheses the
10th and 90th percentile. Python is included: a call is that of the operator, or of the session. All contenders of a
column take turns: {plan.lead * 1000:g} ms of calls that don't count, then about {plan.block * 1000:g} ms that do. Each
goes through copies of its weight, at least three, and {plan.rotated / MIB:g} MiB together. Each library has a process
of its own, bound to as many cores as it has threads, and stopped while another's turn is on. Load of the machine
before: {load:.2f}; prequant's kernels: {native.chosen_isa()}.

Ratios are `peer / fp32 / bf16 / floor / memory floor`: the time of the best peer of the same width (of int8 for 8
bits; of 4 bits and fewer, but no fewer than ours, for 4 and fewer), of torch's float32 and of its bfloat16 linear over
ours, so more is better; then our time over the larger of bytes / bandwidth and operations / peak, so 1 is the best
possible, with the weights coming from where as many bytes as rotate lie, and from memory. The peaks are those of
torch's own products of large matrices: of the type of the inputs, int8 where they are quantized to 8 bits.

- `prequant F, A`: `packed_linear`, weight format F, activations A, float ones being weight-only. `affine4:row`:
  4-bit codes with a scale for each row, `:group64`: for 64 columns; `bcq3`: three binary planes.
- `oneDNN int8, static scales` gets its input quantized already, which is not counted. The other int8 peers, prequant's
  `affine8:row` and ONNX Runtime's `MatMulNBits` (accuracy level 4) quantize it inside the call.
- OpenVINO's weights are compressed by NNCF; it computes as it does by default.{absent}
"""


if __name__ == "__main__":
    typer.run(main)
