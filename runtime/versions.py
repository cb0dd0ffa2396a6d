"""When a tensor was written to: packed weights, plans and adapters that were made of it are made anew then."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_post_hook


def version_of(tensor: Tensor) -> int:
    """What changes when a tensor is written to: always 0 of one made in inference mode, which does not count."""
    return 0 if tensor.is_inference() else tensor._version


@torch.compiler.disable(reason="a version that is counted while a graph is traced is not counted when it runs")
def count_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Count an optimizer's step as a write to its parameters. PyTorch's steps with ``fused=True``, which
    ``transformers.Trainer`` takes unless told otherwise, don't, nor do those of kernels from elsewhere.
    """
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    increment_version([parameter for parameter in parameters if parameter.grad is not None])


register_optimizer_step_post_hook(count_step)
