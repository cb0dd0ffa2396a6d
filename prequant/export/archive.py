"""A Program as a ``torch.export`` program: what PyTorch's own file formats are made of."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram

from prequant.checkpoint.atomic import replacing_file
from prequant.passes import ComposeOps, FuseEpilogue, FuseParallelLinears, Input, Pipeline, Program
from prequant.passes.nesting import nest
from prequant.passes.plan import is_lowered

from .errors import ExportError

SIZES = (3, 5, 7, 11, 13, 17)
"""Of the dynamic axes of examples: no two alike, and none that a graph could take for a constant."""


@contextmanager
def replacing_archive(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file to write, which becomes ``path`` at the end. Raises :class:`ExportError` for a name of another kind.

    It has the name of ``path``, in a folder beside it: PyTorch names the entries of an archive after its file.
    """
    if Path(path).suffix != ".pt2":
        raise ExportError(f"{os.fspath(path)}: PyTorch loads archives and packages from files named *.pt2")
    with replacing_file(Path(path)) as new, TemporaryDirectory(prefix=".", dir=new.parent) as folder:
        staged = Path(folder) / Path(path).name
        yield staged
        staged.replace(new)


def exported(program: Program) -> ExportedProgram:
    """The graph of a Program in eval mode, called with its inputs by name, its results in a dictionary or tuple.

    Dynamic axes stay dynamic; tensors are shared. There is no plan in a file that would fuse a lowered Program's ops on
    the way, so the graph has them fused. Raises :class:`ExportError` for an axis that would not stay dynamic.
    """
    module = _nested(_fused(program.copy().train(False)))
    examples = _examples(program.signature.inputs)
    dims = {
        item.name: {axis: Dim.AUTO if isinstance(size, str) else Dim.STATIC for axis, size in enumerate(item.shape)}
        for item in program.signature.inputs
    }
    with torch.no_grad():
        made = torch.export.export(module, (), examples, dynamic_shapes=dims, strict=False)
    _check_axes(made, program.signature.inputs)
    return made


def _fused(program: Program) -> Program:
    return Pipeline([ComposeOps(), FuseEpilogue(), FuseParallelLinears()])(program) if is_lowered(program) else program


def _nested(program: Program) -> fx.GraphModule:
    """The graph with its flat results in the model's nesting: nothing of a Program is left to call."""
    graph = fx.Graph()
    flat: Any = graph.graph_copy(program.graph, {})
    graph.output(nest(program.signature.outputs, flat))
    return fx.GraphModule(program, graph)


def _examples(inputs: tuple[Input, ...]) -> dict[str, Tensor]:
    names = dict.fromkeys(size for item in inputs for size in item.shape if isinstance(size, str))
    sizes = dict(zip(names, SIZES, strict=False))
    if len(sizes) < len(names):
        raise ExportError(f"the Program has {len(names)} dynamic axes; at most {len(SIZES)} can be exported")
    return {item.name: _example(item, sizes) for item in inputs}


def _example(item: Input, sizes: dict[str, int]) -> Tensor:
    shape = [sizes[size] if isinstance(size, str) else size for size in item.shape]
    return torch.zeros(shape, dtype=item.dtype) if item.dtype.is_floating_point else torch.ones(shape, dtype=item.dtype)


def _check_axes(made: ExportedProgram, inputs: tuple[Input, ...]) -> None:
    placeholders = {node.name: node for node in made.graph.find_nodes(op="placeholder")}
    for item in inputs:
        value = placeholders[item.name].meta["val"]
        for axis, size in enumerate(item.shape):
            if isinstance(size, str) and not isinstance(value.shape[axis], torch.SymInt):
                raise ExportError(
                    f"axis {axis} of {item.name!r}, the {size}, would be fixed to {value.shape[axis]} in the file"
                )
