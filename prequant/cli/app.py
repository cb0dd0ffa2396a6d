"""The ``prequant`` command."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import typer
from rich.console import Console

from prequant.runtime import PrequantError

F = TypeVar("F", bound=Callable[..., None])

WIDTH_OF_PIPES = 160
"""Columns of a table that goes into a file or a pipe, where rich would cut it to 80."""

app = typer.Typer(
    name="prequant",
    help="Make pre-trained language models small and fast, and measure what it costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def show(content: object) -> None:
    """Print a table, or a line of text as it is: not wrapped, no part of it taken for markup."""
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(width=None if known else WIDTH_OF_PIPES)
    if isinstance(content, str):
        console.print(content, markup=False, highlight=False, soft_wrap=True)
    else:
        console.print(content)


def complain(command: str, message: object) -> None:
    """Print one line (or the few of a message that marks a place) on stderr."""
    Console(stderr=True).print(
        f"prequant {command}: {message}", style="red", markup=False, highlight=False, soft_wrap=True
    )


def command(name: str, summary: str) -> Callable[[F], F]:
    """Register a command with its line in the list of commands. Bad input ends it with a line on stderr and exit status
    2, not with a traceback.
    """

    def register(function: F) -> F:
        @wraps(function)
        def run(*args: object, **kwargs: object) -> None:
            try:
                function(*args, **kwargs)
            except (PrequantError, OSError) as error:
                complain(name, error)
                sys.exit(2)

        app.command(name, short_help=summary)(run)
        return function

    return register


# Each registers its command, and imports what it works with only when it runs.
from . import (  # noqa: E402, F401
    adapt,
    adapters,
    blame,
    compress,
    evaluate,
    export,
    finetune,
    generate,
    inspect,
    opt,
    passes,
    recipes,
    tasks,
    view,
)
