"""A cache of a fixed length: buffers that decode steps write into, so that a GPU runs each step as one CUDA graph.

Which design, and why. transformers' ``StaticCache`` is written for models that are compiled: its length is a tensor on
the device, ``generate`` compiles the model that it is given to, and layers with sliding windows keep a window alone. A
Program has its graphs already. So here the *decode* graph alone becomes static (:mod:`prequant.passes.static_cache`):
it writes keys and values of the one new position in place, sees the whole buffer, and its own causal mask hides what is
behind that position. A prompt goes through the prefill graph as ever, with the positions so far as a view of the
buffers, and what is new is copied into them: prompts have many lengths, and would take a graph each.

The length is known to the host, which counts the steps; nothing is read back from a GPU. A :class:`Room` is what a CUDA
graph needs: buffers and inputs that stay where they are, for one batch size and one length. ``generate`` makes a new
cache for every call, so rooms are lent: a cache has one as long as it lives, and the next cache of that size gets it
with the graph that was recorded in it. A graph holds what kernels made of the weights at that time; it is recorded anew
when a weight has been written to or replaced since. On the CPU the same graph runs operator by operator (no plan: plans
are for graphs that write nothing). Recorded or not, ``torch.compile`` may make few kernels of what lies between packed
operators, if it is asked to: a layer of Llama takes some forty of them, most of which, by their bytes, should run for
less time than it takes to start them. No graph has been recorded on a GPU yet.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from itertools import zip_longest
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from prequant.passes.lifted import lifted, without_tensors
from prequant.passes.static_cache import LENGTH, POSITION, static_cache
from prequant.runtime.cuda_graphs import Recording

from .cached_trace import BATCH, PAST, SOURCE, TOTAL
from .errors import GenerationError
from .graphs import Graphs

STEP = 64
"""Lengths of buffers are multiples of it, so that texts of about one length share a room."""

IDLE_ROOMS = 2
"""Rooms that are kept for caches to come, of all sizes together."""

_VERSION = attrgetter("_version")

OWN, CROSS = "past_", "cross_"
"""How the names of inputs begin that are keys and values of the decoder's positions, and of the encoder's."""


def records_on(device: torch.device) -> bool:
    """Whether steps on ``device`` are recorded as a graph."""
    return device.type == "cuda"


class StaticLayer(DynamicLayer):
    """Buffers ``keys`` and ``values``, ``[batch, heads, room, depth]``, of which the first ``length`` positions are
    written.
    """

    is_compileable = False  # a Program is not compiled by generate
    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.length = keys, values, 0
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def written(self) -> list[Tensor]:
        """Keys and values so far, as views."""
        return [self.keys[:, :, : self.length], self.values[:, :, : self.length]]

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Take over the positions of ``keys`` and ``values``, which begin with those so far."""
        begin, self.length = self.length, keys.shape[2]
        for buffer, new in ((self.keys, keys), (self.values, values)):
            buffer[:, :, begin : self.length].copy_(new[:, :, begin:])

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """A Program's graph writes what is new."""
        raise GenerationError("a static cache is written by the Program that it was made for")

    def get_seq_length(self) -> int:
        """See :class:`DynamicLayer`."""
        return self.length

    def get_max_length(self) -> int:
        """See :class:`DynamicLayer`."""
        return self.keys.shape[2]

    def crop(self, tokens_to_remove: int) -> None:
        """See :class:`DynamicLayer`."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes how many positions go, as a negative number, not {tokens_to_remove}")
        self.length = max(self.length + tokens_to_remove, 0)

    def reset(self) -> None:
        """See :class:`DynamicLayer`."""
        self.length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """See :class:`DynamicLayer`."""
        for part in self.written():
            part.copy_(part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """The number of texts is fixed."""
        raise GenerationError("the batch of a static cache is fixed")

    def batch_select_indices(self, indices: Tensor) -> None:
        """The number of texts is fixed."""
        raise GenerationError("the batch of a static cache is fixed")


class StaticCache(Cache):
    """A cache over the buffers of a room, made by :meth:`StaticDecoder.cache`. It starts empty."""

    layers: list[StaticLayer]  # type: ignore[assignment]

    def __init__(self, room: Room) -> None:
        own = [tensor for name, tensor in room.inputs.items() if name.startswith(OWN)]
        layers = [StaticLayer(*pair) for pair in zip(own[::2], own[1::2], strict=True)]
        super().__init__(layers=layers)  # type: ignore[arg-type]
        self.room = room

    def check(self, batch: int, new: int, source: int = 0) -> None:
        """Raise :class:`GenerationError` unless ``new`` positions of so many texts have a place, behind ``source``
        positions of the encoder.
        """
        length = self.get_seq_length()
        if source != self.room.source:
            raise GenerationError(f"a static cache for {self.room.source} positions of an encoder can't take {source}")
        if batch != self.room.batch:
            raise GenerationError(f"a static cache for a batch of {self.room.batch} can't take one of {batch}")
        if length + new > self.room.length:
            raise GenerationError(
                f"a static cache of {self.room.length} positions has {length}, and no place for {new} more: "
                "set max_cache_len"
            )

    def write(self, present: Sequence[Tensor]) -> None:
        """Take over what a prefill returns: keys and values, layer by layer, of all positions so far."""
        for layer, keys, values in zip(self.layers, present[::2], present[1::2], strict=True):
            layer.write(keys, values)

    def step(self, inputs: Sequence[Tensor], cross: Sequence[Tensor] = ()) -> Tensor:
        """Logits of one more position, which is written. ``inputs`` are those of the decode graph before the cache."""
        logits = self.room.step(inputs, cross, self.get_seq_length())
        for layer in self.layers:
            layer.length += 1
        return logits


class Room:
    """What a decode graph reads and writes, in places that stay: a tensor for each input, for one batch and length.

    ``source`` are the encoder's positions, of a seq2seq model; ``backend`` is torch.compile's, if steps are compiled;
    ``records``: whether they become a CUDA graph, where there is CUDA.
    """

    def __init__(
        self, decoder: StaticDecoder, batch: int, length: int, source: int, backend: str | None, records: bool
    ) -> None:
        self.batch, self.length, self.source, self.backend = batch, length, source, backend
        self._compiled = None if backend is None else decoder.compiled(backend)
        self._decoder, self._records = decoder, records and records_on(decoder.device)
        self._holder: Callable[[], object] = lambda: None
        self._recording: Recording[Tensor] | None = None
        self._recorded_state: Any = None
        self._cross: Sequence[Tensor] = ()
        sizes = {BATCH: batch, SOURCE: source, LENGTH: length}
        with torch.inference_mode(False):  # it may be written to outside of the mode that it is made in
            self.inputs = {
                item.name: torch.zeros(
                    [size if isinstance(size, int) else sizes[size] for size in item.shape],
                    dtype=item.dtype,
                    device=decoder.device,
                )
                for item in decoder.program.signature.inputs
            }

    @property
    def is_idle(self) -> bool:
        """Whether no cache has it."""
        return self._holder() is None

    def lend(self) -> StaticCache:
        """A new cache that has this room."""
        cache = StaticCache(self)
        self._holder = weakref.ref(cache)
        for layer in cache.layers:  # what is not finite would show through a mask
            layer.keys.zero_()
            layer.values.zero_()
        return cache

    @torch.no_grad()
    def step(self, inputs: Sequence[Tensor], cross: Sequence[Tensor], position: int) -> Tensor:
        """Logits ``[batch, 1, vocabulary]`` after the token at ``position``, whose keys and values are written."""
        for held, given in zip(self.inputs.values(), inputs, strict=False):
            held[:, : given.shape[1]].copy_(given)
        if any(old is not new for old, new in zip_longest(self._cross, cross)):
            held_cross = [tensor for name, tensor in self.inputs.items() if name.startswith(CROSS)]
            for held, given in zip(held_cross, cross, strict=True):
                held.copy_(given)
            self._cross = cross
        self.inputs[POSITION].fill_(position)
        return self._run()

    def _run(self) -> Tensor:
        if not self._records:
            return self._logits()
        state = self._decoder.state()
        if self._recording is None or self._recorded_state != state:
            self._recording = None  # its memory is free for the next one
            self._recording = Recording(self._logits, self._decoder.device)
            self._recorded_state = state
        return self._recording().clone()  # the next step writes into it

    def _logits(self) -> Tensor:
        function = self._decoder.function if self._compiled is None else self._compiled
        logits: Tensor = function(*self.inputs.values())[0]
        return logits


class StaticDecoder:
    """The decode graph of a Program over buffers, and the rooms that there are for it."""

    def __init__(self, graphs: Graphs, device: torch.device) -> None:
        own = [item.name for item in graphs.decode.signature.inputs if item.name.startswith(OWN)]
        self.program, self.device = static_cache(graphs.decode, own, (PAST, TOTAL)), device
        self.function = lifted(self.program)
        names = dict.fromkeys(str(node.target) for node in self.program.graph.find_nodes(op="get_attr"))
        self._tensors = [self.program.tensor(name) for name in names]
        self._versioned = [tensor for tensor in self._tensors if not tensor.is_inference()]  # others count no writes
        self._rooms: list[Room] = []
        self._lock = threading.Lock()

    def compiled(self, backend: str) -> Callable[..., tuple[Any, ...]]:
        """:attr:`function` by a backend of ``torch.compile``, for inputs of one size. Each is a module of its own, as
        torch compiles the same one for a few sizes only.
        """
        module, tensors = without_tensors(self.program)
        made = torch.compile(module, fullgraph=True, dynamic=False, backend=backend)
        return lambda *inputs: made(*inputs, *tensors)

    def cache(
        self, batch: int, length: int, source: int = 0, backend: str | None = None, records: bool = True
    ) -> StaticCache:
        """An empty cache with place for ``length`` positions of ``batch`` texts; of seq2seq models, ``source`` are the
        encoder's positions. ``backend``: of torch.compile, for the steps. A cache that ``records`` nothing has a room
        of its own, which is gone with it.
        """
        length = -(-length // STEP) * STEP
        kind = batch, length, source, backend
        if not records:
            return Room(self, *kind, records).lend()
        with self._lock:  # another thread must not find the same room idle
            room = next(
                (r for r in self._rooms if r.is_idle and (r.batch, r.length, r.source, r.backend) == kind), None
            )
            if room is None:
                idle = [room for room in self._rooms if room.is_idle]
                for old in idle[: max(len(idle) - IDLE_ROOMS + 1, 0)]:
                    self._rooms.remove(old)
                room = Room(self, *kind, records)
                self._rooms.append(room)
            return room.lend()

    def state(self) -> tuple[Any, ...]:
        """What changes when a weight is written to, or lies somewhere else. Asked before every step, of some hundred
        tensors, while a GPU has nothing to do.
        """
        return tuple(map(_VERSION, self._versioned)), tuple(map(Tensor.data_ptr, self._tensors))
