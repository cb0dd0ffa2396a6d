"""What the machine can do at most, as far as torch can show it: bytes read and operations done in a second.

Each ceiling is the best of several ways and of several repeats, so the true one is never lower. It can be higher:
libraries reach about a third of the int8 peak of AMX, say. Time over such a floor can then be below 1.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

REPEATS = 5


@dataclass(frozen=True)
class Ceilings:
    """Bytes read a second from memory, and from wherever as many bytes lie as the benchmark's weights take; operations
    (a multiplication and an addition are two) a second by arithmetic: ``fp32``, ``bf16`` and ``int8``."""

    threads: int
    memory: float
    rotated: float
    operations: dict[str, float]

    def floor(self, bytes: int, operations: int, arithmetic: str, from_memory: bool = False) -> float:
        """Seconds that nothing can be faster than: those of reading and writing, or those of computing.

        ``from_memory`` says that the weights come from memory; otherwise they come from where they fit.
        """
        bandwidth = self.memory if from_memory else max(self.memory, self.rotated)
        return max(bytes / bandwidth, operations / self.operations[arithmetic])


def measure(threads: int, memory_bytes: int, rotated_bytes: int, size: int) -> Ceilings:
    """Measure on ``threads`` threads; products are those of matrices ``[size, size]``.

    ``memory_bytes`` should be more than the last-level cache holds.
    """
    torch.set_num_threads(threads)
    with torch.inference_mode():
        return Ceilings(threads, _read(memory_bytes), _read(rotated_bytes), _multiply(size))


def _read(bytes: int) -> float:
    """Bytes a second of reading so many again and again: the best of a sum, a dot product, a matrix times a vector."""
    columns = 4096
    matrix = torch.ones(max(2, bytes // (4 * columns)), columns)
    vector, flat = torch.ones(columns), matrix.view(-1)
    halves = flat.split(-(-flat.numel() // 2))
    ways: list[Callable[[], object]] = [matrix.sum, lambda: torch.mv(matrix, vector)]
    if halves[0].shape == halves[1].shape:
        ways.append(lambda: torch.dot(*halves))
    return matrix.numel() * 4 / min(map(_best_seconds, ways))


def _multiply(size: int) -> dict[str, float]:
    """Operations a second of products of large matrices, by arithmetic."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    left_bf16, right_bf16 = left.bfloat16(), right.bfloat16()
    codes = torch.randint(-127, 128, (size, size), dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(codes, [size, size])
    scales, zeros = torch.ones(size), torch.zeros(size, dtype=torch.int64)
    bytes_ = codes.view(torch.uint8)

    def int8() -> object:
        return torch.ops.onednn.qlinear_pointwise(
            *(bytes_, 1.0, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], "")
        )

    seconds = {
        "fp32": _best_seconds(lambda: left @ right),
        "bf16": _best_seconds(lambda: left_bf16 @ right_bf16),
        "int8": min(_best_seconds(int8), _best_seconds(lambda: torch._int_mm(codes, codes))),
    }
    return {arithmetic: 2 * size**3 / best for arithmetic, best in seconds.items()}


def _best_seconds(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)
