"""Pipelines as plain data, and from YAML and JSON files.

A configuration is a list of passes, each a name or ``{name: {option: value}}``::

    - canonicalize
    - split-outliers: {ratio: 0.005}
    - quantize-weights:
        bits: 3
        exclude: ["type:*Pooler"]
    - lower

A single text (``canonicalize,lower``) and one mapping of names to options, in order, do as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import yaml

from prequant.runtime import PrequantError

from .options import OptionError, fit, near_misses, options_of
from .registry import find_pass
from .text import build, given_options, parse_passes, read_word, to_text

if TYPE_CHECKING:
    from .base import Pass

Config: TypeAlias = "str | Sequence[str | Mapping[str, Any]] | Mapping[str, Any]"
FILE_TYPES = (".yaml", ".yml", ".json")


class ConfigError(PrequantError):
    """A configuration that describes no pipeline."""


def passes_of(config: Config) -> tuple[Pass, ...]:
    """The passes that a configuration describes. Raises :class:`ConfigError` that names the entry."""
    if isinstance(config, str):
        return parse_passes(config)
    if isinstance(config, Mapping):
        return tuple(_pass(name, options, str(name)) for name, options in config.items())
    if not isinstance(config, Sequence):
        raise ConfigError(f"a pipeline is a list of passes, or a text, not {config!r}")
    found: list[Pass] = []
    for number, entry in enumerate(config, 1):
        if isinstance(entry, str):
            found += parse_passes(entry)
        elif isinstance(entry, Mapping) and len(entry) == 1:
            ((name, options),) = entry.items()
            found.append(_pass(name, options, f"entry {number}"))
        else:
            raise ConfigError(
                f"entry {number} of the pipeline is {entry!r}; write a name, or {{name: {{option: value}}}}"
            )
    return tuple(found)


def config_of(passes: Sequence[Pass]) -> list[str | dict[str, Any]]:
    """The configuration of passes, in types that JSON and YAML have.

    Raises :class:`PassTextError` for functions as options.
    """
    entries: list[str | dict[str, Any]] = []
    for pass_ in passes:
        to_text(pass_)  # refuses what has no plain form
        options = {option.name: _plain(value) for option, value in given_options(pass_)}
        entries.append({pass_.name: options} if options else pass_.name)
    return entries


def load_passes(path: str | Path) -> tuple[Pass, ...]:
    """The passes that a YAML or JSON file describes.

    Raises :class:`ConfigError` that names the file, and what is wrong in it.
    """
    config = _load(Path(path))
    try:
        return passes_of(config)
    except PrequantError as error:
        raise ConfigError(f"the pipeline file {path}: {error}") from error


def _load(path: Path) -> Any:
    if path.suffix.lower() not in FILE_TYPES:
        raise ConfigError(f"{path} is not a pipeline file: its name should end in one of {', '.join(FILE_TYPES)}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the pipeline file {path} can't be read: {error}") from error
    try:
        if path.suffix.lower() == ".json":
            return json.loads(text, object_pairs_hook=_unique)
        return yaml.load(text, _Loader)  # a safe loader: plain data only
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"the pipeline file {path} is malformed: {error}") from error


def _pass(name: Any, options: Any, where: str) -> Pass:
    try:
        kind = find_pass(str(name))
        known = {option.name: option for option in options_of(kind)}
        given = {}
        for key, value in _mapping(options).items():
            if key not in known:
                raise OptionError(f"pass {name!r} has no option {key!r}{near_misses(str(key), known)}")
            given[key] = _option(value, known[key].type, f"option {key!r} of pass {name!r}")
        return build(kind, given)
    except PrequantError as error:
        raise ConfigError(f"{where} of the pipeline: {error}") from error


def _mapping(options: Any) -> Mapping[Any, Any]:
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise OptionError(f"options are a mapping of names to values, not {options!r}")
    return options


def _option(value: Any, type_: Any, what: str) -> Any:
    try:
        return fit(value, type_)
    except OptionError as error:
        if not isinstance(value, str):
            raise OptionError(f"{what}: {error}") from error
    try:
        return read_word(value, type_)  # YAML takes 1e-3 for text, and dtypes and "none" have no type of their own
    except OptionError as error:
        raise OptionError(f"{what}: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} stands there twice")
        found[key] = value
    return found


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, except that a key that stands there twice is an error instead of the last one winning."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"{key!r} stands there twice{node.start_mark}")
        return super().construct_mapping(node, deep)
