"""Files that are no adapter of a base, or none at all: refused by name, and never half-written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from prequant.adapters import Adapter, AdapterError, adapter_of, fingerprint, write_adapter
from prequant.adapters.listing import adapters_table
from prequant.checkpoint import save

from .adapter_bases import GPT2, base_of, headed, tuned


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    base, other = base_of("gpt2-causal-lm"), base_of("gpt2-causal-lm", "outliers")
    path = write_adapter(tmp_path / "task.safetensors", adapter_of(base, tuned(base, 1)))
    with pytest.raises(
        AdapterError, match=rf"{path} was made on the base [0-9a-f]{{12}}, and this one is [0-9a-f]{{12}};"
    ):
        other.load_adapter("x", path)
    assert other.adapters == ()


def changed(path: Path, tensors: dict[str, Tensor] | None = None, **content: Any) -> Path:
    """An adapter file with other tensors, or something else in its metadata."""
    with safe_open(path, framework="pt") as file:
        meta, held = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    said = {**json.loads(meta["prequant_adapter"]), **content}
    save_file({**held, **(tensors or {})}, path, metadata={**meta, "prequant_adapter": json.dumps(said)})
    return path


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "version": ({"version": 2}, "version 2; this prequant reads version 1"),
    "key": ({"more": 1}, "unknown key 'more'"),
    "base": ({"base": "../x"}, "base is '../x', no SHA-256"),
    "model": ({"model": []}, "model is \\[\\] where dict belongs"),
    "class": ({"model": {"model_class": "os.system"}}, "is missing"),
    "config": ({"config": {"model_type": "no such"}}, "model_type 'no such' is unknown"),
    "nan": ({"tensors": {"transformer.ln_f.weight": torch.full((32,), float("nan"))}}, "holds nan"),
    "integers": ({"tensors": {"transformer.ln_f.weight": torch.ones(32, dtype=torch.int32)}}, "of type int32"),
    "shape": ({"tensors": {"transformer.ln_f.weight": torch.ones(31)}}, "shape"),
    "type": ({"tensors": {"transformer.ln_f.weight": torch.ones(32).double()}}, "the base takes torch.float32"),
    "unknown": ({"tensors": {"no.such": torch.ones(3)}}, "no.such is no tensor of the base"),
    "codes": ({"tensors": {"transformer.h.0.attn.c_attn.weight.planes": torch.ones(3)}}, "planes"),
    "name": ({"tensors": {"a b": torch.ones(3)}}, "'a b' is no name of a tensor"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_mixed_up_file_is_refused_by_name(case: str, tmp_path: Path) -> None:
    base = base_of("gpt2-causal-lm")
    path = write_adapter(tmp_path / "task.safetensors", adapter_of(base, tuned(base, 1)))
    content, message = HOSTILE[case]
    changed(path, **content)
    with pytest.raises(AdapterError, match=message) as caught:
        base.load_adapter("x", path)
    assert str(path) in str(caught.value) and base.adapters == ()


def test_files_that_are_no_adapters(tmp_path: Path) -> None:
    base = base_of("gpt2-causal-lm")
    plain = tmp_path / "plain.safetensors"
    save_file({"a": torch.ones(2)}, plain)
    with pytest.raises(AdapterError, match="is a safetensors file, but no adapter"):
        base.load_adapter("x", plain)
    (tmp_path / "text").write_text("hello")
    for missing in ("text", "nowhere"):
        with pytest.raises(AdapterError, match=f"{missing}: can't be read as an adapter"):
            base.load_adapter("x", tmp_path / missing)
    with pytest.raises(AdapterError, match="is a folder; an adapter is a file"):
        write_adapter(tmp_path, adapter_of(base, tuned(base, 1)))


def test_a_head_without_its_parts_is_refused(tmp_path: Path) -> None:
    base = base_of("gpt2-causal-lm")
    task = headed(base, f"{GPT2}.GPT2ForSequenceClassification", 3, seed=5)
    whole = adapter_of(base, task)
    less = Adapter(whole.base, {}, whole.model, whole.config)
    with pytest.raises(AdapterError, match=r"lacks score\.weight, a part of its head"):
        base.load_adapter("x", write_adapter(tmp_path / "x.safetensors", less))


def test_the_table_of_files(tmp_path: Path) -> None:
    from rich.console import Console

    base = base_of("gpt2-causal-lm")
    save(base, tmp_path / "base")
    about = {"task": "[red]x[/red]", "scores": {"BLEU": 12.5}}
    path = write_adapter(tmp_path / "task.safetensors", adapter_of(base, tuned(base, 1), about))
    other = changed(write_adapter(tmp_path / "other.safetensors", adapter_of(base, tuned(base, 2))), base="0" * 64)
    console = Console(width=300, record=True)
    console.print(adapters_table(base, tmp_path / "base", [path, other]))
    text = console.export_text()
    assert "[red]x[/red]" in text and "BLEU 12.5000" in text and "8 first alphas" in text
    assert "this base" in text and "another: 000000000000" in text
    assert fingerprint(base)[:12] in text


def test_nothing_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of("gpt2-causal-lm")
    path = write_adapter(tmp_path / "task.safetensors", adapter_of(base, tuned(base, 1)))
    before = path.read_bytes()

    def fails(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("prequant.adapters.file.save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        write_adapter(path, adapter_of(base, tuned(base, 2)))
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["task.safetensors"]
