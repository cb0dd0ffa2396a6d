"""Train and eval: an exported graph has the mode frozen into it, in train flags of ops and inside fused attention.

This flips both.
"""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten

DROPOUT_OPS = (aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default, aten.alpha_dropout.default)
TRAIN_FLAGS = {
    **dict.fromkeys(DROPOUT_OPS, 2),
    aten.feature_dropout_.default: 2,
    aten.alpha_dropout_.default: 2,
    aten.feature_alpha_dropout.default: 2,
    aten.rrelu.default: 3,
    aten.batch_norm.default: 5,
    aten.instance_norm.default: 5,
    aten.lstm.input: 6,
    aten.gru.input: 6,
    aten.rnn_tanh.input: 6,
    aten.rnn_relu.input: 6,
}
"""Ops that compute otherwise in training, and the position of the operand that says so."""
RUNNING_MEAN = 3
"""Position of a batch norm's running mean; without one it normalises with the batch's own statistics in both modes."""
ATTENTION = aten.scaled_dot_product_attention.default
ATTENTION_DROPOUT = "attention_dropout"
"""Key in a fused attention node's ``meta`` that keeps its dropout probability while the graph is in eval mode."""


def set_training(graph: fx.Graph, training: bool) -> bool:
    """Put every op of ``graph`` into the mode. Returns whether the code has to be generated anew."""
    changed = False
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in TRAIN_FLAGS:
            changed |= _set_flag(node, TRAIN_FLAGS[node.target], training)
        elif node.target is ATTENTION:
            changed |= _set_attention(node, training)
    return changed


def _set_flag(node: fx.Node, position: int, training: bool) -> bool:
    if node.target is aten.instance_norm.default:
        # Its flag says: normalise with the input's own statistics.
        training = training or node.args[RUNNING_MEAN] is None
    elif node.target is aten.batch_norm.default and node.args[RUNNING_MEAN] is None:
        return False
    if len(node.args) > position:
        if node.args[position] is training:
            return False
        node.update_arg(position, training)
        return True
    # By keyword, or left out because it has its default.
    argument = node.target._schema.arguments[position]  # type: ignore[union-attr]
    if node.kwargs.get(argument.name, argument.default_value) is training:
        return False
    node.update_kwarg(argument.name, training)
    return True


def _set_attention(node: fx.Node, training: bool) -> bool:
    positional = len(node.args) > 4
    present = node.args[4] if positional else node.kwargs.get("dropout_p", 0.0)
    if present and ATTENTION_DROPOUT not in node.meta:
        node.meta[ATTENTION_DROPOUT] = present
    wanted = node.meta.get(ATTENTION_DROPOUT, 0.0) if training else 0.0
    if wanted == present:
        return False
    if positional:
        node.update_arg(4, wanted)
    else:
        node.update_kwarg("dropout_p", wanted)
    return True
