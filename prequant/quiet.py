"""Less on the terminal: progress bars and notices of the libraries underneath, off for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from transformers.utils import logging as transformers_logging


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Switch off the bars of ``datasets``, ``transformers`` and its hub."""
    of_datasets = not datasets.are_progress_bars_disabled()
    of_transformers = transformers_logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if of_datasets:
            datasets.enable_progress_bars()
        if of_transformers:
            transformers_logging.enable_progress_bar()


@contextmanager
def no_load_report() -> Iterator[None]:
    """Leave out the table of missing parameters that ``transformers`` logs as a warning when it loads a model.

    A task head that starts from random numbers is no mishap here; callers that mind ask for ``output_loading_info``.
    """
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
