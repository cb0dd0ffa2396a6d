import threading
from collections.abc import Iterator

import pytest
import torch

from prequant.runtime.formats import WeightFormat
from prequant.runtime.quantizer import Quantizer
from prequant.runtime.threads import parallel_map


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_keep_the_order_of_the_items(threads: int) -> None:
    assert parallel_map(lambda i: i * i, range(50)) == [i * i for i in range(50)]
    assert parallel_map(lambda i: i, []) == []


def test_items_run_on_as_many_threads_as_torch_uses(threads: int) -> None:
    together = threading.Barrier(threads, timeout=30)  # breaks unless so many arrive at once
    names = set(parallel_map(lambda _: (together.wait(), threading.current_thread().name)[1], range(threads)))
    assert len(names) == threads


def test_gradients_are_not_recorded(threads: int) -> None:
    weight = torch.ones(3, requires_grad=True)
    assert not any(result.requires_grad for result in parallel_map(lambda i: weight * i, range(4)))
    assert torch.is_grad_enabled()


def test_the_first_error_comes_through(threads: int) -> None:
    with pytest.raises(ZeroDivisionError):
        parallel_map(lambda i: 1 / i, [1, 0, 2])


@pytest.mark.parametrize("text", ["affine4:row", "affine3:tensor:asym", "affine2:group64:asym", "ternary:row"])
def test_scales_do_not_depend_on_the_number_of_threads(text: str) -> None:
    weight = torch.randn(70, 1280, generator=torch.Generator().manual_seed(1))
    before, quantizer, found = torch.get_num_threads(), Quantizer(WeightFormat.parse(text)), []
    for count in (1, 4):
        torch.set_num_threads(count)
        found.append(quantizer(weight))
    torch.set_num_threads(before)
    for one, many in zip(*found, strict=True):
        assert (one is None and many is None) or torch.equal(one, many)
