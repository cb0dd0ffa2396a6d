"""Modules in turn (MREM-S) and all at once in one process (MREM-P)."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from prequant.passes import weights
from prequant.reconstruction import (
    Learner,
    Module,
    ReconstructionError,
    Schedule,
    reconstruct_in_turn,
    reconstruct_interleaved,
    split,
)
from prequant.training import Checkpoints, TrainingError, parameter_groups

from .chains import BUDGET, STEPS, learner, modules_of, original, recipe, same, state, texts

Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def one_thread(reproducible: None) -> None:
    torch.set_num_threads(1)


def in_turn(method: Any, modules: Any, of: Any = None) -> Any:
    return reconstruct_in_turn(modules, texts(), of or partial(learner, method=method), seed=1, progress=False)


def interleaved(method: Any, modules: Any, of: Any = None, schedule: Schedule = Schedule(4, 4)) -> Any:  # noqa: B008
    made = of or partial(learner, method=method)
    return reconstruct_interleaved(modules, texts(), made, schedule, seed=1, progress=False)


def error(modules: Any, through: str = "results") -> float:
    """How far the quantized model is from the float one in the end."""
    total = 0.0
    with torch.no_grad():
        for batch in texts():
            ours, theirs = dict(batch), dict(batch)
            for module in modules:
                found, wanted = module.results(ours), module.targets(theirs)
                ours, theirs = {**batch, **found.handed_on}, {**batch, **wanted.handed_on}
            total += float(mse_loss(found.compared[1], wanted.compared[1]))
    return total


def named(module: Module, *parts: Any) -> dict[str, Any]:
    inputs = {name: value for part in parts for name, value in part.items()}
    return {name: inputs[name] for name in module.inputs if name in inputs}


# ---- in turn ---------------------------------------------------------------------------------------------------------


def test_it_is_adamw_on_what_the_quantized_modules_before_give() -> None:
    """Against a loop written out here."""
    method = recipe()
    modules, _ = modules_of(method)
    figures = in_turn(method, modules)
    reference, _ = modules_of(method)
    batches = texts()
    ours: list[dict[str, Any]] = [{} for _ in batches]
    theirs: list[dict[str, Any]] = [{} for _ in batches]
    for module in reference:
        given = []
        for batch, values in zip(batches, theirs, strict=True):
            with torch.no_grad():
                given.append(module.teacher.call_with_exposed(**named(module, batch, values)))
        parameters = [p for p in module.student.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameter_groups(module.student, BUDGET))
        rates = [group["lr"] for group in optimizer.param_groups]
        order, losses = batches.order(1 + module.number), []
        for step in range(STEPS):
            factor = step / 2 if step < 2 else (STEPS - step) / (STEPS - 2)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            number = next(order)
            batch = batches[number]
            found, seen = module.student.call_with_exposed(**named(module, batch, ours[number]))
            (wanted, at_end), mask = given[number], batch["attention_mask"].bool()
            if module.number == 0:
                loss = mse_loss(found["hidden_states"][mask], wanted["hidden_states"][mask])
            else:
                last = [next(iter(values.values())) for values in (seen, at_end)]
                loss = mse_loss(found["logits"], wanted["logits"]) + mse_loss(last[0][mask], last[1][mask])
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        assert figures[module.number].first_loss == pytest.approx(losses[0], rel=1e-4)
        assert figures[module.number].last_loss == pytest.approx(losses[-1], rel=1e-4)
        if module.number == 0:
            with torch.no_grad():
                theirs = [dict(values) for values, _ in given]
                ours = [dict(module.student(**batch)) for batch in batches]
    for found, wanted in zip(modules, reference, strict=True):
        expected = dict(wanted.student.named_parameters())
        for name, parameter in found.student.named_parameters():
            torch.testing.assert_close(parameter, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("run", [in_turn, interleaved])
@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 2, "activation_bits": 0}, {"objective": "layers"}], ids=str)
def test_the_quantized_model_comes_closer(run: Run, options: dict[str, Any]) -> None:
    method = recipe(**options)
    modules, _ = modules_of(method)
    before = error(modules)
    figures = run(method, modules, partial(learner, method=method, steps=40))
    assert error(modules) < 0.7 * before
    # The second module of those at once begins on the teacher's values, which are easier.
    assert figures[0].last_loss < figures[0].first_loss
    assert [one.steps for one in figures] == [40, 40]
    assert [one.number for one in figures] == [0, 1] and sum(one.blocks for one in figures) == 4


@pytest.mark.parametrize("run", [in_turn, interleaved])
def test_in_bfloat16_students_alone_compute_in_it(run: Run) -> None:
    exact = recipe()
    method = replace(exact, training=replace(exact.training, precision="bfloat16"))
    losses, kept = [], []
    for each in (exact, method):
        modules, _ = modules_of(each)
        losses.append([figures.last_loss for figures in run(each, modules)])
        kept.append([state(module) for module in modules])
    assert losses[1] == pytest.approx(losses[0], rel=0.2) and losses[1] != losses[0]
    assert {tensor.dtype for module in kept[1] for tensor in module.values()} <= {torch.float32, torch.int64}
    module = modules_of(method)[0][0]
    batch = texts()[0]
    handed_on, _ = learner(module, method).step(batch, module.targets(batch))
    assert {value.dtype for value in handed_on.handed_on.values() if value.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("run", [in_turn, interleaved])
def test_the_same_seed_gives_the_same_weights(run: Run) -> None:
    found = []
    for _ in range(2):
        modules, _ = modules_of(recipe())
        run(recipe(), modules)
        torch.rand(5)
        found.append([state(module) for module in modules])
    assert all(same(*pair) for pair in zip(*found, strict=True))


def test_scales_of_ternary_weights_follow_them() -> None:
    method = recipe(bits=2, activation_bits=0)
    modules, _ = modules_of(method)
    before = state(modules[0])
    in_turn(method, modules)
    views = [view for view in weights(modules[0].student) if "latent" in view.tensors]
    assert views
    for view in views:
        latent, scale = (modules[0].student.tensor(view.tensors[part]) for part in ("latent", "scale"))
        assert not torch.equal(before[view.tensors["latent"]], latent)
        if scale.numel() == 1:  # ternary weight networks: the mean of what is above 0.7 times the mean
            magnitudes = latent.detach().abs()
            above = magnitudes[magnitudes > 0.7 * magnitudes.mean()]
            torch.testing.assert_close(scale.reshape(()), above.mean(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("run", [in_turn, interleaved])
def test_a_head_in_float_may_be_a_module_of_its_own(run: Run) -> None:
    """With ternary weights, of which it has none."""
    method = recipe(bits=2, embedding_bits=2, attention=False, modules=3)
    program, head = original(2, problem_type="single_label_classification")
    student = method.prepare(program, (*head, *_pooler(program)), texts().batches[:2], progress=False)
    modules, _ = split(program, student, boundaries=[1, 2])
    assert not any("latent" in view.tensors for view in weights(modules[2].student))
    before = state(modules[2])
    figures = run(method, modules)
    assert [module.steps for module in figures] == [STEPS] * 3 and not same(state(modules[2]), before)


def _pooler(program: Any) -> list[str]:
    return [name for name, _ in program.named_parameters() if ".pooler." in name]


@pytest.mark.parametrize("run", [in_turn, interleaved])
def test_logits_larger_than_what_they_are_computed_of_are_not_kept(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last module's teacher runs for each step then, and gives the same."""
    method = recipe()
    expected, found = modules_of(method)[0], modules_of(method)[0]
    run(method, expected)
    calls = [0, 0]
    targets = Module.targets

    def counted(module: Module, inputs: Any) -> Any:
        calls[module.number] += 1
        return targets(module, inputs)

    monkeypatch.setattr("prequant.reconstruction.targets.LARGE", 0)
    monkeypatch.setattr(Module, "targets", counted)
    run(method, found)
    assert calls == [len(texts()), len(texts()) + STEPS]
    assert all(same(state(ours), state(theirs)) for ours, theirs in zip(found, expected, strict=True))


def test_one_module_is_the_same_either_way() -> None:
    found = []
    for run in (in_turn, interleaved):
        modules, _ = modules_of(recipe(modules=1))
        run(recipe(modules=1), modules)
        found.append(state(modules[0]))
    assert same(*found)


def test_padding_counts_if_told_to() -> None:
    found = []
    for padding in (False, True):
        modules, _ = modules_of(recipe(padding=padding))
        in_turn(recipe(padding=padding), modules)
        found.append(state(modules[0]))
    assert not same(*found)


# ---- all at once -----------------------------------------------------------------------------------------------------


def test_under_the_teachers_values_a_module_learns_nothing_of_those_before() -> None:
    """The share stays above 0.999999 throughout; then the second module's weights don't depend on the first one's."""
    method = recipe()
    always = Schedule(4, forcing=10**9)
    modules, _ = modules_of(method)
    interleaved(method, modules, schedule=always)
    other, _ = modules_of(method)
    with torch.no_grad():
        for name, parameter in other[0].student.named_parameters():
            if name.endswith("LayerNorm.bias"):
                parameter.add_(1.0)
    interleaved(method, other, schedule=always)
    wanted = state(other[1])
    for name, value in state(modules[1]).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5)
    assert not same(state(modules[0]), state(other[0]))
    without, _ = modules_of(method)
    interleaved(method, without, schedule=Schedule(4, 0))
    assert not same(state(without[1]), state(modules[1])), "else they learn on the student's values"


def test_the_teachers_share_falls_in_a_line() -> None:
    assert [Schedule(1, 4).share(step) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert Schedule(1, 0).share(0) == 0.0
    for options in ({"queue": 0}, {"forcing": -1}):
        with pytest.raises(ReconstructionError, match=f"{next(iter(options))}="):
            Schedule(**options)


# ---- going on --------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kill", [5, 8, 11])
def test_modules_in_turn_go_on_to_the_same_weights(tmp_path: Path, kill: int) -> None:
    method = recipe()
    whole, _ = modules_of(method)
    expected = in_turn(method, whole)

    def kept(module: Module) -> Learner:
        return learner(module, method, Checkpoints(tmp_path / f"{module.number}.safetensors", 2))

    taken = 0

    def killing(module: Module) -> Learner:
        made = kept(module)
        step = made.step

        def counted(*args: Any) -> Any:
            nonlocal taken
            if taken == kill:
                raise Killed
            taken += 1
            return step(*args)

        made.step = counted  # type: ignore
        return made

    modules, _ = modules_of(method)
    with pytest.raises(Killed):
        in_turn(method, modules, killing)
    again, _ = modules_of(method)
    taken, kill = 0, 10**6
    figures = in_turn(method, again, killing)
    assert all(same(state(a), state(b)) for a, b in zip(again, whole, strict=True))
    assert taken < 2 * STEPS, "what was done is not done again"
    for one, other in zip(figures, expected, strict=True):
        assert (one.steps, one.first_loss) == (other.steps, pytest.approx(other.first_loss))
        assert one.last_loss == pytest.approx(other.last_loss)


def test_a_finished_module_only_feeds_the_others(tmp_path: Path) -> None:
    method = recipe()

    def kept(module: Module) -> Learner:
        where = None if module.number else Checkpoints(tmp_path / "first.safetensors", STEPS)
        return learner(module, method, where)

    modules, _ = modules_of(method)
    interleaved(method, modules, kept)
    again, _ = modules_of(method)
    figures = interleaved(method, again, kept)
    assert same(state(again[0]), state(modules[0]))
    assert [one.steps for one in figures] == [STEPS, STEPS] and figures[1].last_loss > 0


def test_a_module_that_diverges_says_so() -> None:
    modules, _ = modules_of(recipe())
    made = learner(modules[0], recipe())
    batch = texts()[0]
    targets = modules[0].targets(batch)
    broken = type(targets)(targets.handed_on, tuple(value * math.inf for value in targets.compared))
    with pytest.raises(TrainingError, match=r"the loss of module 1 was (nan|inf) in step 1: its training has diverged"):
        made.step(batch, broken)
