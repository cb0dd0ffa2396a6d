"""Memory that launches share, and the device that they run on."""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor

COUNTERS = 1 << 14
"""Tiles that one launch with split columns may have."""

_counters: dict[tuple[torch.device, int], Tensor] = {}


def of_split(split: int, results: int, tiles: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Room for the sums of ``split`` programs a tile, and a zero for every tile; nothing where columns are not split.

    Kernels leave the counters at zero, so those of a stream are made once. A graph that is being captured gets some of
    its own, as it may run beside anything.
    """
    if split == 1:
        return None, None
    return torch.empty(split * results, dtype=torch.float32, device=device), _zeros(tiles, device)


def _zeros(tiles: int, device: torch.device) -> Tensor:
    if tiles > COUNTERS or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return torch.zeros(tiles, dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if key not in _counters:
        _counters[key] = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    return _counters[key]


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Launches inside go to ``device``: Triton asks for the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a GPU has; as many as tiles are made for elsewhere."""
    from .tables import MULTIPROCESSORS

    if device.type != "cuda":
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
