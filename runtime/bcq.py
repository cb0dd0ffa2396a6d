"""Binary coding quantization: ``W ~ sum_i alpha_i * b_i``, ``b_i`` in {-1, +1}, an alpha per plane and row or group.

Greedy and alternating solvers as in AlphaTuning (arXiv 2210.03858, section 3.1) and what it cites (arXiv 1802.00150).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import FormatError
from .formats import Granularity, Scheme, WeightFormat
from .metrics import all_finite
from .packing import pack, unpack
from .quantizer import QuantizedWeight, _blocks

CHUNK = 1 << 17
"""Weights solved at once: few enough for the caches, as refinement reads a dozen bytes of each again and again."""


def binary_code(weight: Tensor, format: WeightFormat, rounds: int = 0) -> QuantizedWeight:
    """Code a float weight ``[rows, columns]``: greedy, then ``rounds`` of alternating refinement.

    Greedy takes ``b = sign(r)`` (0 counts as +1), ``alpha = mean|r|`` of the residual ``r``, plane by plane. A round of
    refinement solves for the alphas by least squares given the planes, then gives every weight its nearest of the
    ``2^planes`` levels; neither step can make the squared error larger. Refined planes are ordered by alpha, the
    largest first. No alpha is negative.

    Raises :class:`FormatError` for another scheme, or a weight that is not a finite float matrix.
    """
    if format.scheme is not Scheme.BCQ:
        raise FormatError(f"binary_code makes bcq weights, not {format}")
    if rounds < 0:
        raise FormatError(f"rounds={rounds} must not be negative")
    if reason := refuses(weight):
        raise FormatError(f"weight {tuple(weight.shape)} can't become {format}: {reason}")
    weight = weight.detach().float()
    rows = weight.shape[0]
    planes, alphas = [], []
    for block in _blocks(weight, format):
        step = max(1, CHUNK // block.shape[1])
        solved = [_solve(chunk, format.bits, rounds) for chunk in block.split(step)]
        planes.append(torch.cat([bits for bits, _ in solved], 1).reshape(format.bits, rows, -1))
        alphas.append(torch.cat([alpha for _, alpha in solved]).T.reshape(format.bits, rows, -1))
    return QuantizedWeight(pack(torch.cat(planes, -1), format), torch.cat(alphas, -1).contiguous(), None)


def refuses(weight: Tensor) -> str:
    """Why ``weight`` can't be coded; empty if it can."""
    if weight.dim() != 2:
        return f"a weight of {weight.dim()} dimensions; linear and embedding weights have 2"
    if not weight.is_floating_point():
        return f"of type {weight.dtype}, not a float"
    if weight.numel() == 0:
        return "empty"
    if not all_finite(weight):
        return "it holds NaN or infinity"
    return ""


def _solve(block: Tensor, planes: int, rounds: int) -> tuple[Tensor, Tensor]:
    """Bits uint8 ``[planes, n, group]`` and alphas ``[n, planes]`` of ``block`` ``[n, group]``."""
    bits, alphas = _greedy(block, planes)
    for _ in range(rounds):
        alphas = _least_squares(block, bits, alphas)
        bits = _nearest(block, alphas)
    return _ordered(bits, alphas) if rounds else (bits, alphas)


def _greedy(block: Tensor, planes: int) -> tuple[Tensor, Tensor]:
    residual, bits, alphas = block.clone(), [], []
    for _ in range(planes):
        positive = residual >= 0
        alpha = residual.abs().mean(1, keepdim=True)
        residual -= torch.where(positive, alpha, -alpha)
        bits.append(positive.to(torch.uint8))
        alphas.append(alpha)
    return torch.stack(bits), torch.cat(alphas, 1)


def _least_squares(block: Tensor, bits: Tensor, alphas: Tensor) -> Tensor:
    """Alphas that minimise the squared error given the bits: the normal equations of each row, solved in float64.

    Equal or opposite planes make the equations singular; a tiny ridge towards the present alphas then keeps them.
    """
    signs = (2 * bits.to(torch.float32) - 1).permute(1, 0, 2)
    gram = (signs @ signs.transpose(1, 2)).double()  # counts, exact in float32
    ridge = 1e-6 * block.shape[1] * torch.eye(bits.shape[0], dtype=torch.float64, device=block.device)
    right = (signs @ block.unsqueeze(2)).squeeze(2).double() + (alphas.double() @ ridge)
    return torch.linalg.solve(gram + ridge, right).float()


def _nearest(block: Tensor, alphas: Tensor) -> Tensor:
    """Bits of the level nearest to each weight, by binary search among each row's sorted levels."""
    planes = alphas.shape[1]
    patterns = torch.arange(2**planes, device=block.device)
    bits = ((patterns.unsqueeze(0) >> torch.arange(planes, device=block.device).unsqueeze(1)) & 1).to(torch.uint8)
    levels, order = (alphas @ (2 * bits.to(alphas.dtype) - 1)).sort(1)
    midpoints = ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()
    return bits[:, order.gather(1, torch.searchsorted(midpoints, block.contiguous()))]


def _ordered(bits: Tensor, alphas: Tensor) -> tuple[Tensor, Tensor]:
    """The same values with the alphas positive and descending, so that the first plane is the one that weighs most."""
    bits = bits ^ (alphas < 0).T.unsqueeze(2).to(torch.uint8)
    alphas, order = alphas.abs().sort(1, descending=True)
    return bits.gather(0, order.T.unsqueeze(2).expand_as(bits)), alphas


def from_affine(quantized: QuantizedWeight, format: WeightFormat, columns: int) -> tuple[QuantizedWeight, WeightFormat]:
    """Uniform codes as binary ones, with the bcq format they are in: the same values, no search.

    ``s (u - z) = sum_i (s 2^i / 2) b_i + s ((2^bits - 1) / 2 - z)``, where ``b_i`` is bit ``i`` of ``u`` as a sign.
    What is left over is the same for all weights of a scale: one more plane, all ones, whose alpha it is. So ``bits``
    become ``bits + 1`` planes (largest alpha first, the constant last), exact but for the rounding of the sum.

    Raises :class:`FormatError` for a format that is not affine, or has 8 bits (bcq has at most 8 planes).
    """
    if format.scheme is not Scheme.AFFINE:
        raise FormatError(f"only affine codes are uniform, not {format}")
    target = WeightFormat.bcq(format.bits + 1, format.group_size)
    codes = unpack(quantized.codes, format, columns)
    signs = [(codes >> i) & 1 for i in reversed(range(format.bits))]
    scale, zero_point = quantized.scale.detach(), format.implied_zero_point
    offset = scale * ((format.levels - 1) / 2 - (zero_point if quantized.zero_point is None else quantized.zero_point))
    alphas = torch.stack([*(scale * 2**i / 2 for i in reversed(range(format.bits))), offset])
    if format.granularity is Granularity.TENSOR:
        alphas = alphas.expand(-1, codes.shape[0], -1).contiguous()
    return QuantizedWeight(pack(torch.stack([*signs, torch.ones_like(codes)]), target), alphas, None), target
