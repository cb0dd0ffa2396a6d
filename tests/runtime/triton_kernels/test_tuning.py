"""Tiles are tried once for a card; what a file says of them is believed only if a kernel could run with it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prequant.runtime import WeightFormat
from prequant.runtime.triton_kernels import tables, tuning
from prequant.runtime.triton_kernels.tables import Tiles

from ..native_layers import Layer

pytest.importorskip("triton")

SLOW, FAST = Tiles(64, 16, 1, 4, 4), Tiles(128, 16, 2, 4, 3)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PREQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "_known", {})
    return tmp_path / "cache" / "tiles.json"


def measure(asked: list[Tiles]) -> Any:
    def call(tiles: Tiles) -> float:
        asked.append(tiles)
        return {SLOW: 2.0, FAST: 1.0}.get(tiles, math.inf)

    return call


def test_the_fastest_is_remembered_by_this_process_and_the_next(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tiles] = []
    for _ in range(2):
        assert tuning.tuned("a", [SLOW, FAST], measure(asked)) == FAST
        assert asked == [SLOW, FAST]
    assert [path.name for path in cache.parent.iterdir()] == ["tiles.json"]
    monkeypatch.setattr(tuning, "_known", {})
    assert tuning.remembered("a") == FAST and tuning.remembered("b") is None
    assert tuning.tuned("a", [SLOW, FAST], measure(asked)) == FAST
    assert asked == [SLOW, FAST]


def test_processes_do_not_take_from_each_other(cache: Path) -> None:
    assert tuning.tuned("a", [FAST], measure([])) == FAST
    content = json.loads(cache.read_text())
    content["tiles"]["b"] = list(SLOW)  # another process's
    cache.write_text(json.dumps(content))
    assert tuning.tuned("c", [FAST], measure([])) == FAST
    assert set(json.loads(cache.read_text())["tiles"]) == {"a", "b", "c"}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "no JSON",
        "[]",
        "{}",
        '{"version": 0, "tiles": {"a": [64, 16, 1, 4, 4]}}',
        '{"version": 1, "tiles": []}',
        '{"version": 1, "tiles": {"a": 7}}',
        '{"version": 1, "tiles": {"a": [64, 16, 1, 4]}}',
        '{"version": 1, "tiles": {"a": [64, 16, 1, 4, 4.0]}}',
        '{"version": 1, "tiles": {"a": [64, 16, true, 4, 4]}}',
        '{"version": 1, "tiles": {"a": [60, 16, 1, 4, 4]}}',
        '{"version": 1, "tiles": {"a": [64, 16, 0, 4, 4]}}',
        '{"version": 1, "tiles": {"a": [64, 16, 1, 4, 99]}}',
        '{"version": 1, "tiles": {"a": [128, 256, 1, 8, 4]}}',
        '{"version": 1, "tiles": {"a": [128, 128, 1, 1, 4]}}',
    ],
)
def test_a_file_that_makes_no_sense_is_written_anew(cache: Path, content: str) -> None:
    cache.parent.mkdir()
    cache.write_text(content)
    asked: list[Tiles] = []
    assert tuning.tuned("a", [SLOW, FAST], measure(asked)) == FAST and len(asked) == 2
    assert json.loads(cache.read_text()) == {"version": 1, "tiles": {"a": list(FAST)}}


def test_what_can_not_run_at_all_is_not_remembered(cache: Path) -> None:
    first = Tiles(16, 16, 1, 1, 1)
    assert tuning.tuned("a", [first], measure([])) == first
    assert not cache.exists()


def test_a_folder_that_can_not_be_written_to_costs_nothing_else(cache: Path) -> None:
    cache.parent.write_text("a file where the folder should be")
    assert tuning.tuned("a", [SLOW, FAST], measure([])) == FAST


@pytest.mark.parametrize("tokens", [1, 16, 17, 64, 65, 1000])
@pytest.mark.parametrize("text", ["affine4:row", "bcq3:group128"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (14336, 4096), (4096, 128), (300000, 16384)])
def test_tiles_fit_the_call(tokens: int, text: str, rows: int, columns: int) -> None:
    tiles = tables.default_tiles(tokens, rows, columns, tables.planes_of(WeightFormat.parse(text)))
    chunks = -(-columns // 128)
    assert tuning._makes_sense(list(tiles)) and (tiles.split == 1 or chunks // tiles.split >= 2)
    tried = tuning.candidates(tiles, columns)
    assert tried[0] == tiles and len(set(tried)) == len(tried)
    assert all(tuning._makes_sense(list(each)) and each.split <= max(chunks, tiles.split) for each in tried)


def test_a_card_without_tables_is_tuned_at_the_first_call(
    cache: Path, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prequant.runtime.triton_kernels import linear, workspace

    monkeypatch.setattr(workspace, "other_card", lambda device: "a card")
    tried: list[Tiles] = []

    def seconds(run: Callable[[Tiles], None], tiles: Tiles) -> float:
        tried.append(tiles)
        return 0.5 if tiles.rows == 128 else 1.0

    monkeypatch.setattr(linear, "seconds", seconds)
    layer, input = Layer("affine4:row", 40, 256).to(gpu), torch.randn(3, 256, device=gpu)
    results = [layer(input), layer(input)]
    assert torch.equal(*results)
    expected = input.double() @ layer.weight().T + layer.bias.double()
    torch.testing.assert_close(results[0].double(), expected, rtol=1e-5, atol=1e-5)
    (entry,) = json.loads(cache.read_text())["tiles"].items()
    assert entry[0].startswith("a card, triton 3") and entry[0].endswith("affine4:row, torch.float32, 40x256x4")
    assert entry[1][0] == 128 and len(tried) == len(set(tried)) > 4
