"""The order of codes and scales that the Triton kernels read.

Columns are cut into chunks of 128; what is missing of the last one is filled with zeros, which meet inputs of zero.
Codes are cut into *fields* of 8, 4, 2 or 1 bits (7 = 4 + 2 + 1, low bits first), so that each divides a byte; every
plane of binary coding is a field of width 1. A field is ``[chunks, rows, 16 * width]`` bytes, one behind the other::

    byte 16 * block + j of a row's chunk holds, in bits p * width and up, the column 128 / width * block + 16 * p + j

A tile of some rows and one chunk is thus one contiguous piece of memory whatever the width, and every row in it begins
on 16 bytes, whatever the number of columns of the weight. Scales are ``[terms, groups, rows]``: those that a tile needs
lie side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import Granularity, Scheme, WeightFormat
from ..packing import unpack

CHUNK = 128
"""Columns of a chunk."""

RUN = 16
"""Neighbouring columns of a plane that lie side by side."""

MIN_GROUP = 32
"""The smallest group that a kernel can work on as a whole."""


def has_layout(format: WeightFormat) -> bool:
    """Whether the scales of a format go with whole parts of chunks, or whole chunks."""
    size = format.group_size
    return size == 0 or size % CHUNK == 0 or (CHUNK % size == 0 and size >= MIN_GROUP)


def field_widths(format: WeightFormat) -> tuple[int, ...]:
    """Widths of the fields of a format, in the order they are stored."""
    if format.scheme is Scheme.BCQ:
        return (1,) * format.bits
    return tuple(width for width in (8, 4, 2, 1) if format.bits & width)


def chunks_of(columns: int) -> int:
    """How many chunks hold so many columns."""
    return -(-columns // CHUNK)


def arrange_codes(codes: Tensor, format: WeightFormat, columns: int) -> Tensor:
    """Codes in the neutral layout, uint8 ``format.codes_shape(rows, columns)``, as a flat uint8 tensor in this one."""
    planes = codes if format.scheme is Scheme.BCQ else codes.unsqueeze(0)
    fields, shift = [], 0
    for index, width in enumerate(field_widths(format)):
        plane = unpack(planes[index if format.scheme is Scheme.BCQ else 0], format, columns)
        if format.scheme is not Scheme.BCQ:
            plane = (plane >> shift) & (2**width - 1)
            shift += width
        fields.append(_arrange_field(plane, width))
    return torch.cat(fields)


def _arrange_field(codes: Tensor, width: int) -> Tensor:
    rows, columns = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -columns % CHUNK))
    blocks = padded.reshape(rows, -1, width, 8 // width, RUN)  # row, chunk, block, plane, column
    bytes = blocks[..., 0, :].clone()
    for plane in range(1, 8 // width):
        bytes |= blocks[..., plane, :] << (plane * width)
    return bytes.permute(1, 0, 2, 3).reshape(-1)


def arrange_scales(scale: Tensor, format: WeightFormat) -> Tensor:
    """Scales ``format.scale_shape(rows, columns)``, or zero points, as float32 ``[terms, groups, rows]``; ``[1]`` for
    one that all share.
    """
    if format.granularity is Granularity.TENSOR:
        return scale.detach().float().reshape(1)
    terms = scale.detach() if format.scheme is Scheme.BCQ else scale.detach().unsqueeze(0)
    return terms.float().transpose(-1, -2).contiguous()
