"""What a compressed weight is worth, worked out from the definition of its format in float64, a bit at a time.

Shares no code with the package: it reads the tensors of a Program by their names, and numpy does the rest.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prequant.passes import Program


def codes_of(packed: Tensor, bits: int, columns: int) -> np.ndarray:
    """Codes [..., columns]: ``bits`` each, one little-endian bit stream a row."""
    stream = np.unpackbits(packed.numpy(), axis=-1, bitorder="little")
    digits = stream[..., : columns * bits].reshape(*packed.shape[:-1], columns, bits)
    return (digits * 2 ** np.arange(bits)).sum(-1)


def trits_of(packed: Tensor, columns: int) -> np.ndarray:
    """Codes [..., columns]: five base-3 digits a byte, the lowest first."""
    digits = packed.numpy()[..., None].astype(int) // 3 ** np.arange(5) % 3
    return digits.reshape(*packed.shape[:-1], -1)[..., :columns]


def spread(scale: Tensor, group_size: int, rows: int, columns: int) -> np.ndarray:
    """One scale for each weight [..., rows, columns], from one per tensor, row or group."""
    values = scale.detach().double().numpy()
    if group_size:
        values = np.repeat(values, group_size, axis=-1)[..., :columns]
    return np.broadcast_to(values, (*values.shape[:-2], rows, columns))


def dense_weight(program: Program, name: str, format: str, columns: int) -> np.ndarray:
    """The weight ``name`` without its outliers, from its codes and scales."""
    scheme, granularity, *flags = format.split(":")
    bits = int("".join(filter(str.isdigit, scheme)) or 1)
    group_size = int(granularity.removeprefix("group")) if granularity.startswith("group") else 0

    def part(suffix: str) -> Tensor:
        return program.tensor(f"{name}.{suffix}").detach()

    if scheme.startswith("bcq"):
        codes, scale = codes_of(part("planes"), 1, columns), part("alphas")
        return ((2 * codes - 1) * spread(scale, group_size, codes.shape[-2], columns)).sum(0)
    if scheme == "ternary":
        codes = trits_of(part("codes"), columns) if "base3" in flags else codes_of(part("codes"), 2, columns)
        centred: Any = codes - 1
    elif scheme == "binary":
        codes = codes_of(part("codes"), 1, columns)
        centred = 2 * codes - 1
    else:
        codes = codes_of(part("codes"), bits, columns)
        zero = spread(part("zero_point"), group_size, *codes.shape) if "asym" in flags else 2 ** (bits - 1)
        centred = codes - zero
    return centred * spread(part("scale"), group_size, *codes.shape)


def outliers_of(program: Program, name: str) -> dict[tuple[int, int], float]:
    """Value of every outlier by its row and column."""
    values, columns, offsets = (
        program.tensor(f"{name}.outliers.{part}").detach() for part in ("values", "columns", "row_offsets")
    )
    found: dict[tuple[int, int], float] = {}
    for row, (start, stop) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        for index in range(start, stop):
            position = (row, int(columns[index]))
            assert position not in found, f"two outliers at {position}"
            found[position] = float(values[index])
    return found


def weight(program: Program, name: str, format: str, columns: int, replace: bool | None = None) -> Tensor:
    """The weight ``name`` in float64, with its outliers unless ``replace`` is None."""
    dense = dense_weight(program, name, format, columns)
    if replace is not None:
        for position, value in outliers_of(program, name).items():
            dense[position] = value if replace else dense[position] + value
    return torch.from_numpy(dense)


def with_weights(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """The eager model in float64, with some of its weights."""
    model = model.double()
    with torch.no_grad():
        for name, value in weights.items():
            model.get_parameter(name).copy_(value)
    return model
