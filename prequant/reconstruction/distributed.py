"""MREM-P with a process for each module: what one of them does (Bai et al., arXiv 2109.15082)."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from safetensors.torch import load_file
from tqdm.auto import tqdm

from prequant.checkpoint import load, save
from prequant.checkpoint.atomic import replacing_file
from prequant.checkpoint.tensors import write_tensors
from prequant.measure import PeakMemory

from .calibration import CalibrationSet
from .learner import Learner, ModuleFigures
from .modules import Module, Values
from .parallel import Schedule, Worker
from .ranks import PULSE, Chain
from .targets import Targets

PREPARED, DONE = "prepared", "done"


def reconstruct_as_rank(
    here: Chain, learner: Learner, calibration: CalibrationSet, schedule: Schedule, seed: int, progress: bool = True
) -> list[ModuleFigures]:
    """Train the student of this rank's module in place; rank ``n`` has module ``n``. Returns the figures of all.

    What teachers give goes down the chain first, then what fills the queues, and then every module trains on its own
    clock: results depend on the ranks' speeds. Raises :class:`ReconstructionError` where a rank fails, and names it.
    """
    module, rank = learner.module, here.rank
    taken = [item for item in module.teacher.signature.inputs if item.name in module.taken]
    with PeakMemory() as memory:
        here.listen([item.name for item in taken], [item.dtype for item in taken])
        targets = Targets(module, calibration, rank == here.size - 1)
        for number in range(len(calibration)):
            batch, values = here.received() if rank else (number, {})
            here.send(batch, targets.add(batch, values))
        worker = Worker(learner, calibration, targets, schedule, seed)
        for _ in range(schedule.queue):
            batch, values = here.received() if rank else (worker.next_batch(), _NOTHING)
            worker.receive(batch, values)
            here.send(batch, worker.handed_on(batch, values))
        with _Bars(here, learner.steps, progress and rank == 0) as bars:
            while not learner.finished:
                here.check()
                for batch, values in here.waiting():
                    worker.receive(batch, values)
                batch, values, loss = worker.turn()
                here.send(batch, values)
                here.own.step, here.own.loss = learner.done, loss or 0.0
                bars.show()
            here.ignore()
            here.end()
            learner.peak_memory = module.bytes + memory.growth
            here.tell(f"{DONE}/{rank}", json.dumps(asdict(learner.figures())))
            while not all(here.heard(f"{DONE}/{other}") for other in range(here.size)):
                bars.show()
                time.sleep(PULSE / 5)
    return [ModuleFigures(**json.loads(here.hear(f"{DONE}/{other}"))) for other in range(here.size)]


_NOTHING: Values = {}


class _Bars:
    """A bar for the module of each rank."""

    def __init__(self, here: Chain, steps: int, shown: bool) -> None:
        self._here, self._shown, self._last = here, shown, 0.0
        count = here.size if shown else 0
        self._bars = [
            tqdm(desc=f"module {number + 1} of {here.size}", total=steps, unit="step", position=number)
            for number in range(count)
        ]

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *_: object) -> None:
        for bar in self._bars:
            bar.close()

    def show(self) -> None:
        """Show how far the ranks are, now and then."""
        if not self._shown or time.monotonic() - self._last < PULSE:
            return
        self._last = time.monotonic()
        for rank, bar in enumerate(self._bars):
            now = self._here.own if rank == self._here.rank else self._here.others[rank]
            bar.update(now.step - bar.n)
            bar.set_postfix(loss=f"{now.loss:.3g}")


# ---- what ranks find in the folder that they share -------------------------------------------------------------------


def write_parts(folder: Path, modules: Sequence[Module], calibration: CalibrationSet) -> None:
    """Write every module and the batches, so that each rank reads its own and holds no more."""
    for module in modules:
        save(module.teacher, _part(folder, module.number, "teacher"))
        save(module.student, _part(folder, module.number, "student"))
    tensors = {f"{number}.{key}": value for number, batch in enumerate(calibration) for key, value in batch.items()}
    with replacing_file(folder / "calibration.safetensors") as staging:
        write_tensors(staging, tensors)


def read_calibration(folder: Path) -> CalibrationSet:
    """The batches that the first rank wrote."""
    found: dict[int, dict[str, object]] = {}
    for key, value in load_file(folder / "calibration.safetensors").items():
        number, _, name = key.partition(".")
        found.setdefault(int(number), {})[name] = value
    return CalibrationSet([found[number] for number in sorted(found)])  # type: ignore[misc]


def described(module: Module) -> str:
    """What the first rank says of a module, beside what it writes."""
    return json.dumps([module.number, module.blocks, module.exposed, module.taken])


def read_part(folder: Path, text: str) -> Module:
    """A module as the first rank described and wrote it."""
    number, blocks, exposed, taken = json.loads(text)
    teacher, student = (load(_part(folder, number, which)) for which in ("teacher", "student"))
    return Module(number, blocks, teacher, student, tuple((ours, theirs) for ours, theirs in exposed), tuple(taken))


def write_trained(folder: Path, module: Module) -> None:
    """Write what a rank has trained."""
    save(module.student, _part(folder, module.number, "trained"))


def read_trained(folder: Path, modules: Sequence[Module]) -> list[Module]:
    """The modules with what the ranks have trained."""
    return [replace(module, student=load(_part(folder, module.number, "trained"))) for module in modules]


def _part(folder: Path, number: int, which: str) -> Path:
    return folder / f"module-{number}-{which}"
