"""Another task on a compressed base: a short training, and a small file that holds what it changed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from prequant.adapters import AdapterError, adapter_of, variant, write_adapter
from prequant.adapters.file import check_adapter_path
from prequant.adapters.heads import Headed, with_head
from prequant.checkpoint import load
from prequant.measure import installed_versions, plain, weight_bytes
from prequant.model import ModelProgram
from prequant.passes import Freeze, Pipeline, weights
from prequant.passes.sites import OUTLIER_PREFIX
from prequant.quiet import no_progress_bars
from prequant.recipes import AlphaTuning, PreQuant, TuningRecipe
from prequant.recipes.base import speed_passes
from prequant.runtime import Scheme, WeightFormat
from prequant.sources import AUTO_CLASSES, WRITERS, SourceError, check_length, holds_program, load_tokenizer
from prequant.tasks import Limits, Task
from prequant.tasks.data import described
from prequant.training import TrainingResult, Unfinished, finetune

OF_ONE_TASK = ("id2label", "label2id", "num_labels", "problem_type", "architectures", "quantization_config")
"""What a base's configuration says that is not so for another task."""


@dataclass(frozen=True)
class AdaptReport:
    """What :func:`adapt` measured: of a task on a base, with the adapter loaded from its file.

    ``parameters`` are those of the adapter, ``model`` those of the model before compression; sizes are in bytes.
    """

    task: str
    scores: Mapping[str, float]
    examples: int
    parameters: int
    model: int
    bytes: int
    base_bytes: int
    training: TrainingResult

    def table(self) -> Table:
        """As the command line shows it."""
        table = Table("", self.task, title=f"on {self.examples:,} examples")
        for name, score in self.scores.items():
            table.add_row(name, f"{score:.4f}")
        table.add_row("numbers of its own", f"{self.parameters:,} ({self.parameters / self.model:.2%} of the model's)")
        table.add_row("size of the file", f"{self.bytes:,} bytes ({self.bytes / self.base_bytes:.2%} of the base)")
        table.add_row("training", f"{self.training.steps:,} steps, {self.training.seconds:.0f} s")
        return table


def adapt(
    base: str | Path,
    task: Task,
    data: str | Path | None,
    out: str | Path,
    recipe: TuningRecipe | None = None,
    *,
    max_length: int = 128,
    save_steps: int = 0,
    progress: bool = True,
) -> AdaptReport:
    """Tune the compressed folder ``base`` for another task and write what changed to the file ``out``; the folder stays
    as it is.

    ``recipe`` says what trains and how; its settings for compressing are not looked at. By default it is the one that
    makes such weights (:func:`recipe_for`). A classifier gets a new head. ``data`` as in
    :func:`prequant.tasks.data.read_splits`; ``save_steps`` as in :func:`prequant.compress.compress`. Scores are those
    of the file, loaded again on the folder, and stand in it.
    Raises :class:`PrequantError` for input that can't be used, before anything trains.
    """
    with nullcontext() if progress else no_progress_bars():
        told = None if recipe is None else plain(recipe.settings())
        unfinished = Unfinished(Path(out), save_steps, {"task": task.name, "max_length": max_length, "recipe": told})
        report = _adapt(Path(base), task, data, Path(out), recipe, max_length, progress, unfinished)
        unfinished.remove()
        return report


def _adapt(
    folder: Path,
    task: Task,
    data: str | Path | None,
    out: Path,
    recipe: TuningRecipe | None,
    max_length: int,
    progress: bool,
    unfinished: Unfinished,
) -> AdaptReport:
    check_adapter_path(out)
    task.check_metrics()
    base = load_base(folder)
    recipe = recipe_for(base) if recipe is None else recipe
    tokenizer = load_tokenizer(folder)
    headed = for_task(base, task, tokenizer, recipe.training.seed)
    check_length(headed.program.config, max_length)
    program = Pipeline([recipe.tune(headed.program, headed.head)])(headed.program)
    trained = dict(program.reports[-1].totals)
    rows = task.load(data)
    train = task.encode(rows["train"], tokenizer, max_length, progress)
    limits, collate = Limits(max_length), task.collator(tokenizer)
    evaluate = partial(task.goodness, program, rows["validation"], tokenizer, limits)
    kept = unfinished.checkpoints("training")
    result = finetune(program, train, collate, recipe.training, headed.head, progress, None, evaluate, kept)
    tuned = Pipeline([Freeze(outlier_dtype=_outlier_dtype(base)), *speed_passes()])(program)
    assert isinstance(tuned, ModelProgram)
    settings = {
        "base": str(folder),
        "data": described(task.hub, data),
        "examples": {name: len(split) for name, split in rows.items()},
        "max_length": max_length,
        "recipe": recipe.name,
        "train": list(getattr(recipe, "train", ())),
        **asdict(recipe.training),
    }
    adapter = adapter_of(base, tuned)
    score = task.evaluate(variant(base, adapter), rows["validation"], tokenizer, limits, progress)
    about = {
        "task": task.name,
        "kind": task.kind,
        "scores": dict(score.scores),
        "examples": score.examples,
        "training": asdict(result),
        "settings": settings,
        "versions": installed_versions(),
    }
    write_adapter(out, replace(adapter, about=plain(about)))
    return AdaptReport(
        task=task.name,
        scores=score.scores,
        examples=score.examples,
        parameters=adapter.parameters,
        model=int(trained["model"]),
        bytes=out.stat().st_size,
        base_bytes=weight_bytes(folder),
        training=result,
    )


def load_base(folder: str | Path) -> ModelProgram:
    """A folder that prequant saved of a transformers model. Raises :class:`SourceError` for another."""
    if not holds_program(folder):
        raise SourceError(f"{folder} is no folder that prequant saved; compress a model first")
    program = load(folder)
    if not isinstance(program, ModelProgram):
        raise SourceError(f"{folder} holds no model of transformers, so there is no task for it")
    return program


def recipe_for(base: ModelProgram) -> TuningRecipe:
    """The recipe that tunes weights such as these: AlphaTuning binary-coded ones, PreQuant quantized ones.

    Raises :class:`AdapterError` where there are none.
    """
    compressed = [view for view in weights(base) if not {"codes", "planes"}.isdisjoint(view.tensors)]
    if any(WeightFormat.parse(view.format).scheme is Scheme.BCQ for view in compressed):
        return AlphaTuning()
    if not compressed:
        raise AdapterError("the base has no compressed weight: compress it first")
    recipe = PreQuant()
    if any(OUTLIER_PREFIX + "values" in view.tensors for view in compressed):
        return recipe
    return replace(recipe, outlier_ratio=0.0, train=tuple(kind for kind in recipe.train if kind != "outliers"))


def for_task(base: ModelProgram, task: Task, tokenizer: PreTrainedTokenizerBase, seed: int) -> Headed:
    """The base as ``task`` takes it: with a new head for classes, numbers or answers, drawn from ``seed``; with the
    language model's own where the task is to write.

    Raises :class:`AdapterError` for a base that has no such head.
    """
    if task.kind in WRITERS and base.task == task.kind:
        return Headed(base.copy(), ())
    config = _config_for(base.config, task, tokenizer)
    classes: Mapping[type, Any] = AUTO_CLASSES[task.kind]._model_mapping
    try:
        kind = classes[type(config)]
    except KeyError:
        raise AdapterError(f"there is no {config.model_type} model for {task.kind}, which {task.name} takes") from None
    headed = with_head(base, kind[0] if isinstance(kind, tuple) else kind, config, seed)
    if task.kind in WRITERS and headed.head:
        raise AdapterError(
            f"the base lacks {headed.head[0]}, a part of the language model's head, to write {task.name}"
        )
    return headed


def _config_for(config: PretrainedConfig, task: Task, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    values = {name: value for name, value in copy.deepcopy(config.to_dict()).items() if name not in OF_ONE_TASK}
    made = type(config).from_dict({**values, **task.head_options()})
    if made.pad_token_id is None:
        made.pad_token_id = tokenizer.pad_token_id
    return made


def _outlier_dtype(base: ModelProgram) -> Any:
    """The type that the base stores outlier values in; None without any."""
    for view in weights(base):
        if (name := view.tensors.get(OUTLIER_PREFIX + "values")) is not None:
            return str(base.tensor(name).dtype).removeprefix("torch.")
    return None
