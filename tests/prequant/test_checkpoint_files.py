"""Files that are missing, elsewhere, out of order or of another model, and random damage: an error, or it loads."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from prequant.checkpoint import CheckpointError, load
from prequant.runtime import PrequantError

from .checkpoint_models import edit_json, inputs
from .hostile_folders import (
    POOLER,
    WORDS,
    assert_refused,
    assert_transformers_refuses,
    fresh_folder,
    set_entry,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fresh_folder(tmp_path)


@pytest.mark.parametrize(
    "name", ["config.json", "prequant.json", "model.safetensors", "prequant-constants.safetensors"]
)
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert_refused(folder, name)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no folder"):
        load(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is no folder"):
        load(tmp_path / "file")


def test_a_model_folder_without_a_graph_names_the_other_way(folder: Path) -> None:
    (folder / "prequant.json").unlink()
    assert_refused(folder, "prequant.json", "from_pretrained")


@pytest.mark.parametrize("name", ["config.json", "prequant.json", "model.safetensors"])
def test_a_link_out_of_the_folder(folder: Path, tmp_path: Path, name: str) -> None:
    shutil.move(folder / name, tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    assert_refused(folder, name, "outside the folder")
    if name == "model.safetensors":
        with pytest.raises(CheckpointError, match="outside the folder"):
            AutoModelForSequenceClassification.from_pretrained(folder)


def test_links_within_the_folder_and_the_hubs_cache_are_fine(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "inner")
    (folder / "model.safetensors").symlink_to("inner")
    load(folder)
    snapshots, blobs = tmp_path / "cache" / "snapshots", tmp_path / "cache" / "blobs"
    shutil.copytree(folder, blobs)
    (snapshots / "revision").mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshots / "revision" / path.name).symlink_to(f"../../blobs/{path.name}")
    load(snapshots / "revision")


def test_shards_outside_the_folder(folder: Path) -> None:
    shutil.move(folder / "model.safetensors", folder.parent / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {"bert.pooler.dense.bias": "../model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside the folder"):
        AutoModelForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ("not valid JSON",)),
        ("[1, 2]", ("[1, 2]", "object")),
        ('{"version": NaN}', ("NaN is not a JSON number",)),
        ('{"version": 1, "version": 1}', ("'version'", "twice")),
        ("[" * 200_000, ("not valid JSON",)),
        ('{"version": ' + "9" * 10_000 + "}", ("not valid JSON",)),
        (" " * ((64 << 20) + 1), ("larger than",)),
    ],
    ids=["empty", "list", "NaN", "doubled key", "deep", "long number", "oversized"],
)
@pytest.mark.parametrize("name", ["config.json", "prequant.json"])
def test_json_that_is_out_of_order(folder: Path, name: str, text: str, words: tuple[str, ...]) -> None:
    (folder / name).write_text(text)
    assert_refused(folder, name, *words)


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], tuple[str, ...]]] = {
    "another version": (set_entry("quantization_config", "version", value=7), ("version 7", "reads version 1")),
    "an unknown key": (set_entry("quantization_config", "run", value=1), ("unknown key 'run'",)),
    "no weights": (lambda config: config["quantization_config"].pop("weights"), ("'weights' is missing",)),
    "a format that is none": (
        set_entry("quantization_config", "weights", WORDS, "format", value="gguf"),
        (WORDS, "'gguf' is not a weight format"),
    ),
    "a shape that is none": (
        set_entry("quantization_config", "weights", WORDS, "shape", value=[60, 1 << 60]),
        (WORDS, "not a shape"),
    ),
    "more outliers than weights": (
        set_entry("quantization_config", "weights", WORDS, "outliers", "count", value=99_999),
        (WORDS, "99999 outliers in a weight of 1920"),
    ),
    "a name that is code": (
        lambda config: config["quantization_config"]["weights"].update({"a b": {}}),
        ("'a b'", "no name of a tensor"),
    ),
    "an asymmetric input without a scale": (
        lambda config: config["quantization_config"]["inputs"][POOLER].pop("scale"),
        (POOLER, "dynamic scales are symmetric"),
    ),
    "reasons that it denies": (
        set_entry("quantization_config", "reasons", value=["because"]),
        ("modules is True with 1 reasons",),
    ),
}


@pytest.mark.parametrize(("change", "words"), CONFIGS.values(), ids=CONFIGS.keys())
def test_configurations_that_make_no_sense(
    folder: Path, change: Callable[[dict[str, Any]], Any], words: tuple[str, ...]
) -> None:
    edit_json(folder / "config.json", change)
    assert_refused(folder, "config.json", *words)
    assert_transformers_refuses(folder, *words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            set_entry("quantization_config", "weights", WORDS, "shape", value=[61, 32]),
            ("weights is not what prequant.json",),
        ),
        (lambda config: config.pop("quantization_config"), ("weights is not what prequant.json",)),
        (set_entry("model_type", value="mystery"), ("model_type 'mystery'", "AutoConfig.register")),
        (lambda config: config.pop("model_type"), ("'model_type' is missing",)),
        (set_entry("hidden_size", value="wide"), ("can't be read as the configuration of a bert",)),
    ],
)
def test_a_configuration_of_another_model(
    folder: Path, change: Callable[[dict[str, Any]], Any], words: tuple[str, ...]
) -> None:
    edit_json(folder / "config.json", change)
    assert_refused(folder, "config.json", *words)


def test_a_module_of_another_shape_is_refused_by_transformers_too(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(hidden_size=64))
    with pytest.raises(CheckpointError, match=r"\[60, 32\]; in this BertForSequenceClassification it is \[60, 64\]"):
        AutoModelForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize(
    "name", ["prequant.json", "config.json", "model.safetensors", "prequant-constants.safetensors"]
)
def test_random_damage_loads_or_is_refused(folder: Path, name: str) -> None:
    path = folder / name
    original = path.read_bytes()
    generator = random.Random(name)
    refused = 0
    for _ in range(80):
        data = bytearray(original)
        # Most of a tensor file is numbers, which may be any; what is read closely is its beginning.
        reach = 4_000 if name.endswith(".safetensors") and generator.random() < 0.7 else len(data)
        for _ in range(generator.choice((1, 1, 2, 8))):
            at = generator.randrange(min(reach, len(data)))
            match generator.randrange(4):
                case 0:
                    data[at] ^= 1 << generator.randrange(8)
                case 1:
                    data[at] = generator.randrange(256)
                case 2:
                    del data[at : at + generator.randrange(1, 40)]
                case _:
                    data[at:at] = generator.choice((b"-1", b"null", b'"', b"}", b"[", b"1e999", b"\x00", b"9" * 30))
        if generator.random() < 0.1:
            del data[generator.randrange(1, len(data)) :]
        path.write_bytes(bytes(data))
        try:
            load(folder, verify=False)
        except PrequantError:
            refused += 1
    assert refused > 20
    assert os.listdir(folder.parent) == ["model"]


def test_a_retrained_folder_is_noticed(folder: Path) -> None:
    """transformers saves over the tensors of a folder, and knows nothing of its graph."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.classifier.bias += 1
    model.save_pretrained(folder)
    assert_refused(folder, "SHA-256")
    loaded = load(folder, verify=False)
    values = inputs(model)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**values).logits, model(**values).logits)
