"""The passes there are: those that :mod:`prequant.passes` exports, and those of other packages.

Another package adds one through the entry-point group ``prequant.passes``, in its ``pyproject.toml``::

    [project.entry-points."prequant.passes"]
    prune-heads = "their_package.passes:PruneHeads"
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from prequant.runtime import PrequantError

from .base import Pass
from .options import Option, near_misses, options_of

GROUP = "prequant.passes"
OWN = "prequant"
"""Where built-in passes come from, in :attr:`Registry.origins`."""


class RegistryError(PrequantError):
    """A pass that is not there, or that its package can't deliver."""


@dataclass(frozen=True)
class Registry:
    """``passes`` by name, ``origins``: the distribution of each, and ``broken``: why a name can't be used."""

    passes: Mapping[str, type[Pass]]
    origins: Mapping[str, str]
    broken: Mapping[str, str]


@dataclass(frozen=True)
class PassDescription:
    """What a listing says about a pass."""

    name: str
    summary: str
    options: tuple[Option, ...]


def known_passes() -> dict[str, type[Pass]]:
    """Every pass that can be used, by name: prequant's own in the order of their export, then others by name."""
    return dict(registry().passes)


def broken_passes() -> dict[str, str]:
    """Why a pass of another package can't be used, by its name; each reason names the distribution."""
    return dict(registry().broken)


def find_pass(name: str, known: Mapping[str, type[Pass]] | None = None) -> type[Pass]:
    """The pass of that name, in ``known`` if given.

    Raises :class:`RegistryError` with near misses, or with why it is broken.
    """
    own = built_in() if known is None else known
    if name in own:
        return own[name]
    everything = registry() if known is None else Registry(own, {}, {})
    if name in everything.passes:
        return everything.passes[name]
    if name in everything.broken:
        raise RegistryError(f"pass {name!r} can't be used: {everything.broken[name]}")
    raise RegistryError(f"there is no pass {name!r}{near_misses(name, everything.passes)}")


def describe(kind: type[Pass]) -> PassDescription:
    """Name, one line, and options of a pass class."""
    paragraph = " ".join(inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0].split())
    return PassDescription(kind.name, paragraph, options_of(kind))


def built_in() -> dict[str, type[Pass]]:
    """Every named Pass that ``prequant.passes`` exports: exporting one there is all it takes."""
    package = importlib.import_module("prequant.passes")
    exported = (getattr(package, name) for name in package.__all__)
    return {kind.name: kind for kind in exported if isinstance(kind, type) and issubclass(kind, Pass) and kind.name}


def registry() -> Registry:
    """All passes, those of other packages included; what is wrong with one hides no other."""
    passes = built_in()
    origins = dict.fromkeys(passes, OWN)
    broken: dict[str, str] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, _distribution(entry))):
        origin = _distribution(entry)
        try:
            kind = _load(entry)
        except RegistryError as error:
            _add(broken, entry.name, str(error))
            continue
        if kind.name not in origins:
            passes[kind.name], origins[kind.name] = kind, origin
        elif passes.get(kind.name) is not kind:
            _add(broken, kind.name, f"both {origins[kind.name]} and {origin} have a pass {kind.name!r}")
            if origins[kind.name] != OWN:
                # Which of the two is meant can't be known. A built-in pass stays what it is.
                passes.pop(kind.name, None)
    return Registry(passes, origins, broken)


def _load(entry: EntryPoint) -> type[Pass]:
    what = f"entry point {entry.name!r} ({entry.value}) of {_distribution(entry)}"
    try:
        kind = entry.load()
    except Exception as error:  # what another package's import raises can be anything
        raise RegistryError(f"{what} can't be loaded: {type(error).__name__}: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, Pass)):
        raise RegistryError(f"{what} is {kind!r}, not a subclass of prequant.passes.Pass")
    if not kind.name:
        raise RegistryError(f"{what} has no name: set its class attribute 'name'")
    return kind


def _add(broken: dict[str, str], name: str, reason: str) -> None:
    broken[name] = f"{broken[name]}; {reason}" if name in broken else reason


def _distribution(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else "an unknown distribution"
