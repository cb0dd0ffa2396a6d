from typing import Any, cast

import pytest
import torch
from datasets import Dataset

from prequant.sources import canonical_program
from prequant.tasks import DataToText, Limits, TaskError, task
from prequant.tasks.data_to_text import IGNORED

from ..tiny import make_model, make_tokenizer

E2E, DART, WEB_NLG = task("e2e"), task("dart"), task("webnlg")
SMALL = DataToText("e2e", ("x",), E2E.readings, beams=2, longest_text=6)  # type: ignore[attr-defined]
MR = "name[Blue Spice], eatType[pub], near[The film]"
ROWS = Dataset.from_dict({"mr": [MR, "name[a]", MR], "ref": ["a good film", " fine day ", "the film was good"]})
LENGTH = 32


def test_slots_become_a_line_and_texts_of_the_same_data_come_together() -> None:
    grouped = E2E.checked(ROWS, "here")
    assert list(grouped["source"]) == ["name : Blue Spice | eatType : pub | near : The film", "name : a"]
    assert list(grouped["references"]) == [["a good film", "the film was good"], [" fine day "]]
    hub = ROWS.rename_columns({"mr": "meaning_representation", "ref": "human_reference"})
    assert E2E.checked(hub, "here").to_list() == grouped.to_list()


def test_triples_become_a_line() -> None:
    dart = {
        "tripleset": [["Mars Hill", "JOINED", "1973"], ["Mars Hill", "LOCATION", "Mars Hill, NC"]],
        "annotations": {"source": ["x"], "text": ["Mars Hill joined in 1973."]},
    }
    assert DART.checked(Dataset.from_list([dart]), "here").to_list() == [
        {
            "source": "Mars Hill : JOINED : 1973 | Mars Hill : LOCATION : Mars Hill, NC",
            "references": ["Mars Hill joined in 1973."],
        }
    ]
    web = {
        "modified_triple_sets": {"mtriple_set": [["A | b | c d", "A | e | f"], ["A | e | f", "A | b | c d"]]},
        "lex": {"comment": ["good", "bad"], "text": ["A is.", "wrong"]},
    }
    assert WEB_NLG.checked(Dataset.from_list([web]), "here").to_list() == [
        {"source": "A : b : c d | A : e : f", "references": ["A is."]}
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"mr": ["name Blue"], "ref": ["x"]}, "here, row 0: 'name Blue' is no meaning representation"),
        ({"mr": [MR, None], "ref": ["x", "y"]}, "here: row 1 is not what e2e has: {'mr': None"),
        ({"mr": [MR], "ref": [" "]}, r"row 0 has a text that is none: \[' '\]"),
        ({"mr": [MR]}, "no column 'ref', which task 'e2e' needs; it has mr"),
    ],
)
def test_rows_that_are_not_the_tasks_are_named(rows: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        E2E.checked(Dataset.from_dict(rows), "here")


def test_each_text_is_trained_on_by_itself_and_the_data_is_not() -> None:
    tokenizer, grouped = make_tokenizer(), SMALL.checked(ROWS, "here")
    encoded = SMALL.encode(grouped, tokenizer, LENGTH, progress=False)
    texts = ["a good film", "the film was good", "fine day"]
    assert len(encoded) == 3
    for row, text, source in zip(encoded, texts, [*[grouped["source"][0]] * 2, "name : a"], strict=True):
        prompt = tokenizer(source + " ||")["input_ids"]
        said = [*tokenizer(" " + text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        assert row["input_ids"] == prompt + said
        assert row["labels"] == [IGNORED] * len(prompt) + said
        assert row["attention_mask"] == [1] * len(row["input_ids"])
    short = SMALL.encode(grouped, tokenizer, 12, progress=False)
    assert all(len(row["input_ids"]) <= 12 and len(row["labels"]) == len(row["input_ids"]) for row in short)
    assert all(row["labels"][-1] != IGNORED for row in short)  # the data gives way to the text
    with pytest.raises(TaskError, match="max_length=7: expected 8 to"):
        SMALL.encode(grouped, tokenizer, 7)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_program_says_what_its_model_says_and_has_its_loss(batch_size: int) -> None:
    tokenizer, model = make_tokenizer(), make_model("GPT2", "LMHeadModel", pad_token_id=0)
    program, grouped = canonical_program(model, tokenizer), SMALL.checked(ROWS, "here")
    limits = Limits(LENGTH, batch_size)
    results = [SMALL.evaluate(each, grouped, tokenizer, limits, progress=False) for each in (model, program)]
    assert results[0] == results[1]
    assert list(results[0].scores) == ["BLEU", "ROUGE-L", "NIST"] and results[0].examples == 2
    # Each prompt by itself, without padding, by transformers alone.
    for text, source in zip(results[0].predictions, grouped["source"], strict=True):
        ids = tokenizer(source + " ||", return_tensors="pt")["input_ids"]
        written: Any = cast(Any, model).generate(
            ids, max_new_tokens=6, num_beams=2, length_penalty=0.9, do_sample=False, eos_token_id=2, pad_token_id=0
        )
        assert [text] == [
            t.strip() for t in tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
        ]
    batch = SMALL.collator(tokenizer)(list(SMALL.encode(grouped, tokenizer, LENGTH, progress=False)))
    torch.testing.assert_close(program(**batch).loss, model(**batch).loss)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(program(**batch).loss, expected)
