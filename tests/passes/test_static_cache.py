"""static_cache on a graph small enough to see: one head that adds its keys, in place of attention."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prequant.passes import Input, PassError, Program
from prequant.passes.specialize import specialize
from prequant.passes.static_cache import static_cache
from prequant.trace import trace


class Summing(nn.Module):
    """Joins ``new`` [batch, 1, query, 4] to what was, and sums the positions that the mask leaves, up to its own."""

    def forward(self, mask: Tensor, new: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        keys = torch.cat([past, new], -2)
        places = torch.arange(new.shape[2]) + past.shape[2]
        seen = (torch.arange(keys.shape[2])[None] <= places[:, None]) & mask[:, None, None]
        return seen.float() @ keys, keys


def stepwise(model: nn.Module | None = None) -> Program:
    """The graph for one new position."""
    inputs = {
        "mask": torch.ones(2, 8, dtype=torch.bool),
        "new": torch.randn(2, 1, 3, 4),
        "past": torch.randn(2, 1, 5, 4),
    }
    program: Any = trace(model or Summing(), inputs)
    shapes = {"mask": ("batch", "total"), "new": ("batch", 1, "query", 4), "past": ("batch", 1, "past", 4)}
    taken = tuple(replace(item, shape=shapes[item.name]) for item in program.signature.inputs)
    program.update_info(signature=replace(program.signature, inputs=taken))
    return specialize(program, {"query": 1})


def test_steps_write_in_place_and_see_what_is_written() -> None:
    growing = stepwise()
    static = static_cache(growing, ["past"], ["past", "total"])
    assert static.signature.inputs[2:] == (
        Input("past", torch.float32, ("batch", 1, "length", 4)),
        Input("position", torch.int64, (1,)),
    )
    past, buffer = torch.randn(2, 1, 3, 4), torch.full((2, 1, 10, 4), 7.0)
    buffer[:, :, :3] = past
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[0, 1] = False
    for position in range(3, 10):
        new = torch.randn(2, 1, 1, 4)
        expected, past = growing(mask[:, : position + 1], new, past)
        before = buffer.data_ptr()
        (found,) = static.flat_results((mask, new, buffer, torch.tensor([position])))
        torch.testing.assert_close(found, expected)
        assert torch.equal(buffer[:, :, : position + 1], past) and buffer.data_ptr() == before
        assert bool((buffer[:, :, position + 1 :] == 7).all())


class Scaled(Summing):
    def forward(self, mask: Tensor, new: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        summed, keys = super().forward(mask, new, past)
        return summed * past.shape[2], keys


class Reading(Summing):
    def forward(self, mask: Tensor, new: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        summed, keys = super().forward(mask, new, past)
        return summed + past.sum(), keys


class Before(Summing):
    def forward(self, mask: Tensor, new: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        keys = torch.cat([new, past], -2)
        return keys.sum(-2) * mask.sum(), keys


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Scaled(), "hangs on the number of past positions in a way that has no static form"),
        (Reading(), "the input 'past' is read by itself"),
        (Before(), "what is new is not put behind the input 'past'"),
    ],
)
def test_what_has_no_static_form_is_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(PassError, match=message):
        static_cache(stepwise(model), ["past"], ["past", "total"])


def test_an_input_that_is_not_there_is_named() -> None:
    with pytest.raises(PassError, match="has no input 'past_key_9'"):
        static_cache(stepwise(), ["past_key_9"], ["past"])
