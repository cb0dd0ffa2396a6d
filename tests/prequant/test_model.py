"""ModelProgram: called like the model it came from, by people, by the Trainer and by pipelines."""

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BertForTokenClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.modeling_outputs import BaseModelOutput, ImageClassifierOutput, SequenceClassifierOutput
from transformers.utils import ModelOutput

from prequant.losses import CLASSES, shift_right, task_of
from prequant.model import ModelProgram, output_class
from prequant.runtime import PrequantError
from prequant.trace import TraceError, trace

from ..models import FAMILIES, VOCABULARY, random_inputs, small_model, traced

IGNORED = -100


def program_of(name: str) -> ModelProgram:
    return cast(ModelProgram, traced(name))


def labels_for(model: PreTrainedModel, inputs: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Random targets of the head's kind, some of them ignored."""
    batch, length = inputs["input_ids"].shape
    generator = torch.Generator().manual_seed(3)
    if name.endswith("question-answering"):
        # One of them lies outside the text, which models ignore.
        return {"start_positions": torch.tensor([1, 2, length + 3]), "end_positions": torch.tensor([3, length + 7, 4])}
    if name.endswith("sequence-classification"):
        return {"labels": torch.randint(3, (batch,), generator=generator)}
    classes = 3 if name.endswith("token-classification") else VOCABULARY
    length = inputs["decoder_input_ids"].shape[1] if "decoder_input_ids" in inputs else length
    labels = torch.randint(classes, (batch, length), generator=generator)
    return {"labels": labels.masked_fill(torch.rand(batch, length, generator=generator) < 0.3, IGNORED)}


# ---- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.endswith("encoder")])
def test_the_loss_is_the_models_own(name: str) -> None:
    family = FAMILIES[name]()
    model, program = copy.deepcopy(family.model), copy.deepcopy(program_of(name))
    inputs = family.make_inputs(3, 7, padded=True)
    assert program.task == task_of(model) and program.task is not None and name.endswith(program.task)
    targets = labels_for(model, inputs, name)
    for further in ({}, {"num_items_in_batch": torch.tensor(40)}):
        expected, actual = model(**inputs, **targets, **further), program(**inputs, **targets, **further)
        assert next(iter(actual)) == "loss" and actual[0] is actual.loss
        torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-6, atol=0)
    assert "loss" not in program(**inputs)
    actual.loss.backward()
    expected.loss.backward()
    ours = {key: value.grad for key, value in program.named_parameters() if value.grad is not None}
    theirs = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    assert ours.keys() == theirs.keys() and ours
    scale = max(float(grad.abs().max()) for grad in theirs.values())
    for key, grad in theirs.items():
        torch.testing.assert_close(ours[key], grad, rtol=1e-4, atol=1e-6 * scale)


@pytest.mark.parametrize(
    ("labels", "options", "labels_of"),
    [
        (torch.tensor([0.5, -1.0]), {"num_labels": 1}, "regression"),
        (torch.randn(2, 3), {"num_labels": 3, "problem_type": "regression"}, "regression"),
        (torch.tensor([[1.0, 0, 1], [0, 0, 1]]), {"num_labels": 3}, "multi_label_classification"),
        (torch.tensor([2, 0]), {"num_labels": 3}, "single_label_classification"),
    ],
)
def test_the_loss_goes_by_the_problem_type(labels: Tensor, options: dict[str, Any], labels_of: str) -> None:
    model = small_model("DistilBert", "ForSequenceClassification", **options)
    program = cast(ModelProgram, trace(model, random_inputs(model, 1, 3)))
    inputs = random_inputs(model, 2, 5)
    torch.testing.assert_close(program(**inputs, labels=labels).loss, model(**inputs, labels=labels).loss)
    assert program.config.problem_type == labels_of
    assert program.config is not model.config


def test_one_of_two_targets_is_none() -> None:
    inputs = FAMILIES["bert-question-answering"]().make_inputs(2, 5)
    program = program_of("bert-question-answering")
    assert "loss" not in program(**inputs, start_positions=torch.tensor([1, 2]))
    with pytest.raises(TypeError, match="unexpected input 'labels'"):
        program(**inputs, labels=torch.tensor([1, 2]))


def test_tasks_are_those_of_transformers_classes() -> None:
    class Custom(BertForTokenClassification):
        pass

    model = small_model("Bert", "ForTokenClassification")
    assert task_of(model) == "token-classification"
    assert task_of(Custom(model.config)) == "token-classification"
    assert task_of(small_model("Bert", "Model")) is None
    names = [name for classes in CLASSES.values() for name in classes.values() if isinstance(name, str)]
    assert "T5ForConditionalGeneration" in names


# ---- inputs ----------------------------------------------------------------------------------------------------------


def test_left_out_inputs_are_those_of_the_model() -> None:
    model = small_model("Bert", "ForMaskedLM")
    full = {**random_inputs(model, 1, 3), "token_type_ids": torch.zeros(1, 3, dtype=torch.int64)}
    program = trace(model, full)
    assert program.signature.names == ("input_ids", "attention_mask", "token_type_ids"), "in the order of forward"
    ids = random_inputs(model, 2, 6)["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(program(ids).logits, model(ids).logits, rtol=0, atol=1e-6)
        torch.testing.assert_close(program(input_ids=ids, attention_mask=None).logits, model(ids).logits)
    with pytest.raises(TypeError, match="input 'input_ids' is missing"):
        program(attention_mask=torch.ones(2, 6))
    with pytest.raises(TypeError, match="unexpected input 'position_ids'; this Program was traced with input_ids"):
        program(ids, position_ids=ids)


def test_a_decoders_inputs_are_made_from_labels() -> None:
    model = small_model("T5", "ForConditionalGeneration", num_layers=1)
    example = random_inputs(model, 1, 4)
    example["decoder_attention_mask"] = torch.ones_like(example["decoder_input_ids"])
    program = trace(model, example)
    inputs = random_inputs(model, 3, 7, padded=True)
    del inputs["decoder_input_ids"]
    labels = torch.tensor([[5, 6, 7], [8, 9, IGNORED], [4, IGNORED, IGNORED]])
    expected, actual = model(**inputs, labels=labels), program(**inputs, labels=labels)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(actual.loss, expected.loss)
    assert torch.equal(shift_right(labels, model.config), model._shift_right(labels))
    with pytest.raises(TypeError, match="input 'decoder_input_ids' is missing"):
        program(**inputs)
    model.config.pad_token_id = None
    with pytest.raises(PrequantError, match=r"can't be made from labels: .*pad_token_id is None"):
        shift_right(labels, model.config)


def test_tuples() -> None:
    model = small_model("Bert", "ForSequenceClassification")
    program, inputs = trace(model, random_inputs(model, 1, 3)), random_inputs(model, 2, 5)
    labels = torch.tensor([0, 2])
    expected = model(**inputs, labels=labels, return_dict=False)
    torch.testing.assert_close(program(**inputs, labels=labels, return_dict=False), expected)
    model.config.return_dict = False
    program = trace(model, random_inputs(model, 1, 3))
    torch.testing.assert_close(program(**inputs, labels=labels), expected)
    torch.testing.assert_close(program(**inputs), expected[1:])


# ---- outputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "os.system",
        "transformers.utils.ModelOutput",
        "transformers.BertModel",
        "transformers.modeling_outputs.NoSuchOutput",
        "transformers.no_such_module.Output",
        "transformersx.modeling_outputs.BaseModelOutput",
        "tests.models.Family",
        "Output",
        "",
    ],
)
def test_only_transformers_output_classes_are_made(path: str) -> None:
    with pytest.raises(PrequantError, match="output class"):
        output_class(path)


def test_output_classes_by_path() -> None:
    assert output_class("transformers.modeling_outputs.BaseModelOutput") is BaseModelOutput
    program = program_of("bert-sequence-classification")
    changed = program.copy()
    changed.update_info(
        extra={**program.info.extra, "output_class": "transformers.modeling_outputs.ImageClassifierOutput"}
    )
    assert type(changed(**FAMILIES["bert-sequence-classification"]().make_inputs(1, 3))) is ImageClassifierOutput
    with pytest.raises(PrequantError, match=r"output class 'collections\.OrderedDict'"):
        changed.update_info(extra={**program.info.extra, "output_class": "collections.OrderedDict"})


def test_an_output_class_of_ones_own_is_refused() -> None:
    class OwnOutput(SequenceClassifierOutput):
        pass

    model = small_model("Bert", "ForSequenceClassification")
    original = model.forward
    model.forward = lambda input_ids: OwnOutput(logits=original(input_ids).logits)
    with pytest.raises(TraceError, match=r"can't trace BertForSequenceClassification: it returns a .*OwnOutput"):
        trace(model, {"input_ids": torch.tensor([[5, 6]])})


# ---- being taken for a model -----------------------------------------------------------------------------------------


def test_what_it_says_of_itself() -> None:
    model, program = FAMILIES["bert-masked-lm"]().model, program_of("bert-masked-lm")
    assert program.config.to_dict() == model.config.to_dict()
    assert (program.device, program.dtype, program.main_input_name) == (model.device, model.dtype, "input_ids")
    assert program.num_parameters() == model.num_parameters()
    assert program.num_parameters(exclude_embeddings=True) == model.num_parameters(exclude_embeddings=True)
    assert type(program).__name__ == type(model).__name__ and isinstance(program, ModelProgram)
    assert not program.can_generate()
    half = copy.deepcopy(program).half()
    assert half.dtype == torch.float16 and program.dtype == torch.float32


def test_its_signature_is_that_of_a_call() -> None:
    assert list(inspect.signature(program_of("bert-masked-lm").forward).parameters) == [
        "input_ids",
        "attention_mask",
        "labels",
    ]
    names = list(inspect.signature(type(program_of("bert-question-answering")).forward).parameters)
    assert names == ["self", "input_ids", "attention_mask", "start_positions", "end_positions"]


@pytest.mark.parametrize("make", [copy.deepcopy, ModelProgram.copy], ids=["deepcopy", "copy"])
def test_copies_are_models_too(make: Callable[[ModelProgram], ModelProgram]) -> None:
    program = program_of("gpt2-sequence-classification")
    inputs = FAMILIES["gpt2-sequence-classification"]().make_inputs(3, 6, padded=True)
    copied = make(program)
    assert isinstance(copied, ModelProgram) and type(copied).__name__ == "GPT2ForSequenceClassification"
    assert copied.task == program.task and copied.signature == program.signature
    assert inspect.signature(copied.forward) == inspect.signature(program.forward)
    targets = {"labels": torch.tensor([0, 1, 2])}
    torch.testing.assert_close(dict(copied(**inputs, **targets)), dict(program(**inputs, **targets)))
    assert all("val" in node.meta for node in copied.graph.find_nodes(op="placeholder"))
    copied.train()
    assert not torch.equal(copied(**inputs).logits, copied(**inputs).logits)
    assert torch.equal(program(**inputs).logits, program(**inputs).logits), "the original stays in its mode"
    shared = copied.tensor("score.weight").data_ptr() == program.tensor("score.weight").data_ptr()
    assert shared == (make is ModelProgram.copy)


def test_a_wrapped_forward_follows_the_mode() -> None:
    """accelerate keeps the function that it finds at first; it has to go on to the code of the current mode."""
    model = small_model("Bert", "ForSequenceClassification")
    program = trace(model, random_inputs(model, 1, 3)).train()
    found = cast(Any, program.forward).__func__
    vars(program)["forward"] = lambda *args: found(program, *args)
    inputs = random_inputs(model, 2, 5)
    assert not torch.equal(program(**inputs).logits, program(**inputs).logits)
    program.eval()
    torch.testing.assert_close(program(**inputs).logits, model(**inputs).logits)


# ---- the Trainer -----------------------------------------------------------------------------------------------------

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def run_trainer(model: nn.Module, data: Any, folder: Path, **options: Any) -> dict[str, Any]:
    arguments = TrainingArguments(
        str(folder),
        max_steps=10,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        seed=3,
        **options,
    )
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "before": before,
        "after": trainer.evaluate()["eval_loss"],
        "predictions": torch.from_numpy(trainer.predict(data).predictions),
        "label_names": trainer.label_names,
    }


def classification_data(model: PreTrainedModel) -> Any:
    inputs = random_inputs(model, 24, 6, padded=True)
    rows = [{key: value[i] for key, value in inputs.items()} for i in range(24)]
    # A column that the model does not take, which the Trainer drops.
    return [{**row, "labels": (row["input_ids"][0] > 50).long(), "weight": torch.tensor(0.5)} for row in rows]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_trains_it_like_the_model(accumulation: int, tmp_path: Path) -> None:
    model = small_model("Bert", "ForSequenceClassification", **NO_DROPOUT)
    program = trace(copy.deepcopy(model), random_inputs(model, 1, 3))
    data = classification_data(model)
    ours = run_trainer(program, data, tmp_path / "ours", gradient_accumulation_steps=accumulation)
    theirs = run_trainer(model, data, tmp_path / "theirs", gradient_accumulation_steps=accumulation)
    assert ours["label_names"] == ["labels"]
    assert ours["after"] < 0.7 * ours["before"]
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
    assert (ours["before"], ours["after"]) == pytest.approx((theirs["before"], theirs["after"]), rel=1e-4)
    torch.testing.assert_close(ours["predictions"], theirs["predictions"], rtol=1e-3, atol=1e-3)


def test_the_trainer_counts_the_items_of_a_causal_lm(tmp_path: Path) -> None:
    """The loss over accumulated batches is shared out by the labels that count, which are those after the first."""
    model = small_model("Qwen2", "ForCausalLM", num_hidden_layers=1, attention_dropout=0.0)
    program = trace(copy.deepcopy(model), random_inputs(model, 1, 3))
    inputs = random_inputs(model, 16, 6, padded=True)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)
    data = [{**{key: value[i] for key, value in inputs.items()}, "labels": labels[i]} for i in range(16)]
    ours = run_trainer(program, data, tmp_path / "ours", gradient_accumulation_steps=2)
    theirs = run_trainer(model, data, tmp_path / "theirs", gradient_accumulation_steps=2)
    assert ours["after"] < ours["before"]
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
    assert (ours["before"], ours["after"]) == pytest.approx((theirs["before"], theirs["after"]), rel=1e-4)


def test_mixed_precision_training_evaluates_without_dropout(tmp_path: Path) -> None:
    model = small_model("Bert", "ForSequenceClassification")
    program = trace(model, random_inputs(model, 1, 3))
    data = classification_data(model)
    result = run_trainer(program, data, tmp_path, bf16=True)
    again = Trainer(program, TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, bf16=True))
    torch.testing.assert_close(torch.from_numpy(again.predict(data).predictions), result["predictions"])


# ---- pipelines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "head", "text"),
    [
        ("text-classification", "ForSequenceClassification", ["a text", "another one, which is longer"]),
        ("token-classification", "ForTokenClassification", ["a text", "another one, which is longer"]),
        ("fill-mask", "ForMaskedLM", ["a [MASK] text", "another one, which is [MASK]"]),
        ("feature-extraction", "Model", ["a text", "another one, which is longer"]),
    ],
)
def test_pipelines_take_it_for_the_model(
    task: str, head: str, text: list[str], minilm_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    model = small_model("Bert", head, vocab_size=tokenizer.vocab_size, pad_token_id=0, num_hidden_layers=1)
    program = trace(model, tokenizer(["a text"], return_tensors="pt"))
    make: Any = pipeline
    ours, theirs = (make(task, model=each, tokenizer=tokenizer)(text) for each in (program, model))
    assert repr(flat(ours)) == repr(flat(theirs)) and flat(ours)
    assert "is not supported" not in caplog.text


def flat(value: Any) -> list[Any]:
    """The leaves of nested results, numbers to six digits."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in flat(item)]
    return [value if isinstance(value, str) else f"{float(value):.5f}"]


def test_a_real_encoder(minilm_path: Path) -> None:
    from transformers import AutoModel

    tokenizer, model = AutoTokenizer.from_pretrained(minilm_path), AutoModel.from_pretrained(minilm_path).eval()
    program = trace(model, tokenizer(["a text"], return_tensors="pt"))
    texts = ["The film is a delight.", "It drags on, and on, and then it ends without having said anything.", "No."]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        expected, actual = model(**inputs), program(**inputs)
        assert isinstance(actual, ModelOutput) and type(actual) is type(expected)
        for key, value in expected.items():
            torch.testing.assert_close(actual[key], value, rtol=0, atol=1e-6)
        torch.testing.assert_close(program(inputs["input_ids"])[0], model(inputs["input_ids"])[0], rtol=0, atol=1e-6)
