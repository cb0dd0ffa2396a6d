"""A training that is broken off ends, after it went on, with the weights of one that was not."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prequant.checkpoint import CheckpointError
from prequant.passes import Pipeline, Program, QuantizeWeights, Train, weights
from prequant.passes.latent_scales import following
from prequant.recipes import PreQuant
from prequant.sources import head_parameters
from prequant.training import Checkpoints, TrainingError, TrainingResult, TrainingSettings, finetune
from prequant.training.checkpoints import restore, tensors_of

from .tiny import collator, encoded, make_model, make_program

STEPS = 7
"""Of three batches an epoch: the third epoch is not finished."""
QUICK = TrainingSettings(max_steps=STEPS, batch_size=8, learning_rate=1e-2, eval_steps=2)


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def one_thread(reproducible: None) -> None:
    torch.set_num_threads(1)


def model_of(kind: str) -> nn.Module:
    model = make_model()  # with dropout
    if kind == "eager":
        return model
    original = make_program()
    if kind == "latent":
        return Pipeline([QuantizeWeights(bits=2, ternary=True, latent=True), Train(latents=True)])(original)
    return PreQuant().prepare(original, head_parameters(model))(original)


def run(
    model: nn.Module, at: Path | None, every: int = 2, kill: int = 0, settings: TrainingSettings = QUICK, **about: Any
) -> TrainingResult:
    """Train; ``kill``: the call of the collator that ends the process."""
    calls, collate = [], collator()

    def watched(rows: list[dict[str, Any]]) -> Any:
        calls.append(len(rows))
        if len(calls) == kill:
            raise Killed
        return collate(rows)

    # Deterministic of the state, and best in the middle.
    score: Callable[[], float] = lambda: -sum(float(p.detach().double().abs().sum()) for p in model.parameters())  # noqa: E731
    checkpoints = None if at is None else Checkpoints(at, every, about)
    after = renewal_of(model)
    return finetune(
        model, encoded(), watched, settings, progress=False, after_step=after, evaluate=score, checkpoints=checkpoints
    )


def renewal_of(model: nn.Module) -> Callable[[], None] | None:
    """Scales that follow latent weights are in no checkpoint."""
    latent = isinstance(model, Program) and any("latent" in view.tensors for view in weights(model))
    return following(cast(Program, model)).renew if latent else None


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def broken(tmp_path: Path, kind: str = "eager", kill: int = 6, settings: TrainingSettings = QUICK) -> Path:
    """The checkpoint of a training that was killed."""
    path = tmp_path / "work" / "training.safetensors"
    with pytest.raises(Killed):
        run(model_of(kind), path, kill=kill, settings=settings)
    return path


@pytest.mark.parametrize("kind", ["eager", "program", "latent"])
@pytest.mark.parametrize("kill", [4, 5, 7], ids="killed at {}".format)
@pytest.mark.parametrize("eval_steps", [0, 2], ids=["last", "best"])
def test_a_training_that_goes_on_ends_as_one_that_was_never_killed(
    tmp_path: Path, kind: str, kill: int, eval_steps: int
) -> None:
    settings = dataclasses.replace(QUICK, eval_steps=eval_steps)
    whole = model_of(kind)
    expected = run(whole, None, settings=settings)
    path = broken(tmp_path, kind, kill, settings)
    torch.rand(17)
    model = model_of(kind)
    result = run(model, path, settings=settings)
    assert same(state(model), state(whole))
    assert (result.steps, result.best_step) == (expected.steps, expected.best_step)
    assert result.loss == pytest.approx(expected.loss, rel=1e-6)
    assert not model.training and not list(path.parent.glob(".*")), "nothing half-written is left"


def test_the_best_state_has_the_scales_of_its_own_weights() -> None:
    model, scores = model_of("latent"), iter([0.0, 2.0, 1.0, 1.5])
    renew = renewal_of(model)
    assert renew is not None
    done = finetune(
        model, encoded(), collator(), QUICK, progress=False, after_step=renew, evaluate=lambda: next(scores)
    )
    assert done.best_step == 4
    before = state(model)
    renew()
    assert same(state(model), before)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match=r"2 processes were started \(WORLD_SIZE\), and this training works in one"):
        run(model_of("eager"), None)


def test_it_can_be_killed_again_and_again(tmp_path: Path) -> None:
    whole = model_of("program")
    run(whole, None)
    path = broken(tmp_path, "program", kill=4)
    with pytest.raises(Killed):
        run(model_of("program"), path, kill=4)  # of steps 3 to 6
    model = model_of("program")
    run(model, path)
    assert same(state(model), state(whole))


def test_of_a_training_that_has_ended_nothing_is_trained_again(tmp_path: Path) -> None:
    path = tmp_path / "training.safetensors"
    first, again = model_of("eager"), model_of("eager")
    done = run(first, path)
    result = run(again, path, kill=1)  # the first batch would end it
    assert same(state(first), state(again))
    assert (result.loss, result.steps, result.best_step) == (pytest.approx(done.loss), STEPS, done.best_step)
    assert result.seconds == pytest.approx(done.seconds, abs=1.0) and result.peak_memory > 0


def test_checkpoints_change_nothing_that_trains(tmp_path: Path) -> None:
    first, second = model_of("eager"), model_of("eager")
    run(first, None)
    run(second, tmp_path / "training.safetensors", every=1)
    assert same(state(first), state(second))


def test_one_without_gradients_keeps_none_when_it_goes_on(tmp_path: Path) -> None:
    """AdamW leaves alone, also by decay, what never had a gradient."""

    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.unused = make_model(), nn.Parameter(torch.ones(3, 3))
            self.config = self.model.config

        def forward(self, **batch: Any) -> Any:
            return self.model(**batch)

    torch.manual_seed(0)
    whole = Unused()
    run(whole, None)
    path = tmp_path / "training.safetensors"
    with pytest.raises(Killed):
        run(Unused(), path, kill=6)
    model = Unused()
    run(model, path)
    assert same(state(model), state(whole)) and torch.equal(model.unused, torch.ones(3, 3))


# ---- other trainings, and broken files -------------------------------------------------------------------------------


def test_another_training_does_not_go_on_from_it(tmp_path: Path) -> None:
    path = broken(tmp_path)
    settings = dataclasses.replace(QUICK, learning_rate=2e-2)
    with pytest.raises(TrainingError, match=r"another training, with learning_rate=0\.01 instead of 0\.02: remove it"):
        run(model_of("eager"), path, settings=settings)
    other: Any = make_model()
    with torch.no_grad():
        other.classifier.bias[0] = 7.0
    with pytest.raises(TrainingError, match="another training, with other weights to begin with"):
        run(other, path)
    with pytest.raises(TrainingError, match="another training, with layers=None instead of 'plain'"):
        run(model_of("eager"), path, layers="plain")
    rows = encoded().select(range(20))
    with pytest.raises(TrainingError, match="another training, with other data to begin with"):
        finetune(
            model_of("eager"),
            rows,
            collator(),
            QUICK,
            progress=False,
            evaluate=lambda: 0.0,
            checkpoints=Checkpoints(path, 2),
        )


def changed(path: Path, **values: Any) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    content = json.loads(metadata["prequant_training"])
    for key, value in values.items():
        content[key] = value
    save_file(load_file(path), path, metadata | {"prequant_training": json.dumps(content)})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"version": 9}, "version 9; this prequant reads version 1"),
        ({"step": 99}, "step 99 of a training of 7"),
        ({"step": 0}, "step 0 of a training of 7"),
        ({"step": "4"}, "step is '4' where int belongs"),
        ({"more": 1}, "unknown key 'more'"),
        ({"best": {"step": 6, "score": "0.5"}}, "the best step is 6, of 4"),
        ({"best": {"step": 2, "score": "nan"}}, "score is 'nan' where a number belongs"),
        ({"best": {"step": 2, "score": "x"}}, "score is 'x' where a number belongs"),
        ({"best": None}, r"the tensor 'best\.\S+' is in no list"),
    ],
    ids=str,
)
def test_what_a_file_says_is_checked(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    path = broken(tmp_path)
    changed(path, **values)
    with pytest.raises(CheckpointError, match=message):
        run(model_of("eager"), path)


def with_tensor(path: Path, name: str, value: Tensor | None) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors.pop(name)
    save_file(tensors if value is None else {**tensors, name: value}, path, metadata)


def test_its_tensors_are_checked(tmp_path: Path) -> None:
    name = "exp_avg_sq.classifier.bias"
    for value, message in (
        (None, f"the tensor {name} is missing"),
        (torch.zeros(3), r"is of shape \[3\]; expected \[2\]"),
        (torch.zeros(2, dtype=torch.float16), "is of type F16; expected float32"),
        (torch.tensor([0.0, math.inf]), "classifier.bias"),
        (torch.tensor([0.0, -1.0]), "below 0"),
    ):
        path = broken(tmp_path)
        with_tensor(path, name, value)
        with pytest.raises(CheckpointError, match=message):
            run(model_of("eager"), path)
        path.unlink()
    path = broken(tmp_path)
    with_tensor(path, "generator.cpu", torch.zeros(16, dtype=torch.uint8))
    with pytest.raises(CheckpointError, match=r"generator.cpu is of shape \[16\]"):
        run(model_of("eager"), path)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "training.safetensors"
    path.write_bytes(b"not one")
    with pytest.raises(CheckpointError, match="can't be read as a checkpoint of a training"):
        run(model_of("eager"), path)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="is a safetensors file, but no checkpoint of a training"):
        run(model_of("eager"), path)
    with pytest.raises(TrainingError, match="a checkpoint every 0 steps: expected 1 or more"):
        Checkpoints(path, 0)


def test_all_of_a_state_goes_where_its_parameter_is() -> None:
    weight, other = (nn.Parameter(torch.ones(2, device=device)) for device in ("cpu", "meta"))
    first, second = (torch.optim.AdamW([parameter]) for parameter in (weight, other))
    weight.sum().backward()
    first.step()
    restore({"weight": other}, second, tensors_of({"weight": weight}, first, {}))
    assert {name: value.device.type for name, value in second.state[other].items()} == {
        "step": "meta",
        "exp_avg": "meta",
        "exp_avg_sq": "meta",
    }


def test_a_training_that_diverged_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "training.safetensors"
    model: Any = make_model()
    with torch.no_grad():
        model.classifier.bias[0] = math.inf
    with pytest.raises(TrainingError, match=r"the loss was (nan|inf) by step 2: this training has diverged"):
        run(model, path)
    assert not path.exists()
