"""Tensors that are damaged, or made to do harm: refused, on both roads, before anything computes with them."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from prequant.checkpoint import CheckpointError, load, save
from prequant.trace import trace

from .checkpoint_models import edit_tensors
from .hostile_folders import (
    KEY,
    PLANES,
    POOLER,
    QUERY,
    VALUE,
    WORDS,
    assert_refused,
    assert_transformers_refuses,
    fresh_folder,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fresh_folder(tmp_path)


def test_the_folder_itself_is_fine(folder: Path) -> None:
    load(folder)
    edit_tensors(folder, lambda tensors: None)
    load(folder)


def set_value(name: str, index: Any, value: Any) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name][index] = value

    return change


def replace_by(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = make(tensors[name])

    return change


def columns_swapped(tensors: dict[str, Tensor]) -> None:
    offsets, columns = tensors[f"{WORDS}.outliers.row_offsets"], tensors[f"{WORDS}.outliers.columns"]
    row = int((offsets.diff() > 1).nonzero()[0])
    start = int(offsets[row])
    columns[start : start + 2] = columns[[start + 1, start]]


def fourth_code(tensors: dict[str, Tensor]) -> None:
    tensors[f"{QUERY}.codes"][5, 2] |= 0b00001100


TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], tuple[str, ...]]] = {
    "NaN in a scale": (set_value(f"{WORDS}.scale", (4, 0), float("nan")), (f"{WORDS}.scale", "nan", "finite")),
    "infinity in a scale": (set_value(f"{QUERY}.scale", (0, 0), float("inf")), (f"{QUERY}.scale", "inf", "finite")),
    "NaN in a zero point": (set_value(f"{VALUE}.zero_point", (0, 1), float("nan")), (f"{VALUE}.zero_point", "nan")),
    "infinity in an alpha": (set_value(f"{PLANES}.alphas", (0, 0, 0), -float("inf")), (f"{PLANES}.alphas", "-inf")),
    "NaN in an outlier": (set_value(f"{WORDS}.outliers.values", 3, float("nan")), (f"{WORDS}.outliers.values", "nan")),
    "an outlier's column past the end": (
        set_value(f"{WORDS}.outliers.columns", -1, 32),
        (f"{WORDS}.outliers.columns", "column 32", "has 32"),
    ),
    "columns out of order": (columns_swapped, (f"{WORDS}.outliers.columns", "out of order")),
    "row offsets that fall": (
        set_value(f"{WORDS}.outliers.row_offsets", 1, 19),
        (f"{WORDS}.outliers.row_offsets", "falls from 19"),
    ),
    "row offsets past the values": (
        set_value(f"{WORDS}.outliers.row_offsets", -1, 1_000_000),
        (f"{WORDS}.outliers.row_offsets", "1000000", "expected 0 to 19"),
    ),
    "row offsets below 0": (
        set_value(f"{WORDS}.outliers.row_offsets", 0, -5),
        (f"{WORDS}.outliers.row_offsets", "from -5", "expected 0 to 19"),
    ),
    "a fourth ternary code": (fourth_code, (f"{QUERY}.codes", "code 3")),
    "a base-3 byte over 242": (set_value(f"{KEY}.codes", (0, 0), 243), (f"{KEY}.codes", "byte 243", "242")),
    "an input's zero point far off": (
        set_value(f"{POOLER}.input.zero_point", (0, 0), 1e9),
        (f"{POOLER}.input.zero_point", "1000000000.0", "-256 to 512"),
    ),
    "NaN in an input's scale": (
        set_value(f"{POOLER}.input.scale", (0, 0), float("nan")),
        (f"{POOLER}.input.scale", "nan"),
    ),
    "codes of another shape": (
        replace_by(f"{WORDS}.codes", lambda t: t[:, :-1].contiguous()),
        (f"{WORDS}.codes", "[60, 15]", "expected [60, 16]"),
    ),
    "codes with a row too few": (
        replace_by(f"{WORDS}.codes", lambda t: t[:-1].contiguous()),
        (f"{WORDS}.codes", "[59, 16]", "expected [60, 16]"),
    ),
    "codes of another type": (
        replace_by(f"{WORDS}.codes", lambda t: t.to(torch.int8)),
        (f"{WORDS}.codes", "I8", "expected uint8"),
    ),
    "a scale of integers": (
        replace_by(f"{WORDS}.scale", lambda t: t.to(torch.int32)),
        (f"{WORDS}.scale", "I32", "expected float32"),
    ),
    "outlier columns of another type": (
        replace_by(f"{WORDS}.outliers.columns", lambda t: t.to(torch.int64)),
        (f"{WORDS}.outliers.columns", "I64", "expected uint16"),
    ),
    "a missing tensor": (lambda tensors: tensors.pop(f"{WORDS}.codes"), (f"{WORDS}.codes", "missing")),
}


@pytest.mark.parametrize(("change", "words"), TENSORS.values(), ids=TENSORS.keys())
def test_tensors_that_make_no_sense(
    folder: Path, change: Callable[[dict[str, Tensor]], Any], words: tuple[str, ...]
) -> None:
    edit_tensors(folder, change)
    assert_refused(folder, "model.safetensors", *words)
    assert_transformers_refuses(folder, "model.safetensors", *words)


def test_a_tensor_that_is_in_no_list(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update(extra=torch.zeros(1)))
    assert_refused(folder, "model.safetensors", "extra", "in no list")


def test_a_boolean_that_is_neither_true_nor_false(tmp_path: Path) -> None:
    class Masked(nn.Module):
        mask: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.tensor([True, False, True]))

        def forward(self, x: Tensor) -> Tensor:
            return x.masked_fill(self.mask, 0.0)

    folder = save(trace(Masked(), {"x": torch.randn(4, 3)}), tmp_path / "model")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    start = data.index(b"\x01\x00\x01", 8 + struct.unpack("<Q", data[:8])[0])
    path.write_bytes(data[: start + 1] + b"\x02" + data[start + 2 :])
    assert_refused(folder, "mask", "byte 2", "0 or 1")


@pytest.mark.parametrize("size", [0, 7, 100, 5_000, -1])
def test_truncated_tensors(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert_refused(folder, "model.safetensors", "can't be read as safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: can't be read as safetensors"):
        AutoModelForSequenceClassification.from_pretrained(folder)


def test_a_header_that_claims_more_than_the_file_holds(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header[f"{WORDS}.codes"] = {"dtype": "U8", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 1 << 60]}
    text = json.dumps(header).encode()
    for size in (len(text), 1 << 62):
        path.write_bytes(struct.pack("<Q", size) + text + data[8 + length :])
        assert_refused(folder, "model.safetensors", "can't be read as safetensors")


def test_codes_that_were_flipped_on_the_disk(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert_refused(folder, "model.safetensors", "SHA-256", "damaged or was replaced")
    load(folder, verify=False)
