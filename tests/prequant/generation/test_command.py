"""prequant generate, and what is under it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import Sequence
from typer.testing import CliRunner

import prequant
from prequant.cli import app
from prequant.continuing import continue_text, load_generator
from prequant.sources import SourceError

from ..tiny import LENGTH, make_tokenizer, save_folder

PIPELINE = "canonicalize,split-outliers{ratio=0.01},quantize-weights{bits=4},lower"


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "80"})


def succeed(*words: object) -> str:
    result = run(*words)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return str(result.stdout)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed decoder."""
    folder = save_folder(tmp_path_factory.mktemp("models") / "decoder", "GPT2", "LMHeadModel", n_layer=1)
    out = tmp_path_factory.mktemp("out") / "decoder"
    succeed("opt", folder, "--pipeline", PIPELINE, "--out", out)
    return out


WAYS: list[tuple[list[object], dict[str, Any]]] = [
    ([], {"do_sample": False}),
    (["--num-beams", 3], {"do_sample": False, "num_beams": 3}),
    (
        ["--sample", "--temperature", 2.0, "--top-k", 9, "--seed", 5],
        {"do_sample": True, "temperature": 2.0, "top_k": 9},
    ),
    (["--quantized-cache"], {"do_sample": False, "cache_implementation": "quantized"}),
]


@pytest.mark.parametrize(("words", "settings"), WAYS, ids=["greedy", "beams", "sampling", "quantized-cache"])
def test_generate_writes_what_the_program_does(decoder: Path, words: list[object], settings: dict[str, Any]) -> None:
    program: Any = prequant.load(decoder)
    tokenizer = make_tokenizer()
    torch.manual_seed(5)
    inputs = {name: torch.tensor([value]) for name, value in tokenizer("a good film").items()}
    expected = program.generate(**inputs, max_new_tokens=7, pad_token_id=tokenizer.pad_token_id, **settings)
    shown = succeed("generate", decoder, "--prompt", "a good film", "--max-new-tokens", 7, *words)
    assert shown == str(tokenizer.decode(expected[0], skip_special_tokens=True)) + "\n"
    assert shown.startswith("a good film ") and len(shown.split()) > 3


def test_a_quantized_cache_is_for_compressed_models(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "float", "GPT2", "LMHeadModel", n_layer=1)
    result = run("generate", folder, "--prompt", "a good film", "--quantized-cache")
    message = "prequant generate: a quantized cache is for models that prequant has compressed\n"
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", message)


def test_generate_refuses_what_has_no_place_or_no_tokens(decoder: Path) -> None:
    result = run("generate", decoder, "--prompt", "a good film", "--max-new-tokens", LENGTH)
    message = f"prequant generate: 5 tokens of the prompt and {LENGTH} new ones: the model has {LENGTH} positions\n"
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", message)
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = Sequence([])
    with pytest.raises(SourceError, match="the prompt has no tokens"):
        continue_text(load_generator(decoder)[0], tokenizer, "", 3)
