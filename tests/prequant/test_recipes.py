import dataclasses
import json
from typing import Any

import pytest
import torch

from prequant.measure import plain
from prequant.passes import OptionError, Program, weights
from prequant.recipes import MREM, RECIPES, XTC, AlphaTuning, PreQuant, recipe_type
from prequant.runtime import Granularity, PrequantError
from prequant.sources import canonical_program, head_parameters
from prequant.training import TrainingSettings

from .tiny import make_model, make_tokenizer

FAMILIES = ("Bert", "Roberta", "DistilBert", "Electra", "Albert", "MPNet")


@pytest.fixture(autouse=True)
def one_thread(reproducible: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def original() -> Program:
    return canonical_program(make_model(), make_tokenizer())


HEAD = ("classifier.weight", "classifier.bias")


def prepared(original: Program, recipe: PreQuant, head: tuple[str, ...] = HEAD) -> Program:
    return recipe.prepare(original, head)(original)


def trainable(program: Program) -> set[str]:
    return {name for name, p in program.named_parameters() if p.requires_grad}


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "bits=9 is not possible for affine weights: use 2 to 8"),
        ({"bits": 0}, "bits=0"),
        ({"bits": "four"}, "option 'bits' of recipe 'prequant': 'four' is not an int"),
        ({"granularity": "column"}, "'column' is not one of tensor, row, group"),
        ({"granularity": "group"}, "group_size=0 with granularity='group'"),
        ({"group_size": 32}, "group_size=32"),
        ({"strategy": "mes"}, "strategy 'mes' is unknown; did you mean 'mse'"),
        (
            {"outlier_ratio": 0},
            "outlier_ratio=0.0 leaves no outliers to train|outlier_ratio=0 leaves no outliers to train",
        ),
        ({"outlier_ratio": 1}, "outlier_ratio=1.0: expected a share of the weights, from 0 to below 1"),
        ({"outlier_ratio": -0.1}, "outlier_ratio=-0.1: expected a share"),
        ({"outlier_mode": "add"}, "'add' is not one of 'delta', 'replace'"),
        ({"outlier_dtype": "float8"}, "'float8' is not one of 'float32', 'float16', 'bfloat16'; did you mean float"),
        ({"train": "outlier"}, "'outlier' is not one of .*; did you mean outliers"),
        ({"train": ("outliers", "norms")}, "'norms' is not one of 'outliers', 'head', 'layer-norms'"),
        ({"train": "head", "reset_outliers": True}, "reset_outliers=true goes with 'outliers' in train"),
        ({"activation_bits": 1}, "bits=1"),
        ({"activation_bits": 16}, "bits=16"),
        ({"training": None}, "option 'training' of recipe 'prequant': None is not"),
    ],
)
def test_options_that_make_no_recipe_are_named_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PrequantError, match=message):
        PreQuant(**options)


def test_options_are_brought_into_their_types() -> None:
    given: Any = {"granularity": "tensor", "train": "head", "outlier_ratio": 0}
    recipe = PreQuant(**given)
    assert recipe.granularity is Granularity.TENSOR and recipe.train == ("head",)
    assert isinstance(recipe.outlier_ratio, float)
    assert dataclasses.replace(recipe, train=[]).train == ()  # type: ignore[arg-type]


def test_recipes_are_found_by_name() -> None:
    assert {"alphatuning": AlphaTuning, "mrem": MREM, "prequant": PreQuant, "xtc": XTC} == RECIPES and recipe_type(
        "prequant"
    ) is PreQuant
    with pytest.raises(PrequantError, match="there is no recipe 'pre-quant'; did you mean prequant"):
        recipe_type("pre-quant")


def test_settings_are_every_field_in_jsons_types() -> None:
    recipe = PreQuant(bits=3, training=TrainingSettings(seed=7))
    settings = json.loads(json.dumps(plain(recipe.settings())))
    assert settings.pop("recipe") == "prequant"
    assert settings.keys() == {field.name for field in dataclasses.fields(PreQuant)}
    assert (settings["bits"], settings["granularity"]) == (3, "row")
    assert settings["train"] == ["outliers", "head", "layer-norms", "scales", "biases"]
    assert settings["training"] == dataclasses.asdict(recipe.training) and settings["training"]["seed"] == 7


# ---- stage 1 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_all_weights_are_packed_but_the_heads(family: str) -> None:
    model = make_model(family)
    head = head_parameters(model)
    program = prepared(canonical_program(model, make_tokenizer()), PreQuant(activation_bits=8), head)
    views = weights(program)
    matrices = {name for name, p in model.named_parameters() if p.dim() == 2}
    assert {view.name for view in views} == matrices - set(program.info.extra["unread"])
    for view in views:
        assert (view.format == "float32") == (view.name in head), view.name
        assert view.lowered == (view.name not in head), view.name
        assert view.input_format == ("affine8:row" if view.kind == "linear" and view.name not in head else ""), (
            view.name
        )
    assert {name for name in trainable(program) if name in head} == set(head)
    for name in head:
        assert torch.equal(program.tensor(name), dict(model.named_parameters())[name])


def test_stage_1_is_what_the_options_say(original: Program) -> None:
    recipe = PreQuant(
        bits=3,
        granularity=Granularity.GROUP,
        group_size=8,
        symmetric=False,
        strategy="minmax",
        outlier_ratio=0.02,
        outlier_mode="replace",
    )
    program = prepared(original, recipe)
    for view in weights(program):
        if view.name not in HEAD:
            rows, columns = view.shape
            assert view.format == "affine3:group8:asym" and view.outliers_replace
            assert program.tensor(view.tensors["outliers.values"]).numel() == round(0.02 * rows * columns)


def test_outliers_of_embeddings_train_if_asked(original: Program) -> None:
    for asked in (False, True):
        program = prepared(original, PreQuant(train_embedding_outliers=asked))
        for view in weights(program):
            if view.name not in HEAD:
                assert view.tensors["scale"] in trainable(program)
                trains = asked or view.kind == "linear"
                assert (view.tensors["outliers.values"] in trainable(program)) == trains


def test_without_outliers_there_are_none(original: Program) -> None:
    program = prepared(original, PreQuant(outlier_ratio=0, train=("head",)))
    assert all("outliers.values" not in view.tensors for view in weights(program))
    assert trainable(program) == set(HEAD)


def test_stage_1_needs_no_data_and_no_chance(original: Program) -> None:
    first = prepared(original, PreQuant())
    torch.rand(100)
    second = prepared(original, PreQuant())
    assert all(torch.equal(value, second.tensor(name)) for name, value in first.state_dict().items())


# ---- stage 2 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("outliers", lambda name: name.endswith("outliers.values")),
        ("scales", lambda name: name.endswith(".scale")),
        ("layer-norms", lambda name: ".LayerNorm." in name),
        ("biases", lambda name: name.endswith(".bias") and ".LayerNorm." not in name),
        ("head", lambda name: name in HEAD),
    ],
)
def test_each_part_trains_what_its_name_says(original: Program, part: str, expected: Any) -> None:
    program = prepared(original, PreQuant(train=(part,), train_embedding_outliers=True))  # type: ignore[arg-type]
    names = {name for name, _ in program.named_parameters() if expected(name)}
    assert names and trainable(program) == names


def test_no_part_stands_for_stage_1_alone(original: Program) -> None:
    recipe = PreQuant(train=())
    assert not recipe.trains and PreQuant().trains
    assert [pass_.name for pass_ in recipe.prepare(original, HEAD).passes][-1] == "lower"
    assert trainable(recipe.finish()(prepared(original, recipe))) == set()


def test_training_starts_from_the_original_at_the_outliers_or_from_the_codes(original: Program) -> None:
    name = "bert.embeddings.word_embeddings.weight"
    exact = original.tensor(name).detach()

    for mode in ("delta", "replace"):
        for reset in (False, True):
            options: dict[str, Any] = {"outlier_mode": mode, "reset_outliers": reset, "train_embedding_outliers": True}
            program = prepared(original, PreQuant(outlier_ratio=0.02, **options))
            view = next(view for view in weights(program) if view.name == name)
            columns, offsets = (program.tensor(f"{name}.outliers.{part}").long() for part in ("columns", "row_offsets"))
            rows = torch.repeat_interleave(torch.arange(exact.shape[0]), offsets.diff())
            codes, scale = program.tensor(f"{name}.codes").int(), program.tensor(f"{name}.scale").detach()
            quantized = (torch.stack([codes & 15, codes >> 4], -1).flatten(1) - 8) * scale
            start = (quantized if reset else exact)[rows, columns]
            torch.testing.assert_close(view.value()[rows, columns], start)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_outliers_train_in_float32_and_are_stored_as_asked(original: Program, dtype: str) -> None:
    recipe = PreQuant(outlier_dtype=dtype)  # type: ignore[arg-type]
    program = prepared(original, recipe)
    name = "bert.pooler.dense.weight.outliers.values"
    assert program.tensor(name).dtype is torch.float32
    with torch.no_grad():
        program.tensor(name).add_(0.123456789)
    finished = recipe.finish()(program)
    assert finished.tensor(name).dtype is getattr(torch, dtype)
    assert torch.equal(finished.tensor(name), program.tensor(name).to(getattr(torch, dtype)))
    assert trainable(finished) == set()


def test_a_wrong_type_is_an_option_error() -> None:
    with pytest.raises(OptionError):
        PreQuant(bits=4.5)  # type: ignore[arg-type]
