"""MREM-S (Bai et al., arXiv 2109.15082): one module after the other, each on what the quantized ones before it give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

import torch
from tqdm.auto import tqdm

from prequant.measure import PeakMemory

from .calibration import CalibrationSet
from .learner import Learner, ModuleFigures
from .modules import Module, Values
from .targets import Targets


def reconstruct_in_turn(
    modules: Sequence[Module],
    calibration: CalibrationSet,
    learner_of: Callable[[Module], Learner],
    seed: int,
    progress: bool = True,
) -> list[ModuleFigures]:
    """Train the modules' students in place, one after the other. Targets are those of the float path: what a teacher
    gives for what the teachers before it gave.

    Between two modules all batches' values are in memory, those of the float path and of the quantized one. A module
    with a checkpoint goes on from there, as if it had never stopped; one that is finished is only run. The same seed on
    one thread gives the same weights, bit for bit.
    """
    figures: list[ModuleFigures] = []
    given: list[Values] = [{} for _ in calibration]
    quantized: list[Values] = [{} for _ in calibration]
    for module in modules:
        learner = learner_of(module)
        with PeakMemory() as memory:
            targets = Targets(module, calibration, module is modules[-1])
            given = [targets.add(batch, values) for batch, values in enumerate(given)]
            order = islice(calibration.order(seed + module.number), learner.done, learner.steps)
            title = f"module {module.number + 1} of {len(modules)}"
            bar = tqdm(order, title, learner.steps, initial=learner.done, unit="step", disable=not progress)
            for number in bar:
                _, loss = learner.step({**calibration[number], **quantized[number]}, targets[number])
                if not learner.done % 10:
                    bar.set_postfix(loss=f"{loss:.3g}", refresh=False)
            if module is not modules[-1]:
                quantized = _outputs(module, calibration, quantized)
        learner.peak_memory = max(learner.peak_memory, module.bytes + memory.growth)
        figures.append(learner.figures())
    return figures


@torch.no_grad()
def _outputs(module: Module, calibration: CalibrationSet, values: Sequence[Values]) -> list[Values]:
    return [module.results({**batch, **own}).handed_on for batch, own in zip(calibration, values, strict=True)]
