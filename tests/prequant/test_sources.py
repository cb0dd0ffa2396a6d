from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, BertModel

from prequant import sources
from prequant.checkpoint import save
from prequant.losses import SEQUENCE_CLASSIFICATION
from prequant.model import ModelProgram
from prequant.passes import QuantizeWeights
from prequant.runtime import PrequantError
from prequant.sources import (
    SourceError,
    canonical_program,
    check_length,
    check_output,
    example_inputs,
    example_inputs_of,
    find_tokenizer,
    head_parameters,
    load_for,
    load_model,
    load_model_like,
    load_program,
    load_scored,
    load_tokenizer,
)

from .tiny import SST2, make_model, make_tokenizer, save_folder

HEADS = {
    "Bert": {"classifier"},
    "Albert": {"classifier"},
    "Roberta": {"classifier.dense", "classifier.out_proj"},
    "MPNet": {"classifier.dense", "classifier.out_proj"},
    "Electra": {"classifier.dense", "classifier.out_proj"},
    "DistilBert": {"pre_classifier", "classifier"},
}


@pytest.fixture(autouse=True)
def one_thread(reproducible: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return save_folder(tmp_path / "encoder")


@pytest.fixture
def compressed(tmp_path: Path) -> Path:
    program = QuantizeWeights()(canonical_program(make_model(), make_tokenizer()))
    return save(program, tmp_path / "compressed", make_tokenizer())


# ---- classifiers -----------------------------------------------------------------------------------------------------


def test_a_new_head_is_drawn_from_the_seed_alone(encoder: Path) -> None:
    body = make_model(head="Model").state_dict()
    heads = []
    for seed in (1, 2, 1):
        torch.rand(10)
        model, fresh = load_for(encoder, SST2, seed)
        assert fresh == ("classifier.bias", "classifier.weight") == tuple(sorted(head_parameters(model)))
        loaded = model.state_dict()
        assert all(torch.equal(loaded[f"bert.{name}"], value) for name, value in body.items())
        assert not model.training and model.config.id2label == {0: "negative", 1: "positive"}
        heads.append(loaded["classifier.weight"])
    assert torch.equal(heads[0], heads[2]) and not torch.equal(heads[0], heads[1])


def test_a_head_that_is_there_is_kept(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "tuned", head="ForSequenceClassification")
    model, fresh = load_for(folder, SST2, 3)
    expected = make_model().state_dict()
    assert fresh == () and all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_half_precision_files_become_float32(tmp_path: Path) -> None:
    half: Any = make_model()
    half.to(torch.bfloat16).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model, _ = load_for(tmp_path, SST2, 0)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    program = canonical_program(make_model(), make_tokenizer())
    assert load_model_like(tmp_path, program).dtype == torch.float32


@pytest.mark.parametrize("family", HEADS)
def test_the_head_is_what_lies_outside_the_base_model(family: str) -> None:
    names = head_parameters(make_model(family))
    assert {name.rpartition(".")[0] for name in names} == HEADS[family]
    assert {name.rpartition(".")[2] for name in names} == {"weight", "bias"}


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(SourceError, match="BertModel has no task head beside its base model 'bert'"):
        head_parameters(make_model(head="Model"))


def test_loading_says_nothing(encoder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_for(encoder, SST2, 0)
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


# ---- what can't be loaded --------------------------------------------------------------------------------------------


def refuse(message: str, function: Any, *arguments: Any) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, PrequantError)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a/b/c", "the model folder 'a/b/c' does not exist"),
        ("./there", "the model folder './there' does not exist"),
        ("/no/such", "the model folder '/no/such' does not exist"),
        ("there/", "the model folder 'there/' does not exist"),
        (Path("there"), "the model folder 'there' does not exist"),
        ("no-such-model", r"of 'no-such-model' can't be loaded \(no such folder here; taken for a name on the hub\): "),
        ("some-one/no-such-model", "taken for a name on the hub"),
    ],
)
def test_what_is_not_there_is_no_matter_of_the_network(source: str | Path, message: str) -> None:
    refuse(message, load_tokenizer, source)
    refuse(message, load_for, source, SST2, 0)
    refuse(message, load_model, source)


def test_folders_that_hold_no_model_are_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    refuse("file' is a file; a model is a folder or a hub name", load_model, str(file))
    refuse("has no config.json, so it is no model folder", load_model, tmp_path)
    refuse("has no config.json, so it is no model folder", find_tokenizer, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    refuse("the model of .* can't be loaded: .*unheard-of", load_model, tmp_path)
    refuse("has no tokenizer, which it takes to read text", load_tokenizer, tmp_path)
    assert find_tokenizer(tmp_path) is None
    (tmp_path / "config.json").write_text("{")
    refuse("the model of .* can't be loaded: ", load_model, tmp_path)


def test_damaged_weights_and_other_classes_are_named(encoder: Path, tmp_path: Path) -> None:
    AutoConfig.from_pretrained(encoder, num_labels=3).save_pretrained(tmp_path / "three")
    model = make_model(num_labels=3)
    model.save_pretrained(tmp_path / "three")
    refuse(
        r"three does not fit sst2: its classifier.bias is \[3\] where \[2\] is needed; give a model with a",
        load_for,
        tmp_path / "three",
        SST2,
        0,
    )
    (encoder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    refuse("a model for sst2 of .*encoder' can't be loaded: ", load_for, encoder, SST2, 0)
    config = AutoConfig.from_pretrained(tmp_path / "three")
    config.architectures = ["MyOwn"]
    config.save_pretrained(tmp_path / "three")
    refuse(r"names no model class of transformers in 'architectures': \['MyOwn'\]", load_model, tmp_path / "three")


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        weight = model.get_parameter("bert.encoder.layer.1.output.dense.weight")
        weight[0, :2] = torch.tensor([torch.nan, torch.inf])
    model.save_pretrained(tmp_path)
    refuse("2 of the 1536 numbers of bert.encoder.layer.1.output.dense.weight are NaN", load_for, tmp_path, SST2, 0)


def test_a_compressed_folder_is_no_float_model(compressed: Path) -> None:
    refuse("is compressed already; give the float model", load_for, compressed, SST2, 0)
    program = load_program(compressed)
    refuse("is compressed; compare with the float model", load_model_like, compressed, program)


def test_a_text_that_is_longer_than_the_model_is_refused() -> None:
    config = make_model().config
    check_length(config, config.max_position_embeddings)
    refuse("max_length=35: the model has 34 positions", check_length, config, 35)
    check_length(make_model("T5", "EncoderModel").config, 10**6)  # relative positions


def test_a_model_that_is_read_is_not_written_over(encoder: Path, tmp_path: Path) -> None:
    refuse("encoder is the model that is read: it would be lost", check_output, encoder, str(encoder))
    (tmp_path / "link").symlink_to(encoder)
    refuse("link is the model that is read: it would be lost", check_output, tmp_path / "link", "a-name", encoder)
    check_output(tmp_path / "new", str(encoder))
    with pytest.raises(PrequantError, match=r"config.json is a file"):
        check_output(encoder / "config.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder", "link"]


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def test_a_tokenizer_without_padding_pads_with_its_end_and_its_model_knows(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "gpt2", "GPT2")
    make_tokenizer(padding=False).save_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token == "[SEP]"
    model, _ = load_for(folder, SST2, 0, tokenizer)
    assert model.config.pad_token_id == tokenizer.pad_token_id == 2
    program = canonical_program(model, tokenizer)
    texts = ["a fine day", "no"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        alone = [model(**tokenizer(text, return_tensors="pt")).logits for text in texts]
        torch.testing.assert_close(program(**batch).logits, torch.cat(alone))


def test_a_tokenizer_that_can_not_pad_is_refused(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "bert")
    tokenizer = make_tokenizer(padding=False)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    refuse("has neither a padding nor an end token, so it can't make batches", load_tokenizer, folder)


# ---- Programs --------------------------------------------------------------------------------------------------------


HEADS_TO_TRACE = [
    ("T5", "ForSequenceClassification"),
    ("Bert", "Model"),
    ("Bert", "ForSequenceClassification"),
    ("GPT2", "LMHeadModel"),
    ("T5", "ForConditionalGeneration"),
    ("T5", "EncoderModel"),
]


@pytest.mark.parametrize(
    ("family", "head", "with_tokenizer"),
    [
        *((family, head, True) for family, head in HEADS_TO_TRACE),
        ("Bert", "Model", False),
        ("T5", "ForConditionalGeneration", False),
    ],
)
def test_a_program_of_any_folder_computes_what_its_model_does(
    tmp_path: Path, family: str, head: str, with_tokenizer: bool
) -> None:
    options = {"Bert": {"num_hidden_layers": 1}, "GPT2": {"n_layer": 1, "pad_token_id": 0}, "T5": {"num_layers": 1}}
    model = make_model(family, head, **options[family])
    model.save_pretrained(tmp_path)
    if with_tokenizer:
        make_tokenizer().save_pretrained(tmp_path)
    program = load_program(tmp_path)
    assert isinstance(program, ModelProgram) and not program.training
    inputs = {name: value.repeat(2, 1) for name, value in example_inputs_of(program, find_tokenizer(tmp_path)).items()}
    with torch.no_grad():
        expected, actual = model(**inputs), program(**inputs)
    assert type(expected) is type(actual)
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=1e-5)


def test_examples_are_padded_text_with_a_tokenizer_and_ids_without() -> None:
    model = make_model()
    padded = example_inputs(model, make_tokenizer())
    assert padded["input_ids"].shape == padded["attention_mask"].shape and padded["attention_mask"].min() == 0
    assert example_inputs(model, None)["input_ids"].shape == (2, 4)


def test_a_compressed_folder_is_loaded_as_it_is(compressed: Path) -> None:
    assert sources.is_compressed(compressed)
    assert "classifier.weight.codes" in dict(load_program(compressed).named_buffers())


def test_scoring_takes_a_model_with_the_tasks_head(encoder: Path, compressed: Path, tmp_path: Path) -> None:
    refuse(r"encoder has no head for sst2: classifier.bias, classifier.weight are missing", load_scored, encoder, SST2)
    model, tokenizer = load_scored(compressed, SST2)
    assert isinstance(model, ModelProgram) and model.task == SEQUENCE_CLASSIFICATION and len(tokenizer) > 100
    tuned = save_folder(tmp_path / "tuned", head="ForSequenceClassification")
    assert not isinstance(load_scored(tuned, SST2)[0], ModelProgram)
    three = canonical_program(make_model(num_labels=3), make_tokenizer())
    save(three, tmp_path / "three", make_tokenizer())
    refuse("three does not serve sst2: it has 3 classes; sst2 has 2", load_scored, tmp_path / "three", SST2)
    save(canonical_program(make_model(head="Model"), make_tokenizer()), tmp_path / "plain", make_tokenizer())
    refuse(
        "plain has no head for sst2: it holds no model for sequence-classification",
        load_scored,
        tmp_path / "plain",
        SST2,
    )


def test_the_original_is_loaded_as_the_class_of_the_program(encoder: Path) -> None:
    program = canonical_program(make_model(head="Model"), make_tokenizer())
    assert type(load_model_like(encoder, program)) is BertModel
