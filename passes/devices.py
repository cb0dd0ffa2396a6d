"""Devices: an exported graph has its device in every node that creates a tensor; this moves them along."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


def set_device(graph: fx.Graph, device: torch.device) -> bool:
    """Let every node of ``graph`` create its tensors on ``device``. Returns whether anything changed."""
    changed = False

    def moved(value: Any) -> Any:
        nonlocal changed
        if isinstance(value, torch.device) and value != device:
            changed = True
            return device
        return value

    for node in graph.nodes:
        if node.op == "call_function":
            node.args = tuple(moved(value) for value in node.args)
            node.kwargs = {key: moved(value) for key, value in node.kwargs.items()}
    return changed
