"""The measurements of the benchmark of decoding: one model, a process for each contender."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from decode_contenders import Decoding, Source, torch_and_packed  # type: ignore[import-not-found]
from decode_llama import llama  # type: ignore[import-not-found]
from decode_onnx import onnx_and_openvino  # type: ignore[import-not-found]
from processes import Worker  # type: ignore[import-not-found]
from stands import (  # type: ignore[import-not-found]
    FAILURES,
    Contender,
    Found,
    Plan,
    Stand,
    WrongOutputError,
    compared,
    open_stands,
)
from turns import Times  # type: ignore[import-not-found]

CHECKED = 4
"""Steps after the prompt whose logits are compared, all contenders being given the same tokens."""


def contenders() -> list[Contender]:
    """Every contender, whether it can run here or not; the reference comes first."""
    in_torch, packed = torch_and_packed()
    return [*in_torch, *onnx_and_openvino(), *llama(), *packed]


@dataclass(frozen=True)
class Measurement:
    """One contender on ``batch`` texts at once: seconds of a prompt and of a step (a token for each text), and tokens a
    second of the steps alone and of the whole, new tokens over all the time.

    ``error`` and ``cosine`` compare logits with the reference's.
    """

    model: str
    batch: int
    name: str
    library: str
    bits: int
    prefill: float
    prefill_p10: float
    prefill_p90: float
    step: float
    step_p10: float
    step_p90: float
    tokens_per_second: float
    whole_tokens_per_second: float
    error: float
    cosine: float


class DecoderStand(Stand):
    """A decoder that is being measured."""

    def get_inputs(self) -> None:
        self._contender, self._source = cast(Decoding, self.contender), cast(Source, self.source)
        self._ids = self._source.ids(self._source.batches[0], self._source.prompt)

    def load(self) -> None:
        self._contender.load(self.folder, self._source, self.plan.threads)
        self._contender.begin(self._source.batches[0])

    def first_call(self) -> None:
        self._contender.step(self._contender.prefill(self._ids).argmax(-1))

    def begin(self, batch: int) -> list[np.ndarray]:
        """Get ready for turns with so many texts; logits after the prompt and after some given tokens."""
        with torch.inference_mode():
            self._contender.begin(batch)
            self._ids = self._source.ids(batch, self._source.prompt)
            outputs = [np.array(self._contender.prefill(self._ids), dtype=np.float32)]
            for ids in self._source.ids(batch, CHECKED, seed=1).T:
                outputs.append(np.array(self._contender.step(ids), dtype=np.float32))
        return outputs

    def turn(self) -> tuple[float, list[float]]:
        """Decode greedily, a few tokens first that don't count: seconds of the prompt, and of each step."""
        gc.collect()
        gc.disable()
        try:
            with torch.inference_mode():
                began = time.perf_counter()
                while time.perf_counter() - began < self.plan.lead:
                    self._decode(self._source.new // 8)
                return self._decode(self._source.new)
        finally:
            gc.enable()

    def _decode(self, new: int) -> tuple[float, list[float]]:
        started = time.perf_counter()
        tokens = self._contender.prefill(self._ids).argmax(-1)
        now = time.perf_counter()
        prefill, steps = now - started, []
        for _ in range(new - 1):
            tokens = self._contender.step(tokens).argmax(-1)
            before, now = now, time.perf_counter()
            steps.append(now - before)
        return prefill, steps


def measure_source(
    plan: Plan, source: Source, chosen: Sequence[Contender], work: Path, log: Callable[[str], object]
) -> Found:
    """Measure ``chosen``, the reference first, with every number of texts of ``source``, in turns."""
    found = Found()
    with ExitStack() as stack:
        stands = open_stands(stack, DecoderStand, plan, source, chosen, work, found, log)
        for batch in source.batches:
            log(f"{source.name}: batch {batch}")
            found.measurements += _measure(plan, source, batch, stands, found)
    return found


def _measure(
    plan: Plan, source: Source, batch: int, stands: Mapping[Contender, Worker], found: Found
) -> list[Measurement]:
    expected: list[np.ndarray] = []
    taking_part: dict[Contender, tuple[float, float]] = {}
    for contender, worker in stands.items():
        try:
            outputs = worker.call("begin", batch, timeout=plan.timeout)
            expected = expected or outputs
            taking_part[contender] = compared(contender, outputs, expected)
        except (*FAILURES, WrongOutputError) as error:
            found.leave_out(contender, f"{source.name}, batch {batch}", error)
    prefills: dict[Contender, list[float]] = {contender: [] for contender in taking_part}
    steps: dict[Contender, list[float]] = {contender: [] for contender in taking_part}
    for turn in range(plan.warmup + plan.repeats):
        for contender in list(taking_part):
            try:
                prefill, each = stands[contender].call("turn", timeout=plan.timeout)
            except FAILURES as error:  # a compiler may fail only when a text becomes longer
                found.leave_out(contender, f"{source.name}, batch {batch}", error)
                del taking_part[contender]
                continue
            if turn >= plan.warmup:
                prefills[contender].append(prefill)
                steps[contender] += each
    measurements = []
    for contender, (error_, cosine) in taking_part.items():
        prompt, step = Times.of(prefills[contender]), Times.of(steps[contender])
        new = batch * len(steps[contender])
        whole = new + batch * len(prefills[contender])
        measurements.append(
            Measurement(
                model=source.name,
                batch=batch,
                name=contender.name,
                library=contender.library,
                bits=contender.bits,
                prefill=prompt.median,
                prefill_p10=prompt.p10,
                prefill_p90=prompt.p90,
                step=step.median,
                step_p10=step.p10,
                step_p90=step.p90,
                tokens_per_second=new / sum(steps[contender]),
                whole_tokens_per_second=whole / (sum(steps[contender]) + sum(prefills[contender])),
                error=error_,
                cosine=cosine,
            )
        )
    return measurements
