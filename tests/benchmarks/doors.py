"""Every door out of prequant, for models of five families and every kind of weight: whether it works, how near its
results are to those of the simulated Program, and how large its files are beside the packed tensors.

Models and kinds of weights are measured one at a time and kept in results/doors; ``--only`` measures those whose names
hold a word, so that several processes can share the work. ``--gpt2`` and ``--llama`` take folders of real decoders;
without them, random ones stand in::

    python tests/benchmarks/doors.py run --gpt2 GPT2 --llama LLAMA
    python tests/benchmarks/doors.py table
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import onnxruntime
import torch
import transformers
import typer
from results_file import encoder_folder, row_file, write  # type: ignore[import-not-found]
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

import prequant
from prequant.checkpoint import save
from prequant.export import export_aoti, export_onnx, export_pt2
from prequant.measure import tensor_bytes, write_json
from prequant.passes import (
    BinaryCode,
    Canonicalize,
    Pass,
    Pipeline,
    Program,
    QuantizeActivations,
    QuantizeWeights,
    SplitOutliers,
    lower,
)
from prequant.runtime import Granularity, PrequantError
from prequant.trace import trace

SEED, LENGTH = 42, 24
GROUP: dict[str, Any] = {"granularity": Granularity.GROUP, "group_size": 64}
KINDS: dict[str, tuple[Pass, ...]] = {
    "8 bits": (QuantizeWeights(bits=8),),
    "4 bits": (QuantizeWeights(bits=4),),
    "4 bits, outliers": (SplitOutliers(ratio=0.005), QuantizeWeights(bits=4)),
    "4 bits, 8-bit inputs": (QuantizeWeights(bits=4, **GROUP), QuantizeActivations(bits=8)),
    "3 bits": (QuantizeWeights(bits=3, **GROUP),),
    "ternary": (QuantizeWeights(bits=2, ternary=True),),
    "binary": (QuantizeWeights(bits=1),),
    "3 binary planes": (BinaryCode(bits=3, embeddings=True),),
}
"""Scales are of rows, or of groups of 64 (with 3 bits, and with 8-bit inputs); embeddings are quantized, too."""
GRAPH = "folder", "pt2", "aoti", "torch.compile"
STYLES = {"ONNX, qdq": "qdq", "ONNX, matmulnbits": "matmulnbits"}

app = typer.Typer(add_completion=False)


# ---- models ----------------------------------------------------------------------------------------------------------


def models(gpt2: Path | None, llama: Path | None) -> dict[str, Callable[[], Any]]:
    """Real ones where there are any, else random ones of a family's shape."""
    sizes: dict[str, Any] = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 8000}
    wide: Any = transformers.GPT2Config(n_layer=4, n_embd=256, n_head=4, vocab_size=8000)
    opt = transformers.OPTConfig(**sizes, ffn_dim=1024, word_embed_proj_dim=256)
    t5 = transformers.T5Config(vocab_size=8000, d_model=256, d_kv=64, d_ff=1024, num_layers=4, num_heads=4)
    t5.decoder_start_token_id = 0
    gated = transformers.LlamaConfig(**sizes, intermediate_size=768)
    read = partial(AutoModelForCausalLM.from_pretrained, dtype=torch.float32)
    return {
        "all-MiniLM-L6-v2": partial(AutoModel.from_pretrained, encoder_folder(), dtype=torch.float32),
        **({f"GPT-2, {gpt2.name}": partial(read, gpt2)} if gpt2 else {"GPT-2": partial(_random, wide, "GPT2LMHead")}),
        "OPT": partial(_random, opt, "OPTForCausalLM"),
        **(
            {f"Llama, {llama.name}": partial(read, llama)}
            if llama
            else {"Llama": partial(_random, gated, "LlamaForCausalLM")}
        ),
        "T5": partial(_random, t5, "T5ForConditionalGeneration"),
    }


def _random(config: Any, kind: str) -> Any:
    torch.manual_seed(SEED)
    return getattr(transformers, kind)(config)


def inputs_of(model: Any, batch: int, length: int) -> dict[str, Tensor]:
    """Random ids, of which the first row is shorter."""
    ids = torch.randint(3, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(SEED))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    made = {"input_ids": ids, "attention_mask": mask}
    return {**made, "decoder_input_ids": ids[:, :9]} if model.config.is_encoder_decoder else made


# ---- doors -----------------------------------------------------------------------------------------------------------


def through(door: str, packed: Program, path: Path, inputs: Mapping[str, Tensor]) -> tuple[Tensor, int | None]:
    """The first result of what comes out at a door, and the bytes of its files if it writes some."""
    if door in STYLES:
        # The user's file has a cache, which takes other inputs; numbers are those of the graph without one.
        exact = onnxruntime.SessionOptions()
        exact.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        style: Any = STYLES[door]
        export_onnx(packed, path / "whole.onnx", style=style, cache=False)
        session = onnxruntime.InferenceSession(str(path / "whole.onnx"), exact, providers=["CPUExecutionProvider"])
        found = session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]
        return torch.from_numpy(found), export_onnx(packed, path / "model.onnx", style=style).bytes
    if door == "torch.compile":
        return first(torch.compile(packed, fullgraph=True, dynamic=True)(**inputs)), None
    if door == "folder":
        folder = save(packed, path / "folder")
        return first(prequant.load(folder)(**inputs)), (folder / "model.safetensors").stat().st_size
    if door == "pt2":
        file = export_pt2(packed, path / "model.pt2")
        return first(torch.export.load(file).module()(**inputs)), file.stat().st_size
    file = export_aoti(packed, path / "model.pt2")
    return first(torch._inductor.aoti_load_package(str(file))(**inputs)), file.stat().st_size


def first(results: Any) -> Tensor:
    """The first of a model's results."""
    return cast(Tensor, next(iter(results.values())))


def measure(model: Any, kind: str) -> dict[str, Any]:
    """All doors of one model with one kind of weights."""
    traced = trace(model.eval(), inputs_of(model, 2, 7))
    simulated = Pipeline([Canonicalize(), *KINDS[kind]])(traced)
    packed, inputs = lower(simulated), inputs_of(model, 2, LENGTH)
    row: dict[str, Any] = {"packed": tensor_bytes(packed), "doors": {}}
    with torch.no_grad(), tempfile.TemporaryDirectory() as work:
        expected = first(simulated(**inputs))
        for door in (*GRAPH, *STYLES):
            try:
                found, size = through(door, packed, Path(work), inputs)
            except PrequantError as refused:  # what a door says it does not take is a result as well
                row["doors"][door] = {"refused": str(refused)}
                continue
            difference = float((found - expected).abs().max() / expected.abs().max())
            row["doors"][door] = {"difference": difference, "bytes": size}
    return row


# ---- commands --------------------------------------------------------------------------------------------------------

GPT2 = Annotated[Path | None, typer.Option(help="A folder with a GPT-2.")]
Llama = Annotated[Path | None, typer.Option(help="A folder with a Llama.")]


@app.command()
def run(
    gpt2: GPT2 = None,
    llama: Llama = None,
    only: Annotated[str, typer.Option(help="Rows whose names hold this.")] = "",
) -> None:
    """Measure rows; those whose figures are there already are kept."""
    torch.set_num_threads(1)
    for name, make in models(gpt2, llama).items():
        for kind in KINDS:
            path = row_file("doors", name, kind)
            if only in f"{name}, {kind}" and not path.is_file():
                print(f"---- {name}, {kind}", flush=True)
                write_json(path, measure(make(), kind))
                torch._dynamo.reset()


@app.command()
def table(gpt2: GPT2 = None, llama: Llama = None) -> None:
    """Write the results file from the rows that have been measured."""
    notes = """
Each cell: the largest difference of the first result, relative to its largest value, between what comes out at the door
and the Program with simulated arithmetic; then the size of the files over that of the packed tensors. Random models
are small, so the graph itself shows in their ONNX files, and 2 MB of code in the package of AOTInductor ("aoti");
T5 takes two ONNX files, each with the table of words that both read. ONNX Runtime computes in float32 here. Inputs of
8 bits may round to another level where sums differ in the last bit. Scales are those of rows, with 3 bits and with
8-bit inputs of groups of 64; embeddings are quantized, too. Random models and inputs: seed 42.
"""
    command = ["python", "tests/benchmarks/doors.py", "run"]
    command += ["--gpt2", "GPT2"] * (gpt2 is not None) + ["--llama", "LLAMA"] * (llama is not None)
    tables = {name: list(_lines(name)) for name in models(gpt2, llama)}
    packages = ("onnx", "onnxscript", "onnxruntime")
    print(write("doors", "Models at every door", command, notes, tables, packages=packages, threads="1").read_text())


def _lines(name: str) -> Iterator[dict[str, Any]]:
    for kind in KINDS:
        if (path := row_file("doors", name, kind)).is_file():
            row = json.loads(path.read_text())
            cells = {door: _cell(found, row["packed"]) for door, found in row["doors"].items()}
            yield {"weights": kind, "packed, bytes": f"{row['packed']:,}", **cells}


def _cell(found: dict[str, Any], packed: int) -> str:
    if "refused" in found:
        return f"refused: {found['refused']}"
    size = "" if found["bytes"] is None else f"; {found['bytes'] / packed:.3f}"
    return f"{found['difference']:.0e}{size}"


if __name__ == "__main__":
    app()
