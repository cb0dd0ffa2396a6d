import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

import prequant
from prequant.cli import app
from prequant.model import ModelProgram
from prequant.passes import weights
from prequant.report_file import REPORT_FILE
from prequant.sources import load_program
from prequant.tasks import TASKS

from .tiny import LENGTH, make_model, make_tokenizer, save_folder, write_data

COMMANDS = (
    "adapt",
    "adapters",
    "blame",
    "compress",
    "eval",
    "export",
    "finetune",
    "generate",
    "inspect",
    "opt",
    "passes",
    "recipes",
    "tasks",
    "view",
)
FOUR_PASSES = "canonicalize,split-outliers{ratio=0.01},quantize-weights{bits=4},lower"


@pytest.fixture(autouse=True)
def one_thread(reproducible: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("models") / "encoder", num_hidden_layers=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "rows.tsv")


def run(*words: object, **env: str) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "80", **env})


def succeed(*words: object) -> str:
    result = run(*words)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return str(result.stdout)


@pytest.fixture(scope="module")
def compressed(encoder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A compressed folder, and what was printed."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("out") / "compressed"
    job = ("compress", encoder, "--task", "sst2", "--data", data, "--out", out, "--max-length", LENGTH, "--quiet")
    return out, succeed(*job, "--max-steps", 2, "--batch-size", 8)


# ---- help ------------------------------------------------------------------------------------------------------------


def test_help_lists_every_command_with_a_whole_line() -> None:
    text = succeed("--help")
    lines = dict(re.findall(r"^  (\w+) +(\S.*)$", text.partition("Commands:")[2], re.MULTILINE))
    assert tuple(lines) == COMMANDS
    assert all(line.endswith(".") and not line.endswith("...") for line in lines.values())
    assert run().exit_code == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_for_every_option(name: str) -> None:
    text = succeed(name, "--help")
    assert max(map(len, text.splitlines())) <= 80
    _, _, listed = text.partition("Options:\n")
    for option in re.split(r"\n  (?=-)", listed):
        assert re.match(r"\s*--[\w-]+.*?\s{2,}\S|\s*--[\w-]+ .*\n\s{10,}\S", option), option


def test_tasks_are_listed_with_their_data_and_scores() -> None:
    words = " ".join(succeed("tasks").split())
    for name, known in TASKS.items():
        scores = ", ".join(metric.name for metric in known.metrics)
        assert f"{name} {known.kind} on {'/'.join(known.hub)}, by {scores}" in words


@pytest.mark.parametrize(
    "words", [["compress"], ["eval", "x"], ["opt", "x"], ["compress", "x", "--bit", "4"], ["pass"]]
)
def test_words_that_make_no_command_end_with_status_2(words: list[str]) -> None:
    result = run(*words)
    assert result.exit_code == 2 and result.stdout == "" and "Error: " in result.stderr


# ---- compress, eval, inspect, finetune -------------------------------------------------------------------------------


def test_compress_prints_the_comparison_and_saves_the_folder(compressed: tuple[Path, str]) -> None:
    out, text = compressed
    record = json.loads((out / REPORT_FILE).read_text())
    assert max(map(len, text.splitlines()[1:-1])) <= 80  # the first and last line name folders of any length
    assert f"{record['compressed']['bytes_on_disk']:,}" in text and f"{record['baseline']['metric']:.4f}" in text
    assert text.splitlines()[-1] == f"saved to {out}"
    assert isinstance(prequant.load(out), ModelProgram)


def test_compress_takes_every_option_of_the_recipe(encoder: Path, data: Path, tmp_path: Path) -> None:
    job = ["compress", encoder, "--task", "sst2", "--data", data, "--out", tmp_path / "out", "--max-length", LENGTH]
    job += ["--quiet", "--baseline", "none", "--bits", 3, "--granularity", "group", "--set", "group_size=8"]
    job += [
        "--strategy",
        "minmax",
        "--outlier-ratio",
        0.02,
        "--set",
        "outlier-mode=replace",
        "--set",
        "symmetric=false",
    ]
    job += ["--set", "train=[head, scales]", "--set", "activation_bits=8", "--seed", 5, "--max-steps", 1]
    job += ["--precision", "bfloat16", "--no-dropout"]
    succeed(*job, "--learning-rate", 2e-3, "--head-learning-rate", 3e-3, "--batch-size", 4)
    settings = json.loads((tmp_path / "out" / REPORT_FILE).read_text())["settings"]
    wanted = {
        "recipe": "prequant",
        "bits": 3,
        "granularity": "group",
        "group_size": 8,
        "strategy": "minmax",
        "outlier_ratio": 0.02,
        "outlier_mode": "replace",
        "symmetric": False,
        "train": ["head", "scales"],
        "activation_bits": 8,
    }
    assert wanted.items() <= settings["recipe"].items()
    training: dict[str, Any] = {
        "seed": 5,
        "max_steps": 1,
        "learning_rate": 2e-3,
        "head_learning_rate": 3e-3,
        "batch_size": 4,
    }
    training |= {"dropout": False, "precision": "bfloat16"}
    assert training.items() <= settings["recipe"]["training"].items()
    formats = {view.format for view in weights(prequant.load(tmp_path / "out"))}
    assert formats == {"affine3:group8:asym", "float32"}


def test_the_baselines_learning_rate_is_its_own(encoder: Path, data: Path, tmp_path: Path) -> None:
    job = ["compress", encoder, "--task", "sst2", "--data", data, "--out", tmp_path / "out", "--max-length", LENGTH]
    succeed(*job, "--quiet", "--max-steps", 1, "--learning-rate", 0.5, "--baseline-learning-rate", 0.25)
    settings = json.loads((tmp_path / "out" / REPORT_FILE).read_text())["settings"]
    assert settings["baseline_training"]["learning_rate"] == 0.25 and settings["baseline_training"]["max_steps"] == 1
    assert settings["recipe"]["training"]["learning_rate"] == 0.5


def test_eval_prints_the_score_of_the_report(compressed: tuple[Path, str], data: Path) -> None:
    out, _ = compressed
    metric = json.loads((out / REPORT_FILE).read_text())["compressed"]["metric"]
    text = succeed("eval", out, "--task", "sst2", "--data", data, "--max-length", LENGTH, "--quiet")
    assert text == f"accuracy {metric:.4f} on 12 examples\n"


def test_inspect_shows_what_was_recorded_or_measures_anew(compressed: tuple[Path, str], encoder: Path) -> None:
    out, _ = compressed
    shown = json.loads(succeed("inspect", out, "--json"))
    record = json.loads((out / REPORT_FILE).read_text())
    assert shown["weights"] == record["weights"]
    assert shown["on_disk"] == record["compressed"]["bytes_on_disk"]
    against = json.loads(succeed("inspect", out, "--json", "--against", encoder))
    assert against == shown  # the original's weights have not moved
    text = succeed("inspect", out)
    assert max(map(len, text.splitlines())) <= 80 and "no errors were recorded" not in text
    for row in shown["weights"]:
        assert f"{row['bytes']:,}" in text


def test_finetune_saves_a_model_that_eval_scores_and_compress_compares_with(
    encoder: Path, data: Path, tmp_path: Path
) -> None:
    shared = ["--task", "sst2", "--data", data, "--max-length", LENGTH, "--quiet"]
    text = succeed("finetune", encoder, "--out", tmp_path / "tuned", *shared, "--max-steps", 2, "--batch-size", 8)
    score, saved = text.splitlines()
    assert re.fullmatch(r"accuracy 0\.\d{4} on 12 examples", score) and saved == f"saved to {tmp_path / 'tuned'}"
    assert succeed("eval", tmp_path / "tuned", *shared).strip() == score
    job = ["compress", tmp_path / "tuned", "--out", tmp_path / "out", *shared, "--no-train", "--baseline", "given"]
    assert score.split()[1] in succeed(*job)


# ---- opt -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "head"), [("Bert", "Model"), ("GPT2", "LMHeadModel"), ("T5", "ForConditionalGeneration")]
)
def test_opt_rewrites_any_model_and_inspect_knows_its_errors(tmp_path: Path, family: str, head: str) -> None:
    depth = {"Bert": "num_hidden_layers", "GPT2": "n_layer", "T5": "num_layers"}[family]
    source = save_folder(tmp_path / "source", family, head, **{depth: 1})
    text = succeed("opt", source, "--pipeline", FOUR_PASSES, "--out", tmp_path / "out")
    for name in ("canonicalize", "split-outliers{ratio=0.01}", "quantize-weights", "lower"):
        assert re.search(rf"^{re.escape(name)}.*: \d+ changed, \d+ kept *$", text, re.MULTILINE)
    program, original = prequant.load(tmp_path / "out"), load_program(source)
    assert {view.format for view in weights(program)} == {"affine4:row"}
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    if family == "T5":
        inputs["decoder_input_ids"] = torch.tensor([[0, 9]])
    with torch.no_grad():
        exact, close = original(**inputs)[0], program(**inputs)[0]
    assert close.shape == exact.shape and 0 < (exact - close).norm() < 0.5 * exact.norm()
    rows = json.loads(succeed("inspect", tmp_path / "out", "--json"))["weights"]
    assert all(5 < row["sqnr"] < 40 for row in rows)
    if family == "GPT2":  # whose weights stand the other way round in the model
        measured = succeed("inspect", tmp_path / "out", "--json", "--against", source)
        assert json.loads(measured)["weights"] == rows


def test_opt_takes_pipelines_from_files(encoder: Path, tmp_path: Path) -> None:
    entries = ["canonicalize", {"quantize-weights": {"bits": 2, "exclude": ["*pooler*"]}}, "lower"]
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(entries))
    (tmp_path / "p.json").write_text(json.dumps(entries))
    for name in ("p.yaml", "p.json"):
        succeed("opt", encoder, "--pipeline", tmp_path / name, "--out", tmp_path / "out")
        formats = {view.name: view.format for view in weights(prequant.load(tmp_path / "out"))}
        assert formats.pop("pooler.dense.weight") == "float32" and set(formats.values()) == {"affine2:row"}


def test_opt_shows_time_and_damage_and_writes_graphs(encoder: Path, tmp_path: Path) -> None:
    watching = ["--timing", "--damage", "--dump", tmp_path / "dump", "--no-reports"]
    text = succeed("opt", encoder, "--pipeline", FOUR_PASSES, *watching)
    assert "changed" not in text and "saved" not in text
    for heading in ("seconds", "SQNR"):
        assert heading in text
    assert text.count("quantize-weights") >= 2
    assert len(list((tmp_path / "dump").rglob("*"))) >= 4
    assert os.listdir(tmp_path) == ["dump"]


def test_opt_continues_from_a_saved_folder_and_saves_over_it(encoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    succeed("opt", encoder, "--pipeline", "canonicalize,quantize-weights{bits=4}", "--out", out)
    before = succeed("inspect", out)
    text = succeed("opt", out, "--pipeline", "lower", "--out", out)
    assert "canonicalize" not in text  # what was done before is not shown again
    shown = succeed("inspect", out)
    assert "(simulated)" in before and "(simulated)" not in shown
    errors = [
        [line.split()[-1] for line in table.splitlines() if re.search(r"\d\.\d\d +\d+\.\d$", line.rstrip())]
        for table in (before, shown)
    ]
    assert errors[0] == errors[1] != []  # codes that have not changed are as far from the original as they were
    (out / REPORT_FILE).unlink()
    assert "no errors were recorded for these weights; --against MODEL measures them" in succeed("inspect", out)


def test_opt_works_without_a_tokenizer(tmp_path: Path) -> None:
    make_model(head="ForMaskedLM").save_pretrained(tmp_path / "source")
    succeed("opt", tmp_path / "source", "--pipeline", FOUR_PASSES, "--damage", "--out", tmp_path / "out")
    assert isinstance(prequant.load(tmp_path / "out"), ModelProgram)
    assert not list((tmp_path / "out").glob("tokenizer*"))


# ---- listings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [80, 200])
def test_passes_and_recipes_are_listed_with_their_options(columns: int) -> None:
    from prequant.passes import known_passes
    from prequant.passes.options import options_of
    from prequant.recipes import RECIPES

    for command, kinds in (("passes", known_passes()), ("recipes", RECIPES)):
        result = run(command, COLUMNS=str(columns))
        assert result.exit_code == 0 and max(map(len, result.stdout.splitlines())) <= columns
        sections = re.split(r"^(?=\S)", result.stdout, flags=re.MULTILINE)[1:]
        assert [section.split()[0] for section in sections] == list(kinds)
        for section, kind in zip(sections, kinds.values(), strict=True):
            for option in options_of(kind):
                listed = command == "passes" or option.name not in ("training", "reduction")
                assert (f"    {option.name}: " in section) is listed
    assert "granularity: tensor|row|group = row" in result.stdout


def test_a_pass_that_can_not_be_used_is_named_and_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prequant.passes.broken_passes", lambda: {"their-pass": "it has no name"})
    result = run("passes")
    assert result.exit_code == 1 and "quantize-weights" in result.stdout
    assert result.stderr == "prequant passes: their-pass: it has no name\n"


# ---- bad input -------------------------------------------------------------------------------------------------------

JOB = ["compress", "{encoder}", "--task", "sst2", "--data", "{data}", "--out", "{out}", "--max-length", str(LENGTH)]
BAD: list[tuple[list[str], str]] = [
    (["compress", "no/such/folder", *JOB[2:]], "the model folder 'no/such/folder' does not exist"),
    (["compress", "{empty}", *JOB[2:]], "has no config.json, so it is no model folder"),
    ([*JOB, "--task", "sst3"], "task 'sst3' is unknown; did you mean sst2"),
    ([*JOB, "--data", "none.tsv"], "data path 'none.tsv' does not exist"),
    ([*JOB, "--data", "{wrong}"], "has no column 'sentence', which task 'sst2' needs; it has text, label, split"),
    ([*JOB, "--recipe", "prequent"], "there is no recipe 'prequent'; did you mean prequant?"),
    ([*JOB, "--set", "outlier_rtio=1"], "has no option 'outlier_rtio'; did you mean outlier_ratio"),
    ([*JOB, "--set", "training=1"], "has no option 'training'"),
    ([*JOB, "--set", "bits"], "--set 'bits': write name=value, such as"),
    ([*JOB, "--set", "=4"], "--set '=4': write name=value"),
    ([*JOB, "--set", "train=[a"], "option 'train' of recipe 'prequant': '[a' is no value YAML can read"),
    ([*JOB, "--set", "bits=four"], "option 'bits' of recipe 'prequant': 'four' is not an int"),
    ([*JOB, "--bits", "9"], "bits=9 is not possible for affine weights: use 2 to 8"),
    ([*JOB, "--strategy", "mes"], "strategy 'mes' is unknown; did you mean 'mse'"),
    ([*JOB, "--outlier-ratio", "0"], "outlier_ratio=0.0 leaves no outliers to train|outlier_ratio=0 leaves"),
    ([*JOB, "--epochs", "0"], "epochs=0.0: expected above 0"),
    ([*JOB, "--max-length", "99"], "max_length=99: the model has 34 positions"),
    (
        [*JOB, "--no-train", "--baseline", "none"],
        "has no head for sst2: classifier.bias, classifier.weight are missing",
    ),
    ([*JOB, "--out", "{wrong}"], "is a file; a folder to save into belongs there"),
    ([*JOB, "--out", "{wrong}/below"], "can't be written: Not a directory"),
    ([*JOB, "--out", "{encoder}"], "encoder is the model that is read: it would be lost"),
    (["opt", "{encoder}", "--pipeline", "lower", "--out", "{encoder}"], "is the model that is read: it would be lost"),
    (["finetune", "{encoder}", *JOB[2:], "--out", "{wrong}"], "is a file; a folder to save into belongs there"),
    (
        ["finetune", "{encoder}", *JOB[2:], "--precision", "float16"],
        "precision=float16: expected float32 or bfloat16",
    ),
    (["eval", "no/such/folder", "--task", "sst2"], "the model folder 'no/such/folder' does not exist"),
    (["eval", "{encoder}", "--task", "sst2"], "has no head for sst2"),
    (["generate", "no/such/folder", "--prompt", "a"], "the model folder 'no/such/folder' does not exist"),
    (["generate", "{encoder}", "--prompt", "a"], "encoder holds a BertModel, which does not generate text"),
    (["inspect", "no/such/folder"], "no/such/folder is no folder"),
    (["inspect", "{encoder}"], "has no prequant.json, so it holds no Program"),
    (["opt", "no/such/folder", "--pipeline", "lower"], "the model folder 'no/such/folder' does not exist"),
    (["opt", "{encoder}", "--pipeline", "none.yaml"], "the pipeline file none.yaml can't be read"),
    (
        ["opt", "{encoder}", "--pipeline", "canonicalize", "--out", "{wrong}"],
        "is a file; a folder to save into belongs",
    ),
    (
        ["opt", "{encoder}", "--pipeline", "quantize-weights{{include=[*.qery.*]}}", "--out", "{out}"],
        "pass 1 of 1, quantize-weights{include=[*.qery.*]}: the pattern '*.qery.*' matches none of the",
    ),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[f"{words[0]}-{message[:30]}" for words, message in BAD])
def test_bad_input_is_one_line_on_stderr_and_status_2_and_writes_nothing(
    words: list[str], message: str, encoder: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "wrong.csv").write_text("text,label,split\na,0,train\nb,1,validation\n")
    before = sorted(tmp_path.rglob("*"))
    names = {"encoder": encoder, "data": data, "out": tmp_path / "out", "empty": tmp_path / "empty"}
    result = run(*(word.format(**names, wrong=tmp_path / "wrong.csv") for word in words))
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(rf"prequant {words[0]}: [^\n]*\n", result.stderr), result.stderr
    assert any(part in result.stderr for part in message.split("|")), result.stderr
    assert sorted(tmp_path.rglob("*")) == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("pipeline", "message", "marked"),
    [
        (
            "canonicalize,quantize-weigths{bits=4}",
            "there is no pass 'quantize-weigths'; did you mean quantize-weights",
            16,
        ),
        ("quantize-weights{bit=4}", "pass 'quantize-weights' has no option 'bit'; did you mean bits", 3),
        ("quantize-weights{bits=4", "expected ',' or '}' after an option", 1),
        ("x" * 400, f"there is no pass '{'x' * 400}'", 400),
    ],
)
def test_a_bad_pipeline_is_shown_with_the_place_marked(encoder: Path, pipeline: str, message: str, marked: int) -> None:
    result = run("opt", encoder, "--pipeline", pipeline)
    first, text, marker = result.stderr.splitlines()
    assert result.exit_code == 2 and first.startswith(f"prequant opt: {message}")
    assert text == f"  {pipeline}" and marker.strip() == "^" * marked


def test_a_path_with_brackets_is_no_markup(encoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a [bold] name"
    assert f"saved to {out}" in succeed("opt", encoder, "--pipeline", "canonicalize", "--out", out)
    assert "[red]" in run("inspect", "[red]").stderr


# ---- a process of its own --------------------------------------------------------------------------------------------


def test_a_pipe_gets_a_wide_listing_and_nothing_slow_is_imported_for_it(tmp_path: Path) -> None:
    """But for what registering with transformers takes: the rest is left to the commands that use it."""
    code = """
import atexit, sys
from prequant.cli import app
slow = {"datasets", "pandas", "onnx", "transformers.trainer"} & sys.modules.keys()
atexit.register(lambda: print(slow, file=sys.stderr))
sys.argv = ["prequant", "passes"]
app()
"""
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path)
    assert done.stderr.strip() == "set()"
    assert 100 < max(len(line.rstrip()) for line in done.stdout.splitlines()) <= 160
    assert "\x1b" not in done.stdout


def test_a_tokenizer_stays_beside_the_model(compressed: tuple[Path, str]) -> None:
    from transformers import AutoTokenizer

    text = "Fresh sheets, a glorious view"
    assert AutoTokenizer.from_pretrained(compressed[0])(text)["input_ids"] == make_tokenizer()(text)["input_ids"]
