"""The main job: a model and a task in, a compressed folder and an honest comparison out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prequant.adapters import adapter_of, write_adapter
from prequant.adapters.file import check_adapter_path
from prequant.adapters.variant import stored_name
from prequant.checkpoint import load, save
from prequant.checkpoint.atomic import replacing
from prequant.checkpoint.folder import is_ours
from prequant.distillation import COMPARED, Distiller
from prequant.inspection import weight_rows
from prequant.losses import LABELS, SEQ2SEQ_LM
from prequant.measure import machine_settings, median_seconds, plain, saved_bytes, weight_bytes
from prequant.model import ModelProgram
from prequant.passes.latent_scales import following
from prequant.quiet import no_progress_bars
from prequant.recipes import Stage, StagedRecipe, TuningRecipe
from prequant.report import LATENCY_BATCH, CompressionReport, ModelFigures
from prequant.report_file import write_report
from prequant.runtime import PrequantError
from prequant.sources import (
    SourceError,
    canonical_program,
    check_length,
    check_output,
    head_of,
    load_for,
    load_tokenizer,
)
from prequant.tasks import Evaluation, Limits, Task
from prequant.tasks.data import described
from prequant.training import TrainingResult, TrainingSettings, Unfinished, combined, finetune

__all__ = ["GIVEN", "NONE", "TRAIN", "CompressionReport", "ModelFigures", "compress", "default_baseline_training"]

TRAIN, GIVEN, NONE = "train", "given", "none"
"""What the compressed model is compared with: the model fine-tuned with the same budget, the model as it was given, or
nothing.
"""
STUDENT = "student"
"""What a Distiller calls the model that it trains."""


@dataclass(frozen=True)
class _Workbench:
    """What every step of one job needs."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    train_rows: Dataset
    validation: Dataset
    limits: Limits
    progress: bool
    unfinished: Unfinished

    def score(self, model: nn.Module) -> Evaluation:
        """The task's metrics on the validation set."""
        return self.task.evaluate(model, self.validation, self.tokenizer, self.limits, self.progress)

    def finetune(self, model: nn.Module, training: TrainingSettings, head: Sequence[str]) -> TrainingResult:
        """Train on the training set."""
        collate, evaluate = self.task.collator(self.tokenizer), self._evaluation(model)
        kept = self.unfinished.checkpoints("baseline")
        return finetune(model, self.train_rows, collate, training, head, self.progress, None, evaluate, kept)

    def _evaluation(self, model: nn.Module) -> Callable[[], float]:
        return partial(self.task.goodness, model, self.validation, self.tokenizer, self.limits)

    def train(
        self, number: int, program: ModelProgram, stage: Stage, head: Sequence[str], original: ModelProgram
    ) -> TrainingResult:
        """Train a program as a recipe's stage, the one of this number, says."""
        model: nn.Module = program
        if stage.layers is not None:
            teacher = COMPARED(original)
            assert isinstance(teacher, ModelProgram)
            model, head = Distiller(program, teacher, stage.layers), [f"{STUDENT}.{name}" for name in head]
        renew = following(program).renew if stage.scales_follow else None
        collate = self.task.collator(self.tokenizer)
        evaluate, kept = self._evaluation(program), self.unfinished.checkpoints(f"stage-{number}")
        return finetune(model, self.train_rows, collate, stage.training, head, self.progress, renew, evaluate, kept)

    def latencies(self, models: Sequence[nn.Module]) -> list[float]:
        """Seconds for one batch, each model's, measured in turns."""
        few = self.validation.select(range(min(LATENCY_BATCH, len(self.validation))))
        encoded = self.task.encode(few, self.tokenizer, self.limits.max_length, progress=False)
        batch = self.task.collator(self.tokenizer)([encoded[i] for i in range(min(LATENCY_BATCH, len(encoded)))])
        if self.task.kind != SEQ2SEQ_LM:  # whose decoder reads them
            batch = {name: value for name, value in batch.items() if name not in LABELS[self.task.kind]}
        with torch.inference_mode():
            return median_seconds([partial(model, **batch) for model in models])


def compress(
    source: str | Path,
    recipe: StagedRecipe,
    task: Task,
    data: str | Path | None,
    out: str | Path,
    *,
    baseline: str | None = None,
    baseline_training: TrainingSettings | None = None,
    adapter: str | Path | None = None,
    max_length: int = 128,
    save_steps: int = 0,
    progress: bool = True,
) -> CompressionReport:
    """Compress the model ``source`` (a folder or hub name) for ``task`` by ``recipe``, measure it, and save it to
    ``out``.

    ``data`` as in :func:`prequant.tasks.data.read_splits`. ``baseline``: ``"train"`` fine-tunes the float model on the
    same data, from the same head, with ``baseline_training`` (default: the recipe's epochs, batch size and seed with
    ``TrainingSettings``' learning rate); ``"given"`` takes it as it is; ``"none"`` compares with nothing; a path is a
    model fine-tuned before. By default it is trained, but taken as it is where the recipe distils: it is the teacher.
    Of such a recipe ``"train"`` makes the teacher, which the student starts from as well.
    ``adapter``: a file to write what was trained to, so that the task can be chosen again where the folder serves other
    tasks as well; of recipes that tune. ``save_steps`` above 0: every so many steps of a training its state is kept, in
    ``OUT.unfinished``; the same call, repeated after the process was ended, goes on from there and gives the same
    result. Figures of the compressed model are those of the saved folder, loaded again.
    Its ``prequant-report.json`` has every figure, setting and version; model and report appear in ``out`` together,
    after all is measured, or not at all. Raises :class:`PrequantError` for input that can't be used, before anything
    trains.
    """
    with nullcontext() if progress else no_progress_bars():
        own = None if adapter is None else Path(adapter)
        kind = baseline or (GIVEN if recipe.distils else TRAIN)
        about = {"recipe": recipe.settings(), "task": task.name, "max_length": max_length}
        unfinished = Unfinished(Path(out), save_steps, plain(about))
        report = _compress(
            source, recipe, task, data, Path(out), kind, baseline_training, own, max_length, progress, unfinished
        )
        unfinished.remove()
        return report


def _compress(
    source: str | Path,
    recipe: StagedRecipe,
    task: Task,
    data: str | Path | None,
    out: Path,
    baseline: str,
    baseline_training: TrainingSettings | None,
    adapter: Path | None,
    max_length: int,
    progress: bool,
    unfinished: Unfinished,
) -> CompressionReport:
    check_output(out, source, baseline)
    if adapter is not None:
        check_adapter_path(adapter)
        if not isinstance(recipe, TuningRecipe):
            raise PrequantError(f"the recipe {recipe.name!r} trains whole models, of which there is no adapter")
    task.check_metrics()
    tokenizer = load_tokenizer(source)
    model, fresh = load_for(source, task, recipe.training.seed, tokenizer)
    head = head_of(model, task)
    check_length(model.config, max_length)
    if fresh and recipe.distils and baseline != TRAIN:
        raise SourceError(
            f"{source} has no head for {task.name}: {', '.join(fresh)} are missing; {recipe.name} learns from a model "
            "that is fine-tuned for the task: prequant finetune makes one, or the baseline 'train' does so first"
        )
    if fresh and (baseline == GIVEN or not recipe.trains):
        advice = "compare with 'train'" if recipe.trains else "fine-tune it first, as nothing is to train here"
        raise SourceError(f"{source} has no head for {task.name}: {', '.join(fresh)} are missing; {advice}")
    rows = task.load(data)
    train = task.encode(rows["train"], tokenizer, max_length, progress)
    bench = _Workbench(task, tokenizer, train, rows["validation"], Limits(max_length), progress, unfinished)
    parameters = sum(p.numel() for p in model.parameters())
    original = canonical_program(model, tokenizer)
    # Before the baseline trains: what does not fit the model is refused here.
    stage = recipe.stage(0, original, original, head)
    program = stage.passes(original)
    if left := [name for name in fresh if not program.tensor(name).requires_grad]:
        raise SourceError(f"{source} has no head for {task.name}: {', '.join(left)} are missing, and would not train")
    training = baseline_training or default_baseline_training(recipe.training)
    compared = _baseline(model, baseline, training, bench, parameters)
    if recipe.distils and baseline == TRAIN:
        original = canonical_program(compared[0][0], tokenizer)
        stage = recipe.stage(0, original, original, head)
        program = stage.passes(original)

    results, trains = list[TrainingResult](), dict[str, int]()
    for number in range(recipe.stages if recipe.trains else 0):
        if number:
            stage = recipe.stage(number, program, original, head)
            program = stage.passes(program)
        assert isinstance(program, ModelProgram) and isinstance(original, ModelProgram)
        trains = {name: p.numel() for name, p in program.named_parameters() if p.requires_grad}
        results.append(bench.train(number, program, stage, head, original))
    result = combined(results)
    program = recipe.finish()(program)
    assert isinstance(program, ModelProgram)
    with replacing(out, is_ours) as staging:
        save(program, staging, tokenizer)
        saved = load(staging)
        assert isinstance(saved, ModelProgram)
        score = bench.score(saved)
        count = parameters if isinstance(recipe, TuningRecipe) else _uncompressed_parameters(program)
        size, trained = weight_bytes(staging), sum(trains.values())
        ours = ModelFigures(score.scores, size, count, trained, math.nan, result, recipe.nominal_bits)
        models, known = zip(*(*compared, (saved, ours)), strict=True)
        figures = [replace(one, latency=latency) for one, latency in zip(known, bench.latencies(models), strict=True)]
        report = CompressionReport(
            metric_name=score.metric_name,
            examples=score.examples,
            baseline=figures[0] if compared else None,
            compressed=figures[-1],
            # Where all of a model trains, or layers have other numbers, errors of weights say nothing.
            weights=weight_rows(saved, original if isinstance(recipe, TuningRecipe) else None),
            settings={
                "model": str(source),
                "task": task.name,
                "data": described(task.hub, data),
                "examples": {name: len(split) for name, split in rows.items()},
                "max_length": max_length,
                "recipe": recipe.settings(),
                "baseline": baseline,
                "baseline_training": asdict(training) if baseline == TRAIN else None,
                "seed": recipe.training.seed,
                **machine_settings(),
            },
            passes=[item.to_dict() for item in program.reports],
        )
        write_report(staging, report.to_json())
        if adapter is not None:
            about = {"task": task.name, "kind": task.kind, "scores": score.scores, "settings": report.settings}
            write_adapter(adapter, adapter_of(saved, saved, plain(about), always=map(stored_name, trains)))
    return report


def _uncompressed_parameters(program: ModelProgram) -> int:
    """Parameters of a model before its weights were compressed, as the choice of what trains counted them."""
    return next(int(report.totals["model"]) for report in reversed(program.reports) if "model" in report.totals)


def default_baseline_training(training: TrainingSettings) -> TrainingSettings:
    """The same budget, order of examples and seed, with the learning rates that fine-tuning a whole model takes."""
    usual = TrainingSettings()
    return TrainingSettings(
        epochs=training.epochs,
        batch_size=training.batch_size,
        max_steps=training.max_steps,
        seed=training.seed,
        warmup=training.warmup,
        max_grad_norm=training.max_grad_norm,
        eval_steps=training.eval_steps,
        precision=training.precision,
        learning_rate=usual.learning_rate,
        weight_decay=usual.weight_decay,
    )


def _baseline(
    model: PreTrainedModel, kind: str, training: TrainingSettings, bench: _Workbench, parameters: int
) -> list[tuple[PreTrainedModel, ModelFigures]]:
    """The model to compare with, if there is one, and its figures; the latency is measured later, beside ours."""
    if kind == NONE:
        return []
    result, trained = None, 0
    if kind == TRAIN:
        compared = copy.deepcopy(model)
        result = bench.finetune(compared, training, head_of(model, bench.task))
        trained = parameters
    elif kind == GIVEN:
        compared = model
    else:
        compared, fresh = load_for(kind, bench.task, training.seed, bench.tokenizer)
        if fresh:
            raise SourceError(f"the baseline {kind} has no head for {bench.task.name}: {', '.join(fresh)} are missing")
        parameters = sum(p.numel() for p in compared.parameters())
    if misfit := bench.task.misfit(compared.config):
        raise SourceError(f"the baseline {kind} does not serve {bench.task.name}: {misfit}")
    size = saved_bytes(compared)
    return [(compared, ModelFigures(bench.score(compared).scores, size, parameters, trained, math.nan, result))]
