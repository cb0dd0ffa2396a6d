"""What the benchmarks of whole models share: contenders that are prepared, loaded and measured in processes of their
own, and what loading them takes."""

from __future__ import annotations

import importlib
import re
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from processes import Worker, WorkerError, apart  # type: ignore[import-not-found]

from prequant.measure import PeakMemory

PREQUANT = "prequant"
REFERENCE = "torch fp32"
"""The contender that others are compared with; the first of them."""
MIB = 1 << 20

FAILURES = (WorkerError, TimeoutError)


class Contender(ABC):
    """One way to run a model.

    ``prepare`` writes files, in a process of its own; the process that is measured imports what it needs, then loads
    them. A contender that can't run here raises, whatever its library raises.
    """

    library: str
    modules: tuple[str, ...] = ()
    """What ``imports`` imports."""
    tolerance: float
    """How far a peer's output may be from the reference's, relative to its norm. Beyond, it does not count."""

    def __init__(self, name: str, bits: int) -> None:
        self.name, self.bits = name, bits
        # What honest rounding does to these models is about half of it.
        self.tolerance = 0.3 if bits > 4 else 0.6

    @property
    def slug(self) -> str:
        """Its name as a name of a folder."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    @abstractmethod
    def prepare(self, source: Any, folder: Path) -> None:
        """Write all that is loaded into the empty ``folder``, and nothing else."""

    def imports(self) -> None:
        """Import what it takes to load and run, so that it does not count as the model's memory."""
        for module in self.modules:
            importlib.import_module(module)


@dataclass(frozen=True)
class Plan:
    """How to measure: ``lead`` and ``block`` are seconds, ``timeout`` too, of preparing and of loading."""

    threads: int
    repeats: int
    warmup: int
    lead: float
    block: float
    timeout: float


@dataclass(frozen=True)
class Loaded:
    """What it takes to hold a model: ``peak`` and ``resident`` are bytes over those of the process with its libraries
    imported, while it loads and is first called, and after; ``disk`` is bytes; the rest is seconds."""

    model: str
    name: str
    library: str
    bits: int
    peak: int
    resident: int
    disk: int
    load: float
    first_call: float


@dataclass
class Found:
    """What was measured, and why what is absent is."""

    loaded: list[Loaded] = field(default_factory=list)
    measurements: list[Any] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)

    def add(self, other: Found) -> None:
        """All of ``other``, too."""
        self.loaded += other.loaded
        self.measurements += other.measurements
        self.absent |= other.absent

    def leave_out(self, contender: Contender, where: str, error: Exception) -> None:
        """Say why ``contender`` is absent; raises ``error`` if it is prequant or the reference, which may not be."""
        if contender.library == PREQUANT or contender.name == REFERENCE:
            raise error
        self.absent[f"{where}: {contender.name}"] = str(error)


class Stand(ABC):
    """A contender that is being measured. Lives in a process of its own."""

    def __init__(self, contender: Contender, source: Any, folder: Path, plan: Plan) -> None:
        self.contender, self.source, self.folder, self.plan = contender, source, folder, plan
        torch.set_num_threads(plan.threads)
        contender.imports()
        self.get_inputs()
        with torch.inference_mode(), PeakMemory() as memory:
            started = time.perf_counter()
            self.load()
            loaded = time.perf_counter()
            self.first_call()
            called = time.perf_counter()
        with PeakMemory() as after:
            pass
        disk = sum(file.stat().st_size for file in folder.iterdir())
        whose = (source.name, contender.name, contender.library, contender.bits)
        sizes = (memory.growth, max(0, after.before - memory.before), disk)
        self._loaded = Loaded(*whose, *sizes, loaded - started, called - loaded)

    @abstractmethod
    def get_inputs(self) -> None:
        """Make the inputs of the first call, whose memory and time are not the contender's."""

    @abstractmethod
    def load(self) -> None:
        """Load the contender."""

    @abstractmethod
    def first_call(self) -> None:
        """Run it once."""

    def loaded(self) -> Loaded:
        """What that took."""
        return self._loaded


def _prepare(contender: Contender, source: Any, folder: Path, threads: int) -> None:
    """Fill ``folder``, unless it is there from an earlier time."""
    if folder.is_dir():
        return
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    torch.set_num_threads(threads)
    with torch.no_grad():
        contender.prepare(source, unfinished)
    unfinished.rename(folder)


def open_stands(
    stack: ExitStack,
    make: Callable[..., Stand],
    plan: Plan,
    source: Any,
    chosen: Sequence[Contender],
    work: Path,
    found: Found,
    log: Callable[[str], object],
) -> dict[Contender, Worker]:
    """Prepare ``chosen`` and open a stand for each, which ends with ``stack``; what can't be is left out of ``found``.

    What was prepared in ``work`` before is used again.
    """
    stands: dict[Contender, Worker] = {}
    for contender in chosen:
        log(f"{source.name}: {contender.name}")
        folder = work / source.name / contender.slug
        try:
            apart(plan.threads, _prepare, contender, source, folder, plan.threads, timeout=plan.timeout)
            made = partial(make, contender, source, folder, plan)
            worker = stack.enter_context(Worker(plan.threads, made, plan.timeout))
            found.loaded.append(worker.call("loaded"))
            stands[contender] = worker
        except FAILURES as error:
            found.leave_out(contender, source.name, error)
    return stands


class WrongOutputError(Exception):
    """A peer computes something else than the model."""


def compared(
    contender: Contender, outputs: Sequence[np.ndarray], expected: Sequence[np.ndarray]
) -> tuple[float, float]:
    """Relative error and cosine; raises :class:`WrongOutputError` if a peer is further off than it may be."""
    found, reference = (np.concatenate([p.ravel() for p in parts]).astype(np.float64) for parts in (outputs, expected))
    if found.shape != reference.shape:
        raise WrongOutputError(f"its output has {found.size} values, not {reference.size}")
    norm = float(np.linalg.norm(reference))
    error = float(np.linalg.norm(found - reference)) / norm
    cosine = float(found @ reference) / (float(np.linalg.norm(found)) * norm)
    if contender.library != PREQUANT and not error <= contender.tolerance:
        raise WrongOutputError(f"its output is {error:.3g} from the float32 one, of which {contender.tolerance} may be")
    return error, cosine


# ---- what is written -------------------------------------------------------------------------------------------------


def chosen_of(everybody: Sequence[Contender], parts: Sequence[str]) -> list[Contender]:
    """The reference and those that ``parts`` name, or that have one of them in their name.

    Raises ``ValueError`` for a part in nobody's.
    """
    names = [contender.name for contender in everybody]
    chosen = {REFERENCE}
    for part in parts:
        found = [part] if part in names else [name for name in names if part in name]
        if not found:
            raise ValueError(f"{part!r}: it is in none of {names}")
        chosen.update(found)
    return [contender for contender in everybody if contender.name in chosen]


def ratios(one: Any, cell: Sequence[Any], time: str) -> dict[str, Any]:
    """Times of others over this one's, by the name of the field: the reference's, and for prequant the fastest peer's
    and the fastest of its width (8 bits, or up to 4 but no fewer than ours). ``cell`` is all that was measured
    together."""
    own = getattr(one, time)
    found: dict[str, Any] = {"over_fp32": next((getattr(m, time) / own for m in cell if m.name == REFERENCE), None)}
    if one.library != PREQUANT:
        return found
    peers = [m for m in cell if m.library != PREQUANT]
    widths = range(8, 9) if one.bits > 4 else range(one.bits, 5)
    for key, rivals in (("peer", peers), ("peer_of_width", [m for m in peers if m.bits in widths])):
        best = min(rivals, key=lambda m: float(getattr(m, time)), default=None)
        found[f"best_{key}"] = best.name if best else None
        found[f"over_best_{key}"] = getattr(best, time) / own if best else None
    return found


def ratio_columns(found: Mapping[str, Any]) -> dict[str, str]:
    """Ratios as cells of a table."""
    names = {"fp32 / it": "over_fp32", "best peer / it": "over_best_peer"}
    names["best of width / it"] = "over_best_peer_of_width"
    return {title: "–" if found.get(key) is None else f"{found[key]:.2f}" for title, key in names.items()}


def loading_table(model: str, loaded: Sequence[Loaded]) -> list[dict[str, str]]:
    """What loading each contender of ``model`` took."""
    return [
        {
            "": one.name,
            "peak MiB": f"{one.peak / MIB:,.0f}",
            "MiB after": f"{one.resident / MIB:,.0f}",
            "MiB on disk": f"{one.disk / MIB:,.1f}",
            "peak / disk": f"{one.peak / one.disk:.2f}",
            "s to load": f"{one.load:.2f}",
            "s for the first call": f"{one.first_call:.2f}",
        }
        for one in loaded
        if one.model == model
    ]


def records(found: Found, measurements: Sequence[Mapping[str, Any]], plan: Plan, load: float) -> dict[str, Any]:
    """All of it for a JSON file."""
    return {
        "plan": asdict(plan),
        "load": load,
        "absent": found.absent,
        "loaded": [asdict(loaded) for loaded in found.loaded],
        "measurements": list(measurements),
    }


def absent_list(found: Found) -> str:
    """Who is absent and why, as the end of a list."""
    return "".join(f"\n- absent: {name}: {reason}" for name, reason in found.absent.items())


def milliseconds(seconds: float) -> str:
    """With about three digits."""
    return f"{1000 * seconds:.2f}" if seconds < 0.1 else f"{1000 * seconds:,.0f}"
