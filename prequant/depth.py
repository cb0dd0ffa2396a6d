"""The configuration of a model with fewer layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from transformers import PretrainedConfig

from prequant.runtime import PrequantError

DECODER = ("num_decoder_layers", "decoder_layers")
ENCODER = ("num_layers", "encoder_layers")
"""What configurations of models with both call their depths."""


def depths(config: PretrainedConfig) -> dict[str, int]:
    """What a configuration says of how many layers there are, by the names that it has for that."""
    names = ("num_hidden_layers", *ENCODER, *DECODER)
    return {name: value for name in names if isinstance(value := getattr(config, name, None), int)}


def shallower(config: PretrainedConfig, stack: str, depth: int, kept: Sequence[int]) -> PretrainedConfig:
    """A copy of ``config`` for a model that has, of the ``depth`` layers whose modules are ``stack.0`` and so on, those
    numbered ``kept``. What it lists layer by layer (``layer_types``) is theirs.

    Raises :class:`PrequantError` where it does not say the depth, or another.
    """
    name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    if config.is_encoder_decoder:
        names = DECODER if "decoder" in stack.split(".") else ENCODER
        name = next((known for known in names if hasattr(config, known)), name)
    if getattr(config, name, None) != depth:
        raise PrequantError(f"the configuration's {name} is {getattr(config, name, None)}; {stack} has {depth} layers")
    config = copy.deepcopy(config)
    setattr(config, name, len(kept))
    for key, value in vars(config).items():
        if isinstance(value, list) and "layer" in key and len(value) == depth:
            setattr(config, key, [value[number] for number in kept])
    return config
