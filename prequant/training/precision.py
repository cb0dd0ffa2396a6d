"""What a training computes in: products in bfloat16 take a fraction of the time where the processor has them."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch

Precision: TypeAlias = Literal["float32", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def computing_in(precision: Precision, device: torch.device) -> torch.autocast:
    """The context of a forward pass. In bfloat16, matrix products and attention round what they read and give to it
    (``torch.autocast``); parameters, gradients of them, the optimizer, losses, and rounding to codes stay in float32.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
