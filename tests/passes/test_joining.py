"""The modules of a chain, each rewritten by itself, as one Program again."""

from pathlib import Path

import pytest

from prequant.checkpoint import load, save
from prequant.passes import PassError, Pipeline, lower, partition

from ..models import FAMILIES
from .chains import FOURS, SOME, WEIGHTS_AND_INPUTS, assert_runs_as, assert_same_tensors, canonical, deep, most


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("pipeline", [FOURS, WEIGHTS_AND_INPUTS], ids=["weights", "weights-and-inputs"])
def test_modules_quantized_one_by_one_join_to_the_quantized_whole(name: str, pipeline: Pipeline) -> None:
    program, make_inputs = canonical(name), FAMILIES[name]().make_inputs
    expected, parts = pipeline(program), partition(program, most(program))
    parts = parts.with_modules([pipeline(module) for module in parts.modules])
    whole = parts.whole()
    assert_same_tensors(whole, expected)
    assert_runs_as(parts, expected, make_inputs)
    assert_runs_as(whole, expected, make_inputs)
    assert (type(whole).__name__, whole.signature) == (type(expected).__name__, expected.signature)
    assert whole.info.aliases == expected.info.aliases and whole.info.extra is program.info.extra
    assert len(whole.reports) == len(program.reports) + len(parts) * len(pipeline.passes)
    packed = parts.with_modules([lower(module) for module in parts.modules])
    assert packed.whole().planned and not whole.planned
    assert_runs_as(packed, lower(expected), make_inputs)
    assert_runs_as(packed.whole(), lower(expected), make_inputs)
    assert_runs_as(lower(whole), lower(expected), make_inputs)


def test_what_was_joined_is_saved_and_loaded(tmp_path: Path) -> None:
    program, make_inputs = deep("bert")
    parts = partition(program, 3)
    whole = parts.with_modules([lower(FOURS(module)) for module in parts.modules]).whole()
    save(whole, tmp_path)
    assert_runs_as(load(tmp_path), whole, make_inputs)


def test_a_shared_tensor_that_differs_can_not_be_joined() -> None:
    parts = partition(canonical("bert-masked-lm"), 2)
    weight = "bert.embeddings.word_embeddings.weight"
    changed = parts.modules[1].copy()
    changed.set_tensor(weight, changed.tensor(weight).detach() + 1)
    with pytest.raises(PassError, match=f"the modules 0 and 1 have different values of '{weight}'"):
        parts.with_modules([parts.modules[0], changed]).whole()
    with pytest.raises(PassError, match=rf"module 1 has '{weight}', and module 0 '{weight}.codes'"):
        parts.with_modules([FOURS(parts.modules[0]), parts.modules[1]]).whole()
