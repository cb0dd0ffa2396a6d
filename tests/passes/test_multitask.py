"""multitask: several Programs over shared tensors as one; every task gets what its own Program gives, to the bit."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prequant.passes import (
    BinaryCode,
    Canonicalize,
    ExposeOutputs,
    Pipeline,
    Program,
    QuantizeWeights,
    SplitOutliers,
    lower,
)
from prequant.passes.multitask import multitask
from prequant.runtime import PrequantError, ops
from prequant.trace import trace

from ..models import FAMILIES, PAD, traced

OWN = (".scale", ".alphas", "outliers.values", ".bias", "norm.weight", "ln_1.weight", "layer_norm.weight")
PACKED = (ops.packed_linear, ops.packed_linears)
NAMES = [
    "bert-sequence-classification",
    "roberta-question-answering",
    "albert-masked-lm",
    "t5-seq2seq-lm",
    "gpt2-causal-lm",
    "gpt2-sequence-classification",
    "opt-causal-lm",
    "llama-causal-lm",
    "llama-sequence-classification",
]
FORMS: dict[str, Pipeline] = {
    "float": Pipeline([Canonicalize()]),
    "outliers": Pipeline([Canonicalize(), SplitOutliers(ratio=0.05), QuantizeWeights(bits=4)]),
    "binary": Pipeline([Canonicalize(), BinaryCode(bits=2)]),
}


def tuned(program: Program, seed: int) -> Program:
    """A copy with scales, outliers, norms and biases of its own."""
    copy, random = program.copy(), torch.Generator().manual_seed(seed)
    for name, value in list(copy.named_parameters()):
        if name.endswith(OWN):
            factor = 1 + 0.2 * torch.rand(value.shape, generator=random)
            copy.set_tensor(name, (value.detach().float() * factor).to(value.dtype), trainable=False)
    return copy


def inputs_of(name: str, sizes: tuple[int, ...], length: int = 6) -> list[tuple[Tensor, ...]]:
    """For each task a batch of that size, all padded to one length."""
    family = FAMILIES[name]()
    batches = []
    for size in sizes:
        named = family.make_inputs(size, length, padded=True)
        batches.append(tuple(named[item.name] for item in traced(name).signature.inputs))
    return batches


CASES = [*((name, "outliers") for name in NAMES), *((NAMES[i], form) for i in (0, 4) for form in ("float", "binary"))]


@pytest.mark.parametrize(("name", "form"), CASES)
def test_each_task_gets_what_its_own_program_gives(name: str, form: str) -> None:
    program = FORMS[form](traced(name))
    program = lower(program) if form != "float" else program
    tasks = [tuned(program, seed) for seed in range(3)]
    together = multitask(tasks)
    assert together.planned is program.planned
    for sizes in ((2, 1, 3), (1, 1, 1), (5, 2, 1)):
        batches = inputs_of(name, sizes)
        results = together(*(tensor for batch in batches for tensor in batch))
        for task, batch, result in zip(tasks, batches, results, strict=True):
            expected = task.forward(*batch) if not task.planned else _flat(task(*batch))
            for got, value in zip(result, expected, strict=True):
                assert torch.equal(got, value)


def test_exposed_values_are_left_out() -> None:
    program = lower(FORMS["outliers"](traced("bert-sequence-classification")))
    shown = ExposeOutputs(hidden_states=True, attention_scores=True)(program)
    (batch,) = inputs_of("bert-sequence-classification", (2,))
    expected, found = (multitask([each, each])(*batch, *batch) for each in (program, shown))
    assert all(len(part) == 1 and torch.equal(*part, *other) for part, other in zip(found, expected, strict=True))


def _flat(outputs: Any) -> tuple[Tensor, ...]:
    return tuple(outputs.to_tuple()) if hasattr(outputs, "to_tuple") else tuple(outputs)


def count(program: Program, *targets: Any) -> int:
    return sum(len(list(program.graph.find_nodes(op="call_function", target=target))) for target in targets)


@pytest.mark.parametrize("name", ["bert-sequence-classification", "gpt2-causal-lm", "llama-causal-lm", "opt-causal-lm"])
def test_what_has_no_weights_is_computed_once_and_codes_are_one(name: str) -> None:
    program = lower(FORMS["binary"](traced(name)))
    together = multitask([tuned(program, seed) for seed in range(4)])
    attention = torch.ops.aten.scaled_dot_product_attention.default
    assert count(together, attention) == count(program, attention) > 0
    assert count(together, *PACKED) == 4 * count(program, *PACKED)
    codes = {name: tensor for name, tensor in program.named_buffers() if name.endswith((".planes", ".codes"))}
    assert codes
    held = dict(together.named_buffers())
    for key, tensor in codes.items():
        assert held[key] is tensor
    assert not [key for key in held if key.startswith("task_") and key.endswith((".planes", ".codes"))]


def test_equal_tasks_share_all_but_their_products() -> None:
    program = lower(FORMS["outliers"](traced("bert-sequence-classification")))
    together = multitask([program, program.copy()])
    assert {name for name, _ in together.named_parameters()} <= {name for name, _ in program.named_parameters()}


class Mixing(nn.Module):
    """Looks at all rows at once, and numbers them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        centered = self.linear(x - x.mean(0))
        rows = torch.arange(x.shape[0], device=x.device)
        picked = centered[rows, rows % 3]
        return picked * (1 + rows[:, None]) + centered.sum((0, 1))


def test_what_rows_of_other_tasks_would_change_is_computed_for_each() -> None:
    program = Pipeline([Canonicalize()])(trace(Mixing().eval(), {"x": torch.randn(3, 5, 4)}))
    tasks = [program, tuned(program, 1)]
    x, y = torch.randn(2, 5, 4), torch.randn(4, 5, 4)
    results = multitask(tasks)(x, y)
    for task, input, result in zip(tasks, (x, y), results, strict=True):
        assert torch.equal(result[0], task(input))


def test_rows_need_one_length() -> None:
    program = traced("bert-sequence-classification")
    together = multitask([program, program])
    assert [item.name for item in together.signature.inputs] == [
        *("input_ids_0", "attention_mask_0"),
        *("input_ids_1", "attention_mask_1"),
    ]
    short, long = torch.full((1, 4), PAD + 3), torch.full((1, 5), PAD + 3)
    with pytest.raises(PrequantError, match=r"'input_ids_1' has the shape \[1, 5\]; it takes \[rows_1, length\]"):
        together(short, torch.ones_like(short), long, torch.ones_like(long))


def test_refusals() -> None:
    with pytest.raises(PrequantError, match="no program"):
        multitask([])
    fixed = trace(nn.Linear(4, 4), {"input": torch.randn(3, 4)}, dynamic_axes={})
    with pytest.raises(PrequantError, match=r"inputs of program 0 don't begin with one dynamic axis of rows: input"):
        multitask([fixed])
