"""Memory that launches share, and the device that they run on."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from .availability import TritonError
from .tables import CARDS, MULTIPROCESSORS

Result = TypeVar("Result")

COUNTERS = 1 << 14
"""Tiles that one launch with split columns may have."""

_counters: dict[tuple[torch.device, int], Tensor] = {}


class _Graph(threading.local):
    counters: Tensor | None = None


_graph = _Graph()
"""Counters of the graph that this thread captures."""


def of_split(split: int, results: int, tiles: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Room for the sums of ``split`` programs a tile, and a zero for every tile; nothing where columns are not split.

    Kernels leave the counters at zero, so those of a stream are made once. A graph that is being captured gets some of
    its own, as it may run beside anything: one for all its launches in :func:`counters_of_graph`, else one for each.
    """
    if split == 1:
        return None, None
    return torch.empty(split * results, dtype=torch.float32, device=device), _zeros(tiles, device)


def _zeros(tiles: int, device: torch.device) -> Tensor:
    if _graph.counters is not None and tiles <= COUNTERS and _graph.counters.device == device:
        return _graph.counters
    if tiles > COUNTERS or capturing(device):
        return torch.zeros(tiles, dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if key not in _counters:
        _counters[key] = lasting(lambda: torch.zeros(COUNTERS, dtype=torch.int32, device=device), device)
    return _counters[key]


@contextlib.contextmanager
def counters_of_graph(device: torch.device) -> Iterator[Tensor]:
    """Inside, launches of this thread on ``device`` share the counters that are yielded: for a graph whose launches run
    one after the other. Whoever launches the graph keeps them.
    """
    before, _graph.counters = _graph.counters, torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    try:
        yield _graph.counters
    finally:
        _graph.counters = before


def lasting(make: Callable[[], Result], device: torch.device) -> Result:
    """What ``make`` makes on ``device``, in memory that is nobody's but its own: for what later calls read as well.

    The CUDA graphs of ``torch.compile`` count whatever their thread allocates while they warm up as theirs, and refuse
    what outlives the call. So it is made in another thread, on the same stream; without gradients. Raises
    :class:`TritonError` while a graph is captured: it would be made only when that is launched.
    """
    if capturing(device):
        raise TritonError(
            "a CUDA graph is captured of operators that have not run before: run them once with the same tensors, so "
            "that their weights are arranged"
        )
    cuda = device.type == "cuda"
    stream = torch.cuda.stream(torch.cuda.current_stream(device)) if cuda else contextlib.nullcontext()

    def made() -> Result:
        with on(device), stream, torch.no_grad():
            return make()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(made).result()


def capturing(device: torch.device) -> bool:
    """Whether launches on ``device`` are being recorded as a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Launches inside go to ``device``: Triton asks for the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a GPU has; elsewhere, as many as the tables are made for."""
    if device.type != "cuda":
        return MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def other_card(device: torch.device) -> str | None:
    """The name of a GPU that the tables are not made for; None for one that they are, and elsewhere."""
    if device.type != "cuda":
        return None
    name = str(torch.cuda.get_device_name(device))
    return None if any(known in name for known in CARDS) else name
