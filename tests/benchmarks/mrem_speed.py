"""How much faster MREM's modules are all at once, a process and a core for each, than one after the other on one core.

An encoder of all-MiniLM-L6-v2's width with more layers, whose weights are random (speed does not depend on them), and
sentences of SST-2 (PREQUANT_DATA). Layers are timed first, one a module, and cut into modules that take about as long
as each other. The embeddings take as long as a layer: 11 layers make four even modules, and of 12 one has to have 4.
``taskset`` pins every process to a core of its own::

    python tests/benchmarks/mrem_speed.py --work DIR
"""

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from results_file import data_folder, encoder_folder, write  # type: ignore[import-not-found]
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, set_seed

from prequant.passes.balance import best_cuts

SEED, SAMPLES, QUEUE = 42, 512, 16

app = typer.Typer(add_completion=False)


def make_model(folder: Path, layers: int) -> Path:
    """A random encoder of so many layers, with a real tokenizer."""
    config = AutoConfig.from_pretrained(encoder_folder(), num_hidden_layers=layers, num_labels=2)
    set_seed(SEED)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder_folder()).save_pretrained(folder)
    return folder


def measure(model: Path, out: Path, cuts: list[int], steps: int, cores: list[int]) -> dict[str, Any]:
    """The report of a run: in turn on one core, or a process on each of several."""
    texts = data_folder() / "glue" / "SST-2" / "train.parquet"
    words: list[Any] = ["compress", model, "--recipe", "mrem", "--calibration", texts, "--out", out, "--bits", 4]
    options = [f"boundaries={cuts}", f"samples={SAMPLES}", f"queue={QUEUE}"]
    words += ["--max-steps", steps, "--quiet", *(word for option in options for word in ("--set", option))]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    common = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    several = {"WORLD_SIZE": str(len(cores))} if len(cores) > 1 else {}
    shutil.rmtree(out, ignore_errors=True)
    processes = [
        subprocess.Popen(
            ["taskset", "-c", str(core), sys.executable, "-m", "prequant", *map(str, words)]
            + (["--parallel"] if several else []),
            env={**os.environ, **common, **several, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
        )
        for rank, core in enumerate(cores)
    ]
    if any(process.wait() for process in processes):
        raise SystemExit("a process failed")
    return dict(json.loads((out / "prequant-report.json").read_text()))


def rows(work: Path, layers: int, steps: int, repeats: int) -> list[dict[str, str]]:
    """What is measured of an encoder of so many layers."""
    model = make_model(work / f"model-{layers}", layers)
    each = measure(model, work / "out", list(range(1, layers)), max(10, steps // 10), [0])
    costs = [module["seconds"] for module in each["modules"]]
    made = []
    for count in (2, 4):
        cuts = list(best_cuts(range(layers + 1), count, lambda start, stop: sum(costs[start:stop])))
        turns = {"in turn": [0], "at once": list(range(count))}
        found = {
            how: [measure(model, work / "out", cuts, steps, cores) for _ in range(repeats)]
            for how, cores in turns.items()
        }
        seconds = {how: statistics.median(r["compressed"]["training"]["seconds"] for r in found[how]) for how in turns}
        alone = [statistics.median(r["modules"][i]["seconds"] for r in found["in turn"]) for i in range(count)]
        made.append(
            {
                "layers": str(layers),
                "modules": str(count),
                "layers of each": " ".join(str(module["blocks"]) for module in found["in turn"][0]["modules"]),
                "in turn, s": f"{seconds['in turn']:.1f}",
                "at once, s": f"{seconds['at once']:.1f}",
                "times faster": f"{seconds['in turn'] / seconds['at once']:.2f}",
                "bound of the schedule": f"{sum(alone) / max(alone):.2f}",
                "peak MB, in turn": f"{max(m['peak_memory'] for m in found['in turn'][0]['modules']) / 1e6:,.0f}",
                "of each at once": " ".join(f"{m['peak_memory'] / 1e6:,.0f}" for m in found["at once"][0]["modules"]),
            }
        )
    return made


@app.command()
def run(
    work: Annotated[Path, typer.Option(help="Where models are written.")],
    layers: Annotated[list[int], typer.Option(help="Of the encoder; repeat for several.", min=4)] = [11, 12, 24],  # noqa: B006
    steps: Annotated[int, typer.Option(help="Of each module.", min=1)] = 200,
    repeats: Annotated[int, typer.Option(help="Runs of each kind; the median counts.", min=1)] = 3,
) -> None:
    """Measure, and write the results file."""
    found = [row for count in layers for row in rows(work, count, steps, repeats)]
    notes = f"""
Encoders that are 384 wide, 4-bit weights and 8-bit activations, {steps} steps of 32 sentences for each
module, {SAMPLES} sentences, queues of {QUEUE}; one thread and one processor for each process, of which there are
{os.cpu_count()} here. Median of {repeats}. Seconds are those from the teacher's values to the last module's last step.
The bound: what the steps of all modules take alone, over what those of the slowest take; what teachers compute before
the first step comes on top, in turn more than at once. Peak: tensors of the modules of a process, and how
much it grew by training them.
"""
    options = {"--layers": layers, "--steps": [steps], "--repeats": [repeats]}
    command = ["PREQUANT_DATA=DATA", "python", "tests/benchmarks/mrem_speed.py", "--work", "DIR"]
    command += [str(word) for name, values in options.items() for value in values for word in (name, value)]
    print(write("mrem_speed", "MREM's modules at once", command, notes, {"Speed-up": found}).read_text())


if __name__ == "__main__":
    app()
