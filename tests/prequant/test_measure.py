import gc
import math
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from prequant.measure import PACKAGES, PeakMemory, installed_versions, median_seconds, plain, tensor_bytes, weight_bytes
from prequant.recipes import PreQuant
from prequant.sources import canonical_program, head_parameters
from prequant.training import TrainingResult, TrainingSettings, finetune

from .tiny import collator, encoded, make_model, make_tokenizer


@pytest.fixture(autouse=True)
def one_thread(reproducible: None) -> None:
    torch.set_num_threads(1)


# ---- time, bytes, settings -------------------------------------------------------------------------------------------


def test_latencies_are_medians_taken_in_turns_without_the_first_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, turns = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def lasting(name: str, *durations: float) -> Callable[[], None]:
        left = iter(durations)

        def call() -> None:
            turns.append(name)
            clock[0] += next(left)

        return call

    calls = [lasting("a", 100.0, 50.0, 3.0, 1.0, 2.0, 90.0, 4.0), lasting("b", *[7.0] * 7)]
    assert median_seconds(calls, repeats=5, warmup=2) == [3.0, 7.0]
    assert turns == ["a", "b"] * 7


def test_bytes_are_those_of_the_safetensors_files(tmp_path: Path) -> None:
    for name, size in (("model.safetensors", 7), ("prequant-constants.safetensors", 5), ("tokenizer.json", 100)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert weight_bytes(tmp_path) == 12


def test_values_become_json_or_are_refused() -> None:
    class Color(Enum):
        RED = "red"

    value = {"path": Path("x"), "odd": [math.inf, -math.inf, math.nan]}
    assert plain(value) == {"path": "x", "odd": ["inf", "-inf", "nan"]}
    assert plain((1, True, None, 0.5)) == [1, True, None, 0.5] and plain(Color.RED) == "red"
    assert plain(TrainingResult(1, 2.0, math.nan, 3)) == {
        "steps": 1,
        "seconds": 2.0,
        "loss": "nan",
        "peak_memory": 3,
        "best_step": None,
    }
    with pytest.raises(TypeError, match="has no form in JSON"):
        plain({"a": torch.zeros(1)})


def test_versions_are_those_of_everything_a_result_depends_on() -> None:
    versions = installed_versions()
    assert versions.keys() == {"python", *PACKAGES} and versions["torch"] == torch.__version__


# ---- memory ----------------------------------------------------------------------------------------------------------


def run(model: nn.Module) -> TrainingResult:
    return finetune(model, encoded(), collator(), TrainingSettings(max_steps=2, batch_size=4), progress=False)


def wide() -> PreTrainedModel:
    """16 MB of embeddings. Gradients, AdamW's two moments and a temporary of clipping take as much each; the allocator
    may hold some blocks on top.
    """
    return make_model(hidden_size=64, max_position_embeddings=60_000)


def test_memory_of_a_training_is_weights_gradients_and_optimizer_in_any_order() -> None:
    size = tensor_bytes(wide())
    assert 16e6 < size < 18e6
    peaks = []
    for _ in range(3):
        # What an earlier job leaves to the allocator must not hide what the next one takes.
        litter = [torch.ones(2000) for _ in range(10_000)]
        del litter[::2], litter
        peaks.append(run(wide()).peak_memory)
    for peak in peaks:
        assert 3.5 * size < peak < 7 * size, [round(p / size, 2) for p in peaks]


def test_a_packed_program_trains_in_a_fraction_of_that() -> None:
    model = wide()
    original = canonical_program(model, make_tokenizer())
    peak = run(PreQuant().prepare(original, head_parameters(model))(original)).peak_memory
    assert peak < 1.5 * tensor_bytes(model)


def test_peak_memory_sees_what_is_freed_again() -> None:
    with PeakMemory() as memory:
        block = torch.ones(10_000_000)
        for _ in range(5):
            block.add_(1)
        del block
    gc.collect()
    assert 38e6 < memory.growth < 60e6
    assert memory.bytes == memory.before + memory.growth


def test_tensors_that_share_memory_count_once() -> None:
    module = nn.Module()
    module.first = nn.Parameter(torch.zeros(1000))
    module.second = nn.Parameter(module.first.data[:10])
    module.register_buffer("third", torch.zeros(7, dtype=torch.uint8))
    assert tensor_bytes(module) == 4007
