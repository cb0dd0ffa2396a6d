"""Pipeline: a tuple of passes run in order on a copy of a Program, with observers on one hook."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from prequant.runtime import PrequantError
from prequant.runtime.versions import version_of

from .base import Pass, PassError, Report, current_site
from .config import FILE_TYPES, Config, config_of, load_passes, passes_of
from .observers.base import Observer, Step
from .program import Program
from .properties import violation
from .registry import known_passes
from .reports import label
from .text import parse_passes, to_text


@dataclass(frozen=True)
class Pipeline:
    """Passes in order. Calling it leaves its input as it was: the result shares every tensor that no pass rewrote."""

    passes: tuple[Pass, ...] = ()

    def __init__(self, passes: Iterable[Pass] = ()) -> None:
        members: tuple[Any, ...] = tuple(passes)
        for member in members:
            if not isinstance(member, Pass):
                hint = f"; write {member.__name__}(...)" if isinstance(member, type) else ""
                raise PassError(f"a pipeline is made of passes, not {member!r}{hint}")
        object.__setattr__(self, "passes", members)

    # ---- forms -----------------------------------------------------------------------------------------------

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """The inverse of ``str``; see :mod:`prequant.passes.text`.

        Raises :class:`PassTextError` that marks the place.
        """
        return cls(parse_passes(text))

    @classmethod
    def from_config(cls, config: Config) -> Pipeline:
        """From plain data, see :mod:`prequant.passes.config`; :meth:`to_config` is the inverse.

        Raises :class:`ConfigError`.
        """
        return cls(passes_of(config))

    @classmethod
    def load(cls, path: str | Path) -> Pipeline:
        """From a YAML or JSON file that holds such data. Raises :class:`ConfigError`."""
        return cls(load_passes(path))

    @classmethod
    def read(cls, text: str) -> Pipeline:
        """From text, or from the YAML or JSON file that it names: as :meth:`parse` and :meth:`load`."""
        return cls.load(text) if text.lower().endswith(FILE_TYPES) else cls.parse(text)

    def to_config(self) -> list[str | dict[str, Any]]:
        """This pipeline as data for JSON or YAML. Raises :class:`PassTextError` where an option is a function."""
        return config_of(self.passes)

    def __str__(self) -> str:
        return ",".join(map(to_text, self.passes))

    def __add__(self, other: Pipeline) -> Pipeline:
        """The passes of this pipeline, then those of the other."""
        return Pipeline((*self.passes, *other.passes)) if isinstance(other, Pipeline) else NotImplemented

    # ---- running ---------------------------------------------------------------------------------------------

    def __call__(self, program: Program, observers: Sequence[Observer] = ()) -> Program:
        """Run every pass on a copy of ``program``; the copy's :attr:`~Program.reports` end with one report per pass.

        Raises :class:`PassError` that names the pass, its options, and the node or weight if known, with the cause
        chained. ``program`` is then what it was.
        """
        given = _state_of(program)
        program = program.copy()
        reports = program.reports
        # Observers nest around a pass like brackets. Those that measure the pass itself come innermost.
        nested = sorted(observers, key=lambda observer: observer.innermost)
        for index, pass_ in enumerate(self.passes):
            step = Step(pass_, index, len(self.passes))
            watching: list[Observer] = []
            try:
                for observer in nested:
                    with _attributed(step, f"{type(observer).__name__} before it"):
                        observer.before(step, program)
                    watching.append(observer)
                report = _run(step, program, given)
            except BaseException as error:
                for observer in reversed(watching):
                    observer.failed(step, program, error)
                raise
            reports = (*reports, report)
            program.reports = reports
            for observer in reversed(nested):
                with _attributed(step, f"{type(observer).__name__} after it"):
                    observer.after(step, program, report)
        return program


def _run(step: Step, program: Program, given: dict[str, _TensorState]) -> Report:
    pass_ = step.pass_
    for name in pass_.requires:
        with _attributed(step, f"its requirement {name!r}"):
            if found := violation(name, program):
                raise PassError(f"does not hold before it: {found}{_remedy(name)}")
    started = time.perf_counter()
    with _attributed(step):
        report = pass_.run(program)
        if not isinstance(report, Report):
            raise PassError(f"its run returned {report!r} instead of a Report")
    with _attributed(step, "the graph it left"):
        program.graph.lint()
        program.recompile()
    report.seconds = time.perf_counter() - started
    for name in pass_.ensures:
        with _attributed(step, f"its promise {name!r}"):
            if found := violation(name, program):
                raise PassError(f"does not hold after it: {found}")
    with _attributed(step):
        _check_untouched(given)
    return report


def _remedy(name: str) -> str:
    """Which passes to run first for a property to hold."""
    ensuring = [kind.name for kind in known_passes().values() if name in kind.ensures]
    return f"; run {' or '.join(ensuring)} first" if ensuring else ""


@contextmanager
def _attributed(step: Step, what: str = "") -> Iterator[None]:
    """Turn whatever is raised inside into a :class:`PassError` that names the pass, its options and, if known, the
    node.
    """
    token = current_site.set(None)
    try:
        yield
    except Exception as error:
        at = getattr(error, "node", None) or current_site.get()
        reason = str(error) if isinstance(error, PrequantError) else f"{type(error).__name__}: {error}"
        place = f" (at {label(at)})" if at is not None else ""
        raise PassError(f"pass {step}: {what + ': ' if what else ''}{reason}{place}", node=at) from error
    finally:
        current_site.reset(token)


# ---- the input stays what it was -----------------------------------------------------------------------------

_TensorState = tuple[Tensor, int, bool]


def _state_of(program: Program) -> dict[str, _TensorState]:
    named: Callable[[], Iterator[tuple[str, Tensor]]]
    held: dict[str, _TensorState] = {}
    for named in (program.named_parameters, program.named_buffers):
        held |= {name: (value, version_of(value), value.requires_grad) for name, value in named()}
    return held


def _check_untouched(given: dict[str, _TensorState]) -> None:
    """Copies of a Program share their tensors, so a pass replaces one (``set_tensor``) instead of writing into it."""
    for name, (value, version, requires_grad) in given.items():
        if version_of(value) != version:
            raise PassError(
                f"it wrote into {name!r} in place, which belongs to the Program that the pipeline was given"
            )
        if value.requires_grad != requires_grad:
            raise PassError(
                f"it set requires_grad of {name!r} in place, which belongs to the Program that the pipeline was given"
            )
