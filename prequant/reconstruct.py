"""MREM's job: a fine-tuned model and a few unlabelled texts in, a compressed folder and an honest comparison out."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prequant.checkpoint import load, save
from prequant.checkpoint.atomic import replacing
from prequant.checkpoint.folder import is_ours
from prequant.inspection import weight_rows
from prequant.losses import QUESTION_ANSWERING, SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION, task_of
from prequant.measure import machine_settings, median_seconds, plain, saved_bytes, weight_bytes
from prequant.model import ModelProgram
from prequant.passes import Partitioned, Program
from prequant.quiet import no_progress_bars
from prequant.recipes import MREM
from prequant.reconstruction import (
    CalibrationSet,
    Learner,
    Module,
    ModuleFigures,
    ReconstructionError,
    Schedule,
    encode_texts,
    joined,
    reconstruct_in_turn,
    reconstruct_interleaved,
    split,
)
from prequant.reconstruction.distributed import (
    PREPARED,
    read_calibration,
    read_part,
    read_trained,
    reconstruct_as_rank,
    write_parts,
    write_trained,
)
from prequant.reconstruction.distributed import described as described_module
from prequant.reconstruction.ranks import Chain, chain, under_launcher
from prequant.report import ModelFigures, ReconstructionReport
from prequant.report_file import write_report
from prequant.sources import (
    SourceError,
    canonical_program,
    check_length,
    check_output,
    check_weights,
    head_of,
    head_parameters,
    load_for,
    load_model,
    load_tokenizer,
)
from prequant.tasks import Limits, Task
from prequant.tasks.data import described
from prequant.training import TrainingError, TrainingResult, Unfinished
from prequant.training.batches import steps_of

OF_ONE_TASK = (SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION, QUESTION_ANSWERING)
"""Kinds of models whose head stays in float."""
OBSERVED = 8
"""Batches of the calibration set in which the scales of activations begin."""


@dataclass(frozen=True)
class Job:
    """What the job was given."""

    source: str | Path
    recipe: MREM
    calibration: str | Path | None
    task: Task | None
    data: str | Path | None
    max_length: int
    progress: bool


@dataclass(frozen=True)
class Source:
    """What is reconstructed: the model and its Program, the names of its head's parameters, and texts."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    original: ModelProgram
    head: tuple[str, ...]
    calibration: CalibrationSet
    validation: Dataset | None


def reconstruct(
    source: str | Path,
    recipe: MREM,
    out: str | Path,
    *,
    calibration: str | Path | None = None,
    task: Task | None = None,
    data: str | Path | None = None,
    max_length: int = 128,
    save_steps: int = 0,
    progress: bool = True,
) -> ReconstructionReport | None:
    """Quantize the fine-tuned model ``source`` (a folder or hub name) by ``recipe``, and save it to ``out``.

    ``calibration``: a file of texts (:func:`prequant.reconstruction.encode_texts`); without it, those of the training
    set of ``task``, whose labels are not looked at. ``task`` and ``data`` (as in
    :func:`prequant.tasks.data.read_splits`): what the model is scored on, before and after; without a task it is only
    measured. The folder, with its report, appears whole or not at all. The same call, repeated after it was ended, goes
    on with the modules that were not finished, in ``OUT.unfinished``; ``save_steps``: also from their state so many
    steps apart.

    With ``recipe.parallel`` under torchrun every process takes one of the modules, and they have ``OUT.unfinished`` in
    common; the first process gives the report, the others None. Raises :class:`PrequantError` for input that can't be
    used, before anything trains, and where a process fails.
    """
    with nullcontext() if progress else no_progress_bars():
        about = {"recipe": recipe.settings(), "max_length": max_length, "observed": OBSERVED}
        if save_steps < 0:
            raise TrainingError(f"save_steps={save_steps}: expected 1 or more, or 0 to keep finished modules alone")
        unfinished = Unfinished(Path(out), save_steps or sys.maxsize, plain(about))
        if task is None and data is not None:
            raise ReconstructionError(f"data {str(data)!r} is a task's: name the task, or give texts as calibration")
        if under_launcher() and not recipe.parallel:
            raise ReconstructionError(
                "several processes were started, and mrem works in one: give --parallel (parallel=True) to train a "
                "module in each, or start it without torchrun"
            )
        job = Job(source, recipe, calibration, task, data, max_length, progress)
        if recipe.parallel and under_launcher():
            with chain() as here:
                found = _on_ranks(here, job, Path(out), unfinished)
            if found is None:
                return None
            read, program, figures, seconds = found
        else:
            check_output(Path(out), source)
            read = read_source(job)
            modules, parts = prepared(read, recipe, progress)
            started = time.perf_counter()
            figures = train(modules, recipe, read.calibration, unfinished, progress)
            seconds = time.perf_counter() - started + sum(module.seconds_before for module in figures)
            program = joined(parts, modules)
        report = _write(program, read, job, figures, seconds, Path(out))
        unfinished.remove()
        return report


def read_source(job: Job) -> Source:
    """Load and check everything that the job reads."""
    source, recipe, task, calibration = job.source, job.recipe, job.task, job.calibration
    if task is None and calibration is None:
        raise ReconstructionError("there are no texts to calibrate with: give a file of texts, or a task with its data")
    tokenizer = load_tokenizer(source)
    if task is None:
        model = load_model(source, torch.float32, tokenizer)
        check_weights(model, source)
        head = head_parameters(model) if task_of(model) in OF_ONE_TASK else ()
    else:
        task.check_metrics()
        model, fresh = load_for(source, task, recipe.training.seed, tokenizer)
        if fresh:
            raise SourceError(
                f"{source} has no head for {task.name}: {', '.join(fresh)} are missing; mrem takes a model that is "
                "fine-tuned for the task, which prequant finetune makes"
            )
        head = head_of(model, task)
    if model.config.is_encoder_decoder:
        raise ReconstructionError(f"{source} has an encoder and a decoder; mrem reconstructs models that read one text")
    check_length(model.config, job.max_length)
    validation, rows = None, None
    if task is not None:
        splits = task.load(job.data)
        validation = splits["validation"]
        if calibration is None:
            rows = task.encode(splits["train"], tokenizer, job.max_length, job.progress)
    if rows is None:
        rows = encode_texts(Path(str(calibration)), tokenizer, job.max_length, job.progress)
    texts = CalibrationSet.of(rows, tokenizer, recipe.samples, recipe.training.batch_size, recipe.training.seed)
    if recipe.attention and recipe.activation_bits:
        # Fused attention keeps its probabilities to itself.
        usual = model.config._attn_implementation
        model.set_attn_implementation("eager")
        original = canonical_program(model, tokenizer)
        model.set_attn_implementation(usual)
    else:
        original = canonical_program(model, tokenizer)
    assert isinstance(original, ModelProgram)
    return Source(model, tokenizer, original, head, texts, validation)


def prepared(read: Source, recipe: MREM, progress: bool) -> tuple[tuple[Module, ...], Partitioned]:
    """The modules of the model and its quantized copy, and the latter's parts."""
    student = recipe.prepare(read.original, read.head, read.calibration.spread(OBSERVED), progress)
    count, cuts = (None, recipe.boundaries) if recipe.boundaries else (recipe.modules, None)
    return split(read.original, student, count, cuts, recipe.balance, recipe.objective)


def _on_ranks(
    here: Chain, job: Job, out: Path, unfinished: Unfinished
) -> tuple[Source, Program, list[ModuleFigures], float] | None:
    """Train one module in each process. The first reads the model, before and after; between, each has its part."""
    recipe = job.recipe
    if here.size != recipe.parts:
        raise ReconstructionError(
            f"{here.size} processes for {recipe.parts} modules: each takes one, so there have to be as many"
        )
    folder = unfinished.folder
    if here.rank == 0:
        check_output(out, job.source)
        _write_parts(folder, job, here)
        gc.collect()
    module = read_part(folder, here.hear(f"{PREPARED}/{here.rank}"))
    module, calibration = module.to(here.device), read_calibration(folder).to(here.device)
    learner = learner_of(recipe, calibration, unfinished)(module)
    started, schedule = time.perf_counter(), schedule_of(recipe, calibration)
    figures = reconstruct_as_rank(here, learner, calibration, schedule, recipe.training.seed, job.progress)
    seconds = time.perf_counter() - started + max(module.seconds_before for module in figures)
    write_trained(folder, module.to(torch.device("cpu")))
    here.tell(f"written/{here.rank}")
    if here.rank:
        return None
    for rank in range(here.size):
        here.hear(f"written/{rank}")
    read = read_source(replace(job, progress=False))
    modules, parts = prepared(read, recipe, progress=False)
    return read, joined(parts, read_trained(folder, modules)), figures, seconds


def _write_parts(folder: Path, job: Job, here: Chain) -> None:
    read = read_source(job)
    modules, _ = prepared(read, job.recipe, job.progress)
    write_parts(folder, modules, read.calibration)
    for module in modules:
        here.tell(f"{PREPARED}/{module.number}", described_module(module))


def train(
    modules: tuple[Module, ...],
    recipe: MREM,
    calibration: CalibrationSet,
    unfinished: Unfinished,
    progress: bool,
) -> list[ModuleFigures]:
    """Train all modules in this process, in turn or interleaved."""
    seed, learner = recipe.training.seed, learner_of(recipe, calibration, unfinished)
    torch.manual_seed(seed)
    if not recipe.parallel:
        return reconstruct_in_turn(modules, calibration, learner, seed, progress)
    return reconstruct_interleaved(modules, calibration, learner, schedule_of(recipe, calibration), seed, progress)


def schedule_of(recipe: MREM, calibration: CalibrationSet) -> Schedule:
    """Queues and teacher forcing in numbers of batches and steps."""
    return Schedule(recipe.queue, round(recipe.forcing * steps_of(recipe.training, calibration.rows)))


def learner_of(recipe: MREM, calibration: CalibrationSet, unfinished: Unfinished) -> Callable[[Module], Learner]:
    """What makes the learner of a module."""

    def made(module: Module) -> Learner:
        return Learner(
            module,
            recipe.training,
            steps_of(recipe.training, calibration.rows),
            recipe.scales_follow,
            recipe.padding,
            unfinished.checkpoints(f"module-{module.number}"),
            calibration.digest,
        )

    return made


def _write(
    program: Any,
    read: Source,
    job: Job,
    modules: list[ModuleFigures],
    seconds: float,
    out: Path,
) -> ReconstructionReport:
    """Freeze, save, load again, measure, and write the report."""
    parameters = sum(p.numel() for p in read.model.parameters())
    trained = sum(module.trained for module in modules)
    finished = job.recipe.finish()(program)
    result = TrainingResult(
        sum(module.steps for module in modules), seconds, modules[-1].last_loss, max(m.peak_memory for m in modules)
    )
    limits, task = Limits(job.max_length), job.task

    def scores(model: Any) -> tuple[Mapping[str, float], int]:
        if task is None or read.validation is None:
            return {}, 0
        found = task.evaluate(model, read.validation, read.tokenizer, limits, job.progress)
        return found.scores, found.examples

    batch = read.calibration[len(read.calibration) // 2]
    settings = {
        "model": str(job.source),
        "task": None if task is None else task.name,
        "data": None if task is None else described(task.hub, job.data),
        "calibration": None if job.calibration is None else str(job.calibration),
        "texts": read.calibration.rows,
        "max_length": job.max_length,
        "recipe": job.recipe.settings(),
        "processes": len(modules) if job.recipe.parallel and under_launcher() else 1,
        "seed": job.recipe.training.seed,
        "latency_batch": len(batch["input_ids"]),
        **machine_settings(),
    }
    with replacing(out, is_ours) as staging:
        save(finished, staging, read.tokenizer)
        saved = load(staging)
        ours, examples = scores(saved)
        theirs, _ = scores(read.model)
        with torch.inference_mode():
            times = median_seconds([partial(model, **batch) for model in (read.model, saved)])
        base = ModelFigures(theirs, saved_bytes(read.model), parameters, 0, times[0])
        packed = ModelFigures(ours, weight_bytes(staging), parameters, trained, times[1], result)
        report = ReconstructionReport(
            metric_name=next(iter(ours), ""),
            examples=examples,
            baseline=base,
            compressed=packed,
            weights=weight_rows(saved, None),
            settings=settings,
            passes=[item.to_dict() for item in finished.reports],
            modules=tuple(modules),
        )
        write_report(staging, report.to_json())
    return report
