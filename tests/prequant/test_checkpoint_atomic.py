"""Saving is atomic: a folder is there whole, or as it was before."""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from prequant.checkpoint import CheckpointError, atomic, load, save
from prequant.checkpoint.atomic import replacing
from prequant.passes import QuantizeWeights

from .checkpoint_models import compressed, inputs, mixed_bert, traced
from .hostile_folders import snapshot


class Broken:
    """A tokenizer that writes a file and then fails."""

    def save_pretrained(self, folder: Path) -> None:
        (folder / "vocab.txt").write_text("half")
        raise RuntimeError("the disk is full")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the disk is full"):
        save(mixed_bert(), tmp_path / "out", Broken())
    assert os.listdir(tmp_path) == []


def test_a_failure_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    model, program = traced("bert")
    save(program, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    with pytest.raises(RuntimeError, match="the disk is full"):
        save(mixed_bert(), tmp_path / "out", Broken())
    assert snapshot(tmp_path / "out") == before
    assert os.listdir(tmp_path) == ["out"]
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "out")(**inputs(model)).logits, model(**inputs(model)).logits)


@pytest.mark.parametrize("exchange", [True, False], ids=["in one step", "in two"])
def test_saving_over_a_folder(tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its model is replaced, with the shards and the graph of the one before; what belongs to others stays."""
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    out = tmp_path / "out"
    save(mixed_bert(), out)
    others = {
        "README.md": b"mine",
        "model-card.md": b"mine too",
        "prequant.txt": b"notes",
        "checkpoint-5/state.bin": b"trained",
        "vocab.txt": b"words",
    }
    for name in (*others, "model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(others.get(name, b"stale"))
    out.chmod(0o750)
    program = compressed(traced("gpt2")[1], QuantizeWeights(bits=2))
    save(program, out)
    found = tree(out)
    save(program, tmp_path / "fresh")
    assert found == tree(tmp_path / "fresh") | others
    assert out.stat().st_mode & 0o777 == 0o750
    assert sorted(os.listdir(tmp_path)) == ["fresh", "out"]


def test_a_second_rename_that_fails_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.suffix == ".new":
            raise OSError("no luck")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no luck"), replacing(tmp_path / "out", lambda name: False) as staging:
        (staging / "new").write_text("new")
    assert tree(tmp_path) == {"out/old": b"old"}


def test_a_path_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(CheckpointError, match="out is a file"):
        save(mixed_bert(), tmp_path / "out")
    assert (tmp_path / "out").read_text() == "a file"


def test_the_working_directory_is_not_pulled_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "inner")
    for folder in (".", ".."):
        with pytest.raises(CheckpointError, match="working directory"):
            save(mixed_bert(), folder)
    save(mixed_bert(), "out")
    load("out")


def test_folders_on_the_way_are_made_and_links_followed(tmp_path: Path) -> None:
    save(mixed_bert(), tmp_path / "a" / "b")
    (tmp_path / "link").symlink_to("a/b")
    save(traced("bert")[1], tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert "quantization_config" not in (tmp_path / "a" / "b" / "config.json").read_text()


def _write_for_ever(folder: Path) -> None:
    number = 0
    while True:
        number += 1
        with replacing(folder, lambda name: True) as staging:
            for name in "abc":
                (staging / name).write_text(str(number))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="folders are exchanged in one step on Linux only")
def test_a_process_that_is_killed_leaves_one_version_whole(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    for delay in (0.05, 0.08, 0.13):
        writer = multiprocessing.get_context("fork").Process(target=_write_for_ever, args=(folder,))
        writer.start()
        while not folder.exists():
            time.sleep(0.001)
        time.sleep(delay)
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        assert sorted(os.listdir(folder)) == ["a", "b", "c"]
        assert len({(folder / name).read_text() for name in "abc"}) == 1
