"""AlphaTuning on tiny decoders: what it codes, what it trains, and the whole job, for text from data and classes."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

import prequant
from prequant.checkpoint import CheckpointError, save
from prequant.compress import compress
from prequant.passes import Program, weights
from prequant.recipes import AlphaTuning
from prequant.runtime import PrequantError, binary_code
from prequant.runtime.formats import WeightFormat
from prequant.sources import canonical_program, head_of, load_for
from prequant.tasks import DataToText, Limits, Task, task
from prequant.training import TrainingSettings

from .tiny import LENGTH, SST2, make_tokenizer, save_folder, write_data

BUDGET = TrainingSettings(max_steps=3, batch_size=4, scale_learning_rate=0.05, weight_decay=0.5, dropout=False)
E2E = DataToText("e2e", ("x",), task("e2e").readings, beams=2, longest_text=6)  # type: ignore[attr-defined]
LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


@pytest.fixture(autouse=True)
def one_thread(reproducible: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    return save_folder(tmp_path / "decoder", "GPT2", "LMHeadModel", pad_token_id=0)


@pytest.fixture
def meanings(tmp_path: Path) -> Path:
    rows = {"mr": [f"name[day {i % 4}], food[good]" for i in range(12)], "ref": ["a good film", "the day was bad"] * 6}
    folder = tmp_path / "e2e"
    folder.mkdir()
    for split in ("train", "dev"):
        Dataset.from_dict(rows).to_csv(folder / f"{split}set.csv")
    return folder


def trainable(program: Program) -> set[str]:
    return {name for name, p in program.named_parameters() if p.requires_grad}


def prepared(folder: Path, recipe: AlphaTuning, of: Task) -> tuple[Program, Program]:
    """The float model and what the recipe makes of it."""
    model, _ = load_for(folder, of, 0, make_tokenizer())
    original = canonical_program(model, make_tokenizer())
    return original, recipe.prepare(original, head_of(model, of))(original)


@pytest.mark.parametrize(("bits", "group", "refine"), [(1, 0, 0), (3, 0, 0), (2, 8, 0), (3, 0, 4)])
def test_linears_are_coded_and_first_alphas_train(decoder: Path, bits: int, group: int, refine: int) -> None:
    original, program = prepared(decoder, AlphaTuning(bits=bits, group_size=group, refine=refine), E2E)
    names = [f"transformer.h.{i}.{name}" for i in range(2) for name in LINEARS]
    ending = "first_alphas" if bits > 1 else "alphas"
    assert trainable(program) == {f"{name}.weight.{ending}" for name in names}
    format = WeightFormat.bcq(bits, group)
    for name in names:
        expected = binary_code(original.tensor(f"{name}.weight").detach(), format, refine)
        assert torch.equal(program.tensor(f"{name}.weight.planes"), expected.codes)
        alphas = program.tensor(f"{name}.weight.{ending}")
        assert torch.equal(alphas, expected.scale[:1]) and alphas.shape[0] == 1
    assert program.tensor("transformer.wte.weight").dtype is torch.float32
    # 9 h for each block row-wise, as the paper counts: 3 h + h + 4 h + h.
    if not group:
        assert program.reports[-1].totals["trainable"] == 2 * 9 * 32


def test_what_trains_is_what_the_option_says(decoder: Path) -> None:
    _, program = prepared(decoder, AlphaTuning(train=("alphas", "layer-norms", "biases")), E2E)
    kinds = {name.rpartition(".")[2] for name in trainable(program)}
    assert kinds == {"alphas", "weight", "bias"} and all("ln_" in n for n in trainable(program) if n.endswith("weight"))
    _, program = prepared(decoder, AlphaTuning(mean_gradients=False), E2E)
    assert not [node for node in program.graph.nodes if "scale_gradient" in node.name]
    _, program = prepared(decoder, AlphaTuning(train=(), embeddings=True), E2E)
    formats = {view.name: view.format for view in weights(program)}
    assert set(formats.values()) == {"bcq3:row"} and "transformer.wte.weight" in formats


@pytest.mark.parametrize(
    ("options", "message"),
    [({"train": ("alphas", "first-alphas")}, "choose one"), ({"bits": 9}, "bits=9"), ({"refine": -1}, "refine=-1")],
)
def test_options_that_make_no_recipe_are_named_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PrequantError, match=message):
        AlphaTuning(**options)


def test_a_program_that_trains_is_not_saved_before_it_is_frozen(decoder: Path, tmp_path: Path) -> None:
    recipe = AlphaTuning()
    _, program = prepared(decoder, recipe, E2E)
    with pytest.raises(CheckpointError, match=r"its alphas is .*; if it is being trained, freeze first"):
        save(program, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    save(recipe.finish()(program), tmp_path / "out")
    assert sum(p.numel() for p in prequant.load(tmp_path / "out").parameters()) > 0


def test_the_whole_job_on_text_from_data(decoder: Path, meanings: Path, tmp_path: Path) -> None:
    recipe = AlphaTuning(training=BUDGET)
    out = tmp_path / "out"
    report = compress(decoder, recipe, E2E, meanings, out, max_length=LENGTH, progress=False)
    assert list(report.compressed.scores) == ["BLEU", "ROUGE-L", "NIST"] and report.examples == 4
    assert report.compressed.trainable == 2 * 9 * 32 and report.baseline is not None
    assert report.settings["recipe"]["recipe"] == "alphatuning"
    saved, (_, start) = prequant.load(out), prepared(decoder, recipe, E2E)
    for name, value in saved.named_parameters():
        if name.endswith(".alphas"):
            base = name.removesuffix("alphas")
            assert not torch.isclose(value[0], start.tensor(base + "first_alphas")[0]).all()
            assert torch.equal(value[1:], start.tensor(base + "other_alphas"))
        else:
            assert torch.equal(value, start.tensor(name)), name
    rows = E2E.load(meanings)["validation"]
    score = E2E.evaluate(saved, rows, make_tokenizer(), Limits(LENGTH), progress=False)
    assert score.scores == report.compressed.scores
    again = tmp_path / "again"
    compress(decoder, recipe, E2E, meanings, again, baseline="none", max_length=LENGTH, progress=False)
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("family", ["GPT2", "OPT", "Llama"])
def test_classes_take_a_head_that_trains(family: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    options = {
        "GPT2": {},
        "OPT": {**sizes, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": LENGTH},
        "Llama": {**sizes, "num_key_value_heads": 2, "intermediate_size": 48},
    }[family]
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    folder = save_folder(tmp_path / family, family, head, pad_token_id=0, **options)
    recipe = AlphaTuning(training=dataclasses.replace(BUDGET, head_learning_rate=1e-2))
    data = write_data(tmp_path / "rows.tsv")
    report = compress(folder, recipe, SST2, data, tmp_path / "out", baseline="none", max_length=LENGTH, progress=False)
    _, start = prepared(folder, recipe, SST2)
    assert {name for name in trainable(start) if not name.endswith("first_alphas")} == {"score.weight"}
    saved = prequant.load(tmp_path / "out")
    assert not torch.equal(saved.tensor("score.weight"), start.tensor("score.weight"))
    assert report.metric_name == "accuracy" and report.compressed.trainable > 2 * 32
