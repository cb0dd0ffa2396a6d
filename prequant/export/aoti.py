"""AOTInductor: the graph compiled ahead of time, as a package for PyTorch in Python and in C++."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from prequant.passes import Program

from .archive import exported, replacing_archive

WRITTEN_OUT = 8


def export_aoti(program: Program, path: str | os.PathLike[str]) -> Path:
    """Compile a Program into an AOTInductor package for the machine that this runs on; returns its path.

    A process loads it with ``torch._inductor.aoti_load_package(path)`` once it has imported ``prequant.runtime``: the
    packed operators in it are calls of the runtime's. It takes the inputs by name, in any batch size and length.
    Takes a C++ compiler. Raises :class:`ExportError`.
    """
    made = exported(_with_wide_columns(program))
    with replacing_archive(path) as new:
        torch._inductor.aoti_compile_and_package(made, package_path=str(new))
    return Path(path)


def _with_wide_columns(program: Program) -> Program:
    """Inductor writes constants of so few numbers into its code, and has no code for uint16: int32 means the same."""
    copied = program.copy()
    for name, value in list(copied.named_buffers()):
        if value.dtype == torch.uint16 and value.numel() <= WRITTEN_OUT:
            copied.set_tensor(name, value.to(torch.int32))
    return copied
