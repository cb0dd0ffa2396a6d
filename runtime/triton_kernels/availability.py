"""Whether the Triton kernels run: on CUDA tensors if Triton is installed, on the CPU only in its interpreter."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings

import torch

from .. import native
from ..errors import PrequantError

INTERPRET = "TRITON_INTERPRET"
"""The variable that makes Triton run kernels as Python, on the CPU; it is read when they are imported."""


class TritonError(PrequantError):
    """Triton is missing, or is not set up for what it was asked to run."""


def run_on(device: torch.device) -> bool:
    """Whether the kernels take tensors on ``device``. ``PREQUANT_ISA=reference`` is for no kernel at all on a GPU, too.

    That Triton is missing on a machine with a GPU is said once.
    """
    if device.type == "cuda":
        return os.environ.get("PREQUANT_ISA", "") != native.REFERENCE and _installed_for_cuda()
    return True  # only interpreted() asks for them elsewhere


def check_interpreted() -> None:
    """Raise :class:`TritonError` unless kernels would run in the interpreter."""
    if not installed():
        raise TritonError("Triton is not installed: pip install 'prequant[triton]'")
    if os.environ.get(INTERPRET) != "1":
        raise TritonError(
            f"kernels run on the CPU in Triton's interpreter alone: set {INTERPRET}=1 before they are imported"
        )


def installed() -> bool:
    """Whether there is a package called triton. It is not imported."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _installed_for_cuda() -> bool:
    there = installed()
    if not there:
        warnings.warn(
            "Triton is not installed: on a GPU, packed operators run on their reference implementation in PyTorch, "
            "which is slower than float16. Install it with: pip install 'prequant[triton]'",
            stacklevel=2,
        )
    return there
