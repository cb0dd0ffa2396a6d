"""What ``torch.autocast`` does to the ops: packed linears compute as any linear does there, in its lower precision.

The other ops compute in float32: a scale or a value that was rounded to bfloat16 before it is rounded to a code would
give another code. ``torch.library.register_autocast`` knows one precision for all arguments, and no keywords.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import ops

LINEARS = ("packed_linear", "packed_linears")
ACTIVATIONS = ("input", "residual")
"""What of a linear follows the precision around it; scales and biases stay as they are stored."""

KEYS = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}


def _kernel(name: str, device: str) -> Callable[..., Any]:
    op = getattr(torch.ops.prequant, name).default
    names = [argument.name for argument in op._schema.arguments]
    excluded = torch._C.DispatchKeySet(KEYS[device])

    def cast(name_of: str, value: Any) -> Any:
        if name not in LINEARS:
            return _as(value, torch.float32)
        return _as(value, torch.get_autocast_dtype(device)) if name_of in ACTIVATIONS else value

    def kernel(*arguments: Any, **options: Any) -> Any:
        given = [cast(*each) for each in zip(names, arguments, strict=False)]
        named = {key: cast(key, value) for key, value in options.items()}
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return op(*given, **named)

    return kernel


def _as(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype is torch.float64:
        return value
    return value.to(dtype)


for _device, _key in KEYS.items():
    for _name in ops.OP_NAMES:
        ops.library.impl(_name, _kernel(_name, _device), _key.name)
