"""What ranks tell each other: here several in one process, on one store."""

import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from prequant.reconstruction import ReconstructionError, ranks
from prequant.reconstruction.ranks import Chain, _header, _read, under_launcher


@pytest.fixture
def store() -> Any:
    return dist.TCPStore("127.0.0.1", 0, None, True, timeout=timedelta(seconds=20))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "PULSE", 0.02)


@pytest.fixture
def three(store: Any, quick: None) -> Iterator[list[Chain]]:
    made = [Chain(store, rank, 3, torch.device("cpu"), patience=1.0) for rank in range(3)]
    yield made
    for one in made:
        one._stop.set()
        one._watch.join()


def raised(chain: Chain, seconds: float = 10.0) -> str:
    """What a rank raises, at last."""
    since = time.monotonic()
    while time.monotonic() - since < seconds:
        try:
            chain.check()
        except ReconstructionError as error:
            return str(error)
        time.sleep(0.01)
    raise AssertionError("nothing was raised")


def test_the_first_that_failed_is_named_by_all(three: list[Chain]) -> None:
    for one in three:
        one.check()
    three[1].fail(1, "failed: ValueError: of its own")
    three[2].fail(1, "is gone: its connections are closed")
    three[0].fail(2, "is gone: its connections are closed")
    for one in three:
        assert raised(one) == "rank 1, which had module 2 of 3, failed: ValueError: of its own"


def test_one_without_a_pulse_is_dead(three: list[Chain]) -> None:
    three[2].own.step, three[2].own.loss = 7, 0.5
    since = time.monotonic()
    while three[0].others[2].step != 7 and time.monotonic() - since < 10:
        time.sleep(0.01)
    assert (three[0].others[2].step, three[0].others[2].loss) == (7, 0.5)
    three[2]._stop.set()  # as if it hung
    for one in three[:2]:
        assert raised(one) == "rank 2, which had module 3 of 3, has shown no sign of life for 1 seconds"


def test_one_that_has_left_is_not_dead(three: list[Chain]) -> None:
    three[2].tell("left/2")
    three[2]._stop.set()
    time.sleep(1.5)
    three[0].check()


def test_words_are_waited_for(three: list[Chain]) -> None:
    assert not three[0].heard("word")
    three[1].tell("word", "said")
    assert three[0].hear("word") == "said"
    three[1].fail(1, "failed: at once")
    with pytest.raises(ReconstructionError, match="rank 1, which had module 2 of 3, failed: at once"):
        three[0].hear("never said")


def test_messages_say_what_shapes_they_have() -> None:
    header = _header(5, [torch.zeros(2, 3, 4), torch.zeros(7)])
    assert _read(header.tolist(), 2) == (5, [[2, 3, 4], [7]])


def test_alone_there_is_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert not under_launcher()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not under_launcher()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert under_launcher()
