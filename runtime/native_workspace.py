"""What a thread lends to its calls of the native kernels, so that no call allocates what the last one had already."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from . import memory, native


class Workspace:
    """``prequant_workspace`` of one thread. Its scratch grows to what the largest call takes, and is kept."""

    __slots__ = ("_lent", "_scratch", "address", "isa", "threads")

    def __init__(self) -> None:
        self._lent = native.Workspace()
        self._scratch: Tensor | None = None
        self.address = ctypes.addressof(self._lent)
        self.threads, self.isa = 0, ""

    def set(self, threads: int, isa: str) -> None:
        """How many threads calls may take, and their instruction set."""
        self.threads, self.isa = threads, isa
        self._lent.threads, self._lent.isa = threads, isa.encode()

    def grow(self) -> None:
        """Make the scratch as large as the call that was just refused found that it takes."""
        needed = self._lent.needed
        self._scratch = memory.aligned_bytes(needed)
        self._lent.scratch, self._lent.scratch_bytes = self._scratch.data_ptr(), needed


class _Workspaces(threading.local):
    def __init__(self) -> None:
        self.mine = Workspace()


_workspaces = _Workspaces()


def workspace() -> Workspace:
    """That of this thread, for the number of threads and the instruction set that are set now."""
    mine: Workspace = _workspaces.mine
    threads, isa = torch.get_num_threads(), native.chosen_isa()
    if mine.threads != threads or mine.isa is not isa:
        mine.set(threads, isa)
    return mine


def run(linear: int, input: int, residual: int | None, output: int, tokens: int) -> None:
    """``prequant_run_linear``, all tensors by their addresses. Raises :class:`NativeLibraryError` if it is refused."""
    mine, call = workspace(), native.load().prequant_run_linear
    if status := call(linear, input, residual, output, tokens, mine.address):
        if status == native.SMALL_SCRATCH:
            mine.grow()
            status = call(linear, input, residual, output, tokens, mine.address)
        native.check(status, "packed_linear")


def run_all(linears: Sequence[int], input: int, outputs: Sequence[int], tokens: int) -> None:
    """``prequant_run_linears``, as many at a time as it takes. Raises :class:`NativeLibraryError` if it is refused."""
    mine, call = workspace(), native.load().prequant_run_linears
    for start in range(0, len(linears), native.MAX_LINEARS):
        some = linears[start : start + native.MAX_LINEARS]
        pointers = ctypes.c_void_p * len(some)
        places = pointers(*outputs[start : start + native.MAX_LINEARS])
        arguments = (pointers(*some), len(some), input, None, places, tokens, mine.address)
        if status := call(*arguments):
            if status == native.SMALL_SCRATCH:
                mine.grow()
                status = call(*arguments)
            native.check(status, "packed_linears")
