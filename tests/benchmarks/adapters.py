"""Many tasks on one base: what adapters take on disk and in memory, and how fast they are chosen and mixed.

python tests/benchmarks/adapters.py

The weights are random, and a task's own numbers are those that its recipe trains, moved at random: neither sizes nor
times look at them.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from processes import apart  # type: ignore[import-not-found]
from results_file import RESULTS, write  # type: ignore[import-not-found]
from rich.console import Console
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

import prequant
from prequant.adapters import adapter_of, write_adapter
from prequant.measure import PeakMemory, median_seconds, weight_bytes
from prequant.recipes import AlphaTuning, PreQuant, TuningRecipe
from prequant.sources import canonical_program, head_parameters

TASKS = 3
LENGTH = 32
MIB = 1 << 20

MODELS: dict[str, tuple[Callable[[], PreTrainedModel], TuningRecipe]] = {
    "BERT-base, PreQuant, 4 bits": (
        lambda: BertForSequenceClassification(BertConfig()),
        PreQuant(bits=4, outlier_ratio=0.005, strategy="minmax"),
    ),
    "GPT-2, AlphaTuning, 3 bits": (lambda: GPT2LMHeadModel(GPT2Config(pad_token_id=0)), AlphaTuning(bits=3)),
}


def main(
    threads: Annotated[list[int], typer.Option(min=1, help="1 and all, if not given.")] = [],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1)] = 21,
    out: Annotated[
        Path, typer.Option(help="Folder for adapters.md and .json.", show_default="tests/benchmarks/results")
    ] = RESULTS,
) -> None:
    """Measure, and write adapters.md and adapters.json."""
    counts = threads or sorted({1, torch.get_num_threads()})
    sizes, speeds = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for number, name in enumerate(MODELS):
            folder = Path(scratch) / str(number)
            trained = apart(max(counts), prepare, name, folder)
            sizes.append({"": name, **measured_sizes(folder, trained), **apart(max(counts), memory, folder)})
            speeds += [{"": name, "threads": count, **apart(count, times, folder, repeats)} for count in counts]
    notes = f"""
{TASKS} tasks of one base, {LENGTH} tokens, random weights. Numbers of a task are what its recipe trains, without the
head. Memory is what the process grew by: with the base loaded and called once, and with each further task loaded and
called once; beside it, the same with {TASKS} folders in the place of one base. Times are medians of {repeats}: choosing
a task, and what the first call after it takes beyond any other; a batch with a row of each task, against {TASKS} calls
of one row and one call of {TASKS} rows of one task, all in turns.
"""
    path = write(
        "adapters",
        "Many tasks on one base",
        ["python", "tests/benchmarks/adapters.py"],
        notes,
        {"Sizes": sizes, "Times": speeds},
        folder=out,
        threads=" and ".join(map(str, counts)),
    )
    Console().print(path.read_text(encoding="utf-8"), markup=False, highlight=False, soft_wrap=True)


# ---- files -----------------------------------------------------------------------------------------------------------


def prepare(name: str, folder: Path) -> dict[str, int]:
    """A base in ``folder/base``, the tasks' adapters beside it, and each task as a folder of its own."""
    make, recipe = MODELS[name]
    torch.manual_seed(0)
    model = make()
    head = head_parameters(model) if isinstance(recipe, PreQuant) else ()
    program = recipe.prepare(canonical_program(model, None), head)(canonical_program(model, None))
    trained = {key for key, value in program.named_parameters() if value.requires_grad}
    totals = program.reports[-1].totals
    base: Any = recipe.finish()(program)
    prequant.save(base, folder / "base")
    base = prequant.load(folder / "base")
    for task in range(TASKS):
        tuned: Any = base.copy()
        for key in {key.replace(".first_alphas", ".alphas") for key in trained}:
            value = base.tensor(key).detach().clone()
            own = value[:1] if key.endswith(".alphas") else value
            own.mul_((1 + 0.1 * torch.rand(own.shape)).to(own.dtype))
            tuned.set_tensor(key, value, trainable=False)
        write_adapter(folder / f"{task}.safetensors", adapter_of(base, tuned))
        prequant.save(tuned, folder / f"task-{task}")
    numbers = sum(program.tensor(key).numel() for key in trained if key not in head)
    return {"numbers": numbers, "model": int(totals["model"])}


def measured_sizes(folder: Path, trained: dict[str, int]) -> dict[str, str]:
    """What stands on disk."""
    base, task = weight_bytes(folder / "base"), (folder / "0.safetensors").stat().st_size
    numbers = trained["numbers"]
    return {
        "numbers of a task": f"{numbers:,} ({numbers / trained['model']:.2%})",
        "base, bytes": f"{base:,}",
        "an adapter, bytes": f"{task:,} ({task / base:.2%})",
    }


# ---- memory ----------------------------------------------------------------------------------------------------------


def batch(rows: int, model: Any) -> dict[str, Tensor]:
    """Random tokens."""
    random = torch.Generator().manual_seed(rows)
    ids = torch.randint(0, model.config.vocab_size, (rows, LENGTH), generator=random)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def resident() -> int:
    """Bytes of this process, without those that it has freed."""
    with PeakMemory() as memory:
        return memory.before


@torch.inference_mode()
def memory(folder: Path) -> dict[str, str]:
    """MiB that the process grows by."""
    start = resident()
    base: Any = prequant.load(folder / "base")
    base(**batch(1, base))
    grown = [resident() - start]
    for task in range(TASKS):
        base.load_adapter(str(task), folder / f"{task}.safetensors")
        base.set_adapter(str(task))
        base(**batch(1, base))
        grown.append(resident() - start)
    base.set_adapter(None)
    models = []
    start = resident()
    for task in range(TASKS):
        models.append(prequant.load(folder / f"task-{task}"))
        models[-1](**batch(1, models[-1]))
    folders = resident() - start
    return {
        "base, MiB": f"{grown[0] / MIB:.1f}",
        **{f"+ task {i + 1}": f"{(b - a) / MIB:.1f}" for i, (a, b) in enumerate(pairwise(grown))},
        f"{TASKS} folders, MiB": f"{folders / MIB:.1f}",
    }


# ---- times -----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def times(folder: Path, repeats: int) -> dict[str, str]:
    """What loading, choosing and mixing take, and whether mixing gives what separate calls give."""
    base: Any = prequant.load(folder / "base")
    loading = []
    for task in range(TASKS):
        started = time.perf_counter()
        base.load_adapter(str(task), folder / f"{task}.safetensors")
        loading.append(time.perf_counter() - started)
    names = list(map(str, range(TASKS)))
    one, rows = batch(1, base), batch(TASKS, base)
    for name in names:
        base.set_adapter(name)
        base(**one), base(**rows)
    choosing, first, next_ = [], [], []
    for turn in range(repeats):
        began = time.perf_counter()
        base.set_adapter(names[turn % TASKS])
        chosen = time.perf_counter()
        base(**one)
        called = time.perf_counter()
        base(**one)
        choosing.append(chosen - began)
        first.append(called - chosen)
        next_.append(time.perf_counter() - called)

    def separate() -> list[Any]:
        results = []
        for row, name in enumerate(names):
            base.set_adapter(name)
            results.append(base(**{key: value[row : row + 1] for key, value in rows.items()}))
        return results

    def mixed() -> Any:
        return base(**rows, adapters=names)

    def alike() -> Any:
        base.set_adapter(names[0])
        return base(**rows)

    equal = all(torch.equal(a.logits, mixed().logits[i : i + 1]) for i, a in enumerate(separate()))
    in_one, apart_, same = median_seconds([mixed, separate, alike], repeats)
    extra = statistics.median(first) - statistics.median(next_)
    return {
        "loading the first, ms": f"{loading[0] * 1e3:.0f}",
        "a further one, ms": f"{statistics.median(loading[1:]) * 1e3:.0f}",
        "choosing, µs": f"{statistics.median(choosing) * 1e6:.1f}",
        "first call after it, µs more": f"{extra * 1e6:.0f}",
        f"{TASKS} tasks in a batch, ms": f"{in_one * 1e3:.2f}",
        f"{TASKS} calls, ms": f"{apart_ * 1e3:.2f}",
        f"{TASKS} rows of one task, ms": f"{same * 1e3:.2f}",
        "equal": "yes" if equal else "no",
    }


if __name__ == "__main__":
    typer.run(main)
