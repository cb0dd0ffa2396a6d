"""Mixed precision by AllocateBits against one width for all weights, at equal bytes, on a fine-tuned all-MiniLM-L6-v2:
three sensitivities, two tasks, no training.

PREQUANT_DATA names a folder with glue/{SST-2,STS-B}; ``--model`` is what ``prequant finetune`` made for the task. A row
that is done is kept, and so are the costs that all choices go by. One thread (OMP_NUM_THREADS=1), a process for each
task::

    python tests/benchmarks/allocate_bits.py run --task sst2 --model MODEL --work DIR
    python tests/benchmarks/allocate_bits.py run --task stsb --model MODEL --work DIR
    python tests/benchmarks/allocate_bits.py table --work DIR
"""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from results_file import data_folder, write  # type: ignore[import-not-found]

from prequant.measure import write_json
from prequant.passes import ExampleBatches, Program, QuantizeWeights, weight_sites
from prequant.passes.knapsack import cheapest
from prequant.passes.sensitivity import Candidate, Candidates, fisher_noise, output_noise, weight_noise
from prequant.reconstruction import CalibrationSet
from prequant.runtime import Granularity, sqnr
from prequant.sources import canonical_program, load_for, load_tokenizer
from prequant.tasks import Limits, task

SEED, LENGTH, TEXTS, BATCH = 0, 128, 256, 32
WIDTHS, GROUP = (2, 3, 4, 5, 6, 8), 64
UNIFORM = (2, 3, 4)
BUDGETS = (2.25, 2.5, 3.0, 3.5, 4.0)
"""Of mixed precision, each in the bytes of that one width, or as far between those of two."""
TASKS = {"sst2": "glue/SST-2", "stsb": "glue/STS-B"}
SENSITIVITIES = {
    "weight": "mixed, noise of the weights",
    "fisher": "mixed, noise of the outputs by gradients (fisher)",
    "output": "mixed, noise of the outputs, measured (output)",
}

app = typer.Typer(add_completion=False)
Work = Annotated[Path, typer.Option(help="Where the figures are kept.")]


@app.command()
def run(
    of: Annotated[str, typer.Option("--task", help="sst2 or stsb.")],
    model: Annotated[Path, typer.Option(help="The float model, fine-tuned for the task.")],
    work: Work,
) -> None:
    """Measure the rows of a task."""
    if of not in TASKS:
        raise typer.BadParameter(f"{of!r} is not one of {', '.join(TASKS)}")
    work.mkdir(parents=True, exist_ok=True)
    wanted, tokenizer = task(of), load_tokenizer(model)
    float_model, _ = load_for(model, wanted, SEED, tokenizer)
    program = canonical_program(float_model, tokenizer)
    rows = wanted.load(data_folder() / TASKS[of])
    candidates, sites = _candidates(program), weight_sites(program)
    sizes = [[each.bytes for each in of_site] for of_site in candidates]

    def score(values: dict[str, Any] | None = None) -> tuple[float, torch.Tensor]:
        coded = program.copy()
        for name, value in (values or {}).items():
            coded.set_tensor(name, value)
        found = wanted.evaluate(coded, rows["validation"], tokenizer, Limits(LENGTH, BATCH), progress=False)
        return found.metric, torch.as_tensor(found.predictions)

    exact_score, exact = score()
    encoded = wanted.encode(rows["train"], tokenizer, LENGTH, progress=False)
    calibration = CalibrationSet.of(encoded, tokenizer, TEXTS, BATCH, SEED)
    batches = ExampleBatches(
        {name: value for name, value in batch.items() if name in program.signature.names} for batch in calibration
    )
    costs = _costs(work / f"{of}-costs.json", program, batches, candidates)
    path = work / f"{of}.json"
    done: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    done["float"] = {"score": exact_score, "bytes": 4 * sum(site.value().numel() for site in sites)}
    choices: dict[str, list[int]] = {f"{bits}|one width": [WIDTHS.index(bits)] * len(sites) for bits in UNIFORM}
    for budget in BUDGETS:
        lower, share = int(budget), budget - int(budget)
        low, high = (sum(row[WIDTHS.index(bits)] for row in sizes) for bits in (lower, lower + 1))
        for name in SENSITIVITIES:
            choices[f"{budget:g}|{name}"] = cheapest(costs[name]["costs"], sizes, low + int(share * (high - low)))
    for key, chosen in choices.items():
        if key not in done:
            picked = [of_site[choice] for of_site, choice in zip(candidates, chosen, strict=True)]
            found, logits = score({each.site.name: each.site.value() for each in picked})
            done[key] = {
                "score": found,
                "sqnr": sqnr(exact, logits),
                "bytes": sum(each.bytes for each in picked),
                "bits": {each.site.name: each.bits for each in picked},
            }
            print(key, done[key]["score"], done[key]["sqnr"], flush=True)
            write_json(path, done)


def _candidates(program: Program) -> Candidates:
    """Every weight at every width, as the pass has them."""
    found: list[list[Candidate]] = [[] for _ in weight_sites(program)]
    for bits in WIDTHS:
        quantized = QuantizeWeights(bits=bits, granularity=Granularity.GROUP, group_size=GROUP)(program)
        for of_site, site in zip(found, weight_sites(quantized), strict=True):
            of_site.append(Candidate(bits, site))
    return found


def _costs(path: Path, program: Program, batches: ExampleBatches, candidates: Candidates) -> dict[str, Any]:
    """The costs by sensitivity, with the seconds that each took."""
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    sites, found = weight_sites(program), {}
    measures = {
        "weight": lambda: weight_noise(sites, candidates),
        "fisher": lambda: fisher_noise(program, batches, sites, candidates),
        "output": lambda: output_noise(program, batches, candidates),
    }
    for name, measure in measures.items():
        started = time.process_time()
        costs = measure()
        found[name] = {"costs": costs, "seconds": time.process_time() - started}
    write_json(path, found)
    return found


@app.command()
def table(work: Work) -> None:
    """Write the results file from the rows that have been measured."""
    tables: dict[str, list[dict[str, Any]]] = {}
    times = []
    for of in TASKS:
        done = json.loads((work / f"{of}.json").read_text())
        metric = "accuracy" if of == "sst2" else "Pearson correlation"
        size = done["float"]["bytes"]
        rows = [
            {
                "bits": "32",
                "": "float32",
                metric: _score(of, done["float"]),
                "logit SQNR, dB": "–",
                "bytes": f"{size:,}",
            }
        ]
        measured = [key for key in done if key != "float"]
        for key in sorted(measured, key=lambda key: (float(key.partition("|")[0]), "mixed" in key)):
            bits, _, name = key.partition("|")
            found = done[key]
            rows.append(
                {
                    "bits": bits,
                    "": SENSITIVITIES.get(name, name),
                    metric: _score(of, found),
                    "logit SQNR, dB": f"{found['sqnr']:.2f}",
                    "bytes": f"{found['bytes']:,}",
                }
            )
        tables[task(of).name] = rows
        costs = json.loads((work / f"{of}-costs.json").read_text())
        times.append(f"{of}: " + ", ".join(f"{name} {found['seconds']:.0f}" for name, found in costs.items()))
    notes = f"""
all-MiniLM-L6-v2 (22.7 M parameters) fine-tuned in float32 for each task, then quantized without training: all weights,
embeddings and the head included, symmetric codes in groups of {GROUP} (scales add 0.5 bits a weight), scales by mse.
`bits` says what the budget is: the bytes of codes of that width everywhere, or as far between those of the two widths
next to it. Mixed precision chooses among {", ".join(map(str, WIDTHS))} bits for each weight. Sensitivities look at
{TEXTS} texts of the training set, without labels, seed 0. Scores and logits are those on the validation set; the SQNR
is that of all logits against float32's.

Seconds of one core that a sensitivity takes, for all budgets: {"; ".join(times)}.
"""
    command = ["PREQUANT_DATA=DATA", "python", "tests/benchmarks/allocate_bits.py", "run"]
    command += ["--task", "TASK", "--model", "MODEL", "--work", "DIR"]
    print(write("allocate_bits", "Bits for each weight, chosen under a budget", command, notes, tables).read_text())


def _score(of: str, found: dict[str, Any]) -> str:
    return f"{100 * found['score']:.2f}" if of == "sst2" else f"{found['score']:.4f}"


if __name__ == "__main__":
    app()
