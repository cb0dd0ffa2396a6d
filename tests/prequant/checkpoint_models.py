"""Small models and folders for the tests of checkpoints. Import with ``from .checkpoint_models import ...``."""

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prequant.checkpoint.tensors import digest
from prequant.passes import (
    BinaryCode,
    Canonicalize,
    Pipeline,
    Program,
    QuantizeActivations,
    QuantizeWeights,
    SplitOutliers,
    calibrate,
    lower,
)
from prequant.runtime import Granularity
from prequant.trace import trace
from prequant.traced import TracedProgram

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def bert(**options: Any) -> transformers.BertForSequenceClassification:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, **options)).eval()


def roberta() -> transformers.RobertaForMaskedLM:
    return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SIZES)).eval()


def gpt2() -> transformers.GPT2LMHeadModel:
    config = transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=4, n_positions=40, **TOKENS)
    return transformers.GPT2LMHeadModel(config).eval()


def opt() -> transformers.OPTForCausalLM:
    config = transformers.OPTConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        ffn_dim=48,
        max_position_embeddings=40,
        word_embed_proj_dim=32,
        **TOKENS,
    )
    return transformers.OPTForCausalLM(config).eval()


def llama() -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, **TOKENS)
    return transformers.LlamaForCausalLM(config).eval()


def t5() -> transformers.T5ForConditionalGeneration:
    config = transformers.T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    config.decoder_start_token_id = 0
    return transformers.T5ForConditionalGeneration(config).eval()


MODELS: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "bert": bert,
    "roberta": roberta,
    "gpt2": gpt2,
    "opt": opt,
    "llama": llama,
    "t5": t5,
}


def inputs(model: nn.Module, batch: int = 2, length: int = 7) -> dict[str, Tensor]:
    """Token ids with padding in the last row."""
    generator = torch.Generator().manual_seed(batch * 100 + length)
    values = {"input_ids": torch.randint(3, 60, (batch, length), generator=generator)}
    values["attention_mask"] = torch.ones(batch, length, dtype=torch.long)
    values["attention_mask"][-1, length // 2 :] = 0
    if isinstance(model, transformers.T5ForConditionalGeneration):
        values["decoder_input_ids"] = torch.randint(3, 60, (batch, 4), generator=generator)
    return values


@lru_cache
def traced(name: str) -> tuple[Any, TracedProgram]:
    """A model and its Program, which are not to be changed: each is traced once."""
    torch.manual_seed(0)
    model = MODELS[name]()
    return model, cast(TracedProgram, Canonicalize()(trace(model, inputs(model))))


def compressed(program: Program, *passes: Any) -> TracedProgram:
    """With outliers, 4-bit weights and dynamic 8-bit inputs, unless other passes are given."""
    steps = passes or (SplitOutliers(ratio=0.01, dtype="float16"), QuantizeWeights(), QuantizeActivations())
    return cast(TracedProgram, Pipeline(steps)(program))


def mixed_bert() -> Program:
    """A BERT with every kind of stored weight in it, lowered."""
    model, program = traced("bert")
    layer = "bert.encoder.layer.0."
    program = compressed(
        program,
        SplitOutliers(ratio=0.01, include=("*word_embeddings*", "*output.dense*"), exclude=("*attention*",)),
        QuantizeWeights(include=("*word_embeddings*", "*pooler*")),
        QuantizeWeights(bits=2, ternary=True, include=(f"{layer}attention.self.query*",)),
        QuantizeWeights(bits=2, ternary=True, base3=True, include=(f"{layer}attention.self.key*",)),
        QuantizeWeights(
            granularity=Granularity.GROUP, group_size=8, symmetric=False, include=(f"{layer}attention.self.value*",)
        ),
        BinaryCode(include=(f"{layer}intermediate*",)),
        QuantizeActivations(granularity=Granularity.TENSOR, dynamic=False, symmetric=False, include=("*pooler*",)),
    )
    return lower(calibrate(program, [inputs(model)], progress=False))


# ---- editing folders -------------------------------------------------------------------------------------------------


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a folder, and the digest with them: someone who means harm would."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    edit_json(folder / "prequant.json", lambda graph: graph["files"][path.name].update(sha256=digest(path)))


def outputs(result: Any) -> list[Tensor]:
    """The float tensors of a model's result."""
    return [value for value in result.values() if isinstance(value, Tensor)]
