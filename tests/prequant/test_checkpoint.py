"""Folders: what is saved comes back, bit for bit, and is laid out as a Hugging Face model folder."""

import json
import math
import os
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import prequant
from prequant.checkpoint import CheckpointError, load, save
from prequant.model import ModelProgram
from prequant.passes import (
    BinaryCode,
    FuseEpilogue,
    FuseParallelLinears,
    Lower,
    Pipeline,
    Program,
    QuantizeActivations,
    QuantizeWeights,
    SplitOutliers,
    Train,
    calibrate,
    lower,
    readable,
    weights,
)
from prequant.runtime import Granularity, WeightFormat
from prequant.trace import trace
from prequant.traced import TracedProgram

from .checkpoint_models import MODELS, compressed, gpt2, inputs, mixed_bert, outputs, traced

PIPELINES: dict[str, tuple[Any, ...]] = {
    "2 bits": (QuantizeWeights(bits=2),),
    "3 bits": (QuantizeWeights(bits=3),),
    "8 bits per tensor": (QuantizeWeights(bits=8, granularity=Granularity.TENSOR),),
    "groups, asymmetric": (QuantizeWeights(bits=4, granularity=Granularity.GROUP, group_size=12, symmetric=False),),
    "binary": (QuantizeWeights(bits=1),),
    "ternary": (QuantizeWeights(bits=2, ternary=True),),
    "ternary, base 3": (QuantizeWeights(bits=2, ternary=True, base3=True),),
    "bcq": (BinaryCode(bits=2, embeddings=True),),
    "bcq groups": (BinaryCode(bits=3, group_size=16),),
    "outliers on floats": (SplitOutliers(ratio=0.02),),
    "outliers that replace": (SplitOutliers(ratio=0.02, mode="replace", dtype="bfloat16"), QuantizeWeights()),
    "latent weights": (QuantizeWeights(bits=2, ternary=True, latent=True),),
    "inputs per token": (QuantizeWeights(), QuantizeActivations()),
    "inputs of float weights": (QuantizeActivations(granularity=Granularity.TENSOR),),
    "attention's inputs too": (QuantizeWeights(), QuantizeActivations(operands="matmul")),
}


def assert_equal_outputs(first: Program, second: Program, values: dict[str, Tensor]) -> None:
    for a, b in zip(outputs(first(**values)), outputs(second(**values)), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("steps", PIPELINES.values(), ids=PIPELINES.keys())
@pytest.mark.parametrize("lowered", [False, True], ids=["simulated", "lowered"])
def test_a_compressed_model_comes_back_bit_for_bit(tmp_path: Path, steps: tuple[Any, ...], lowered: bool) -> None:
    model, program = traced("bert")
    program = compressed(program, *steps)
    program = cast(ModelProgram, lower(program) if lowered else program)
    save(program, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert isinstance(loaded, ModelProgram)
    assert_equal_outputs(program, loaded, inputs(model, 3, 5))
    assert readable(loaded) == readable(program)
    assert loaded.config.to_dict() == program.config.to_dict() | {
        "architectures": ["BertForSequenceClassification"],
        "dtype": "float32",
    }


@pytest.mark.parametrize("name", MODELS)
def test_every_family_comes_back(tmp_path: Path, name: str) -> None:
    model, program = traced(name)
    program = cast(ModelProgram, lower(compressed(program)))
    program.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert_equal_outputs(program, loaded, inputs(model, 3, 6))
    assert type(loaded(**inputs(model))) is type(model(**inputs(model)))
    assert loaded.info.aliases == program.info.aliases


def test_a_folder_is_the_same_fused_or_not_but_for_its_graph(tmp_path: Path) -> None:
    apart = Lower()(compressed(traced("bert")[1]))
    save(apart, tmp_path / "apart")
    loaded = load(tmp_path / "apart")
    fused = Pipeline([FuseEpilogue(), FuseParallelLinears()])(loaded)
    assert readable(fused) == readable(lower(compressed(traced("bert")[1])))
    assert readable(fused) != readable(loaded)
    save(fused, tmp_path / "fused")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "apart" / name).read_bytes() == (tmp_path / "fused" / name).read_bytes()
    assert readable(load(tmp_path / "fused")) == readable(fused)


def test_all_kinds_of_weights_in_one_model(tmp_path: Path) -> None:
    program = mixed_bert()
    formats = {view.format for view in weights(program)}
    assert len(formats) == 6, formats
    save(program, tmp_path)
    assert_equal_outputs(program, load(tmp_path), inputs(traced("bert")[0]))


def test_saving_twice_writes_the_same_bytes(tmp_path: Path) -> None:
    save(mixed_bert(), tmp_path / "first")
    save(load(tmp_path / "first"), tmp_path / "second")
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == ["config.json", "model.safetensors", "prequant-constants.safetensors", "prequant.json"]
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


def test_the_file_has_the_size_that_arithmetic_predicts(tmp_path: Path) -> None:
    model, program = traced("bert")
    save(compressed(program, QuantizeWeights(bits=4)), tmp_path)
    parameters = dict(model.named_parameters())
    codes = sum(p.shape[0] * math.ceil(p.shape[1] / 2) + 4 * p.shape[0] for p in parameters.values() if p.dim() == 2)
    floats = sum(4 * p.numel() for p in parameters.values() if p.dim() != 2)
    path = tmp_path / "model.safetensors"
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size - header == codes + floats


# ---- as Hugging Face would have it -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_float_model_has_the_tensors_that_transformers_writes(tmp_path: Path, name: str) -> None:
    model, program = traced(name)
    save(program, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    with safe_open(tmp_path / "ours" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["architectures"] == [type(model).__name__]


def test_what_is_not_packed_stays_as_the_model_has_it(tmp_path: Path) -> None:
    model, program = traced("gpt2")
    program = compressed(program, QuantizeWeights(include=("*c_attn*", "*wte*")))
    save(program, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["transformer.h.0.mlp.c_fc.weight"].shape == (32, 128)
    assert torch.equal(tensors["transformer.h.0.mlp.c_fc.weight"], model.transformer.h[0].mlp.c_fc.weight)
    assert tensors["transformer.h.0.attn.c_attn.weight.codes"].shape == (96, 16)
    assert not any(name.startswith("lm_head") for name in tensors)
    assert_equal_outputs(program, load(tmp_path), inputs(model))


def test_a_packed_weight_is_described_in_the_configuration(tmp_path: Path) -> None:
    save(mixed_bert(), tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "prequant"
    assert written["version"] == 1
    assert written["modules"] is True
    embedding = written["weights"]["bert.embeddings.word_embeddings.weight"]
    assert embedding == {
        "format": "affine4:row",
        "shape": [60, 32],
        "outliers": {"count": 19, "dtype": "float32", "index": "uint16", "replace": False},
    }
    assert written["weights"]["bert.encoder.layer.0.output.dense.weight"]["format"] == "float32"
    assert written["inputs"] == {
        "bert.pooler.dense": {"format": "affine8:tensor:asym", "scale": "bert.pooler.dense.input"}
    }
    for name, entry in written["weights"].items():
        if entry["format"] != "float32":
            WeightFormat.parse(entry["format"])
            assert name not in load_file(tmp_path / "model.safetensors")


def test_the_tokenizer_and_the_generation_configuration_come_along(tmp_path: Path, minilm_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_path)
    model = gpt2()
    model.generation_config.max_new_tokens = 17
    program = cast(ModelProgram, trace(model, inputs(model)))
    assert program.save_pretrained(tmp_path, tokenizer) == tmp_path
    assert transformers.GenerationConfig.from_pretrained(tmp_path).max_new_tokens == 17
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again("a text")["input_ids"] == tokenizer("a text")["input_ids"]
    save(load(tmp_path), tmp_path / "again")
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "again").max_new_tokens == 17


# ---- what a Program is -----------------------------------------------------------------------------------------------


class Shared(nn.Module):
    """Tied weights, a buffer that is not saved, a constant, infinity, nested outputs, a name with a dash."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, 8)
        self.parts = nn.ModuleDict({"a-b": nn.Linear(8, 8)})
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer("offset", torch.arange(8.0), persistent=False)
        self.register_buffer("kept", torch.full((8,), 0.5))

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Any]:
        hidden = self.parts["a-b"](self.tokens(ids)) * self.kept + self.offset + torch.tensor([0.25, 0.75]).sum()
        hidden = hidden.masked_fill(mask.unsqueeze(-1), -torch.inf).softmax(1)
        return {"logits": self.head(hidden), "rest": (hidden, [hidden[:, 1:], None])}


def test_a_plain_module(tmp_path: Path) -> None:
    model = Shared().eval()
    values = {"ids": torch.randint(20, (3, 5)), "mask": torch.zeros(3, 5, dtype=torch.bool)}
    values["mask"][1, 3:] = True
    program = compressed(trace(model, values), QuantizeWeights(bits=8))
    assert program.save_pretrained(tmp_path) == tmp_path
    loaded = load(tmp_path)
    assert not isinstance(loaded, ModelProgram)
    expected, found = program(**values), loaded(**values)
    assert torch.equal(expected["logits"], found["logits"])
    assert isinstance(found["rest"], tuple) and found["rest"][1][1] is None
    assert torch.equal(expected["rest"][1][0], found["rest"][1][0])
    assert set(load_file(tmp_path / "model.safetensors")) == {
        "tokens.weight.codes",
        "tokens.weight.scale",
        "parts.a-b.weight.codes",
        "parts.a-b.weight.scale",
        "parts.a-b.bias",
        "kept",
    }
    assert loaded.names_of("tokens.weight") == ("tokens.weight", "head.weight")
    assert set(loaded.info.constants) == set(program.info.constants)
    assert {"offset"} < set(load_file(tmp_path / "prequant-constants.safetensors"))
    assert cast(TracedProgram, loaded).save_pretrained(tmp_path / "again") == tmp_path / "again"


def test_what_trains_and_what_is_a_buffer_come_back(tmp_path: Path) -> None:
    program = compressed(traced("bert")[1], SplitOutliers(ratio=0.01), QuantizeWeights(), Train(outliers=True))
    save(program, tmp_path)
    loaded = load(tmp_path)
    trainable = {name for name, value in program.named_parameters() if value.requires_grad}
    assert trainable == {name for name, value in loaded.named_parameters() if value.requires_grad}
    assert 0 < len(trainable) < len(dict(program.named_parameters()))
    assert dict(program.named_buffers()).keys() == dict(loaded.named_buffers()).keys()


def test_the_mode_is_not_saved_and_switches_after_loading(tmp_path: Path) -> None:
    model, original = traced("bert")
    program = original.copy()
    program.train()
    save(program, tmp_path)
    assert program.training
    loaded, values = load(tmp_path), inputs(model)
    assert not loaded.training
    assert torch.equal(loaded(**values).logits, loaded(**values).logits)
    program.eval()
    assert torch.equal(loaded(**values).logits, program(**values).logits)
    loaded.train()
    assert not torch.equal(loaded(**values).logits, loaded(**values).logits)
    dropout = [node for node in loaded.graph.nodes if "scaled_dot_product" in node.name]
    assert dropout and all(node.args[4] == 0.1 for node in dropout), "attention's dropout is switched too"


def test_passes_go_on_after_loading(tmp_path: Path) -> None:
    model, program = traced("bert")
    program = compressed(program, SplitOutliers(ratio=0.01), QuantizeWeights())
    save(program, tmp_path)
    loaded = lower(compressed(load(tmp_path), QuantizeActivations()))
    expected = lower(compressed(program, QuantizeActivations()))
    assert_equal_outputs(expected, loaded, inputs(model))


def test_static_input_scales_are_shared_after_loading(tmp_path: Path) -> None:
    model, program = traced("bert")
    steps = (QuantizeWeights(), QuantizeActivations(granularity=Granularity.TENSOR, dynamic=False))
    calibrated = calibrate(compressed(program, *steps), [inputs(model)], progress=False)
    save(calibrated, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["inputs"]
    attention = "bert.encoder.layer.0.attention.self"
    assert {written[f"{attention}.{part}"]["scale"] for part in ("query", "key", "value")} == {
        f"{attention}.query.input"
    }
    assert_equal_outputs(calibrated, load(tmp_path), inputs(model))


def test_reasons_against_modules_are_written(tmp_path: Path) -> None:
    program: Program = traced("bert")[1].copy()
    save(compressed(program, QuantizeActivations(operands="matmul")), tmp_path / "attention")
    save(compressed(program, QuantizeWeights(latent=True)), tmp_path / "latent")
    for name, reason in (("attention", "more than the weight or input of a linear"), ("latent", "latent weight")):
        written = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        assert written["modules"] is False
        assert reason in written["reasons"][0]
    program.update_info(extra={**program.info.extra, "not_modules": ("a layer was dropped",)})
    save(program, tmp_path / "told")
    assert load(tmp_path / "told").info.extra["not_modules"] == ("a layer was dropped",)


def test_loading_onto_a_device(tmp_path: Path) -> None:
    save(mixed_bert(), tmp_path)
    loaded = load(tmp_path, device="meta")
    assert {value.device.type for value in (*loaded.parameters(), *loaded.buffers())} == {"meta"}


def test_the_public_names() -> None:
    assert prequant.load is load
    assert prequant.save is save
    assert issubclass(prequant.CheckpointError, prequant.PrequantError)


# ---- what can't be saved ---------------------------------------------------------------------------------------------


def test_a_scale_that_is_not_finite_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    program = compressed(traced("bert")[1], QuantizeWeights())
    scale = program.tensor("bert.pooler.dense.weight.scale")
    with torch.no_grad():
        scale[3] = float("nan")
    with pytest.raises(CheckpointError, match=r"bert\.pooler\.dense\.weight\.scale holds nan"):
        save(program, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_call_that_no_file_may_hold_is_refused(tmp_path: Path) -> None:
    program: Program = traced("bert")[1].copy()
    output = program.graph.output_node()
    with program.graph.inserting_before(output):
        node = program.graph.call_function(print, (cast(Any, output.args[0])[0],))
    with pytest.raises(CheckpointError, match=rf"node {node.name}: a call of builtins.print can't be saved"):
        save(program, tmp_path / "out")
    assert os.listdir(tmp_path) == []
