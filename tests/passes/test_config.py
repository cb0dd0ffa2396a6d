import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from prequant.passes import BinaryCode, ConfigError, Freeze, PassTextError, Pipeline, QuantizeWeights
from prequant.runtime import Granularity

PIPELINE = Pipeline(
    [
        BinaryCode(bits=2, include=("tokens*",)),
        QuantizeWeights(bits=3, granularity=Granularity.GROUP, group_size=8, exclude=("type:*Pooler", "a[b]")),
        Freeze(),
    ]
)
CONFIG: list[Any] = [
    {"binary-code": {"bits": 2, "include": ["tokens*"]}},
    {"quantize-weights": {"bits": 3, "granularity": "group", "group_size": 8, "exclude": ["type:*Pooler", "a[b]"]}},
    "freeze",
]


def test_a_pipeline_and_its_plain_data() -> None:
    assert PIPELINE.to_config() == CONFIG
    assert Pipeline.from_config(CONFIG) == PIPELINE


@pytest.mark.parametrize(
    "config",
    [
        {
            name: options
            for entry in CONFIG
            for name, options in (entry.items() if isinstance(entry, dict) else [(entry, None)])
        },
        str(PIPELINE),
        [str(PIPELINE)],
        [str(Pipeline(PIPELINE.passes[:2])), {"freeze": {}}],
    ],
)
def test_other_forms_of_the_same(config: Any) -> None:
    assert Pipeline.from_config(config) == PIPELINE


def test_files(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(CONFIG))
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(CONFIG))
    (tmp_path / "b.yml").write_text(
        "# written by hand\n"
        "- binary-code: {bits: 2, include: tokens*}\n"
        "- quantize-weights:\n    bits: 3\n    granularity: group\n    group_size: 8\n"
        "    exclude: ['type:*Pooler', 'a[b]']\n"
        "- freeze:\n"
    )
    for name in ("a.json", "a.yaml", "b.yml"):
        assert Pipeline.load(tmp_path / name) == PIPELINE
        assert Pipeline.load(str(tmp_path / name)) == PIPELINE


def test_an_empty_pipeline() -> None:
    assert Pipeline.from_config([]) == Pipeline() and Pipeline().to_config() == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            ["freeze", {"quantize-weight": {}}],
            "entry 2 of the pipeline: there is no pass 'quantize-weight'; did you mean",
        ),
        (
            [{"quantize-weights": {"bit": 3}}],
            "entry 1 .* pass 'quantize-weights' has no option 'bit'; did you mean bits",
        ),
        ([{"quantize-weights": {"bits": "four"}}], "entry 1 .* option 'bits' .* 'four' is not an int"),
        ([{"quantize-weights": {"bits": 3.5}}], "entry 1 .* option 'bits' .* 3.5 is not an int"),
        ([{"quantize-weights": 4}], "options are a mapping of names to values, not 4"),
        ([{"freeze": {}, "train": {}}], "entry 1 of the pipeline is"),
        ([3], "entry 1 of the pipeline is 3"),
        (3, "a pipeline is a list of passes, or a text, not 3"),
        ({"quantise": {}}, "quantise of the pipeline: there is no pass 'quantise'"),
    ],
)
def test_what_is_wrong_is_named(config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Pipeline.from_config(config)


def test_text_inside_a_configuration_marks_the_place() -> None:
    with pytest.raises(PassTextError, match=r"\^\^\^"):
        Pipeline.from_config(["quantize-weights{bit=4}"])


def test_a_function_has_no_plain_form() -> None:
    with pytest.raises(PassTextError, match="'<lambda>' is a function"):
        Pipeline([QuantizeWeights(include=(lambda node: True,))]).to_config()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "", "its name should end in one of .yaml, .yml, .json"),
        ("a.yaml", "- freeze: {a: 1, a: 2}", "a.yaml is malformed: 'a' stands there twice"),
        ("a.json", '[{"freeze": {"a": 1, "a": 2}}]', "a.json is malformed: 'a' stands there twice"),
        ("a.json", "[", "a.json is malformed"),
        ("a.yaml", "- [", "a.yaml is malformed"),
        ("a.yaml", "- !!python/object/apply:os.getcwd []", "a.yaml is malformed"),
        ("a.yaml", "- quantize-weights: {bits: [4]}", r"a.yaml: entry 1 .* option 'bits'"),
        ("a.yaml", "", "a.yaml: a pipeline is a list of passes, or a text, not None"),
    ],
)
def test_files_that_hold_no_pipeline(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        Pipeline.load(tmp_path / name)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone.yaml can't be read"):
        Pipeline.load(tmp_path / "gone.yaml")


def test_yaml_takes_exponents_for_text_but_an_option_that_is_a_number_does_not(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("- split-outliers: {ratio: 5e-3}\n- train: {outliers: true}")
    assert yaml.safe_load("5e-3") == "5e-3"
    assert Pipeline.load(tmp_path / "a.yaml") == Pipeline.parse("split-outliers{ratio=0.005},train{outliers=true}")
