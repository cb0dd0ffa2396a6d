"""Saved folders through transformers: the model's own modules over the packed tensors, equal to the Program."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import prequant
from prequant.checkpoint import CheckpointError, load, save
from prequant.modules import PackedConv1D, PackedEmbedding, PackedLinear, PackedWeight, packed_class
from prequant.passes import (
    BinaryCode,
    Program,
    QuantizeActivations,
    QuantizeWeights,
    SplitOutliers,
    calibrate,
    lower,
    weights,
)
from prequant.runtime import Granularity, PrequantError
from prequant.trace import trace

from .checkpoint_models import MODELS, bert, compressed, edit_json, inputs, mixed_bert, outputs, traced

AUTO: dict[str, Any] = {
    "bert": transformers.AutoModelForSequenceClassification,
    "roberta": transformers.AutoModelForMaskedLM,
    "gpt2": transformers.AutoModelForCausalLM,
    "opt": transformers.AutoModelForCausalLM,
    "llama": transformers.AutoModelForCausalLM,
    "t5": transformers.AutoModelForSeq2SeqLM,
}
PIPELINES: dict[str, tuple[Any, ...]] = {
    "weights": (QuantizeWeights(),),
    "outliers and dynamic inputs": (
        SplitOutliers(ratio=0.02, dtype="float16"),
        QuantizeWeights(),
        QuantizeActivations(),
    ),
    "bcq, heads and all": (BinaryCode(bits=2, embeddings=True, group_size=16),),
    "float weights with outliers": (SplitOutliers(ratio=0.02, mode="replace"),),
    "float weights with dynamic inputs": (QuantizeActivations(granularity=Granularity.TENSOR),),
    "some weights": (QuantizeWeights(bits=2, ternary=True, base3=True, include=("type:*Attention*",)),),
}


def run(model: nn.Module, values: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return outputs(model(**values))


def assert_close(first: list[Tensor], second: list[Tensor]) -> None:
    assert len(first) >= len(second) > 0
    for a, b in zip(first, second, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", PIPELINES.values(), ids=PIPELINES.keys())
@pytest.mark.parametrize("name", MODELS)
def test_a_saved_program_is_the_model_it_came_from(tmp_path: Path, name: str, steps: tuple[Any, ...]) -> None:
    model, program = traced(name)
    if name in ("gpt2", "llama", "roberta") and steps is PIPELINES["some weights"]:
        steps = (QuantizeWeights(bits=3, include=("*0*",)),)
    program = compressed(program, *steps)
    save(lower(program), tmp_path)
    loaded, report = AUTO[name].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    values = inputs(model, 3, 6)
    assert_close(run(loaded, values), run(program, values))
    assert not loaded.training
    packed = [module for module in loaded.modules() if isinstance(module, PackedWeight)]
    assert len(packed) == sum(view.tensors != {"dense": view.name} for view in weights(program))


def test_every_kind_of_weight_and_static_inputs(tmp_path: Path) -> None:
    program = mixed_bert()
    save(program, tmp_path)
    loaded = AUTO["bert"].from_pretrained(tmp_path)
    values = inputs(loaded)
    assert_close(run(loaded, values), run(program, values))
    for view in weights(program):
        weight = loaded.get_submodule(view.name) if view.tensors != {"dense": view.name} else None
        if weight is not None:
            torch.testing.assert_close(weight.dequantize(), view.value(), rtol=0, atol=0)
            assert (weight.shape, weight.size(1), weight.dtype) == (view.shape, view.shape[1], torch.float32)
    assert loaded.num_parameters() < bert().num_parameters() / 4
    assert loaded.get_memory_footprint() < bert().get_memory_footprint() / 2
    assert "PackedLinear" in repr(loaded) and "ternary:row:base3 [32, 32]" in repr(loaded)


def test_a_static_scale_that_several_linears_share(tmp_path: Path) -> None:
    model, program = traced("bert")
    steps = (QuantizeWeights(), QuantizeActivations(granularity=Granularity.TENSOR, dynamic=False, symmetric=False))
    calibrated = calibrate(compressed(program, *steps), [inputs(model)], progress=False)
    save(calibrated, tmp_path / "out")
    loaded = AUTO["bert"].from_pretrained(tmp_path / "out")
    assert_close(run(loaded, inputs(model)), run(calibrated, inputs(model)))
    attention = loaded.bert.encoder.layer[0].attention.self
    assert attention.key.quantized_input is attention.query.input
    loaded.save_pretrained(tmp_path / "again")
    again = AUTO["bert"].from_pretrained(tmp_path / "again")
    assert_close(run(again, inputs(model)), run(calibrated, inputs(model)))


# ---- ties -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["roberta", "gpt2", "opt", "t5"])
def test_tied_weights_are_one(tmp_path: Path, name: str) -> None:
    save(compressed(traced(name)[1]), tmp_path)
    loaded = AUTO[name].from_pretrained(tmp_path)
    embedding, head = loaded.get_input_embeddings(), loaded.get_output_embeddings()
    assert isinstance(embedding, PackedEmbedding) and isinstance(head, PackedLinear)
    assert embedding.weight is head.weight
    for again in (copy.deepcopy(loaded), loaded):
        again.tie_weights()
        assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
    assert not any(key.startswith(("lm_head.weight", "lm_head.decoder.weight")) for key in loaded.state_dict())


def test_the_three_embeddings_of_t5_are_one(tmp_path: Path) -> None:
    save(compressed(traced("t5")[1]), tmp_path)
    loaded = AUTO["t5"].from_pretrained(tmp_path)
    shared = {id(module.weight) for module in (loaded.shared, loaded.encoder.embed_tokens, loaded.decoder.embed_tokens)}
    assert shared == {id(loaded.lm_head.weight)}


def test_a_tie_that_only_the_program_knows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(traced("llama")[0].config).eval()
    model.lm_head.weight = model.model.embed_tokens.weight
    program = trace(model, inputs(model))
    values = inputs(model)
    for name, steps in (("packed", (QuantizeWeights(),)), ("half", (QuantizeWeights(include=("*mlp*",)),))):
        reference = compressed(program, *steps)
        save(reference, tmp_path / name)
        loaded, report = AUTO["llama"].from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(report.values()), report
        assert_close(run(loaded, values), run(reference, values))
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        loaded.save_pretrained(tmp_path / f"{name}-again")
        again = AUTO["llama"].from_pretrained(tmp_path / f"{name}-again")
        assert_close(run(again, values), run(reference, values))


# ---- saving again, and other classes --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_saving_again_gives_the_same_tensors(tmp_path: Path, name: str) -> None:
    model, program = traced(name)
    save(compressed(program), tmp_path / "first")
    loaded = AUTO[name].from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    quantization = [
        json.loads((tmp_path / folder / "config.json").read_text())["quantization_config"]
        for folder in ("first", "second")
    ]
    assert quantization[0] == quantization[1]
    again = AUTO[name].from_pretrained(tmp_path / "second")
    assert_close(run(again, inputs(model)), run(loaded, inputs(model)))
    with pytest.raises(CheckpointError, match="from_pretrained"):
        load(tmp_path / "second")


def test_the_base_of_a_model_with_a_head_and_the_other_way_round(tmp_path: Path) -> None:
    model, program = traced("bert")
    save(compressed(program), tmp_path / "head")
    whole = AUTO["bert"].from_pretrained(tmp_path / "head")
    base = transformers.AutoModel.from_pretrained(tmp_path / "head")
    values = inputs(model)
    assert_close(run(base, values), run(whole.bert, values))
    assert isinstance(base.pooler.dense, PackedLinear)
    base.save_pretrained(tmp_path / "base")
    fresh, report = AUTO["bert"].from_pretrained(tmp_path / "base", output_loading_info=True)
    assert set(report["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert_close(run(fresh.bert, values), run(base, values))


def test_a_head_of_another_shape_is_refused(tmp_path: Path) -> None:
    save(compressed(traced("bert")[1], QuantizeWeights(bits=8)), tmp_path)
    with pytest.raises(CheckpointError, match=r"classifier\.weight is \[2, 32\]; in this .* it is \[5, 32\]"):
        AUTO["bert"].from_pretrained(tmp_path, num_labels=5)


def test_a_program_that_modules_cannot_express_names_the_other_way(tmp_path: Path) -> None:
    program = compressed(traced("bert")[1], QuantizeWeights(), QuantizeActivations(operands="matmul"))
    save(program, tmp_path)
    with pytest.raises(CheckpointError, match=r"more than the weight or input of a linear.*prequant\.load"):
        AUTO["bert"].from_pretrained(tmp_path)
    assert isinstance(load(tmp_path), Program)


def test_a_float_model_is_not_packed_as_it_loads(tmp_path: Path) -> None:
    save(mixed_bert(), tmp_path / "packed")
    bert().save_pretrained(tmp_path / "float")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "packed").quantization_config
    config = prequant.transformers_quantizer.PrequantConfig(**config)
    with pytest.raises(ValueError, match="pre-quantized"):
        AUTO["bert"].from_pretrained(tmp_path / "float", quantization_config=config)


# ---- in use ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "t5"])
def test_generation_writes_what_the_program_predicts(tmp_path: Path, name: str) -> None:
    """Greedy decoding with transformers' cache, against the argmax of the whole Program at every step."""
    model, program = traced(name)
    program = compressed(program, QuantizeWeights(bits=8))
    save(program, tmp_path)
    loaded = AUTO[name].from_pretrained(tmp_path)
    ids = inputs(model, 2, 5)["input_ids"]
    mask = torch.ones_like(ids)
    written = loaded.generate(
        ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0
    )
    tokens = torch.zeros(2, 1, dtype=torch.long) if name == "t5" else ids
    for _ in range(4):
        values = {"input_ids": ids, "attention_mask": mask} | ({"decoder_input_ids": tokens} if name == "t5" else {})
        values = values if name == "t5" else {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        with torch.no_grad():
            logits = program(**values).logits[:, -1].clone()
        if model.generation_config.eos_token_id is not None:
            logits[:, model.generation_config.eos_token_id] = -torch.inf
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(written, tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_computing_in_half_precision(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    model, program = traced(name)
    program = compressed(program)
    save(program, tmp_path / "out")
    loaded = AUTO[name].from_pretrained(tmp_path / "out", dtype=dtype)
    assert loaded.dtype is dtype
    result, expected = run(loaded, inputs(model))[0], run(program, inputs(model))[0]
    assert result.dtype is dtype
    assert (result.float() - expected).norm() < 0.05 * expected.norm()
    weight = next(module for module in loaded.modules() if isinstance(module, PackedWeight))
    assert weight.scale.dtype is torch.float32 and weight.dtype is dtype
    loaded.save_pretrained(tmp_path / "again")
    again = AUTO[name].from_pretrained(tmp_path / "again")
    assert again.dtype is dtype
    assert torch.equal(run(again, inputs(model))[0], result)


def test_casting_a_loaded_model_leaves_its_scales(tmp_path: Path) -> None:
    save(mixed_bert(), tmp_path)
    loaded = AUTO["bert"].from_pretrained(tmp_path)
    before = {name: value.clone() for name, value in loaded.named_buffers() if ".weight." in name or ".input." in name}
    loaded.to(torch.bfloat16)
    assert loaded.classifier.weight.dtype is torch.bfloat16
    assert run(loaded, inputs(loaded))[0].dtype is torch.bfloat16
    for name, value in loaded.named_buffers():
        if name in before:
            assert torch.equal(value, before[name]), name
    assert len(before) > 15


def test_gradients_reach_what_is_not_packed(tmp_path: Path) -> None:
    save(compressed(traced("bert")[1], QuantizeWeights()), tmp_path)
    loaded = AUTO["bert"].from_pretrained(tmp_path)
    loaded(**inputs(loaded)).logits.sum().backward()
    assert loaded.bert.embeddings.LayerNorm.weight.grad.abs().sum() > 0


def test_a_state_dict_instead_of_files_is_checked_too(tmp_path: Path) -> None:
    program = mixed_bert()
    save(program, tmp_path)
    config, state = transformers.AutoConfig.from_pretrained(tmp_path), load_file(tmp_path / "model.safetensors")
    kind = transformers.BertForSequenceClassification
    loaded = kind.from_pretrained(None, config=config, state_dict=dict(state))
    assert_close(run(loaded, inputs(loaded)), run(program, inputs(loaded)))
    name = "bert.embeddings.word_embeddings.weight.outliers.columns"
    with pytest.raises(CheckpointError, match=r"outliers\.columns holds the column 999; the weight has 32"):
        kind.from_pretrained(None, config=config, state_dict=state | {name: torch.full_like(state[name], 999)})
    with pytest.raises(CheckpointError, match=r"outliers\.columns is missing"):
        kind.from_pretrained(None, config=config, state_dict={key: v for key, v in state.items() if key != name})


def test_a_fresh_process_needs_one_import(tmp_path: Path) -> None:
    model, program = traced("bert")
    program = compressed(program)
    save(program, tmp_path)
    torch.save((inputs(model), run(program, inputs(model))[0]), tmp_path / "expected.pt")
    code = f"""
import torch
import prequant
from transformers import AutoModelForSequenceClassification
values, expected = torch.load({str(tmp_path / "expected.pt")!r})
model = AutoModelForSequenceClassification.from_pretrained({str(tmp_path)!r})
with torch.no_grad():
    torch.testing.assert_close(model(**values).logits, expected, rtol=1e-5, atol=1e-6)
print("equal")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.stdout.strip() == "equal", result.stderr[-2000:]


def test_a_float_folder_needs_no_prequant(tmp_path: Path) -> None:
    model, program = traced("gpt2")
    save(program, tmp_path)
    torch.save((inputs(model), run(model, inputs(model))[0]), tmp_path / "expected.pt")
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM
values, expected = torch.load({str(tmp_path / "expected.pt")!r})
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
with torch.no_grad():
    torch.testing.assert_close(model(**values).logits, expected, rtol=1e-5, atol=1e-6)
print("prequant" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.stdout.strip() == "False", result.stderr[-2000:]


# ---- modules --------------------------------------------------------------------------------------------------------


def test_a_subclass_keeps_its_code() -> None:
    from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

    kind = packed_class(OPTLearnedPositionalEmbedding)
    assert issubclass(kind, OPTLearnedPositionalEmbedding) and issubclass(kind, PackedEmbedding)
    assert kind.__mro__.index(OPTLearnedPositionalEmbedding) < kind.__mro__.index(PackedEmbedding)
    assert packed_class(nn.Linear) is PackedLinear
    assert packed_class(transformers.pytorch_utils.Conv1D) is PackedConv1D
    with pytest.raises(PrequantError, match="a LayerNorm can't hold a packed weight"):
        packed_class(nn.LayerNorm)


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_an_embedding_with_a_life_of_its_own_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    from prequant.checkpoint.config import QuantizationSpec, WeightSpec
    from prequant.runtime import WeightFormat
    from prequant.transformers_quantizer import place

    model = bert()
    for key, value in options.items():
        setattr(model.bert.embeddings.word_embeddings, key, value)
    name = "bert.embeddings.word_embeddings.weight"
    spec = QuantizationSpec({name: WeightSpec(WeightFormat.affine(4), 60, 32, torch.float32)})
    with pytest.raises(CheckpointError, match=r"word_embeddings\.weight: an embedding with max_norm"):
        place(model, spec)


def test_a_listed_weight_of_a_module_without_one_is_refused(tmp_path: Path) -> None:
    save(mixed_bert(), tmp_path)

    def add(config: dict[str, Any]) -> None:
        weights = config["quantization_config"]["weights"]
        weights["bert.embeddings.LayerNorm.weight"] = weights.pop("bert.embeddings.word_embeddings.weight")

    edit_json(tmp_path / "config.json", add)
    with pytest.raises(CheckpointError, match=r"LayerNorm\.weight"):
        AUTO["bert"].from_pretrained(tmp_path)
