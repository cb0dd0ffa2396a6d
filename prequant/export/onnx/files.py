"""Writing a model whole or not at all, with its large tensors beside it where it would be too large for one file."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import onnx
import onnx_ir as ir

from prequant.checkpoint.atomic import replacing_file

from ..errors import ExportError

LARGEST = 2**31 - 2**24
"""Bytes of tensors that one file may have: protobuf's limit is 2 GiB, and the graph takes some of it."""
SMALL = 1024
"""Tensors of so many bytes at most stay in the model's own file."""


def write(models: Mapping[Path, ir.Model], external_over: int) -> tuple[Path, ...]:
    """Write models, all of them checked, then moved into place one after the other; returns every file.

    A model with more than ``external_over`` bytes of tensors keeps them in ``NAME.data`` beside it. Raises
    :class:`ExportError` for a model that ONNX's checker refuses: then what was there before is there still.
    """
    files: list[Path] = []
    with contextlib.ExitStack() as stack:
        for path, model in models.items():
            folder = path.parent
            folder.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=folder))
            stack.callback(shutil.rmtree, staging, ignore_errors=True)
            data = f"{path.name}.data" if _bytes(model) > external_over else None
            ir.save(model, staging / path.name, external_data=data, size_threshold_bytes=SMALL)
            try:
                onnx.checker.check_model(str(staging / path.name))
            except onnx.checker.ValidationError as error:
                raise ExportError(f"the model for {path} is not valid ONNX: {str(error).splitlines()[0]}") from error
            names = [data, path.name] if data is not None else [path.name]
            files += [folder / name for name in names]
            for name in reversed(names):  # entered last, and so put in place first: the data, then what refers to it
                target = stack.enter_context(replacing_file(folder / name))
                (staging / name).replace(target)
    for path in models:
        stale = path.with_name(f"{path.name}.data")
        if stale not in files:
            stale.unlink(missing_ok=True)
    return tuple(files)


def _bytes(model: ir.Model) -> int:
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
