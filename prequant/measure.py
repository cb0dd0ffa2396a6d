"""Measuring: peak memory, latency, bytes on disk."""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from enum import Enum
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from prequant.checkpoint.atomic import replacing_file
from prequant.quiet import no_progress_bars
from prequant.runtime.memory import return_freed_memory


class PeakMemory:
    """Context manager: the largest resident memory of the process while inside, sampled every 2 ms; a shorter peak can
    be missed.

    ``before`` and ``bytes`` (the peak) are bytes of the process, so they hold whatever else is in it. :attr:`growth` is
    what came on top. For that to be the work's own need, memory that was freed earlier goes back to the system first,
    as far as the C library knows how to (glibc's ``malloc_trim``): otherwise it would be used again unseen.
    """

    interval = 0.002

    def __init__(self) -> None:
        self.before = 0
        self.bytes = 0
        self._process = psutil.Process(os.getpid())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def growth(self) -> int:
        """Peak over what was resident on entry."""
        return max(0, self.bytes - self.before)

    def __enter__(self) -> PeakMemory:
        gc.collect()
        return_freed_memory()
        self.before = self.bytes = self._process.memory_info().rss
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._stop.wait(self.interval):
            self._sample()

    def _sample(self) -> None:
        self.bytes = max(self.bytes, self._process.memory_info().rss)


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers in memory; what is shared counts once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in chain(model.parameters(), model.buffers())
    }
    return sum(storages.values())


def median_seconds(calls: Sequence[Callable[[], object]], repeats: int = 20, warmup: int = 3) -> list[float]:
    """Median wall seconds of each of ``calls``, after ``warmup`` rounds that don't count.

    They take turns, so that whatever else the machine does in the meantime slows them all.
    """
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(warmup + repeats):
        for call, seconds in zip(calls, times, strict=True):
            started = time.perf_counter()
            call()
            if turn >= warmup:
                seconds.append(time.perf_counter() - started)
    return [statistics.median(seconds) for seconds in times]


def weight_bytes(folder: Path) -> int:
    """Bytes of the safetensors files in a model folder, as they are on disk."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def saved_bytes(model: PreTrainedModel) -> int:
    """Bytes of the safetensors files that a transformers model is saved in."""
    with tempfile.TemporaryDirectory() as scratch, no_progress_bars():
        model.save_pretrained(scratch)
        return weight_bytes(Path(scratch))


def machine_settings() -> dict[str, Any]:
    """What a result depends on beside its settings: threads, the kind of machine, versions."""
    return {"threads": torch.get_num_threads(), "machine": platform.machine(), "versions": installed_versions()}


PACKAGES = ("prequant", "torch", "transformers", "accelerate", "tokenizers", "datasets", "safetensors", "numpy")


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def plain(value: Any) -> Any:
    """``value`` in JSON's types: dataclasses as mappings, enums as their values, paths as text.

    Infinite and undefined numbers, which JSON does not have, become text (``"nan"``). Raises ``TypeError`` for anything
    else.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (str, bool, int)):
        return value
    raise TypeError(f"{value!r} has no form in JSON")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON whole or not at all; see :func:`plain`."""
    text = json.dumps(plain(content), indent=1, allow_nan=False) + "\n"
    with replacing_file(path) as staging:
        staging.write_text(text, encoding="utf-8")
