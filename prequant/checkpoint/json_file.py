"""JSON as this package reads it: bounded in size and depth, without duplicate keys or non-numbers, checked as it is
taken apart.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from .errors import CheckpointError

MAX_BYTES = 64 << 20
"""More than a hundred times what the graph of a model with 12 layers takes."""

T = TypeVar("T")


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The object that a JSON file holds. Raises :class:`CheckpointError` for a missing, oversized or malformed file."""
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror or error}") from error
    return parse_json(data, str(path), max_bytes)


def parse_json(text: bytes | str, where: str, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The object that a text holds; ``where`` begins the messages. Raises :class:`CheckpointError` as
    :func:`read_json`.
    """
    if len(text) > max_bytes:
        raise CheckpointError(f"{where}: larger than {max_bytes:,} bytes, the most that is read")
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_not_a_number)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: holds {describe(value)} where an object belongs")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise CheckpointError(f"the key {next(n for n in names if names.count(n) > 1)!r} stands twice in one object")
    return result


def _not_a_number(text: str) -> Any:
    raise CheckpointError(f"{text} is not a JSON number")


class Record:
    """An object from a file, taken apart with checks. ``where`` begins every message: the file, and the place in it."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise CheckpointError(f"{where}: {describe(value)} where an object belongs")
        self.value: dict[str, Any] = value
        self.where = where

    def only(self, known: Iterable[str]) -> Record:
        """Refuse keys that are not in ``known``."""
        if unknown := sorted(set(self.value) - set(known)):
            raise CheckpointError(f"{self.where}: unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")
        return self

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """The value of ``key``, exactly of type ``kind`` (a bool is no int); without a default it has to be there."""
        if key not in self.value:
            if default is None:
                raise CheckpointError(f"{self.where}: {key!r} is missing")
            return default
        value = self.value[key]
        if type(value) is not kind:
            raise CheckpointError(f"{self.where}: {key} is {describe(value)} where {kind.__name__} belongs")
        return value

    def record(self, key: str) -> Record:
        """The object under ``key``."""
        return Record(self.get(key, dict), f"{self.where}, {key}")

    def records(self, key: str) -> Iterable[tuple[str, Record]]:
        """The objects inside the object under ``key``, by name."""
        for name, value in self.get(key, dict).items():
            yield name, Record(value, f"{self.where}, {key} {describe(name)}")

    def strings(self, key: str, default: list[str] | None = None) -> tuple[str, ...]:
        """The list of strings under ``key``."""
        values = self.get(key, list, default)
        for value in values:
            if not isinstance(value, str):
                raise CheckpointError(f"{self.where}: {key} holds {describe(value)} where a string belongs")
        return tuple(values)

    def sizes(self, key: str, most: int = 8) -> tuple[int, ...]:
        """The list of at most ``most`` non-negative sizes under ``key``."""
        values = self.get(key, list)
        if len(values) > most or any(type(value) is not int or not 0 <= value < 1 << 48 for value in values):
            raise CheckpointError(f"{self.where}: {key} is {describe(values)}, not a shape")
        return tuple(values)


def describe(value: Any) -> str:
    """A value from a file for a message: short, and on one line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
