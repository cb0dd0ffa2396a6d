"""Every family and head: traced, 4-bit, lowered, saved, loaded; what comes out is the eager model with quantized
weights.

The table of what was measured is committed. It is written by ``PREQUANT_WRITE_RESULTS=1`` and checked otherwise.
"""

import copy
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

import prequant
from prequant.checkpoint import save
from prequant.model import ModelProgram
from prequant.passes import Canonicalize, Pipeline, Program, QuantizeWeights, lower, weights
from prequant.runtime import sqnr

from ..models import FAMILIES, traced

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "families.md"
COMMAND = "PREQUANT_WRITE_RESULTS=1 python -m pytest tests/end_to_end/test_families.py"
HEADINGS = (
    "family and head",
    "weights packed",
    "float32 bytes",
    "4-bit bytes",
    "smaller by",
    "loaded − simulated, relative",
    "output SQNR to eager, dB",
)
BITS = 4

measured: dict[str, tuple[str, ...]] = {}


@pytest.fixture(autouse=True)
def one_thread(reproducible: None) -> None:
    torch.set_num_threads(1)


def floats(result: Any) -> list[Tensor]:
    """The float tensors of a model's output, without caches."""
    return [value for value in result.values() if isinstance(value, Tensor) and value.is_floating_point()]


def difference(first: Any, second: Any) -> float:
    """The largest difference, relative to the largest value; what both have as NaN (rows without a token) is equal."""
    worst = 0.0
    for a, b in zip(floats(first), floats(second), strict=True):
        assert a.shape == b.shape and torch.equal(a.isnan(), b.isnan())
        worst = max(worst, float((a - b).nan_to_num().abs().max() / b.nan_to_num().abs().max()))
    return worst


def quantized_eager(model: nn.Module, program: Program) -> nn.Module:
    """The model itself, with the values of the codes in its weights."""
    changed = copy.deepcopy(model)
    parameters = dict(changed.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for view in weights(program):
            target = parameters[view.name]
            target.copy_(view.value().t() if view.name in program.info.transposed else view.value())
    return changed


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_goes_all_the_way(name: str, tmp_path: Path) -> None:
    model, _, make_inputs = FAMILIES[name]()
    canonical = Canonicalize()(traced(name))
    simulated = Pipeline([QuantizeWeights(bits=BITS)])(canonical)
    folder = save(lower(simulated), tmp_path / "model")
    loaded = prequant.load(folder)
    assert isinstance(loaded, ModelProgram)

    views = weights(loaded)
    assert views and all(view.format == f"affine{BITS}:row" and view.lowered for view in views)
    expected = sum(rows * (math.ceil(columns * BITS / 8) + 4) for rows, columns in (view.shape for view in views))
    assert sum(view.bytes for view in views) == expected
    packed = {view.name for view in views}
    others = [p for key, p in canonical.named_parameters() if key not in packed]
    plain = sum(p.numel() * p.element_size() for p in others)
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = sum(t.numel() * t.element_size() for t in map(file.get_tensor, file.keys()))
    buffers = {key: b for key, b in canonical.named_buffers() if key not in canonical.info.constants}
    assert stored == expected + plain + sum(b.numel() * b.element_size() for b in buffers.values())
    before = stored - expected + sum(4 * rows * columns for rows, columns in (view.shape for view in views))

    differences, errors = [], []
    oracle = quantized_eager(model, simulated)
    for batch, length, padded in ((8, 7, False), (6, 11, True)):
        inputs = make_inputs(batch, length, padded)
        with torch.no_grad():
            result, eager = loaded(**inputs), model(**inputs)
            differences.append(difference(result, simulated(**inputs)))
            assert difference(result, oracle(**inputs)) <= 1e-5
        assert type(result) is type(eager)
        pairs = zip(floats(result), [value for value in floats(eager)], strict=True)
        errors += [sqnr(exact.nan_to_num(), close.nan_to_num()) for close, exact in pairs]
    assert max(differences) <= 1e-5
    assert min(errors) > 0  # random weights, rounded to 16 levels: near, and not the same
    measured[name] = (
        name,
        str(len(views)),
        f"{before:,}",
        f"{stored:,}",
        f"{before / stored:.2f}x",
        f"{max(differences):.1e}",
        f"{min(errors):.1f}",
    )


@pytest.fixture(scope="module")
def committed() -> Iterator[list[list[str]]]:
    """The rows of the table, after it has been written if that was asked for."""
    if os.environ.get("PREQUANT_WRITE_RESULTS") == "1":
        assert measured.keys() == FAMILIES.keys(), "run all of this file"
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
        lines = [
            "# Every family: traced, 4 bits per row, lowered, saved, loaded",
            f"```bash\n{COMMAND}\n```",
            f"Small random models, so sizes tell of the format and not of the family; {versions}. The difference is "
            "the largest of any output over two batches, one of them padded, relative to the largest value. SQNR "
            "compares with the float model: random weights have no redundancy that would hide the rounding.",
            "\n".join(
                ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
                + ["| " + " | ".join(row) + " |" for row in measured.values()]
            ),
        ]
        RESULTS.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    text = RESULTS.read_text(encoding="utf-8")
    assert COMMAND in text
    yield [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_the_table_has_a_row_for_every_family(committed: list[list[str]]) -> None:
    head, line, *rows = committed
    assert tuple(head) == HEADINGS and set(line) == {"---"}
    assert [row[0] for row in rows] == list(FAMILIES)


def test_the_tables_figures_are_those_measured_here(committed: list[list[str]]) -> None:
    """Sizes to the byte; errors are of floats, which add up a little differently on every machine."""
    rows = {row[0]: row for row in committed[2:]}
    for name, row in measured.items():
        assert rows[name][1:5] == list(row[1:5]), name
        assert float(rows[name][5]) <= 1e-5
        assert float(rows[name][6]) == pytest.approx(float(row[6]), abs=1.0)


def test_every_family_that_is_promised_is_there() -> None:
    promised = ("bert", "roberta", "distilbert", "electra", "albert", "mpnet", "t5", "gpt2", "opt", "llama", "qwen2")
    assert {re.split("-", name, maxsplit=1)[0] for name in FAMILIES} == set(promised)
    heads = {name.partition("-")[2] for name in FAMILIES}
    assert heads == {
        "sequence-classification",
        "token-classification",
        "question-answering",
        "masked-lm",
        "encoder",
        "causal-lm",
        "seq2seq-lm",
    }
