"""What the benchmarks of a GPU have in common: which GPU it is, how calls on it are timed, and its copy rate.

Import it before prequant's kernels and Triton: with ``--smoke`` it sets Triton's interpreter up, so that the code runs
on the CPU, on tiny sizes. What it measures then means nothing, and is not written.
"""

import contextlib
import functools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

SMOKE = "--smoke" in sys.argv
if SMOKE:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

import torch  # noqa: E402

from prequant.runtime.triton_kernels import backends  # noqa: E402

Call = Callable[[], object]

DEVICE = torch.device("cpu" if SMOKE else "cuda")
PACKAGES = ("triton", "gemlite", "bitsandbytes")
"""What the figures depend on beside torch."""

CALLS = 32
"""Of a launch that is timed, at least: the gaps before and behind it are shared by so many."""


def require_gpu() -> None:
    """Exit with a message where there is no GPU, unless this is only a smoke test."""
    if not SMOKE and not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device here: this benchmark is for a GPU (--smoke runs its code on the CPU)")


def kernels() -> contextlib.AbstractContextManager[None]:
    """Inside, packed operators on :data:`DEVICE` run on the Triton kernels."""
    return backends.interpreted() if SMOKE else contextlib.nullcontext()


@functools.cache
def device_text() -> str:
    """The GPU, its driver, and the CUDA that torch is built for."""
    if SMOKE:
        return "Triton's interpreter on the CPU"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    properties = torch.cuda.get_device_properties(DEVICE)
    memory = properties.total_memory / 2**30
    return f"{properties.name} ({memory:.0f} GiB), driver {driver}, CUDA {torch.version.cuda}"


def synchronize() -> None:
    """Wait for the GPU."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize(DEVICE)


def rotations(bytes_each: int) -> int:
    """How many copies of a weight calls go through, so that none is still in the second-level cache."""
    if DEVICE.type != "cuda":
        return 1
    cache = int(getattr(torch.cuda.get_device_properties(DEVICE), "L2_cache_size", 64 << 20))
    return max(2, -(-3 * cache // max(bytes_each, 1)))


def seconds(calls: Sequence[Call], repeats: int) -> float:
    """Seconds a call, the median over ``repeats`` passes through all ``calls``.

    On a GPU the passes are launches of one CUDA graph, or, where a call can't be recorded, calls between two events:
    then what the host takes to launch is in the figure if that is longer. The GPU is busy with a launch that does not
    count while the host makes the next one ready, which would be waited for between the events otherwise.
    """
    if DEVICE.type != "cuda":
        calls[0]()
        started = time.perf_counter()
        calls[0]()
        return time.perf_counter() - started
    made = [*calls] * -(-CALLS // len(calls))
    launch = _recorded(made)
    for _ in range(3):
        launch()
    found = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        launch()
        begin.record()
        launch()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1000 / len(made))
    return statistics.median(found)


def _recorded(calls: Sequence[Call]) -> Call:
    """All ``calls`` as one launch."""
    from prequant.runtime.cuda_graphs import Recording

    def every() -> None:
        for call in calls:
            call()

    try:
        return Recording(every, DEVICE)
    except RuntimeError:  # what asks the host while it runs has no graph
        torch.cuda.synchronize(DEVICE)
        return every


def copy_rate(bytes_: int, repeats: int) -> float:
    """Bytes a second that a copy on the device reads and writes together: the most that memory gives."""
    source = torch.empty(bytes_, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * bytes_ / seconds([lambda: target.copy_(source)], repeats)
