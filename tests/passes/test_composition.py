"""Passes in any order: each rewrites the float leaf that it finds, and none needs to know what the others did."""

import random
from typing import Any

import pytest
import torch

from prequant.passes import (
    BinaryCode,
    Freeze,
    Lower,
    Pass,
    PassError,
    Pipeline,
    Program,
    QuantizeActivations,
    QuantizeWeights,
    SplitOutliers,
    Train,
    readable,
    weight_sites,
    weights,
)
from prequant.passes.properties import violation
from prequant.runtime import Granularity

from . import truth
from .support import embedding_inputs, tiny_embedding_program

GROUPS: dict[str, Any] = {"granularity": Granularity.GROUP, "group_size": 3}
PASSES: list[Pass] = [
    SplitOutliers(ratio=0.1),
    SplitOutliers(threshold=1.5, mode="replace"),
    QuantizeWeights(bits=2),
    QuantizeWeights(bits=3, symmetric=False, **GROUPS),
    QuantizeWeights(bits=2, ternary=True, base3=True),
    QuantizeWeights(bits=2, latent=True),
    QuantizeWeights(bits=2, ternary=True, latent=True),
    BinaryCode(bits=2),
    BinaryCode(embeddings=True),
    BinaryCode(from_affine=True, embeddings=True),
    QuantizeActivations(),
    Freeze(),
    Train(biases=True),
    Lower(),
]
SCOPES: list[dict[str, Any]] = [{}, {}, {"include": ("mix",)}, {"exclude": ("type:Embedding",)}]


def random_pipeline(seed: int) -> list[Pass]:
    chooser = random.Random(seed)
    steps = []
    for pass_ in chooser.choices(PASSES, k=5):
        scope = {} if isinstance(pass_, Train) else chooser.choice(SCOPES)
        steps.append(type(pass_)(**{**pass_.__dict__, **scope}))
    return steps


def run(steps: list[Pass], program: Program) -> list[Program]:
    """The Program after every step, without those whose scope found nothing left to look at."""
    programs = [program]
    for step in steps:
        try:
            programs.append(step(programs[-1]))
        except PassError as error:
            assert "matches none of the" in str(error), error
    return programs


@pytest.mark.parametrize("seed", range(40))
def test_any_order(seed: int) -> None:
    original, inputs = tiny_embedding_program(), embedding_inputs()
    text = readable(original)
    programs = run([*random_pipeline(seed), Lower()], original)
    assert readable(original) == text
    for program in programs:
        assert violation("no-orphans", program) is violation("valid-formats", program) is None
        names = {name for view in weights(program) for name in view.tensors.values()}
        assert names <= set(program.state_dict())
        for view in weights(program):
            value = view.value()
            if "outliers.values" in view.tensors:
                # What was split off is what it was, whatever came after it.
                rows, columns = torch.tensor(list(truth.outliers_of(program, view.name))).unbind(1)
                assert torch.allclose(value[rows, columns], original.tensor(view.name)[rows, columns], atol=1e-6)
            for site in weight_sites(program):
                assert site.name != view.name or torch.allclose(site.value(), value, atol=1e-6)
    *_, before, lowered = programs
    assert torch.allclose(lowered(**inputs)["logits"], before(**inputs)["logits"], atol=1e-5)


@pytest.mark.parametrize("pass_", PASSES, ids=str)
def test_again_changes_nothing(pass_: Pass) -> None:
    steps = {
        "freeze": [QuantizeWeights(bits=2, latent=True)],
        "binary-code": [QuantizeWeights(bits=2)] if getattr(pass_, "from_affine", False) else [],
        "lower": [QuantizeWeights()],
    }
    once = Pipeline([*steps.get(pass_.name, []), pass_])(tiny_embedding_program())
    twice = pass_(once)
    assert readable(twice) == readable(once)
    assert pass_.name == "train" or not twice.reports[-1].changes
    for name, value in once.state_dict().items():
        assert torch.equal(twice.state_dict()[name], value)


def test_quantizers_take_turns() -> None:
    steps = [
        SplitOutliers(ratio=0.1, include=("mix",)),
        QuantizeWeights(bits=8, include=("tokens",)),
        BinaryCode(bits=3),
        QuantizeActivations(),
        Lower(strict=True),
    ]
    program = Pipeline(steps)(tiny_embedding_program())
    assert [(view.name, view.format, view.input_format) for view in weights(program)] == [
        ("tokens.weight", "affine8:row", "affine8:row"),
        ("mix.weight", "bcq3:row", "affine8:row"),
    ]
    kept = [[(item.what, item.why) for item in report.kept] for report in program.reports]
    assert kept == [
        [("tokens.weight", "out of scope")],
        [("mix.weight", "out of scope")],
        [("tokens.weight", "linear+embedding: stays as it is (embeddings=True codes it)")],
        [],
        [],
    ]
