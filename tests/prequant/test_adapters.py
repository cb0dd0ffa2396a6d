"""Adapters: files of what tasks have of their own, loaded on one base, chosen, mixed, and refused."""

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prequant.adapters import AdapterError, adapter_of, fingerprint, read_adapter, variant, write_adapter
from prequant.adapters.heads import with_head
from prequant.checkpoint import load, save
from prequant.model import ModelProgram
from prequant.model_class import find_model_class
from prequant.passes import lower, weights
from prequant.runtime import PrequantError, native_linear

from ..models import FAMILIES, traced
from .adapter_bases import FORMS, GPT2, OWN, base_of, equal, headed, inputs, tuned

# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["bert-sequence-classification", "gpt2-causal-lm", "t5-seq2seq-lm"])
def test_an_adapter_is_all_that_a_task_has_of_its_own(name: str, form: str, tmp_path: Path) -> None:
    base = base_of(name, form)
    task = tuned(base, 1)
    path = write_adapter(tmp_path / "a" / "task.safetensors", adapter_of(base, task, {"task": "x"}))
    read = read_adapter(path)
    ending = ".first_alphas" if form == "binary" else ".outliers.values"
    assert any(key.endswith(ending) for key in read.tensors)
    assert all(key.endswith((*OWN, ".first_alphas")) for key in read.tensors)
    assert read.about == {"task": "x"} and read.base == fingerprint(base)
    loaded = variant(base, read)
    batch = inputs(name, 3)
    assert equal(loaded(**batch), task(**batch)) and not equal(loaded(**batch), base(**batch))
    own = dict(loaded.named_buffers())
    for key, tensor in base.named_buffers():
        assert own[key] is tensor  # codes, positions
    assert path.stat().st_size < 0.5 * sum(t.nbytes for t in (*base.parameters(), *base.buffers()))


@torch.inference_mode()
def test_all_of_it_in_inference_mode(folder: Path) -> None:
    loaded, batch = load_with(folder, "ab"), inputs("gpt2-causal-lm", 2)
    loaded.set_adapter("a")
    alone = loaded(**batch)
    mixed = loaded(**batch, adapters=["a", "b"])
    assert torch.allclose(mixed.logits[0], alone.logits[0], atol=1e-4)
    assert not torch.allclose(mixed.logits[1], alone.logits[1], atol=1e-2)


def test_a_fingerprint_is_of_what_is_computed_with(tmp_path: Path) -> None:
    simulated = FORMS["outliers"](traced("bert-sequence-classification"))
    base = lower(simulated)
    save(base, tmp_path / "base")
    loaded = load(tmp_path / "base")
    assert fingerprint(base) == fingerprint(loaded) == fingerprint(base.copy()) == fingerprint(simulated)
    before = fingerprint(base)
    name = next(name for name, _ in base.named_parameters() if name.endswith(".scale"))
    scale = base.tensor(name)
    with torch.no_grad():
        scale[0] *= 2
    assert fingerprint(base) != before
    with torch.no_grad():
        scale[0] /= 2
    assert fingerprint(base) == before
    scale = loaded.tensor(name)
    scale.data = scale.detach() * 2  # which no version counts
    twice = fingerprint(loaded)
    assert twice != before and fingerprint(loaded.to(torch.bfloat16)) not in (before, twice)


def test_a_task_that_changed_more_than_an_adapter_holds_is_refused() -> None:
    base = base_of("bert-sequence-classification", "outliers")
    other = base.copy()
    name = next(name for name, _ in base.named_buffers() if name.endswith(".codes"))
    other.set_tensor(name, base.tensor(name) ^ 1)
    with pytest.raises(AdapterError, match=f"{name} differs from the base, and holds no floats"):
        adapter_of(base, other)
    other = base.copy()
    name = next(name for name, _ in base.named_parameters() if name.endswith("outliers.values"))
    other.set_tensor(name, base.tensor(name).double())
    with pytest.raises(AdapterError, match=f"{name} is torch.float64 .* an adapter keeps types and shapes"):
        adapter_of(base, other)


# ---- other heads -----------------------------------------------------------------------------------------------------


BERT = "transformers.models.bert.modeling_bert"


@pytest.mark.parametrize(
    ("name", "path", "classes"),
    [
        ("gpt2-causal-lm", f"{GPT2}.GPT2ForSequenceClassification", 3),
        ("gpt2-causal-lm", f"{GPT2}.GPT2ForTokenClassification", 5),
        ("gpt2-sequence-classification", f"{GPT2}.GPT2LMHeadModel", 3),
        ("gpt2-sequence-classification", f"{GPT2}.GPT2ForSequenceClassification", 7),
        ("bert-sequence-classification", f"{BERT}.BertForQuestionAnswering", 2),
        ("llama-causal-lm", "transformers.models.llama.modeling_llama.LlamaForSequenceClassification", 2),
        ("opt-causal-lm", "transformers.models.opt.modeling_opt.OPTForSequenceClassification", 2),
    ],
)
def test_a_head_of_another_class(name: str, path: str, classes: int, tmp_path: Path) -> None:
    base = base_of(name)
    task = tuned(headed(base, path, classes, seed=3), 1)
    adapter = read_adapter(write_adapter(tmp_path / "task.safetensors", adapter_of(base, task)))
    loaded = variant(base, adapter)
    batch = inputs(name, 2)
    assert equal(loaded(**batch), task(**batch))
    assert type(loaded).__name__ == path.rpartition(".")[2] and loaded.config.num_labels == classes
    # An independent truth: the float model of that class over the weights that the base stands for.
    model: Any = find_model_class(path)._from_config(copy.deepcopy(loaded.config))
    state = {view.name: view.value() for view in weights(loaded)}
    for key, value in loaded.named_parameters():
        if not key.endswith((".alphas", ".planes")):
            state.setdefault(key, value)
    conv1d = {f"{path}.weight" for path, module in model.named_modules() if type(module).__name__ == "Conv1D"}
    state = {key: value.t() if key in conv1d else value for key, value in state.items()}
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert all("lm_head" in key for key in missing)  # tied
    model.tie_weights()
    expected = model.eval()(**batch)
    torch.testing.assert_close(loaded(**batch)[0], expected[0], rtol=1e-3, atol=1e-4)


def test_the_same_seed_draws_the_same_head() -> None:
    base = base_of("gpt2-causal-lm")
    path = f"{GPT2}.GPT2ForSequenceClassification"
    state = torch.get_rng_state()
    first, again, other = (headed(base, path, 2, seed).tensor("score.weight") for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_class_of_another_model_is_no_head() -> None:
    base = base_of("gpt2-causal-lm")
    with pytest.raises(PrequantError, match=r"'os\.system' is not one of transformers, nor of an imported module"):
        find_model_class("os.system")
    with pytest.raises(PrequantError, match=r"'transformers\.nowhere\.X'"):
        find_model_class("transformers.nowhere.X")
    bert = FAMILIES["bert-masked-lm"]().model
    before = bert.config.to_dict()
    with pytest.raises(AdapterError, match="a BertForMaskedLM has no weight in common with the base"):
        with_head(base, type(bert), bert.config)
    assert bert.config.to_dict() == before


# ---- choosing --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in a folder, with the files of two tasks of its own kind, and of two that tell classes."""
    folder = tmp_path_factory.mktemp("tasks")
    base = base_of("gpt2-causal-lm")
    save(base, folder / "base")
    classifier = headed(base, f"{GPT2}.GPT2ForSequenceClassification", 3, seed=5)
    other = headed(base, f"{GPT2}.GPT2ForSequenceClassification", 5, seed=6)
    for name, task in {"a": tuned(base, 1), "b": tuned(base, 2), "c": tuned(classifier, 3), "d": other}.items():
        write_adapter(folder / f"{name}.safetensors", adapter_of(base, task, {"task": name}))
    return folder


def load_with(folder: Path, names: str) -> ModelProgram:
    base: Any = load(folder / "base")
    for name in names:
        base.load_adapter(name, folder / f"{name}.safetensors")
    assert isinstance(base, ModelProgram)
    return base


@pytest.fixture
def loaded(folder: Path) -> ModelProgram:
    """The base with the two tasks of its own kind."""
    return load_with(folder, "ab")


@pytest.fixture
def with_all(folder: Path) -> ModelProgram:
    """The base with all three."""
    return load_with(folder, "abc")


def test_a_program_becomes_the_one_of_the_adapter_in_use(folder: Path, tmp_path: Path) -> None:
    loaded, batch = load_with(folder, "abc"), inputs("gpt2-causal-lm", 3)
    base: Any = load(folder / "base")
    expected: dict[str | None, Any] = {None: base(**batch)}
    expected |= {task: variant(base, read_adapter(folder / f"{task}.safetensors"))(**batch) for task in "abc"}
    assert (*loaded.adapters, loaded.active_adapter) == ("a", "b", "c", None)
    for name in ("a", "c", None, "b", "c", "a"):
        loaded.set_adapter(name)
        assert loaded.active_adapter == name
        assert equal(loaded(**batch), expected[name])
        assert loaded.task == ("sequence-classification" if name == "c" else "causal-lm")
        assert loaded.can_generate() is (name != "c")
    assert type(loaded).__name__ == "GPT2LMHeadModel"
    save(loaded, tmp_path / "merged")
    assert equal(load(tmp_path / "merged")(**batch), expected["a"])


def test_generating_with_each_adapter(loaded: ModelProgram) -> None:
    ids = torch.tensor([[5, 6, 7]])
    texts: dict[str | None, Tensor] = {}
    for name in ("a", "b", None, "a"):
        loaded.set_adapter(name)
        got = loaded.generate(input_ids=ids, max_new_tokens=12, do_sample=False, pad_token_id=1)
        logits = loaded(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert int(got[0, 3]) == int(logits[0, -1].argmax())
        assert torch.equal(texts.setdefault(name, got), got)


def test_choosing_packs_nothing_and_copies_no_codes(with_all: ModelProgram, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, batch = with_all, inputs("gpt2-causal-lm", 2)
    for name in ("a", "b", "c", None):
        loaded.set_adapter(name)
        loaded(**batch)

    def packs(*args: Any) -> Tensor:
        raise AssertionError("something is packed anew")

    for function in ("_pack_codes", "_pack_scales"):
        monkeypatch.setattr(native_linear, function, packs)
    for name in ("c", "a", None, "b"):
        loaded.set_adapter(name)
        loaded(**batch)
    memories = [
        {name: tensor.data_ptr() for name, tensor in program.named_buffers() if name.endswith(".planes")}
        for program in loaded._adapters.programs.values()  # type: ignore[union-attr]
    ]
    assert memories[0] and all(memory == memories[0] for memory in memories)


def test_an_adapter_is_unloaded_with_its_memory(loaded: ModelProgram, folder: Path) -> None:
    batch = inputs("gpt2-causal-lm", 2)
    for name in ("a", "b", None):
        loaded.set_adapter(name)
        loaded(**batch)
    codes = next(tensor for name, tensor in loaded.named_buffers() if name.endswith(".planes"))
    before = len(native_linear._packed[codes].weights)
    loaded.delete_adapter("a")
    gc.collect()
    assert loaded.adapters == ("b",) and len(native_linear._packed[codes].weights) == before - 1
    loaded.set_adapter("b")
    with pytest.raises(AdapterError, match="'b' is in use"):
        loaded.delete_adapter("b")
    with pytest.raises(AdapterError, match="'b' is in use"):
        loaded.load_adapter("b", folder / "a.safetensors")
    with pytest.raises(AdapterError, match="no adapter 'a' is loaded; there are b"):
        loaded.set_adapter("a")


def test_a_program_without_adapters_says_so() -> None:
    base = base_of("gpt2-causal-lm")
    base.set_adapter(None)
    for call in (lambda: base.set_adapter("x"), lambda: base.delete_adapter("x")):
        with pytest.raises(PrequantError, match="no adapter 'x' is loaded; there are none"):
            call()
    with pytest.raises(PrequantError, match="none is loaded"):
        base(**inputs("gpt2-causal-lm", 2), adapters=["x", "x"])


def test_copies_have_no_adapters_and_moving_comes_first(loaded: ModelProgram) -> None:
    loaded.set_adapter("a")
    batch = inputs("gpt2-causal-lm", 2)
    for copied in (loaded.copy(), copy.deepcopy(loaded)):
        assert copied.adapters == () and equal(copied(**batch), loaded(**batch))
    with pytest.raises(PrequantError, match="move it before"):
        loaded.to("cpu")


# ---- rows of several tasks -------------------------------------------------------------------------------------------


def test_rows_of_several_tasks_in_one_call(loaded: ModelProgram) -> None:
    batch = inputs("gpt2-causal-lm", 6)
    names = ["a", None, "b", "a", "b", "b"]
    together = loaded(**batch, adapters=names)
    for name in dict.fromkeys(names):
        rows = [i for i, each in enumerate(names) if each == name]
        loaded.set_adapter(name)
        alone = loaded(**{key: value[rows] for key, value in batch.items()})
        assert type(together) is type(alone) and torch.equal(together.logits[rows], alone.logits)
    again = loaded(*batch.values(), adapters=names)  # another one is in use, and inputs come by position
    assert torch.equal(again.logits, together.logits)


def test_a_compiled_call_of_the_base_is_the_bases_whatever_is_in_use(loaded: ModelProgram) -> None:
    batch = inputs("gpt2-causal-lm", 3)
    ours = torch.compile(lambda: loaded(**batch, adapters=[None] * 3).logits, backend="eager")
    with torch.no_grad():
        expected = loaded(**batch).logits
        for name in ("a", None, "b"):
            loaded.set_adapter(name)
            assert torch.equal(ours(), expected)


def test_rows_of_tasks_with_other_classes(folder: Path) -> None:
    loaded, batch = load_with(folder, "cd"), inputs("gpt2-causal-lm", 4)
    results = loaded(**batch, adapters=["c", "d", "c", "d"])
    assert [result.logits.shape for result in results] == [(1, 3), (1, 5), (1, 3), (1, 5)]
    loaded.set_adapter("d")
    alone = loaded(**{key: value[1::2] for key, value in batch.items()})
    assert torch.equal(torch.cat([results[1].logits, results[3].logits]), alone.logits)


def test_rows_of_tasks_with_different_heads(with_all: ModelProgram) -> None:
    loaded, batch = with_all, inputs("gpt2-causal-lm", 5)
    names = ["c", "a", "c", "b", "c"]
    results = loaded(**batch, adapters=names)
    assert isinstance(results, tuple) and len(results) == 5
    for name in "abc":
        rows = [i for i, each in enumerate(names) if each == name]
        loaded.set_adapter(name)
        alone = loaded(**{key: value[rows] for key, value in batch.items()})
        for i, row in enumerate(rows):
            assert type(results[row]) is type(alone)
            assert torch.equal(results[row].logits, alone.logits[i : i + 1])


def test_rows_of_one_task_need_no_other_graph(loaded: ModelProgram) -> None:
    batch = inputs("gpt2-causal-lm", 2)
    result = loaded(**batch, adapters=["b", "b"])
    loaded.set_adapter("b")
    assert equal(result, loaded(**batch))


def test_names_that_do_not_fit_the_rows(loaded: ModelProgram) -> None:
    batch = inputs("gpt2-causal-lm", 3)
    with pytest.raises(AdapterError, match=r"named for 2 rows; input_ids is \[3, 6\]"):
        loaded(**batch, adapters=["a", "b"])
    with pytest.raises(AdapterError, match="no adapter 'z' is loaded; there are a, b"):
        loaded(**batch, adapters=["a", "b", "z"])
    with pytest.raises(TypeError, match=r"unexpected input 'labels'; .* and no labels"):
        loaded(**batch, adapters=["a", "b", "a"], labels=batch["input_ids"])
