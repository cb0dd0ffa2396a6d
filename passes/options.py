"""The options of a pass: its dataclass fields, with their types, defaults and help, and how a given value is made to
fit a type.

Types that options may have: ``bool``, ``int``, ``float``, ``str``, enums, ``Literal``, ``torch.dtype``, tuples of
these, and unions of these (``float | None``). Functions are allowed too, but have no text form.
"""

from __future__ import annotations

import ast
import collections.abc
import dataclasses
import difflib
import inspect
import numbers
import operator
import re
import textwrap
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, Union, get_args, get_origin

import torch

from prequant.runtime import PrequantError

DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
REQUIRED = dataclasses.MISSING
"""Default of an option that has to be given."""


class OptionError(PrequantError):
    """An option that a pass does not have, or a value that it can't take."""


@dataclass(frozen=True)
class Option:
    """One option of a pass: ``default`` is :data:`REQUIRED` where there is none."""

    name: str
    type: Any
    default: Any
    help: str = ""

    @property
    def type_text(self) -> str:
        """The type as a reader wants it: ``int``, ``row|tensor|group``, ``[str]``."""
        return type_text(self.type)


# ---- what there is -------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def options_of(kind: type[Any]) -> tuple[Option, ...]:
    """The options of a pass class, in the order of its constructor.

    Raises :class:`OptionError` for hints that can't be resolved.
    """
    try:
        hints = typing.get_type_hints(kind)
    except (NameError, TypeError) as error:
        raise OptionError(
            f"the option types of {kind.__module__}.{kind.__qualname__} can't be resolved: {error}"
        ) from error
    helps = _helps(kind)
    return tuple(
        Option(
            field.name, hints[field.name], _default(field), str(field.metadata.get("help", helps.get(field.name, "")))
        )
        for field in sorted(dataclasses.fields(kind), key=lambda field: field.kw_only is True)
        if field.init
    )


def near_misses(word: str, known: Iterable[str]) -> str:
    """``; did you mean a, b?``, or a list of what there is where nothing is near."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    if near:
        return f"; did you mean {', '.join(near)}?"
    return f"; there are: {', '.join(names)}" if names else "; there are none"


def type_text(type_: Any) -> str:
    """A type in words that fit a table: alternatives separated by ``|``, tuples in brackets."""
    origin, arguments = get_origin(type_), get_args(type_)
    if is_union(type_):
        return "|".join(type_text(part) for part in arguments)
    if origin is tuple:
        return f"[{', '.join('...' if part is Ellipsis else type_text(part) for part in arguments)}]".replace(
            ", ...]", "]"
        )
    if origin is Literal:
        return "|".join(map(str, arguments))
    if type_ is type(None):
        return "none"
    if type_ is torch.dtype:
        return "dtype"
    if is_function(type_):
        return "function"
    if is_class(type_) and issubclass(type_, Enum):
        return "|".join(str(member.value) for member in type_)
    return getattr(type_, "__name__", str(type_))


def is_union(type_: Any) -> bool:
    """Whether a type is ``A | B`` or ``Optional[A]``."""
    return get_origin(type_) in (Union, types.UnionType)


def is_class(type_: Any) -> bool:
    """Whether a type is a class; on Python 3.10, ``isinstance(tuple[int], type)`` holds."""
    return isinstance(type_, type) and get_origin(type_) is None


def is_function(type_: Any) -> bool:
    """Whether a type is ``Callable``, with or without its signature."""
    return collections.abc.Callable in (type_, get_origin(type_))


# ---- fitting values ------------------------------------------------------------------------------------------


def fit(value: Any, type_: Any) -> Any:
    """``value`` as the type wants it: lists become tuples, an enum's value the enum, an integer a float where one is
    due.

    One value where a tuple of any length is due becomes a tuple of one. Raises :class:`OptionError` where nothing fits.
    """
    origin, arguments = get_origin(type_), get_args(type_)
    if type_ is Any or type_ is object:
        return value
    if is_union(type_):
        return _fit_union(value, arguments, type_)
    if origin is tuple or type_ is tuple:
        return _fit_tuple(value, arguments)
    if origin is Literal:
        for choice in arguments:
            if value == choice and type(value) is type(choice):
                return choice
        raise OptionError(f"{value!r} is not one of {', '.join(map(repr, arguments))}{_near(value, arguments)}")
    if is_class(type_) and issubclass(type_, Enum):
        try:
            return type_(value)
        except ValueError:
            choices = [str(member.value) for member in type_]
            raise OptionError(f"{value!r} is not one of {', '.join(choices)}{_near(value, choices)}") from None
    return _fit_scalar(value, type_)


def _fit_union(value: Any, arguments: tuple[Any, ...], type_: Any) -> Any:
    # A value that already is of one of the types stays what it is; only then is one of them made to fit.
    for part in arguments:
        if type(value) is part:
            return value
    complaints = []
    for part in arguments:
        try:
            return fit(value, part)
        except OptionError as error:
            complaints.append(str(error))
    detail = complaints[0] if len([p for p in arguments if p is not type(None)]) == 1 else ""
    raise OptionError(detail or f"{value!r} is not one of the types {type_text(type_)}")


def _fit_tuple(value: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    variadic = not arguments or arguments[-1] is Ellipsis
    if not isinstance(value, (list, tuple)):
        if not variadic:
            raise OptionError(f"{value!r} is not a list of {len(arguments)} values")
        value = (value,)
    if variadic:
        return tuple(fit(item, arguments[0]) for item in value) if arguments else tuple(value)
    if arguments == ((),):
        arguments = ()
    if len(value) != len(arguments):
        raise OptionError(f"{list(value)!r} has {len(value)} values where {len(arguments)} are due")
    return tuple(fit(item, part) for item, part in zip(value, arguments, strict=True))


def _fit_scalar(value: Any, type_: Any) -> Any:
    if type_ is bool and isinstance(value, bool):
        return value
    if type_ is int and not isinstance(value, bool) and hasattr(value, "__index__"):
        return operator.index(value)
    if type_ is float and not isinstance(value, bool) and isinstance(value, numbers.Real):
        return float(value)
    if type_ is torch.dtype:
        if isinstance(value, torch.dtype):
            return value
        if isinstance(value, str) and value.removeprefix("torch.") in DTYPES:
            return DTYPES[value.removeprefix("torch.")]
        raise OptionError(f"{value!r} is not a dtype{near_misses(str(value), DTYPES)}")
    if is_function(type_) and callable(value):
        return value
    if is_class(type_) and type_ not in (bool, int, float) and isinstance(value, type_):
        return value
    raise OptionError(f"{value!r} is not {_article(type_text(type_))}{' (true or false)' if type_ is bool else ''}")


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}" if noun != "none" else noun


def _near(value: Any, choices: Iterable[Any]) -> str:
    near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


# ---- help ----------------------------------------------------------------------------------------------------

_IN_DOCSTRING = re.compile(r"``(\w+)``: (.+?)(?=[.;]? ``\w+``: |$)")


def _helps(kind: type[Any]) -> dict[str, str]:
    """What is written about each field: a string right after it, or ``name``: in the class's docstring; the nearest
    class wins.
    """
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        for paragraph in inspect.cleandoc(base.__doc__ or "").split("\n\n"):
            found.update({name: _sentence(text) for name, text in _IN_DOCSTRING.findall(" ".join(paragraph.split()))})
        found.update(_attribute_docstrings(base))
    return found


def _attribute_docstrings(kind: type[Any]) -> dict[str, str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return {}  # a class without a source file (typed in, or generated) can't carry any
    body = tree.body[0].body if tree.body and isinstance(tree.body[0], ast.ClassDef) else []
    return {
        field.target.id: " ".join(inspect.cleandoc(text.value.value).split())
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }


def _sentence(text: str) -> str:
    """Up to the end of the first sentence."""
    return re.split(r"(?<=[a-z0-9)`])\. (?=[A-Z`])", text)[0].rstrip(". ")


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
