"""AOTInductor: the graph compiled ahead of time, as a package for PyTorch in Python and in C++."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from prequant.passes import Program
from prequant.passes.nesting import named_results

from .archive import exported, replacing_archive

INPUTS, OUTPUTS = "prequant.inputs", "prequant.outputs"
"""What a package's metadata say, for those who can't call it by name: the inputs in their order, each with its type
and axes (``input_ids int64 [batch, sequence]``), and the results, a line each."""


def export_aoti(program: Program, path: str | os.PathLike[str]) -> Path:
    """Compile a Program into an AOTInductor package for the machine that this runs on; returns its path.

    A process loads it with ``torch._inductor.aoti_load_package(path)`` once it has imported ``prequant.runtime``: the
    packed operators in it are calls of the runtime's. It takes the inputs by name, in any batch size and length. In
    C++ it takes them in the order of the metadata, and the operators from ``runtime/torch_ops``.
    Takes a C++ compiler. Raises :class:`ExportError`.
    """
    made = exported(program)
    # Inductor would write the few numbers of a small tensor into its code, and make a tensor of them in every call: to
    # the operators a new weight each time. (And it has no code for uint16.)
    settings = {"always_keep_tensor_constants": True, "aot_inductor.metadata": _metadata(program)}
    with replacing_archive(path) as new:
        torch._inductor.aoti_compile_and_package(made, package_path=str(new), inductor_configs=settings)
    return Path(path)


def _metadata(program: Program) -> dict[str, str]:
    inputs = (
        f"{item.name} {str(item.dtype).removeprefix('torch.')} [{', '.join(map(str, item.shape))}]"
        for item in program.signature.inputs
    )
    outputs = (name for name, _ in named_results(program.signature.outputs))
    return {INPUTS: "\n".join(inputs), OUTPUTS: "\n".join(outputs)}
