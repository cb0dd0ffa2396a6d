"""Sharing work among threads: for sequences of torch calls too small for torch to share out by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def parallel_map(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """``[function(item) for item in items]`` on as many threads as torch uses, in any order of execution.

    torch lets go of the interpreter while it computes. Gradients are not recorded, on any of the threads.
    """
    items = list(items)
    threads = min(torch.get_num_threads(), len(items))

    def without_gradients(item: Item) -> Result:
        with torch.no_grad():  # a new thread starts with gradients on
            return function(item)

    if threads <= 1:
        return [without_gradients(item) for item in items]
    # A pool for each call: one that lasts would be broken in a forked process.
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(without_gradients, items))
