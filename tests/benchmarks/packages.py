"""A package of AOTInductor called from C++ and from Python, beside the Program that it was made of: all-MiniLM-L6-v2
with 4-bit weights, outliers and 8-bit inputs, one text on one thread.

``--runner`` is the program that ``examples/aoti`` builds. In every round each way is called some times, one way after
the other, and the median counts; a C++ process loads the package anew each time, which is not timed::

    OMP_NUM_THREADS=1 python tests/benchmarks/packages.py --runner build/aoti/run_package
"""

import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from results_file import encoder_folder, write  # type: ignore[import-not-found]

from prequant.export import export_aoti
from prequant.passes import Pipeline, Program, QuantizeActivations, QuantizeWeights, SplitOutliers, lower
from prequant.sources import canonical_program, load_model, load_tokenizer

LENGTHS = (8, 32, 128)
CALLS = 50

WAYS = ("C++", "the package from Python", "the Program, by its plan", "the Program, by its graph")


def packed() -> Program:
    """The encoder, lowered."""
    program = canonical_program(load_model(encoder_folder()), load_tokenizer(encoder_folder()))
    steps = Pipeline([SplitOutliers(ratio=0.005), QuantizeWeights(bits=4), QuantizeActivations(bits=8)])
    return lower(steps(program)).eval()


def from_cpp(runner: Path, package: Path, ids: list[int]) -> float:
    """Milliseconds a call: the median that the example prints."""
    words = [str(runner), str(package), "--repeat", str(CALLS), *map(str, ids)]
    printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return float(printed.splitlines()[-1].split()[0])


def from_python(call: Callable[[], Any]) -> float:
    """Milliseconds a call, the median after some that don't count."""
    spent = []
    for _ in range(CALLS + CALLS // 10):
        started = time.perf_counter()
        call()
        spent.append(time.perf_counter() - started)
    return 1e3 * statistics.median(spent[-CALLS:])


def measure(program: Program, runner: Path, package: Path, length: int, rounds: int) -> dict[str, Any]:
    """A row: milliseconds a call from C++, and what the other ways take as multiples of it."""
    ids = torch.randint(1000, 20000, (1, length), generator=torch.Generator().manual_seed(length))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    loaded = torch._inductor.aoti_load_package(str(package))
    spent: dict[str, list[float]] = {way: [] for way in WAYS}
    with torch.inference_mode():
        expected, found = (call(**given)["last_hidden_state"] for call in (program, loaded))
        apart = float((found - expected).abs().max() / expected.abs().max())
        assert apart < 0.05, apart  # sums in another order move some 8-bit codes
        for _ in range(rounds):
            spent["C++"].append(from_cpp(runner, package, ids[0].tolist()))
            spent["the package from Python"].append(from_python(lambda: loaded(**given)))
            for way, program.planned in zip(WAYS[2:], (True, False), strict=True):
                spent[way].append(from_python(lambda: program(**given)))
            program.planned = True
    first, *others = (statistics.median(times) for times in spent.values())
    ratios = {way: f"{each / first:.2f}" for way, each in zip(WAYS[1:], others, strict=True)}
    return {"tokens": length, "C++, ms": f"{first:.3f}", **ratios}


def main(
    runner: Annotated[Path, typer.Option(help="The program that examples/aoti builds.", exists=True)],
    rounds: Annotated[int, typer.Option(help="Of each length.", min=1)] = 11,
) -> None:
    """Measure and write the results file."""
    torch.set_num_threads(1)
    program = packed()
    with tempfile.TemporaryDirectory() as folder:
        package = export_aoti(program, Path(folder) / "model.pt2")
        rows = [measure(program, runner, package, length, rounds) for length in LENGTHS]
    notes = f"""
all-MiniLM-L6-v2, 4-bit weights with outliers, 8-bit inputs, one text, one thread: milliseconds a call from C++, and
what the other ways take as multiples of it. Medians of {rounds} rounds of {CALLS} calls each way.
"""
    command = ["OMP_NUM_THREADS=1", "python", "tests/benchmarks/packages.py", "--runner", "build/aoti/run_package"]
    print(write("packages", "A package from C++ and Python", command, notes, {"Ways": rows}, threads="1").read_text())


if __name__ == "__main__":
    typer.run(main)
