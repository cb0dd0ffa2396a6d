"""Whether packed decoders write what simulated ones write: 256 greedy tokens on 20 prompts.

python tests/benchmarks/same_tokens.py --model GPT2_DIR --model LLAMA_DIR

Models of the families that no folder is given for have random weights. Prompts are the beginnings of prequant's sample
sentences, or random tokens where there is no tokenizer.
"""

import csv
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from results_file import RESULTS, write  # type: ignore[import-not-found]
from rich.console import Console
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from prequant.passes import (
    BinaryCode,
    Canonicalize,
    Pipeline,
    QuantizeActivations,
    QuantizeWeights,
    SplitOutliers,
    lower,
)
from prequant.sources import example_inputs, find_tokenizer, load_model
from prequant.trace import trace

PROMPTS, WORDS, TOKENS = 20, 6, 256
SMALL: dict[str, Any] = {"vocab_size": 1000, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
RANDOM: dict[str, Any] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=256, n_head=4, **SMALL)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            num_hidden_layers=4, hidden_size=256, word_embed_proj_dim=256, num_attention_heads=4, ffn_dim=1024, **SMALL
        )
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=4,
            hidden_size=256,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=704,
            **SMALL,
        )
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config.from_dict(
            {**SMALL, "d_model": 256, "d_ff": 1024, "num_layers": 4, "num_heads": 4, "decoder_start_token_id": 0}
        )
    ),
}
FORMS: dict[str, list[Any]] = {
    "4 bits, 1 % outliers": [SplitOutliers(ratio=0.01), QuantizeWeights(bits=4)],
    "3 bits in groups of 32": [QuantizeWeights(bits=3, granularity="group", group_size=32)],  # type: ignore[arg-type]
    "3 binary planes": [BinaryCode(bits=3)],
    "4 bits, 8-bit inputs": [QuantizeWeights(bits=4), QuantizeActivations(bits=8)],
}


def main(
    model: Annotated[list[str], typer.Option(help="A folder or hub name; repeat for several.")] = [],  # noqa: B006
    tokens: Annotated[int, typer.Option(min=1)] = TOKENS,
    out: Annotated[
        Path, typer.Option(help="Folder for same_tokens.md and .json.", show_default="tests/benchmarks/results")
    ] = RESULTS,
) -> None:
    """Compare, and write same_tokens.md and same_tokens.json."""
    models: dict[str, tuple[Any, Any]] = {}
    for source in model:
        loaded = load_model(source)
        models[loaded.config.model_type] = (loaded, find_tokenizer(source))
    torch.manual_seed(0)
    for kind, make in RANDOM.items():
        models.setdefault(kind, (make().eval(), None))
    rows = []
    for kind in sorted(models):
        for form, passes in FORMS.items():
            Console(stderr=True).print(f"{kind}, {form}")
            rows.append({"model": _name(kind, models[kind]), "form": form, **compare(*models[kind], passes, tokens)})
    notes = f"""
{PROMPTS} prompts, {tokens} new tokens each, greedily, in one left-padded batch. `equal`: prompts whose tokens are all
the same. `first apart`: the earliest new token at which any prompt's differ, and by how much the simulated model
preferred its own there, relative to the deviation of its logits. With 8-bit inputs a rounding may move a code.
"""
    command = ["python", "tests/benchmarks/same_tokens.py", *(word for _ in model for word in ("--model", "DIR"))]
    path = write("same_tokens", "Tokens of packed and simulated decoders", command, notes, {"Tokens": rows}, folder=out)
    Console().print(path.read_text(encoding="utf-8"), markup=False, highlight=False, soft_wrap=True)


def _name(kind: str, model: tuple[Any, Any]) -> str:
    parameters = sum(p.numel() for p in model[0].parameters()) / 1e6
    return f"{kind}, {parameters:.1f} M parameters, " + ("pre-trained" if model[1] is not None else "random weights")


@torch.inference_mode()
def compare(model: Any, tokenizer: Any, passes: list[Any], tokens: int) -> dict[str, str]:
    """Tokens of the simulated and of the lowered Program."""
    simulated: Any = Pipeline([Canonicalize(), *passes])(trace(model, example_inputs(model, tokenizer)))
    packed: Any = lower(simulated)
    inputs = prompts(model, tokenizer)
    options: dict[str, Any] = {
        "max_new_tokens": tokens,
        "min_new_tokens": tokens,
        "do_sample": False,
        "pad_token_id": 0,
    }
    expected, found = (each.generate(**inputs, **options)[:, -tokens:] for each in (simulated, packed))
    apart = expected != found
    equal = int((~apart.any(1)).sum())
    return {
        "equal": f"{equal} of {PROMPTS}",
        "first apart": "–" if equal == PROMPTS else gap(simulated, inputs, expected, apart),
    }


def prompts(model: Any, tokenizer: Any) -> Mapping[str, Tensor]:
    """Left-padded, as ``generate`` takes them."""
    if tokenizer is None:
        ids = torch.randint(3, model.config.vocab_size, (PROMPTS, 8), generator=torch.Generator().manual_seed(1))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    text = (resources.files("prequant") / "data" / "sentences.tsv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))[:PROMPTS]
    beginnings = [" ".join(row["sentence"].split()[:WORDS]) for row in rows]
    tokenizer.padding_side = "left"
    encoded = tokenizer(beginnings, return_tensors="pt", padding=True)
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def gap(simulated: Any, inputs: Mapping[str, Tensor], expected: Tensor, apart: Tensor) -> str:
    """Where tokens first differ, and how much better the simulated model's own is than the next."""
    step = int(apart.any(0).nonzero()[0])
    row = int(apart[:, step].nonzero()[0])
    if simulated.config.is_encoder_decoder:
        start = torch.full((1, 1), simulated.config.decoder_start_token_id)
        given = {**{name: value[row : row + 1] for name, value in inputs.items()}}
        given["decoder_input_ids"] = torch.cat([start, expected[row : row + 1, :step]], 1)
        logits = simulated(**given).logits[0, -1]
    else:
        kept = inputs["attention_mask"][row].bool()
        ids = torch.cat([inputs["input_ids"][row][kept], expected[row, :step]])[None]
        logits = simulated(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1]
    best = logits.topk(2).values
    return f"{step} ({float((best[0] - best[1]) / logits.std()):.1e})"


if __name__ == "__main__":
    typer.run(main)
