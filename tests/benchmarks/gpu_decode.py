"""Decoding on a GPU: tokens a second on packed weights, against bfloat16 under torch.compile.

python tests/benchmarks/gpu_decode.py

Llama-7B's and GPT-2-XL's shape with random weights, a prompt of 128 tokens, then 128 more, greedily, with a static
cache. What is measured is written after each row; with --minutes it ends in time, and names what it left out. --smoke
runs the code without a GPU, on a tiny shape, and writes nothing.
"""

import dataclasses
import functools
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import gpu  # type: ignore[import-not-found]  # first: it may turn Triton's interpreter on
import torch
import typer
from results_file import RESULTS, markdown, write  # type: ignore[import-not-found]
from tqdm import tqdm
from transformers import (
    CompileConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
)

import prequant as pq
from prequant.generation import with_cache
from prequant.passes import Canonicalize, QuantizeWeights, weight_sites
from prequant.runtime import Granularity

LLAMA: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 32000}
GPT2: dict[str, Any] = {"n_embd": 1600, "n_layer": 48, "n_head": 25}
MODELS: dict[str, tuple[Any, PretrainedConfig]] = {
    "llama-7b": (LlamaForCausalLM, LlamaConfig(**LLAMA, num_hidden_layers=32, num_attention_heads=32)),
    "gpt2-xl": (GPT2LMHeadModel, GPT2Config(**GPT2)),
}
TINY: dict[str, Any] = {"vocab_size": 96, "bos_token_id": 0, "eos_token_id": 0}
SMOKE: dict[str, tuple[Any, PretrainedConfig]] = {
    "llama-tiny": (
        LlamaForCausalLM,
        LlamaConfig(**TINY, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2),
    ),
}
GROUP = 64
"""Columns of a group: GPT-2-XL's 1,600 are no multiple of 128."""

COMPILED = "transformers, bf16, torch.compile"
ROWS: dict[str, tuple[int, str | None]] = {
    f"prequant, {bits} bits in groups of {GROUP}, torch.compile": (bits, "inductor") for bits in (4, 8, 3, 2)
}
ROWS[f"prequant, 4 bits in groups of {GROUP}"] = (4, None)
"""Bits, and the backend of torch.compile for what lies between the packed operators."""

SPREAD = 0.02
"""Standard deviation of the random weights."""

LAYERS_AT_ONCE = 4
"""Layers whose weights are floats at one time."""


def models() -> dict[str, tuple[Any, PretrainedConfig]]:
    """The shapes that are measured."""
    return SMOKE if gpu.SMOKE else MODELS


@functools.cache
def traced(name: str) -> Any:
    """The Program of a model's shape in bfloat16, canonical, on the meta device: it has no weights."""
    kind, config = models()[name]
    with torch.device("meta"):
        model = kind._from_config(config, dtype=torch.bfloat16).eval()
        ids = torch.zeros(2, 5, dtype=torch.int64)
    return Canonicalize()(pq.trace(model, {"input_ids": ids}))


def random_program(name: str, bits: int) -> Any:
    """A packed Program of random weights. They are made and quantized a few layers at a time, so that the float model
    is never there as a whole.
    """
    kind, config = models()[name]
    program = traced(name).copy()
    with torch.device(gpu.DEVICE):  # angles and the like, which are made and not learnt
        small = kind._from_config(_shallow(config), dtype=torch.bfloat16)
    made = {**dict(small.named_parameters()), **dict(small.named_buffers())}
    named = [*program.named_parameters(), *program.named_buffers()]
    shapes = {path: (tensor.shape, tensor.dtype) for path, tensor in named}
    sites = [site.name for site in weight_sites(program)]
    for path, (shape, dtype) in shapes.items():
        if path in program.info.constants:
            program.set_tensor(path, made[path].detach().to(gpu.DEVICE))
        elif path not in sites:
            value = torch.ones if path.endswith("weight") else torch.zeros
            program.set_tensor(path, value(shape, dtype=dtype, device=gpu.DEVICE), trainable=False)
    quantize = QuantizeWeights(bits=bits, granularity=Granularity.GROUP, group_size=GROUP, strategy="minmax")
    for group in tqdm(_by_layers(sites), desc="weights", disable=None, leave=False):
        for path in group:
            shape, dtype = shapes[path]
            program.set_tensor(path, torch.randn(shape, device=gpu.DEVICE, dtype=dtype) * SPREAD, trainable=False)
        program = dataclasses.replace(quantize, include=tuple(group))(program)
    for tensor in program.parameters():
        tensor.requires_grad_(False)
    return pq.lower(program.to(gpu.DEVICE))


def _shallow(config: PretrainedConfig) -> PretrainedConfig:
    shallow = type(config).from_dict(config.to_dict())
    shallow.num_hidden_layers = 1
    return shallow


def _by_layers(names: list[str]) -> list[list[str]]:
    """Names of weights, those of some layers together."""
    groups: dict[str, list[str]] = {}
    for name in names:
        number = next((int(part) for part in name.split(".") if part.isdigit()), None)
        groups.setdefault(name if number is None else f"layers {number // LAYERS_AT_ONCE}", []).append(name)
    return list(groups.values())


def compiled_model(name: str) -> Any:
    """transformers' model of random weights in bfloat16, which ``generate`` compiles with a static cache on a GPU."""
    kind, config = models()[name]
    with torch.device(gpu.DEVICE):
        return kind._from_config(config, dtype=torch.bfloat16).eval()


def generating(
    model: Any, batch: int, prompt: int, new: int, repeats: int, backend: str | None = None
) -> dict[str, float]:
    """Seconds of a step, tokens a second and seconds of the prompt with ``generate``, which chooses tokens, too."""
    vocabulary = model.config.vocab_size
    ids = torch.randint(1, vocabulary, (batch, prompt), device=gpu.DEVICE)

    def run(count: int) -> Callable[[], object]:
        lengths = {"max_new_tokens": count, "min_new_tokens": count, "max_cache_len": prompt + new}
        options = {"do_sample": False, "pad_token_id": 0, "cache_implementation": "static", **lengths}
        if backend is not None:
            options["compile_config"] = CompileConfig(backend=backend)
        return lambda: model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)

    first, whole = _seconds(run(1), repeats), _seconds(run(new), repeats)
    step = (whole - first) / (new - 1)
    return {"step": step, "tokens_per_second": batch / step, "prompt": first}


def steps_alone(program: Any, batch: int, prompt: int, new: int, repeats: int, backend: str | None) -> float:
    """Seconds of a step without ``generate`` around it: each token is the largest logit of the step before."""
    generative: Any = with_cache(program)
    ids = torch.randint(1, program.config.vocab_size, (batch, prompt), device=gpu.DEVICE)
    found = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            cache = generative.static_cache(batch, prompt + new, backend=backend)
            token = generative(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
            token = generative(token, past_key_values=cache).logits.argmax(-1)  # records the graph
            gpu.synchronize()
            started = time.perf_counter()
            for _ in range(new - 2):
                token = generative(token, past_key_values=cache).logits.argmax(-1)
            gpu.synchronize()
            found.append((time.perf_counter() - started) / (new - 2))
            del cache
    return min(found[1:])


def _seconds(call: Callable[[], object], repeats: int) -> float:
    """The shortest of the repeats, after some that don't count: what else runs only makes it longer."""
    found = []
    warm_up = 1 if gpu.SMOKE else 2
    for _ in range(warm_up + repeats):
        gpu.synchronize()
        started = time.perf_counter()
        call()
        gpu.synchronize()
        found.append(time.perf_counter() - started)
    return min(found[warm_up:])


def row_of(shape: str, name: str, batch: int, prompt: int, new: int, repeats: int) -> dict[str, Any]:
    """The figures of one contender on one model."""
    bits, backend = ROWS.get(name, (16, None))
    model = compiled_model(shape) if name == COMPILED else random_program(shape, bits)
    tensors = dict.fromkeys([*model.parameters(), *model.buffers()])
    row: dict[str, Any] = {
        "model": shape,
        "name": name,
        "batch": batch,
        "bytes": sum(tensor.nbytes for tensor in tensors),
    }
    row |= generating(model, batch, prompt, new, repeats, backend)
    if name != COMPILED:
        row["step_alone"] = steps_alone(model, batch, prompt, new, repeats, backend)
    if gpu.DEVICE.type == "cuda":
        row["peak_bytes"] = torch.cuda.max_memory_allocated(gpu.DEVICE)
        torch.cuda.reset_peak_memory_stats(gpu.DEVICE)
    return row


def tables(records: list[dict[str, Any]]) -> dict[str, list[dict[str, str]]]:
    """A table for each model and batch."""
    result: dict[str, list[dict[str, str]]] = {}
    compiled = {(r["model"], r["batch"]): r for r in records if r["name"] == COMPILED}
    for r in records:
        base = compiled.get((r["model"], r["batch"]), r)
        alone = f"{1000 * r['step_alone']:.3f}" if "step_alone" in r else "–"
        result.setdefault(f"{r['model']}, batch {r['batch']}", []).append(
            {
                "": r["name"],
                "tokens/s": f"{r['tokens_per_second']:,.0f}",
                "over bf16": f"{base['step'] / r['step']:.2f}" if base is not r else "–",
                "ms a step of generate": f"{1000 * r['step']:.3f}",
                "ms a step alone": alone,
                "ms for the prompt": f"{1000 * r['prompt']:.1f}",
                "weights, MiB": f"{r['bytes'] / 2**20:,.0f}",
                "bytes of the weights a second, of the copy rate": f"{100 * r['of_copy_rate']:.0f} %",
            }
        )
    return result


def main(
    model: Annotated[list[str], typer.Option(help=f"Some of {', '.join(MODELS)}.")] = list(MODELS),  # noqa: B006
    contender: Annotated[list[str], typer.Option(help="Only those with this in their name.")] = [""],  # noqa: B006
    batch: Annotated[list[int], typer.Option(min=1)] = [1],  # noqa: B006
    prompt: Annotated[int, typer.Option(min=2)] = 128,
    new: Annotated[int, typer.Option(min=4)] = 128,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    minutes: Annotated[float, typer.Option(help="After so many, what is left is left out.")] = 8,
    smoke: Annotated[bool, typer.Option("--smoke", help="Tiny, in Triton's interpreter on the CPU.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for gpu_decode.md and gpu_decode.json.")] = RESULTS,
) -> None:
    """Measure, and write gpu_decode.md and gpu_decode.json."""
    gpu.require_gpu()
    if smoke:
        model, contender, prompt, new, repeats = list(SMOKE), ["bf16", "4 bits"], 4, 4, 1
    if unknown := set(model) - set(models()):
        raise typer.BadParameter(f"--model {sorted(unknown)}: expected some of {list(models())}")
    started = time.monotonic()
    records: list[dict[str, Any]] = []
    left: list[str] = []
    names = [name for name in (COMPILED, *ROWS) if any(part in name for part in contender)]
    if smoke:
        names = [name for name in names if name == COMPILED or ROWS[name][1] is None]  # compilers take a minute
    with gpu.kernels():
        rate = gpu.copy_rate(1 << (20 if smoke else 30), 10)
        torch.manual_seed(0)
        for each in model:
            for name in names:
                for count in batch:
                    if time.monotonic() - started > 60 * minutes:
                        left.append(f"{name}, {each}, batch {count}")
                        continue
                    row = row_of(each, name, count, prompt, new, repeats)
                    records.append({**row, "of_copy_rate": row["bytes"] / row["step"] / rate})
                    gc.collect()
                    if gpu.DEVICE.type == "cuda":
                        torch.cuda.empty_cache()
                    if not smoke:
                        _write(records, left, rate, prompt, new, out)
        if left:
            _write(records, left, rate, prompt, new, out)
    for heading, rows in tables(records).items():
        print(f"\n## {heading}\n\n{markdown(rows)}")


def _write(records: list[dict[str, Any]], left: list[str], rate: float, prompt: int, new: int, out: Path) -> None:
    missing = f" Left out for want of time: {'; '.join(left)}." if left else ""
    notes = f"""
Random weights in bfloat16 on {gpu.device_text()}: a prompt of {prompt} tokens, then {new}, greedily, with a static
cache. Steps of `generate` are what {new} tokens take longer than one, over their number, in the best of the repeats;
transformers compiles its model for them (`torch.compile`, CUDA graphs); prequant records its own, of what
`torch.compile` made of the operators between the packed ones where a row says so. A step alone is without `generate`
around it. The share is that of the {rate / 1e9:,.0f} GB/s that a copy on the device reads and writes in the same run.
Embeddings and heads are quantized like the other weights.{missing}
"""
    write(
        "gpu_decode",
        "Decoding on a GPU",
        ["python", "tests/benchmarks/gpu_decode.py", *sys.argv[1:]],
        notes,
        tables(records),
        folder=out,
        packages=gpu.PACKAGES,
        measurements={"device": gpu.device_text(), "copy_rate": rate, "records": records, "left": left},
    )


if __name__ == "__main__":
    typer.run(main)
