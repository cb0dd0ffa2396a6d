"""What a function launches on a GPU, recorded as a CUDA graph, and launched again as a whole.

A decode step is hundreds of small launches, each of which can take the host longer than the GPU. A graph is one launch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from .triton_kernels import workspace

Result = TypeVar("Result")

WARM_UP = 2
"""Runs before the recording: kernels are compiled, their tiles tried, weights arranged for them, and the libraries'
workspaces made, none of which a graph may hold."""


class Recording(Generic[Result]):
    """A function without arguments, recorded on a device: calling it does again what the function did.

    The function reads and writes tensors that stay where they are; it asks the host for nothing, and running it again
    changes nothing more, as it runs :data:`WARM_UP` times before. Results are always the same tensors, which the next
    call writes into. What the function reads has to live, and stay in its place, as long as the recording does.
    """

    def __init__(self, function: Callable[[], Result], device: torch.device) -> None:
        with torch.cuda.device(device):
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    function()
            torch.cuda.current_stream(device).wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            # Other threads may go on: they have nothing to do with what this one launches.
            recorded = torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local")
            with workspace.counters_of_graph(device) as self._counters, recorded:
                self._result = function()

    def __call__(self) -> Result:
        """Launch it all again, on the current stream."""
        self._graph.replay()
        return self._result
