"""Memory for kernels, and memory that goes back to the system."""

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from prequant.runtime.memory import ALIGNMENT, LARGE_PAGE, POOL, MappedFiles, Pool, aligned_bytes

linux = pytest.mark.skipif(sys.platform != "linux", reason="the calls are Linux's")


@pytest.mark.parametrize("count", [0, 1, 1000, LARGE_PAGE - 1, LARGE_PAGE, 3 * LARGE_PAGE + 5])
def test_bytes_are_aligned_and_the_callers(count: int) -> None:
    memory = aligned_bytes(count)
    assert memory.shape == (count,)
    assert memory.dtype is torch.uint8
    assert memory.data_ptr() % ALIGNMENT == 0
    memory.fill_(7)
    assert int(memory.sum(dtype=torch.int64)) == 7 * count


def test_bytes_asked_for_in_inference_mode_may_be_written_to_outside() -> None:
    with torch.inference_mode():
        parts = aligned_bytes(100), Pool().take(100)
    for part in parts:
        part.fill_(3)
        assert bool((part == 3).all())


def test_parts_of_a_pool_stay_apart_and_outlive_it() -> None:
    pool = Pool()
    counts = [1, 64, 65, 1 << 20, POOL // 2, POOL // 2 - 1, POOL // 2 + 1, 100]
    parts = [pool.take(count) for count in counts]
    for number, part in enumerate(parts):
        assert part.data_ptr() % ALIGNMENT == 0
        part.fill_(number)
    del pool
    for number, (part, count) in enumerate(zip(parts, counts, strict=True)):
        assert part.shape == (count,)
        assert bool((part == number).all())
    assert parts[1].data_ptr() == parts[0].data_ptr() + ALIGNMENT


def mapped(path: Path, value: int = 3) -> Tensor:
    save_file({"codes": torch.full((1 << 20,), value, dtype=torch.uint8)}, path)
    with path.open("rb") as written:
        os.fsync(written.fileno())  # what is yet to be written stays in memory
    with safe_open(path, framework="pt", device="cpu") as file:
        return file.get_tensor("codes")


def resident(path: Path) -> int:
    """Kilobytes of a file that are in this process's memory."""
    here, total = False, 0
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if "-" in line.split()[0]:
            here = line.endswith(str(path))
        elif here and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


@linux
def test_mapped_memory_goes_back_and_comes_again(tmp_path: Path) -> None:
    path = tmp_path / "codes.safetensors"
    codes, own = mapped(path), torch.full((1 << 20,), 5, dtype=torch.uint8)
    assert int(codes.sum(dtype=torch.int64)) == 3 << 20
    files = MappedFiles()
    assert codes in files
    assert own not in files
    before = resident(path)
    files.give_back([codes, own, codes[:0], codes[1:7]])
    assert before > 900
    assert resident(path) < before / 2
    assert bool((codes == 3).all())
    assert bool((own == 5).all())


@linux
def test_what_was_written_into_mapped_memory_is_kept(tmp_path: Path) -> None:
    codes = mapped(tmp_path / "codes.safetensors")
    codes[1000:500000] = 9
    MappedFiles().give_back([codes])
    assert int((codes == 9).sum()) == 499000
    assert int((codes == 3).sum()) == (1 << 20) - 499000
