"""Models that generate: the graphs with past and present keys and values, run token by token by ONNX Runtime."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import prequant
from prequant.export import ExportError, export_onnx
from prequant.passes import (
    Canonicalize,
    ExposeOutputs,
    Pipeline,
    Program,
    QuantizeWeights,
    SplitOutliers,
    lower,
)
from prequant.trace import trace

from ...models import small_model
from .onnx_models import exported, run, session

TOKENS = 8
IDS = torch.randint(4, 97, (2, 5), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(IDS)
MASK[0, :2] = 0
"""The first text is padded on the left."""


def compressed(family: str, head: str, *steps: Any) -> Program:
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    if family == "T5":
        inputs["decoder_input_ids"] = IDS[:, :3]
    depth = {"T5": "num_layers", "GPT2": "n_layer"}.get(family, "num_hidden_layers")
    program = trace(small_model(family, head, **{depth: 1}), inputs)
    return lower(Pipeline([Canonicalize(), *(steps or (QuantizeWeights(),))])(program))


def wanted(program: Any) -> np.ndarray[Any, Any]:
    """The new tokens that the Program generates."""
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 1}
    generated = program.generate(input_ids=IDS, attention_mask=MASK, eos_token_id=-1, **options)
    return np.asarray(generated[:, -TOKENS:])


def empty_past(running: Any) -> dict[str, np.ndarray[Any, Any]]:
    return {
        item.name: np.zeros((len(IDS), item.shape[1], 0, item.shape[3]), np.float32)
        for item in running.get_inputs()
        if item.name.startswith("past_key_values.")
    }


def decoded(running: Any, ids: np.ndarray[Any, Any], mask: np.ndarray[Any, Any], prefix: str, **others: Any) -> Any:
    """Greedy tokens, and the shape of the last keys."""
    names, past, tokens = [item.name for item in running.get_outputs()], empty_past(running), []
    takes_positions = "position_ids" in [item.name for item in running.get_inputs()]
    for _ in range(TOKENS):
        feed = {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask, **past, **others}
        if takes_positions:
            feed["position_ids"] = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        found = dict(zip(names, running.run(None, feed), strict=True))
        ids = found["logits"][:, -1].argmax(-1)[:, None]
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
        past = {name: found[name.replace("past_key_values", "present")] for name in past}
        tokens.append(ids)
    return np.concatenate(tokens, axis=1), past["past_key_values.0.key"].shape


DECODERS: dict[str, tuple[str, str, str, list[Any]]] = {
    "gpt2": ("GPT2", "LMHeadModel", "matmulnbits", [SplitOutliers(ratio=0.01), QuantizeWeights()]),
    "llama": ("Llama", "ForCausalLM", "qdq", []),
}


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_write_the_same_text(tmp_path: Path, name: str) -> None:
    family, head, style, steps = DECODERS[name]
    program = compressed(family, head, *steps)
    if name == "gpt2":  # a folder that was loaded is exported like any other
        program = prequant.load(prequant.save(program, tmp_path / "folder"))
    path = tmp_path / "model.onnx"
    exported(program, path, style=style)
    running = session(path)
    assert [item.name for item in running.get_outputs()][:3] == ["logits", "present.0.key", "present.0.value"]
    shapes = {item.name: item.shape for item in running.get_inputs()}
    assert shapes["input_ids"] == ["batch", "query"] and shapes["attention_mask"] == ["batch", "total"]
    assert shapes["past_key_values.0.value"][0::2] == ["batch", "past"]
    tokens, keys = decoded(running, IDS.numpy(), MASK.numpy(), "")
    np.testing.assert_array_equal(tokens, wanted(program))
    assert keys[2] == IDS.shape[1] + TOKENS - 1


def test_seq2seq_models_become_two_files(tmp_path: Path) -> None:
    program = compressed("T5", "ForConditionalGeneration")
    result, _ = exported(program, tmp_path / "t5.onnx", style="matmulnbits")
    encoder, decoder = result.files
    assert (encoder.name, decoder.name) == ("t5.encoder.onnx", "t5.decoder.onnx")
    hidden = run(encoder, {"input_ids": IDS, "attention_mask": MASK})
    assert hidden.pop("last_hidden_state").shape == (2, 5, 32) and len(hidden) == 2
    start, ones = np.zeros((2, 1), np.int64), np.ones((2, 1), np.int64)
    tokens, _ = decoded(session(decoder), start, ones, "decoder_", attention_mask=MASK.numpy(), **hidden)
    np.testing.assert_array_equal(tokens, wanted(program))
    assert len(result.weights) == len({weight.name for weight in result.weights})


def test_what_can_not_generate_says_how_to_go_on(tmp_path: Path) -> None:
    shown = ExposeOutputs(hidden_states=True)(compressed("GPT2", "LMHeadModel"))
    with pytest.raises(ExportError, match="--no-cache"):
        export_onnx(shown, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
