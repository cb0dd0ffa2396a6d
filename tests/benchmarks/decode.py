"""Decoding on packed weights against other libraries: milliseconds a token, tokens a second, memory, time to load.

python tests/benchmarks/decode.py --work DIR

GPT-2's smallest shape with random weights: a prompt of 128 tokens, then 64 more, greedily. The machine must be idle:
whatever else runs on its cores is in the figures, and the load is written down beside them. The peers come with the
extra ``bench``. In DIR is kept what each contender loads.
"""

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from decode_cells import Measurement, contenders, measure_source  # type: ignore[import-not-found]
from decode_contenders import SOURCES  # type: ignore[import-not-found]
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

_log = Console(stderr=True, highlight=False)


def main(
    work: Annotated[Path, typer.Option(help="Folder where what contenders load is kept.")],
    model: Annotated[list[str], typer.Option(help=f"Some of {', '.join(SOURCES)}.")] = ["gpt2"],  # noqa: B006
    contender: Annotated[
        list[str], typer.Option(help=f"Only the one so called, or all with this in their name; {REFERENCE} always.")
    ] = [""],  # noqa: B006
    threads: Annotated[int, typer.Option(min=0, help="0 for all.")] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Turns, of a whole text each.")] = 7,
    warmup: Annotated[int, typer.Option(min=0, help="Turns that don't count.")] = 1,
    lead_ms: Annotated[float, typer.Option(min=0, help="Of texts before one that counts.")] = 100,
    timeout_s: Annotated[float, typer.Option(min=1, help="To prepare or to load a model.")] = 900,
    out: Annotated[
        Path, typer.Option(help="Folder for decode.md and decode.json.", show_default="tests/benchmarks/results")
    ] = RESULTS,
) -> None:
    """Measure, and write decode.md and decode.json."""
    if unknown := set(model) - set(SOURCES):
        raise typer.BadParameter(f"--model {sorted(unknown)}: expected some of {list(SOURCES)}")
    try:
        chosen = chosen_of(contenders(), contender)
    except ValueError as error:
        raise typer.BadParameter(f"--contender {error}") from None
    plan = Plan(threads or torch.get_num_threads(), repeats, warmup, lead_ms / 1000, 0.0, timeout_s)
    load = os.getloadavg()[0]
    if load > 0.5:
        _log.print(f"[bold]the load of this machine is {load:.1f}: what else runs on it will be in the figures")
    found = Found()
    for name in model:
        found.add(measure_source(plan, SOURCES[name], chosen, work.absolute(), _log.print))
        path = _write(plan, found, load, out)  # as far as it goes
    Console().print(path.read_text(encoding="utf-8"), markup=False, highlight=False, soft_wrap=True)


def _write(plan: Plan, found: Found, load: float, out: Path) -> Path:
    cells: dict[tuple[str, int], list[Measurement]] = {}
    for m in found.measurements:
        cells.setdefault((m.model, m.batch), []).append(m)
    tables: dict[str, list[dict[str, str]]] = {}
    measurements = []
    ms = milliseconds
    for (model, batch), cell in cells.items():
        rows = []
        for m in cell:
            against = ratios(m, cell, "step")
            prompt = {f"prompt_{key}": value for key, value in ratios(m, cell, "prefill").items()}
            measurements.append({**asdict(m), **against, **prompt})
            rows.append(
                {
                    "": m.name,
                    "ms a step": f"{ms(m.step)} ({ms(m.step_p10)}–{ms(m.step_p90)})",
                    "tokens/s": f"{m.tokens_per_second:,.0f}",
                    **ratio_columns(against),
                    "ms for the prompt": f"{ms(m.prefill)} ({ms(m.prefill_p10)}–{ms(m.prefill_p90)})",
                    "new tokens/s, with prompt": f"{m.whole_tokens_per_second:,.0f}",
                    "error": f"{m.error:.2g}",
                    "cosine": f"{m.cosine:.4f}",
                }
            )
        tables[f"{model}, batch {batch}"] = rows
    for model in dict.fromkeys(loaded.model for loaded in found.loaded):
        tables[f"{model}: loading"] = loading_table(model, found.loaded)
    return write(
        "decode",
        "Decoding",
        ["python", "tests/benchmarks/decode.py", *sys.argv[1:]],
        _notes(plan, found, load),
        tables,
        folder=out,
        threads=str(plan.threads),
        packages=("onnx", "onnxruntime", "openvino", "nncf", "llama-cpp-python", "gguf"),
        measurements=records(found, measurements, plan, load),
    )


def _notes(plan: Plan, found: Found, load: float) -> str:
    lengths = "; ".join(
        f"`{name}`: prompts of {source.prompt} tokens, {source.new} new ones"
        for name, source in SOURCES.items()
        if any(m.model == name for m in found.measurements)
    )
    return f"""
Milliseconds a step, which is one token for each text of the batch: the median over all steps of {plan.repeats} texts,
in parentheses the 10th and 90th percentile. {lengths}; greedily, with the choice of the token, which is the same code
for everybody, in the time. Weights and prompts are random. Each contender has a process of its own, bound to
{plan.threads} cores and stopped while another's turn is on; a turn begins with {plan.lead * 1000:g} ms of short texts
that don't count. Errors are those of logits, relative to those of `{REFERENCE}`, after the prompt and after some tokens
that all are given. Load of the machine before: {load:.2f}; prequant's kernels: {native.chosen_isa()}.

Ratios are the step of `{REFERENCE}`, of the best peer at any width, and of the best of the same width (8 bits; 4 and
fewer, but no fewer than ours) over this one's, so more is better. Memory is what a process has over one that has only
imported the libraries: at most while it loads and runs a prompt and a step, and after that.

- `prequant F, A`: weights, embeddings and the tied head in format F (`affine4:row`: 4-bit codes with a scale for
  each row, `:group64`: for 64 columns); inputs of linears quantized as they come.
- ONNX Runtime has keys and values as inputs and outputs, OpenVINO as its state, compiled torch in a cache of fixed
  size, llama.cpp in its own, where each text is a sequence.
- llama.cpp is `llama-cpp-python`, built for this machine, on a GGUF file of the same weights; without AMX, with
  which its quantized models may crash.{absent_list(found)}
"""


if __name__ == "__main__":
    typer.run(main)
