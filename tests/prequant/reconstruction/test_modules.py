"""A model and its quantized copy in modules, what is compared, and texts in batches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prequant.passes import PassError, Train
from prequant.reconstruction import CalibrationSet, ReconstructionError, encode_texts, joined, split
from prequant.reconstruction.modules import Results, reconstruction_loss
from prequant.sources import canonical_program
from prequant.tasks import TaskError

from ..tiny import LENGTH, encoded, make_model, make_tokenizer
from .chains import modules_of, original, recipe, texts


def test_the_teachers_give_the_models_hidden_states_and_logits() -> None:
    """Against transformers' own hidden states."""
    modules, _ = modules_of(recipe(modules=4))
    model, batch, values = make_model(num_hidden_layers=4), texts()[2], dict[str, Tensor]()
    with torch.no_grad():
        wanted = model(**batch, output_hidden_states=True)
    for number, module in enumerate(modules):
        found = module.targets({**batch, **values})
        expected = wanted.hidden_states[number + 1]
        if number < 3:
            assert list(found.handed_on) == ["hidden_states"] and len(found.compared) == 1
            torch.testing.assert_close(found.compared[0], expected, rtol=1e-4, atol=1e-5)
        else:
            torch.testing.assert_close(found.compared[0], wanted.logits, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.compared[1], expected, rtol=1e-4, atol=1e-5)
        values = dict(found.handed_on)


def test_of_all_layers_every_one_is_compared() -> None:
    modules, _ = modules_of(recipe(modules=2, objective="layers"))
    model, batch = make_model(num_hidden_layers=4), texts()[1]
    with torch.no_grad():
        wanted = model(**batch, output_hidden_states=True)
    first = modules[0].targets(batch)
    second = modules[1].targets({**batch, **first.handed_on})
    for found, expected in zip(
        (*first.compared, *second.compared),
        (*wanted.hidden_states[2:0:-1], wanted.logits, *wanted.hidden_states[3:]),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", ["output", "layers"])
def test_embeddings_and_head_may_be_modules_of_their_own(objective: Any) -> None:
    program, _ = original(2)
    modules, _ = split(program, Train(head=("*",))(program), boundaries=[0, 2], objective=objective)
    assert [module.blocks for module in modules] == [0, 2, 0]
    batch, values, compared = texts()[0], dict[str, Tensor](), list[int]()
    for module in modules:
        found = module.targets({**batch, **values})
        values = dict(found.handed_on)
        compared.append(len(found.compared))
    assert compared == [1, 2 if objective == "layers" else 1, 1]
    with torch.no_grad():
        assert torch.equal(values["logits"], program(**batch).logits)


def test_the_students_are_the_quantized_copy_and_join_to_it() -> None:
    method, (program, head) = recipe(modules=3), original()
    student = method.prepare(program, head, texts().batches[:2], progress=False)
    modules, parts = split(program, student, 3)
    batch, values = texts()[3], dict[str, Tensor]()
    with torch.no_grad():
        for module in modules:
            found = module.results({**batch, **values})
            values = dict(found.handed_on)
        expected = student(**batch).logits
        assert torch.equal(found.compared[0], expected)
        assert torch.equal(joined(parts, modules)(**batch).logits, expected)
    assert sum(module.blocks for module in modules) == 4


def test_what_two_modules_read_trains_in_none() -> None:
    """The table of words that a language model's head is tied to."""
    from transformers import PreTrainedModel

    model: PreTrainedModel = make_model(head="ForMaskedLM", num_hidden_layers=2)
    program: Any = canonical_program(model, make_tokenizer())
    method = recipe(attention=False)
    student = method.prepare(program, (), texts().batches[:1], progress=False)
    modules, parts = split(program, student, 2)
    words = "bert.embeddings.word_embeddings.weight"
    assert any(name.startswith(words) for name in parts.shared)
    for module in modules:
        trained = {name for name, p in module.student.named_parameters() if p.requires_grad}
        assert trained and not any(name.startswith(words) for name in trained)
    assert joined(parts, modules)(**texts()[0]).logits.shape[-1] == program.config.vocab_size


def test_more_modules_than_layers_are_refused() -> None:
    with pytest.raises(PassError, match="5 modules of 4 blocks"):
        modules_of(recipe(modules=5))


def test_another_signature_is_refused() -> None:
    program, _ = original()
    other, _ = original(hidden_size=64, intermediate_size=64)
    with pytest.raises(ReconstructionError, match="module 2 of the quantized model takes or hands on something else"):
        split(program, Train(head=("*",))(other), 2)


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_the_loss_is_a_mean_of_squares_without_padding() -> None:
    given = torch.tensor([[[1.0, 2.0], [5.0, 5.0]], [[0.0, 1.0], [2.0, 2.0]]])
    wanted = torch.zeros(2, 2, 2)
    mask = torch.tensor([[1, 0], [1, 1]])
    assert reconstruction_loss([given], [wanted], [mask]).item() == pytest.approx((1 + 4 + 0 + 1 + 4 + 4) / 6)
    assert reconstruction_loss([given], [wanted]).item() == pytest.approx((1 + 4 + 25 + 25 + 0 + 1 + 4 + 4) / 8)
    logits = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    both = reconstruction_loss([given, logits], [wanted, torch.zeros(2, 2)], [mask])
    assert both.item() == pytest.approx(14 / 6 + 10 / 4), "of logits every row counts"


def test_logits_of_padded_positions_do_not_count() -> None:
    """Those of question answering, which are one for each position."""
    program: Any = canonical_program(make_model(head="ForQuestionAnswering"), make_tokenizer())
    ((module,), _) = split(program, Train(head=("*",))(program), 1)
    batch = next(batch for batch in texts() if not batch["attention_mask"].all())
    found = module.targets(batch)
    padded = batch["attention_mask"] == 0
    other = [torch.where(padded[..., None], value + 1, value) for value in found.compared]
    assert len(other) == 3 and reconstruction_loss(other, found.compared, [batch["attention_mask"]]) == 0


def test_what_is_handed_on_is_a_mixture() -> None:
    ours = Results({"hidden_states": torch.full((2, 3), 1.0), "codes": torch.arange(3)}, ())
    theirs = {"hidden_states": torch.full((2, 3), 5.0), "codes": torch.arange(3)}
    mixed = ours.mixed(theirs, 0.25)
    assert torch.equal(mixed["hidden_states"], torch.full((2, 3), 2.0)) and torch.equal(mixed["codes"], torch.arange(3))
    assert ours.mixed(theirs, 0.0) is ours.handed_on


# ---- texts -----------------------------------------------------------------------------------------------------------


def test_batches_hold_every_text_once_those_of_a_length_together() -> None:
    found = CalibrationSet.of(encoded(count=20), make_tokenizer(), 100, 6, seed=3)
    assert [len(batch["input_ids"]) for batch in found] == [6, 6, 6, 2] and found.rows == 20
    rows = [
        row[mask.bool()].tolist() for b in found for row, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
    ]
    assert sorted(rows) == sorted(map(list, encoded(count=20)["input_ids"]))
    lengths = list(map(len, rows))
    assert lengths == sorted(lengths)
    few = CalibrationSet.of(encoded(count=20), make_tokenizer(), 5, 6, seed=3)
    assert few.rows == 5 and few.digest != CalibrationSet.of(encoded(count=20), make_tokenizer(), 5, 6, seed=4).digest


def test_observed_batches_are_of_all_lengths() -> None:
    found = CalibrationSet.of(encoded(count=20), make_tokenizer(), 100, 1, seed=3)
    lengths = [batch["input_ids"].shape[1] for batch in found.spread(4)]
    assert lengths == [found[number]["input_ids"].shape[1] for number in (2, 7, 12, 17)]
    assert lengths[0] < lengths[-1]
    assert found.spread(100).digest == found.digest and len(found.spread(1)) == 1


def test_every_round_has_every_batch() -> None:
    found, order = texts(), texts().order(seed=1)
    rounds = [[next(order) for _ in found] for _ in range(3)]
    assert all(sorted(numbers) == list(range(len(found))) for numbers in rounds) and rounds[0] != rounds[1]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("lines.txt", "a good film\n\na bad film\n"),
        ("table.csv", "idx,text\n0,a good film\n1,\n2,a bad film\n"),
        ("rows.jsonl", '{"sentence": "a good film"}\n{"sentence": "a bad film"}\n'),
    ],
)
def test_texts_of_a_file_are_read_as_the_tokenizer_reads_them(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    rows = encode_texts(tmp_path / name, make_tokenizer(), LENGTH, progress=False)
    expected = make_tokenizer()(["a good film", "a bad film"])["input_ids"]
    assert rows["input_ids"][:] == expected


def test_pairs_are_read_as_pairs(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"sentence1": "a good film", "sentence2": "a bad film"}\n')
    rows = encode_texts(tmp_path / "pairs.jsonl", make_tokenizer(), LENGTH, progress=False)
    assert rows["input_ids"][0] == make_tokenizer()("a good film", "a bad film")["input_ids"]


def test_questions_are_read_with_their_contexts(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"question": "a good film", "context": "a bad film"}\n')
    rows = encode_texts(tmp_path / "pairs.jsonl", make_tokenizer(), LENGTH, progress=False)
    assert rows["input_ids"][0] == make_tokenizer()("a good film", "a bad film")["input_ids"]


def test_files_without_texts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    with pytest.raises(
        ReconstructionError, match=r"table.csv has no column of texts: one of text, .* is read; it has a, b"
    ):
        encode_texts(tmp_path / "table.csv", make_tokenizer(), LENGTH, progress=False)
    (tmp_path / "blank.txt").write_text(" \n\n")
    with pytest.raises(ReconstructionError, match="has no texts"):
        encode_texts(tmp_path / "blank.txt", make_tokenizer(), LENGTH, progress=False)
    with pytest.raises(TaskError, match="does not exist"):
        encode_texts(tmp_path / "none.txt", make_tokenizer(), LENGTH, progress=False)
    with pytest.raises(ReconstructionError, match="the calibration set is empty"):
        CalibrationSet([])
