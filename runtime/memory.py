"""Memory for the kernels: aligned, in large pages where it is large; and memory that the system may have back."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes that panels and scratch are aligned to."""

LARGE_PAGE = 1 << 21
"""Bytes of a large page, on the processors that have them: kernels walk through memory in strides, and with small pages
they would wait for the page tables."""

POOL = 16 * LARGE_PAGE
"""Bytes of which panels are allotted: most are smaller than a large page."""

RETURN_EVERY = 16
"""Batches after which work on batches of many lengths calls :func:`return_freed_memory`. Each length leaves holes in
the heap between what stays: training on long texts would grow to several times what it needs.
"""

_PAGE_OUT = 21  # MADV_PAGEOUT


@torch.inference_mode(False)  # it may be kept, and used outside the mode that it is first asked for in
def aligned_bytes(count: int) -> Tensor:
    """``count`` uninitialised bytes that begin at a multiple of :data:`ALIGNMENT`; large memory in large pages, where
    the system has them.
    """
    if count < LARGE_PAGE or sys.platform != "linux":
        memory, alignment = torch.empty(count + ALIGNMENT, dtype=torch.uint8, device="cpu"), ALIGNMENT
    else:
        private = mmap.mmap(-1, count + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a system without large pages
            private.madvise(mmap.MADV_HUGEPAGE)
        memory, alignment = torch.frombuffer(private, dtype=torch.uint8), LARGE_PAGE
    start = -memory.data_ptr() % alignment
    return memory[start : start + count]


def return_freed_memory() -> None:
    """Let the system have what was freed, as far as the C library knows how to (glibc's ``malloc_trim``)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(ctypes.c_size_t(0))


class Pool:
    """Hands out parts of large pieces of memory. A piece lives as long as any part of it, or while it is the one that
    parts are taken of.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._piece = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._used = 0

    def take(self, count: int) -> Tensor:
        """``count`` uninitialised bytes that begin at a multiple of :data:`ALIGNMENT`."""
        if count > POOL // 2:
            return aligned_bytes(count)
        with self._lock:
            if self._used + count > self._piece.numel():
                self._piece, self._used = aligned_bytes(POOL), 0
            part = self._piece[self._used : self._used + count]
            self._used += -(-count // ALIGNMENT) * ALIGNMENT
        return part


panels = Pool()
"""For packed weights."""


class MappedFiles:
    """Where this process has files in its memory, now."""

    def __init__(self) -> None:
        self._places: list[tuple[int, int]] = []
        if sys.platform == "linux":
            lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
            for place, access, _, _, inode in (line.split()[:5] for line in lines):
                if inode != "0" and "x" not in access:  # not a program
                    start, end = (int(address, 16) for address in place.split("-"))
                    self._places.append((start, end))

    def __contains__(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in a file."""
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        return any(start <= first and last <= end for start, end in self._places)

    def give_back(self, tensors: Iterable[Tensor]) -> None:
        """Let the system have the memory of those tensors that lie in a file: it reads them again when they are needed.
        Others stay as they are.
        """
        page, library = mmap.PAGESIZE, ctypes.CDLL(None)
        for tensor in tensors:
            first = -(-tensor.data_ptr() // page) * page
            last = (tensor.data_ptr() + tensor.nbytes) // page * page
            if first < last and tensor in self:
                # What it answers makes no difference to anybody.
                library.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _PAGE_OUT)
