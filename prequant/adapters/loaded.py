"""The adapters that a Program has loaded: each a Program of its own over the base's tensors, one of them in use."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from prequant.model import ModelProgram
from prequant.passes import Program
from prequant.passes.multitask import multitask

from .errors import AdapterError
from .file import Adapter, read_adapter
from .variant import variant

LOADED = "_loaded_adapters"
"""The attribute under which a Program, and every Program of its adapters, keeps them."""


class Adapters:
    """Adapters of one base by name; None is the base as it is.

    The Program that loaded them *becomes* the one of the adapter in use: it takes over that one's attributes and class,
    so that its graph, configuration, labels and name are those of the task wherever they are looked at, and choosing
    costs nothing. :attr:`programs` holds them under objects of their own.
    """

    def __init__(self, base: ModelProgram) -> None:
        twin: ModelProgram = object.__new__(type(base))
        object.__setattr__(twin, "__dict__", base.__dict__)
        twin.recompile()  # compiled calls of the base find this one, which no adapter's takes the place of
        self.programs: dict[str | None, ModelProgram] = {None: twin}
        self.active: str | None = None
        self._together: dict[tuple[str | None, ...], Program] = {}
        base.__dict__[LOADED] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of a Program begins with none."""
        return None

    def __reduce__(self) -> Any:
        return type(None), ()

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters, in the order in which they were loaded."""
        return tuple(name for name in self.programs if name is not None)

    def load(self, name: str, source: str | os.PathLike[str] | Adapter) -> None:
        """Load a file, or an adapter in memory. Raises :class:`AdapterError`; nothing has changed then."""
        if not name:
            raise AdapterError("an adapter needs a name")
        if name == self.active:
            raise AdapterError(f"the adapter {name!r} is in use: choose another, or None, before loading it anew")
        adapter = source if isinstance(source, Adapter) else read_adapter(source)
        made = variant(self.programs[None], adapter, f"adapter {name!r}" if adapter is source else str(source))
        made.__dict__[LOADED] = self
        self._forget(name)
        self.programs[name] = made

    def delete(self, name: str) -> None:
        """Unload an adapter that is not in use."""
        self.program(name)
        if name == self.active:
            raise AdapterError(f"the adapter {name!r} is in use: choose another, or None, before deleting it")
        self._forget(name)
        del self.programs[name]

    def choose(self, program: ModelProgram, name: str | None) -> None:
        """Let ``program``, which loaded them, be the base with that adapter."""
        chosen = self.program(name)
        object.__setattr__(program, "__class__", type(chosen))
        object.__setattr__(program, "__dict__", chosen.__dict__)
        self.active = name

    def program(self, name: str | None) -> ModelProgram:
        """The Program of an adapter. Raises :class:`AdapterError` for one that is not loaded."""
        if name not in self.programs:
            raise AdapterError(f"no adapter {name!r} is loaded; there are {', '.join(self.names) or 'none'}")
        return self.programs[name]

    def together(self, names: Sequence[str | None]) -> Program:
        """One Program for rows of all these tasks; see :func:`multitask`. It is made once."""
        key = tuple(names)
        if key not in self._together:
            self._together[key] = multitask([self.program(name) for name in key])
        return self._together[key]

    def _forget(self, name: str) -> None:
        self._together = {names: program for names, program in self._together.items() if name not in names}
