"""Encoders in OpenVINO: float, with weights and inputs in 8 bits, and with 4-bit weights."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from model_contenders import Encoding, torch_encoder  # type: ignore[import-not-found]
from model_inputs import Batch, Cell, Source  # type: ignore[import-not-found]

GROUP = 64


class OpenVino(Encoding):
    """The model as OpenVINO converts it, compiled for the shape of each cell, or for any if a cell has several."""

    library = "openvino"
    modules = ("openvino",)

    def __init__(self, name: str, bits: int, precision: str = "") -> None:
        """``precision`` is the one to compute in, or what OpenVINO chooses: bf16 where the processor has it."""
        super().__init__(name, bits)
        self.precision = precision

    def prepare(self, source: Source, folder: Path) -> None:
        import openvino

        model = self._compressed(self._converted(source), source)
        # In half precision, as OpenVINO stores floats unless told otherwise, where it does not compute in more.
        openvino.save_model(model, folder / "model.xml", compress_to_fp16=self.precision != "f32")

    def _converted(self, source: Source) -> Any:
        import openvino

        example = tuple(torch.ones(2, 16, dtype=torch.int64) for _ in range(2))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tracing
            return openvino.convert_model(torch_encoder(source), example_input=example)

    def _compressed(self, model: Any, source: Source) -> Any:
        return model

    def load(self, folder: Path, source: Source, cell: Cell, threads: int) -> None:
        import openvino

        core = openvino.Core()
        options = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
        if self.precision:
            options["INFERENCE_PRECISION_HINT"] = self.precision
        model = core.read_model(folder / "model.xml")
        if cell.length is not None:
            model.reshape({name: [cell.batch, cell.length] for name in ("input_ids", "attention_mask")})
        self._request = None  # before the next takes its memory
        self._request = core.compile_model(model, "CPU", options).create_infer_request()

    def run(self, batch: Batch) -> np.ndarray:
        assert self._request is not None
        found = self._request.infer([batch.ids, batch.mask], share_inputs=True, share_outputs=True)
        return np.asarray(found[0])


class OpenVinoInt8(OpenVino):
    """Weights and inputs in 8 bits with static scales, calibrated by NNCF."""

    def _compressed(self, model: Any, source: Source) -> Any:
        import nncf

        nncf.set_log_level(logging.WARNING)
        batches = source.calibration()
        dataset = nncf.Dataset([[batch.ids, batch.mask] for batch in batches])
        with contextlib.redirect_stdout(io.StringIO()):  # bars of progress
            return nncf.quantize(model, dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(batches))


class OpenVinoInt4(OpenVino):
    """Weights in 4 bits, those of embeddings too, by NNCF; inputs as OpenVINO sees fit."""

    def _compressed(self, model: Any, source: Source) -> Any:
        import nncf

        nncf.set_log_level(logging.WARNING)
        mode = nncf.CompressWeightsMode.INT4_SYM
        with contextlib.redirect_stdout(io.StringIO()):
            return nncf.compress_weights(model, mode=mode, ratio=1.0, group_size=GROUP, all_layers=True)


def openvino_contenders() -> list[Encoding]:
    """From wide to narrow."""
    return [
        OpenVino("OpenVINO fp32", 32, "f32"),
        OpenVino("OpenVINO bf16", 16),
        OpenVinoInt8("OpenVINO int8 W8A8 static", 8),
        OpenVinoInt4("OpenVINO 4-bit weights", 4),
    ]
