"""Passes as text and back: ``quantize-weights{bits=3,include=[*.query.weight,type:Bert*]},lower``.

The grammar::

    passes := [pass ("," pass)*]
    pass   := name ["{" [option ("," option)*] "}"]
    option := name "=" value
    value  := "[" [value ("," value)*] "]" | word | string

A word is anything without blanks and without ``,={}[]"``; a string is written as in JSON and may hold everything.
What a word means follows from the option's type: ``true``, ``4``, ``0.5``, ``row``, ``none``. Options at their
defaults are left out when printing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args, get_origin

import torch

from prequant.runtime import PrequantError

from .options import (
    DTYPES,
    REQUIRED,
    Option,
    OptionError,
    fit,
    is_class,
    is_function,
    is_union,
    near_misses,
    options_of,
    type_text,
)

if TYPE_CHECKING:
    from .base import Pass

WORD = re.compile(r"[^\s,={}\[\]\"]+")
BLANKS = re.compile(r"\s*")
INTEGER = re.compile(r"[+-]?[0-9]+")
NONE = "none"


class PassTextError(PrequantError):
    """Text that is no pass, or a pass that has no text. Shows the line and marks the place in it."""


# ---- printing ------------------------------------------------------------------------------------------------


def to_text(pass_: Pass) -> str:
    """The text form of a pass. Raises :class:`PassTextError` for an option that has none, such as a function."""
    return _printed(pass_, strict=True)


def shown(pass_: Pass) -> str:
    """Like :func:`to_text` for messages and reports: what has no text form is shown between ``<`` and ``>`` instead
    of raising.
    """
    return _printed(pass_, strict=False)


def _printed(pass_: Pass, strict: bool) -> str:
    parts = []
    for option, value in given_options(pass_):
        try:
            parts.append(f"{option.name}={_value_text(value, option.type)}")
        except OptionError as error:
            if strict:
                raise PassTextError(
                    f"option {option.name!r} of pass {pass_.name!r} has no text form: {error}"
                ) from error
            parts.append(f"{option.name}=<{getattr(value, '__name__', value)}>")
    return f"{pass_.name}{{{','.join(parts)}}}" if parts else pass_.name


def given_options(pass_: Pass) -> list[tuple[Option, Any]]:
    """The options of a pass that are not at their defaults, with their values."""
    pairs = [(option, getattr(pass_, option.name)) for option in options_of(type(pass_))]
    return [
        (option, value)
        for option, value in pairs
        if option.default is REQUIRED or value != option.default or type(value) is not type(option.default)
    ]


def default_text(option: Option) -> str:
    """The default of an option as it would be written, for listings; empty where there is none."""
    return "" if option.default is REQUIRED else _value_text(option.default, option.type)


def _value_text(value: Any, type_: Any) -> str:
    value = fit(value, type_)
    if isinstance(value, tuple):
        types = _item_types(value, type_)
        return f"[{','.join(_value_text(item, part) for item, part in zip(value, types, strict=True))}]"
    text = _word(value)
    candidates = [text] if text is not None and WORD.fullmatch(text) else []
    if isinstance(value, (str, Enum)):
        candidates.append(json.dumps(text, ensure_ascii=False))
    for candidate in candidates:
        try:
            back = read_word(candidate, type_) if candidate == text else read_string(json.loads(candidate), type_)
        except OptionError:
            continue
        if back == value and type(back) is type(value):
            return candidate
    if callable(value):
        name = getattr(value, "__name__", str(value))
        raise OptionError(f"{name!r} is a function; a pattern of names or of module types can be written")
    raise OptionError(f"{value!r} can't be written as {type_text(type_)}")


def _word(value: Any) -> str | None:
    if value is None:
        return NONE
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return str(value) if isinstance(value, (int, float, str)) else None


def _item_types(value: tuple[Any, ...], type_: Any) -> list[Any]:
    for part in get_args(type_) if is_union(type_) else (type_,):
        arguments = get_args(part)
        if get_origin(part) is tuple and arguments[-1:] == (Ellipsis,):
            return [arguments[0]] * len(value)
        if get_origin(part) is tuple and len(arguments) == len(value):
            return list(arguments)
    return [str | int | float | bool | None] * len(value)


# ---- reading words -------------------------------------------------------------------------------------------


def read_word(word: str, type_: Any) -> Any:
    """What a bare word stands for, given the type that is due.

    Raises :class:`OptionError` where it stands for nothing.
    """
    if is_union(type_):
        return _read_union(word, type_)
    if get_origin(type_) is tuple:
        return fit([read_word(word, get_args(type_)[0])], type_)
    if get_origin(type_) is Literal or (is_class(type_) and issubclass(type_, Enum)):
        choices = get_args(type_) or [member.value for member in type_]
        return fit(next((choice for choice in choices if _word(choice) == word), word), type_)
    readers: dict[Any, Callable[[], Any]] = {
        bool: lambda: {"true": True, "false": False}[word],
        int: lambda: int(word) if INTEGER.fullmatch(word) else None,
        float: lambda: float(word),
        torch.dtype: lambda: DTYPES[word],
        type(None): lambda: {NONE: None}[word],
    }
    if type_ not in readers:
        return fit(word, type_)
    try:
        value = readers[type_]()
    except (ValueError, KeyError):
        value = word
    if value is None and type_ is type(None):
        return None
    return fit(word if value is None else value, type_)


# A word is tried as these in turn where a type allows several; text comes last because every word is text.
_ORDER = (type(None), bool, int, float, torch.dtype)


def _read_union(word: str, type_: Any) -> Any:
    parts = sorted(
        (part for part in get_args(type_) if not is_function(part)),
        key=lambda part: _ORDER.index(part) if part in _ORDER else len(_ORDER) + (part is str),
    )
    complaints = []
    for part in parts:
        try:
            return read_word(word, part)
        except OptionError as error:
            complaints.append(str(error))
    raise OptionError(
        complaints[-1] if len(complaints) <= 2 else f"{word!r} is not one of the types {type_text(type_)}"
    )


def read_string(text: str, type_: Any) -> Any:
    """What a quoted string stands for: text, or something that is spelled as text (an enum's value)."""
    return fit(text, type_)


# ---- parsing -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Value:
    """A value as written: a word, a quoted string, or a list, and where it stands."""

    content: str | list[_Value]
    quoted: bool
    start: int
    end: int


def parse_passes(text: str, known: Mapping[str, type[Pass]] | None = None) -> tuple[Pass, ...]:
    """The passes that ``text`` names, separated by commas; ``known`` replaces the registry.

    Raises :class:`PassTextError`.
    """
    return _Parser(text, known).passes()


def parse_pass(text: str, known: Mapping[str, type[Pass]] | None = None) -> Pass:
    """The one pass that ``text`` names. Raises :class:`PassTextError`, also where it names none or several."""
    passes = parse_passes(text, known)
    if len(passes) != 1:
        raise PassTextError(f"expected one pass, found {len(passes)}: {text!r}")
    return passes[0]


class _Parser:
    def __init__(self, text: str, known: Mapping[str, type[Pass]] | None) -> None:
        self.text, self.known, self.at = text, known, 0

    def passes(self) -> tuple[Pass, ...]:
        found: list[Pass] = []
        self.skip()
        while self.at < len(self.text):
            if found:
                self.expect(",", "between passes")
            found.append(self.pass_())
        return tuple(found)

    def pass_(self) -> Pass:
        start = self.at
        name = self.word("the name of a pass")
        kind = self.find(name, start)
        options = {option.name: option for option in options_of(kind)}
        given: dict[str, Any] = {}
        for key, value, at in self.options():
            if key not in options:
                self.fail(f"pass {name!r} has no option {key!r}{near_misses(key, options)}", at, at + len(key))
            if key in given:
                self.fail(f"option {key!r} is given twice", at, at + len(key))
            try:
                given[key] = _read(value, options[key].type)
            except OptionError as error:
                self.fail(f"option {key!r} of pass {name!r}: {error}", value.start, value.end, error)
        try:
            return build(kind, given)
        except PrequantError as error:
            self.fail(str(error), start, self.at, error)

    def find(self, name: str, start: int) -> type[Pass]:
        from .registry import find_pass

        try:
            return find_pass(name, self.known)
        except PrequantError as error:
            self.fail(str(error), start, start + len(name), error)

    def options(self) -> list[tuple[str, _Value, int]]:
        found: list[tuple[str, _Value, int]] = []
        if not self.take("{"):
            return found
        while not self.take("}"):
            if found:
                self.expect(",", "or '}' after an option")
            start = self.at
            key = self.word("the name of an option")
            self.expect("=", f"and a value after the option {key!r}")
            found.append((key, self.value(), start))
        return found

    def value(self) -> _Value:
        start = self.at
        if self.take("["):
            items: list[_Value] = []
            while not self.take("]"):
                if items:
                    self.expect(",", "or ']' in a list")
                items.append(self.value())
            return _Value(items, False, start, self.at)
        if self.text.startswith('"', start):
            try:
                content, self.at = json.JSONDecoder().raw_decode(self.text, start)
            except json.JSONDecodeError as error:
                self.fail(f"a string that JSON can't read ({error.msg})", start, len(self.text), error)
            end = self.at
            self.skip()
            return _Value(content, True, start, end)
        content = self.word("a value")
        return _Value(content, False, start, start + len(content))

    # ---- characters ------------------------------------------------------------------------------------------

    def skip(self) -> None:
        match = BLANKS.match(self.text, self.at)
        self.at = match.end() if match else self.at

    def take(self, character: str) -> bool:
        if not self.text.startswith(character, self.at):
            return False
        self.at += 1
        self.skip()
        return True

    def expect(self, character: str, why: str) -> None:
        if not self.take(character):
            self.fail(f"expected {character!r} {why}", self.at, self.at + 1)

    def word(self, what: str) -> str:
        match = WORD.match(self.text, self.at)
        if match is None:
            self.fail(f"expected {what}", self.at, self.at + 1)
        self.at = match.end()
        self.skip()
        return match.group()

    def fail(self, message: str, start: int, end: int, cause: Exception | None = None) -> NoReturn:
        raise PassTextError(f"{message}\n{_place(self.text, start, end)}") from cause


def build(kind: type[Pass], given: Mapping[str, Any]) -> Pass:
    """A pass from fitted options. Raises :class:`OptionError` where a required one is missing."""
    missing = [option.name for option in options_of(kind) if option.default is REQUIRED and option.name not in given]
    if missing:
        raise OptionError(f"pass {kind.name!r} needs the option {missing[0]!r}")
    return kind(**given)


def _read(value: _Value, type_: Any) -> Any:
    if isinstance(value.content, str):
        return read_string(value.content, type_) if value.quoted else read_word(value.content, type_)
    complaints = []
    for part in get_args(type_) if is_union(type_) else (type_,):
        if get_origin(part) is not tuple and part is not tuple:
            continue
        types = _item_types(tuple(value.content), part)
        try:
            return fit(
                tuple(_read(item, item_type) for item, item_type in zip(value.content, types, strict=True)), part
            )
        except OptionError as error:
            complaints.append(error)
    raise complaints[0] if complaints else OptionError(f"a list where {type_text(type_)} is due")


def _place(text: str, start: int, end: int) -> str:
    """The line of ``text`` that holds ``start``, with a marker under the place."""
    line_start = text.rfind("\n", 0, start) + 1
    line_end = text.find("\n", start)
    line = text[line_start : line_end if line_end >= 0 else len(text)]
    width = max(1, min(end, line_start + len(line)) - start)
    return f"  {line}\n  {' ' * (start - line_start)}{'^' * width}"
