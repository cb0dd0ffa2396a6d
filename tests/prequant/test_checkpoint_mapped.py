"""Packed codes that stay in the file they were loaded from."""

from pathlib import Path

import pytest
import torch

from prequant.checkpoint import load, save, tensors
from prequant.passes import Program, weights
from prequant.passes.lower import lower
from prequant.runtime.memory import MappedFiles

from .checkpoint_models import compressed, inputs, outputs, traced


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lowered model, too small for its codes to be left in the file as they are."""
    monkeypatch.setattr(tensors, "MAPPED_BYTES", 1)
    save(lower(compressed(traced("bert")[1])), tmp_path / "model")
    return tmp_path / "model"


def results(program: Program) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in outputs(program(**inputs(traced("bert")[0])))]


def packed(program: Program) -> list[torch.Tensor]:
    return [tensor for tensor in program.state_dict().values() if tensor.dtype is torch.uint8]


def test_codes_stay_in_the_file_and_all_else_is_copied(folder: Path) -> None:
    program, copied = load(folder), load(folder, mapped=False)
    files = MappedFiles()
    assert len(packed(program)) >= len(weights(program)) > 0
    for tensor in program.state_dict().values():
        assert (tensor in files) == (tensor.dtype is torch.uint8)
    assert not any(tensor in files for tensor in copied.state_dict().values())
    for found, expected in zip(results(program), results(copied), strict=True):
        assert torch.equal(found, expected)


def test_a_loaded_program_is_itself_when_another_is_saved_in_its_folder(folder: Path) -> None:
    program = load(folder)
    before = results(program)
    for tensor in packed(program):
        tensor.bitwise_not_()  # in this process alone
    save(program, folder)
    other = load(folder)
    for mine, theirs in zip(packed(program), packed(other), strict=True):
        assert torch.equal(mine, theirs)
        mine.bitwise_not_()
    for found, expected, of_other in zip(results(program), before, results(other), strict=True):
        assert torch.equal(found, expected)
        assert not torch.equal(found, of_other)
