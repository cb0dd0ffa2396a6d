"""Whether the tensors of a compressed weight make sense together, looked at before any kernel computes with them.

Kernels trust their operands: an outlier column past the row's end would be a write past a buffer's. So every number
that becomes an index or a code is checked here, against the weight's format and its ``[rows, columns]``. What each part
has to be:

===========================  ====================================================================================
``codes``, ``planes``        uint8, ``format.codes_shape``; ternary: no fourth code, base-3: no byte over 242
``scale``, ``alphas``        float, ``format.scale_shape``, finite
``zero_point``               the same, there if and only if the format is asymmetric
``dense``, ``latent``        float ``[rows, columns]``
``outliers.values``          float ``[nnz]``, finite
``outliers.columns``         uint16 or int32 ``[nnz]``, below ``columns``, ascending within a row
``outliers.row_offsets``     int32 ``[rows + 1]``, from 0 up to ``nnz``, never falling
===========================  ====================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from prequant.passes.sites import OUTLIER_PREFIX
from prequant.runtime import FormatError, Scheme, WeightFormat
from prequant.runtime.formats import TRITS_PER_BYTE
from prequant.runtime.metrics import all_finite

from .errors import CheckpointError
from .json_file import describe

OUTLIER_PARTS = tuple(OUTLIER_PREFIX + part for part in ("values", "columns", "row_offsets"))
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INDICES = (torch.uint16, torch.int32)
MAX_GROUP = 1 << 16
"""The largest group size beside the number of columns: a scale is spread over its whole group, also where the row is
shorter.
"""


def parse_format(text: str, columns: int) -> WeightFormat:
    """A weight format from a file, for rows of ``columns``. Raises :class:`CheckpointError`."""
    try:
        parsed = WeightFormat.parse(text)
    except FormatError as error:
        raise CheckpointError(f"{describe(text)} is no weight format that can be read: {error}") from error
    if parsed.group_size > max(columns, MAX_GROUP):
        raise CheckpointError(
            f"the group size {parsed.group_size} is larger than a row of {columns} and than {MAX_GROUP}"
        )
    return parsed


def part_shapes(format: WeightFormat | None, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the parts of a weight, outliers aside; a format of None is a dense weight that has outliers."""
    if format is None:
        return {"dense": (rows, columns)}
    stored, scale = ("planes", "alphas") if format.scheme is Scheme.BCQ else ("codes", "scale")
    shapes = {stored: format.codes_shape(rows, columns), scale: format.scale_shape(rows, columns)}
    return shapes if format.symmetric else shapes | {"zero_point": format.scale_shape(rows, columns)}


def check_weight(
    format: WeightFormat | None, rows: int, columns: int, parts: Mapping[str, Tensor], name: Callable[[str], str]
) -> None:
    """Raise :class:`CheckpointError` unless ``parts`` are a ``[rows, columns]`` weight of that format, with or without
    outliers.

    ``name(part)`` begins the message about a part: its file and name.
    """
    outliers = {part: parts[part] for part in OUTLIER_PARTS if part in parts}
    core = {part: tensor for part, tensor in parts.items() if part not in outliers}
    _check_parts(format, rows, columns, core, part_shapes(format, rows, columns), name)
    if outliers:
        check_outliers(rows, columns, outliers, name)


def check_outliers(rows: int, columns: int, parts: Mapping[str, Tensor], name: Callable[[str], str]) -> None:
    """Raise :class:`CheckpointError` unless ``parts`` are the outliers of a ``[rows, columns]`` weight; see
    :func:`check_weight`.
    """
    count = parts[OUTLIER_PARTS[0]].numel() if OUTLIER_PARTS[0] in parts else 0
    shapes = dict(zip(OUTLIER_PARTS, ((count,), (count,), (rows + 1,)), strict=True))
    _check_parts(None, rows, columns, parts, shapes, name)
    _check_positions(rows, columns, parts, name)


def _check_parts(
    format: WeightFormat | None,
    rows: int,
    columns: int,
    parts: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    name: Callable[[str], str],
) -> None:
    weight = f"a weight {format or 'of floats'} [{rows}, {columns}]"
    if missing := sorted(shapes.keys() - parts.keys()):
        raise CheckpointError(f"{name(missing[0])} is missing; {weight} has {', '.join(shapes)}")
    if unknown := sorted(parts.keys() - shapes.keys()):
        raise CheckpointError(f"{name(unknown[0])} does not belong to {weight}, which has {', '.join(shapes)}")
    for part, shape in shapes.items():
        if tuple(parts[part].shape) != shape:
            found = list(parts[part].shape)
            raise CheckpointError(f"{name(part)} is of shape {found}; {weight} takes {list(shape)}")
        _CHECKS[part](format, parts[part], name(part))


def _check_codes(format: WeightFormat | None, codes: Tensor, name: str) -> None:
    _check_dtype(codes, (torch.uint8,), name)
    if format is None or format.scheme is not Scheme.TERNARY or not codes.numel():
        return
    if format.base3:
        limit = 3**TRITS_PER_BYTE - 1
        if int(codes.max()) > limit:
            raise CheckpointError(f"{name} holds the byte {int(codes.max())}; five base-3 digits reach {limit}")
    elif bool((codes & (codes >> 1) & 0b01010101).any()):
        raise CheckpointError(f"{name} holds the code 3; ternary codes are 0, 1 and 2")


def check_finite(format: WeightFormat | None, tensor: Tensor, name: str) -> None:
    """Raise :class:`CheckpointError` unless a tensor holds floats, all of them finite."""
    _check_dtype(tensor, FLOATS, name)
    if not all_finite(tensor):
        raise CheckpointError(
            f"{name} holds {tensor[~torch.isfinite(tensor)][0].item()}; its numbers have to be finite"
        )


def _check_float(format: WeightFormat | None, tensor: Tensor, name: str) -> None:
    _check_dtype(tensor, FLOATS, name)


def _check_columns(format: WeightFormat | None, tensor: Tensor, name: str) -> None:
    _check_dtype(tensor, INDICES, name)


def _check_offsets(format: WeightFormat | None, tensor: Tensor, name: str) -> None:
    _check_dtype(tensor, (torch.int32,), name)


_CHECKS: dict[str, Callable[[WeightFormat | None, Tensor, str], None]] = {
    "codes": _check_codes,
    "planes": _check_codes,
    "scale": check_finite,
    "alphas": check_finite,
    "zero_point": check_finite,
    "dense": _check_float,
    "outliers.values": check_finite,
    "outliers.columns": _check_columns,
    "outliers.row_offsets": _check_offsets,
}


def _check_dtype(tensor: Tensor, expected: tuple[torch.dtype, ...], name: str) -> None:
    if tensor.dtype not in expected:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in expected)
        raise CheckpointError(f"{name} is of type {str(tensor.dtype).removeprefix('torch.')}; expected {names}")


def _check_positions(rows: int, columns: int, parts: Mapping[str, Tensor], name: Callable[[str], str]) -> None:
    values, places, offsets = (parts[part] for part in OUTLIER_PARTS)
    offsets, places = offsets.to(torch.int64), places.to(torch.int64)
    where = name(OUTLIER_PARTS[2])
    if int(offsets[0]) != 0 or int(offsets[-1]) != values.numel():
        raise CheckpointError(
            f"{where} runs from {int(offsets[0])} to {int(offsets[-1])}; "
            f"expected 0 to {values.numel()}, the number of values"
        )
    falls = (offsets.diff() < 0).nonzero()
    if falls.numel():
        row = int(falls[0])
        raise CheckpointError(
            f"{where} falls from {int(offsets[row])} to {int(offsets[row + 1])} at row {row}; offsets never fall"
        )
    where = name(OUTLIER_PARTS[1])
    if places.numel() and not (int(places.min()) >= 0 and int(places.max()) < columns):
        bad = int(places.max()) if int(places.min()) >= 0 else int(places.min())
        raise CheckpointError(f"{where} holds the column {bad}; the weight has {columns}")
    flat = torch.repeat_interleave(torch.arange(rows, device=offsets.device), offsets.diff()) * columns + places
    if bool((flat.diff() <= 0).any()):
        at = int((flat.diff() <= 0).nonzero()[0]) + 1
        raise CheckpointError(
            f"{where} is out of order at {at}: column {int(places[at])} follows {int(places[at - 1])} in its row"
        )
