"""This process as one of a chain of ranks, as torchrun starts them: messages to the next one, and news of all.

Values go from a rank to the next one point to point, in threads of their own, so that no rank waits for another while
it trains. All see in a common store how far the others are, and that one has failed: each sets its pulse there, and
looks at those of the others. Which rank was the first to fail is said in every rank's error.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .modules import ReconstructionError, Values

PULSE = 0.5
"""Seconds between two looks at the store."""
PATIENCE = 60.0
"""Seconds without a pulse after which a rank counts as dead."""
AHEAD = 8
"""Messages that may be on their way before a sender waits."""
_AXES = 6
_END = -1
_FAILED = "failed"


def under_launcher() -> bool:
    """Whether torchrun, or something like it, started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@dataclass
class Progress:
    """How far a rank is."""

    step: int = 0
    loss: float = 0.0


class Chain:
    """The chain of ranks, seen from this one. Use :func:`chain`."""

    def __init__(self, store: Any, rank: int, size: int, device: torch.device, patience: float) -> None:
        self.rank, self.size, self.device, self.own = rank, size, device, Progress()
        self.others = [Progress() for _ in range(size)]
        self._store, self._patience = store, patience
        self._failure: tuple[int, str] | None = None
        self._inbox: queue.SimpleQueue[tuple[int, Values] | None] = queue.SimpleQueue()
        self._sent: deque[tuple[list[Any], list[Tensor]]] = deque()
        self._stop, self._deaf = threading.Event(), threading.Event()
        self._ears: threading.Thread | None = None
        self._watch = threading.Thread(target=self._look, args=(store.clone(),), daemon=True)
        self._watch.start()

    # ---- news --------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise :class:`ReconstructionError` if a rank has failed; it names the first that did."""
        if self._failure is not None:
            rank, why = self._failure
            raise ReconstructionError(f"rank {rank}, which had module {rank + 1} of {self.size}, {why}")

    def fail(self, rank: int, why: str) -> None:
        """Tell all that a rank failed, unless another did before."""
        text = json.dumps([rank, why])
        first = text
        with suppress(RuntimeError):  # the store may be gone with the rank that kept it
            first = self._store.compare_set(_FAILED, "", text).decode()
        found = json.loads(first)
        self._failure = (int(found[0]), str(found[1]))

    def tell(self, key: str, value: str = "") -> None:
        """Leave a word for the others."""
        self._store.set(key, value)

    def hear(self, key: str) -> str:
        """The word that a rank leaves; waits for it."""
        while not self.heard(key):
            time.sleep(PULSE / 10)
        return str(self._store.get(key).decode())

    def heard(self, key: str) -> bool:
        """Whether a rank has left that word."""
        self.check()
        try:
            return bool(self._store.check([key]))
        except RuntimeError:
            self._stop.wait(2 * PULSE)
            self.check()
            raise

    def _look(self, store: Any) -> None:
        seen: dict[int, tuple[str, float]] = {}
        count = 0
        while not self._stop.wait(PULSE if count else 0.0):
            count += 1
            try:
                store.set(f"pulse/{self.rank}", json.dumps([count, self.own.step, self.own.loss]))
                self._look_at_others(store, seen)
            except RuntimeError:
                if not self._stop.is_set():
                    self._failure = self._failure or (0, "is gone, and the store of all ranks with it")
                return

    def _look_at_others(self, store: Any, seen: dict[int, tuple[str, float]]) -> None:
        if self._failure is None and store.check([_FAILED]):
            rank, why = json.loads(store.get(_FAILED).decode())
            self._failure = (int(rank), str(why))
        for rank in range(self.size):
            key = f"pulse/{rank}"
            text = store.get(key).decode() if store.check([key]) else ""
            now = time.monotonic()
            last, since = seen.setdefault(rank, (text, now))
            if text != last:
                seen[rank] = (text, now)
                _, step, loss = json.loads(text)
                self.others[rank] = Progress(int(step), float(loss))
            elif now - since > self._patience and not store.check([f"left/{rank}"]):
                self.fail(rank, f"has shown no sign of life for {self._patience:.0f} seconds")

    # ---- messages ----------------------------------------------------------------------------------------------------

    def listen(self, names: Sequence[str], dtypes: Sequence[torch.dtype]) -> None:
        """Begin to receive what the rank before sends: values of these names."""
        if self.rank:
            self._ears = threading.Thread(target=self._receive, args=(tuple(names), tuple(dtypes)), daemon=True)
            self._ears.start()

    def send(self, batch: int, values: Values) -> None:
        """Send values for a batch to the next rank, if there is one, without waiting for it to read them."""
        if self.rank + 1 < self.size:
            tensors = [value.detach().contiguous() for value in values.values()]
            self._send([_header(batch, tensors), *tensors])

    def end(self) -> None:
        """Say that nothing more is sent, and wait until all that was sent has arrived."""
        if self.rank + 1 < self.size:
            self._send([_header(_END, [])])
        while self._sent:
            self._settle()

    def received(self) -> tuple[int, Values]:
        """The next message; waits for it."""
        while True:
            self.check()
            try:
                message = self._inbox.get(timeout=PULSE)
            except queue.Empty:
                continue
            if message is not None:
                return message

    def waiting(self) -> Iterator[tuple[int, Values]]:
        """The messages that are there."""
        while True:
            try:
                message = self._inbox.get_nowait()
            except queue.Empty:
                return
            if message is not None:
                yield message

    def ignore(self) -> None:
        """Drop what is received from now on."""
        self._deaf.set()

    def _send(self, tensors: list[Tensor]) -> None:
        tensors = [tensor.to(self.device) for tensor in tensors]
        while len(self._sent) >= AHEAD:
            self._settle()
        with self._connection(self.rank + 1):
            self._sent.append(([dist.isend(tensor, self.rank + 1) for tensor in tensors], tensors))

    def _settle(self) -> None:
        """Wait for the oldest message to arrive."""
        works, _ = self._sent[0]
        with self._connection(self.rank + 1):
            for work in works:
                work.wait()
        self._sent.popleft()

    def _receive(self, names: Sequence[str], dtypes: Sequence[torch.dtype]) -> None:
        try:
            with self._connection(self.rank - 1), self._own_stream():
                while not self._stop.is_set():
                    header = torch.empty(1 + len(names) * _AXES, dtype=torch.int64, device=self.device)
                    dist.recv(header, self.rank - 1)
                    batch, shapes = _read(header.tolist(), len(names))
                    if batch == _END:
                        return
                    values = {}
                    for name, dtype, shape in zip(names, dtypes, shapes, strict=True):
                        values[name] = torch.empty(shape, dtype=dtype, device=self.device)
                        dist.recv(values[name], self.rank - 1)
                    self._arrived(values)
                    if not self._deaf.is_set():
                        self._inbox.put((batch, values))
        except ReconstructionError:
            return  # it is kept, and raised where the main thread looks
        except ValueError:  # the group is gone
            if not self._stop.is_set():
                raise

    def _own_stream(self) -> AbstractContextManager[Any]:
        """On a GPU, a stream in which this thread waits for messages, so that the one that trains does not."""
        on_gpu = self.device.type == "cuda"
        return torch.cuda.stream(torch.cuda.Stream(self.device)) if on_gpu else nullcontext()

    def _arrived(self, values: Values) -> None:
        """Wait, on a GPU, until values are there, and say that the stream that trains reads them."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
            for value in values.values():
                value.record_stream(torch.cuda.default_stream(self.device))

    @contextmanager
    def _connection(self, peer: int) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            # One that failed by itself says so first, and then its connections break.
            self._stop.wait(2 * PULSE)
            if self._failure is None:
                self.fail(peer, "is gone: its connections are closed")
            try:
                self.check()
            except ReconstructionError as failure:
                raise failure from error

    def close(self) -> None:
        """Leave the chain, and end what still listens."""
        with suppress(RuntimeError):
            self._store.set(f"left/{self.rank}", "")
        self._stop.set()
        self._watch.join()
        dist.destroy_process_group()
        if self._ears is not None:
            self._ears.join(timeout=PULSE)


def _header(batch: int, tensors: Sequence[Tensor]) -> Tensor:
    sizes = [size for tensor in tensors for size in (*tensor.shape, *(-1,) * (_AXES - tensor.dim()))]
    return torch.tensor([batch, *sizes], dtype=torch.int64)


def _read(header: Sequence[int], count: int) -> tuple[int, list[list[int]]]:
    shapes = [header[1 + number * _AXES :][:_AXES] for number in range(count)]
    return header[0], [[size for size in shape if size >= 0] for shape in shapes]


@contextmanager
def chain(patience: float = PATIENCE) -> Iterator[Chain]:
    """This process in the chain that its launcher made, by torchrun's environment variables: over NCCL with a GPU for
    each process, over gloo without.

    What is raised inside ends all ranks, with an error that names this one. Raises :class:`ReconstructionError` where
    another rank has failed.
    """
    gpus = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if gpus else torch.device("cpu")
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=300))))
    prefixed = dist.PrefixStore("prequant", store)
    dist.init_process_group(
        "nccl" if gpus else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=size,
        timeout=timedelta(days=7),  # who is dead the pulses say
    )
    here = Chain(prefixed, rank, size, device, patience)
    try:
        yield here
        here.check()
    except BaseException as error:
        if not isinstance(error, ReconstructionError) or here._failure is None:
            here.fail(rank, f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        raise
    finally:
        here.close()
