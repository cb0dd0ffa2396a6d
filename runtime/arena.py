"""Placing buffers that live at different times in common memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .memory import ALIGNMENT


def placed(bytes: npt.NDArray[np.int64], lives: Sequence[tuple[int, int]]) -> tuple[npt.NDArray[np.int64], int]:
    """Offsets of buffers of so many ``bytes`` each, and the bytes of all together.

    ``lives`` are the first and last step that needs each. The largest are placed first, each at the lowest offset where
    nothing lies that is needed at the same time: greedy by size, of Pisarchyk and Lee, *Efficient Memory Management for
    Deep Neural Net Inference* (2020), section 5.2. Offsets are multiples of :data:`ALIGNMENT`.
    """
    offsets = np.zeros(len(bytes), dtype=np.int64)
    done: list[int] = []
    total = 0
    for index in sorted(range(len(bytes)), key=lambda i: (-int(bytes[i]), i)):
        first, last = lives[index]
        others = sorted((int(offsets[i]), int(bytes[i])) for i in done if lives[i][0] <= last and first <= lives[i][1])
        at = 0
        for offset, size in others:
            if offset - at >= bytes[index]:
                break
            at = max(at, -(-(offset + size) // ALIGNMENT) * ALIGNMENT)
        offsets[index] = at
        done.append(index)
        total = max(total, at + int(bytes[index]))
    return offsets, total
