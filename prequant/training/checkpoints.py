"""A training's state in a file on the way, from which the same training goes on as if it had never stopped.

One safetensors file, replaced every so many steps: the parameters that train, AdamW's moments, the generators' states,
and the best state so far. Its metadata say which training it is of: settings, data and model by their hashes, and
whatever the caller says of it. Nothing in it is run, and all of it is checked.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from prequant.checkpoint import CheckpointError
from prequant.checkpoint.atomic import replacing_file
from prequant.checkpoint.json_file import Record, describe, parse_json
from prequant.checkpoint.tensors import Stored, hash_tensors, read_tensors, write_tensors
from prequant.checkpoint.weight_tensors import check_finite

from .settings import TrainingError, TrainingSettings

VERSION = 1
"""Of the file. A reader refuses every version that it does not know."""

_KEY = "prequant_training"
_PARAMETER, _BEST, _STEP, _MOMENTS = "parameters", "best", "step", ("exp_avg", "exp_avg_sq")
_GENERATOR = "generator"
_NUMBERS = ("loss", "first_loss", "seconds")


@dataclass(frozen=True)
class Checkpoints:
    """Where a training is kept (``path``, a file), and after how many steps each time (``every``); at the end, too.

    ``about``: what decides on the result beside model, data and settings, such as the loss; of JSON's types. A training
    with the same of all these goes on from the file. Raises :class:`TrainingError` for ``every`` below 1.
    """

    path: Path
    every: int
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise TrainingError(f"a checkpoint every {self.every} steps: expected 1 or more")


@dataclass(frozen=True)
class State:
    """A training after ``step`` steps: what these took, and the tensors by name. ``loss``: a sum, or a mean, as the
    training reckons it; ``first_loss`` the like of its beginning. ``best``: step and score.
    """

    step: int
    loss: float
    seconds: float
    peak_memory: int
    best: tuple[int, float] | None
    tensors: Mapping[str, Tensor]
    first_loss: float = 0.0


# ---- which training it is --------------------------------------------------------------------------------------------


def identity(model: nn.Module, data: str, settings: TrainingSettings, about: Mapping[str, Any]) -> dict[str, Any]:
    """What a training is known by, before it begins: settings, hashes of the model's tensors and of the ``data``."""
    of_model = hashlib.sha256()
    hash_tensors(of_model, model.state_dict())
    found = {"settings": asdict(settings), "model": of_model.hexdigest(), "data": data, "about": about}
    return dict(json.loads(json.dumps(found, allow_nan=False)))


def hash_of(rows: Dataset) -> str:
    """SHA-256, in hexadecimal, of all columns."""
    sha = hashlib.sha256()
    for column in rows.column_names:
        sha.update(f"{column}={rows[column][:]!r}".encode())
    return sha.hexdigest()


def _difference(ours: Any, theirs: Any, path: str = "") -> str:
    """The first thing in which two identities differ, for a message."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        key = next(key for key in (*ours, *theirs) if key not in ours or ours[key] != theirs.get(key, ours))
        return _difference(ours.get(key), theirs.get(key), key)
    if path in ("model", "data"):
        return f"with other {'weights' if path == 'model' else 'data'} to begin with"
    return f"with {path}={describe(theirs)} instead of {describe(ours)}"


# ---- tensors ---------------------------------------------------------------------------------------------------------


def tensors_of(
    trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, best: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Everything that a training has to have to go on, as it is now, by name."""
    found: dict[str, Tensor] = {}
    for name, parameter in trained.items():
        # Without a gradient so far, there is no state; zeros after no step are the same.
        state = optimizer.state.get(parameter, {})
        found[f"{_PARAMETER}.{name}"] = parameter.detach()
        found[f"{_STEP}.{name}"] = torch.as_tensor(state.get(_STEP, 0.0), dtype=torch.float32)
        for moment in _MOMENTS:
            found[f"{moment}.{name}"] = state.get(moment, torch.zeros_like(parameter))
    found |= {f"{_BEST}.{name}": value for name, value in best.items()}
    return found | {f"{_GENERATOR}.{kind}": state for kind, state in _generators(trained).items()}


def _generators(trained: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if (device := next(iter(trained.values())).device).type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


@torch.no_grad()
def restore(
    trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Put a state into parameters, optimizer and generators. Returns the best state's parameters, if it has one."""
    for name, parameter in trained.items():
        parameter.copy_(tensors[f"{_PARAMETER}.{name}"])
        # The count of steps as well: fused optimizers read it where they compute.
        optimizer.state[parameter] = {
            part: tensors[f"{part}.{name}"].to(parameter.device) for part in (_STEP, *_MOMENTS)
        }
    torch.set_rng_state(tensors[f"{_GENERATOR}.cpu"])
    if (state := tensors.get(f"{_GENERATOR}.cuda")) is not None:
        torch.cuda.set_rng_state(state, next(iter(trained.values())).device)
    kept = {name: tensors.get(f"{_BEST}.{name}") for name in trained}
    return {name: value.to(trained[name].device) for name, value in kept.items() if value is not None}


# ---- the file --------------------------------------------------------------------------------------------------------


def write_state(path: Path, known_by: Mapping[str, Any], state: State) -> None:
    """Write a state; the file has the state before or this one, whenever the process ends."""
    content = {
        "version": VERSION,
        "training": known_by,
        "step": state.step,
        "loss": state.loss,
        "first_loss": state.first_loss,
        "seconds": state.seconds,
        "peak_memory": state.peak_memory,
        "best": None if state.best is None else {"step": state.best[0], "score": str(state.best[1])},
    }
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    with replacing_file(path) as staging:
        write_tensors(staging, state.tensors, {_KEY: text})


def read_state(path: Path, known_by: Mapping[str, Any], like: Mapping[str, Tensor], steps: int) -> State:
    """The state in a file, whose tensors are of the types and shapes of ``like`` (a state of the same training, with a
    best one or not).

    Raises :class:`CheckpointError` for a file that is no such state, and :class:`TrainingError` for one of another
    training, naming in what it differs.
    """
    record = _record(path)
    if (theirs := record.get("training", dict)) != known_by:
        raise TrainingError(
            f"{path} is the checkpoint of another training, {_difference(dict(known_by), theirs)}: remove it to begin "
            "anew, or repeat that training to go on from it"
        )
    step, best = record.get("step", int), None
    if not 1 <= step <= steps:
        raise CheckpointError(f"{path}: step {step} of a training of {steps}")
    if record.value.get("best") is not None:
        of_best = record.record("best").only(("step", "score"))
        best = of_best.get("step", int), _score(of_best)
        if not 1 <= best[0] <= step:
            raise CheckpointError(f"{path}: the best step is {best[0]}, of {step}")
    parameters = {name: value for name, value in like.items() if not name.startswith(f"{_BEST}.")}
    if best is not None:
        names = [name.removeprefix(f"{_PARAMETER}.") for name in parameters if name.startswith(f"{_PARAMETER}.")]
        parameters |= {f"{_BEST}.{name}": like[f"{_PARAMETER}.{name}"] for name in names}
    table = {name: Stored(value.dtype, tuple(value.shape)) for name, value in parameters.items()}
    tensors = read_tensors(path, table, mapped=False)
    for name, value in tensors.items():
        if value.dtype.is_floating_point:
            check_finite(None, value, f"{path}: {name}")
        if name.startswith((f"{_STEP}.", f"{_MOMENTS[1]}.")) and bool((value < 0).any()):
            raise CheckpointError(f"{path}: {name} holds {float(value.min()):g}; steps and squares are never below 0")
    loss, first_loss, seconds = (record.get(name, float) for name in _NUMBERS)
    return State(step, loss, seconds, record.get("peak_memory", int), best, tensors, first_loss)


def _score(record: Record) -> float:
    """A score, which is written as text: it may be minus infinity, which JSON does not have."""
    text = record.get("score", str)
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if math.isnan(score):
        raise CheckpointError(f"{record.where}: score is {describe(text)} where a number belongs")
    return score


def _record(path: Path) -> Record:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            text = (file.metadata() or {}).get(_KEY)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: can't be read as a checkpoint of a training: {error}") from error
    if text is None:
        raise CheckpointError(f"{path} is a safetensors file, but no checkpoint of a training")
    record = Record(parse_json(text, str(path)), f"{path}, {_KEY}")
    if (version := record.get("version", int)) != VERSION:
        raise CheckpointError(f"{record.where}: version {version}; this prequant reads version {VERSION}")
    record.only(("version", "training", "step", "peak_memory", "best", *_NUMBERS))
    for name in _NUMBERS:
        if not math.isfinite(record.get(name, float)):
            raise CheckpointError(f"{record.where}: {name} is {record.value[name]}")
    return record
