"""What the GPU kernels compile to, counted in machine code: on any machine that has Triton, with a GPU or without.

Usage: python tests/benchmarks/gpu_code.py [--formats affine4:group128,bcq3:row] [--tokens 1,64,512]

For each format, type of inputs and number of tokens, with the tiles that ``tables.py`` chooses for a (14336, 4096)
weight on an H100: registers, bytes spilled, shared memory, groups of matrix instructions that may still run while the
next weights are unpacked, loads from global memory in the main loop, the matrix instruction, and instructions of that
loop for each weight of a thread. It runs nothing: what it counts is no time.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # read when the kernels are imported

import torch
import triton
from triton.backends.compiler import GPUTarget

from prequant.runtime import WeightFormat
from prequant.runtime.triton_kernels import gradients, linear, rounding, rows, simulated, tables
from prequant.runtime.triton_kernels.device import gradients as device_gradients
from prequant.runtime.triton_kernels.device import linear as device
from prequant.runtime.triton_kernels.device import rounding as device_rounding
from prequant.runtime.triton_kernels.device import rows as device_rows
from prequant.runtime.triton_kernels.device import simulated as device_simulated

ROWS, COLUMNS = 14336, 4096
FORMATS = (
    *(f"affine{bits}:group128" for bits in range(2, 9)),
    *("affine4:row", "affine4:group32", "affine4:group128:asym", "ternary:row", "binary:row"),
    *(f"bcq{planes}:group128" for planes in (1, 2, 3, 4)),
)
INPUTS = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32", "int8": "*i8"}
"""Types of inputs as Triton calls pointers to them; int8 ones are of a float16 model."""

OWN = (
    *("codes", "scales", "zeros", "outlier_values", "outlier_columns", "outlier_offsets"),
    *("bias", "row_sums", "output", "row_counts"),
)
"""Arguments that are tuples, of one for each linear of a launch."""

MATRIX = ("HGMMA", "IGMMA", "HMMA", "IMMA", "FFMA")
"""Instructions that multiply tiles, the widest first."""


def signature(inputs: str, linears: int = 1) -> dict[str, Any]:
    """Types of the kernel's arguments that are no constants; what each of the linears has of its own is a tuple."""
    floats = "*fp16" if inputs == "int8" else INPUTS[inputs]
    pointers = dict.fromkeys(("scales", "zeros", "outlier_values", "bias", "token_scales", "token_zeros"), "*fp32")
    pointers |= {"row_sums": "*fp32", "partial": "*fp32", "codes": "*u8", "input": INPUTS[inputs]}
    pointers |= {"outlier_columns": "*i32", "outlier_offsets": "*i32", "counters": "*i32"}
    counts = dict.fromkeys(("token_count", "row_counts", "column_count", "chunk_count"), "i32")
    types: dict[str, Any] = {**pointers, "residual": floats, "output": floats, **counts}
    return types | {name: (types[name],) * linears for name in OWN}


def compiled(text: str, inputs: str, tiles: tables.Tiles, everything: bool = False, linears: int = 1) -> Any:
    """The kernel of packed linears for a format; ``everything``: with all that a call may have."""
    format, quantized = WeightFormat.parse(text), inputs == "int8"
    constants = {
        **linear.format_constants(format),
        **linear.tile_constants(tiles),
        "HAS_ZEROS": not format.symmetric,
        "HAS_OUTLIERS": everything,
        "HAS_BIAS": True,
        "HAS_RESIDUAL": everything,
        "QUANTIZED": quantized,
        "HAS_TOKEN_ZEROS": everything and quantized,
        "ACTIVATION": "gelu_tanh" if everything and quantized else "gelu" if everything else "",
        "WHOLE": not everything,
    }
    warps = constants.pop("num_warps")
    return built(device.packed_linear, signature(inputs, linears), constants, warps, tiles.stages)


def built(
    kernel: Any,
    types: dict[str, Any],
    constants: dict[str, Any],
    warps: int = 4,
    stages: int = 3,
    aligned: Sequence[str] = ("row_counts", "column_count"),
) -> Any:
    """A kernel compiled for an H100, with all pointers on 16 bytes, and the counts ``aligned`` in multiples of 16."""
    names, sixteen = kernel.arg_names, []
    for at, name in enumerate(names):
        given = types.get(name, "")
        parts = [((at,), given)] if isinstance(given, str) else [((at, i), part) for i, part in enumerate(given)]
        sixteen += [path for path, part in parts if part.startswith("*") or name in aligned]
    source = triton.compiler.ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        constants,
        {path: [["tt.divisibility", 16]] for path in sixteen},
    )
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def small_kernels() -> dict[str, Any]:
    """The other kernels, by what they do."""
    counts = dict.fromkeys(("count", "table_rows", "columns", "row_bytes", "groups"), "i32")
    table = {"codes": "*u8", "scales": "*fp32", "zeros": "*fp32", "ids": "*i64", "output": "*fp16", **counts}
    found = {}
    for text in ("affine3:group128:asym", "ternary:row:base3"):
        format = WeightFormat.parse(text)
        constants = {**rows.format_constants(format), "HAS_ZEROS": not format.symmetric, "HAS_IDS": True}
        blocks = {"BLOCK_ROWS": rows.BLOCK_ROWS, "BLOCK_COLUMNS": rows.BLOCK_COLUMNS}
        found[f"unpack rows of {text}"] = built(device_rows.unpack_rows, table, {**constants, **blocks})
    places = {"rows": "*i64", "columns": "*i64", "output": "*fp32"}
    found["values of a weight at some places"] = built(
        *(device_rows.values_at, {**table, **places}),
        {**rows.format_constants(format), "HAS_ZEROS": False, "BLOCK": rows.BLOCK_VALUES},
    )
    sparse = {"output": "*fp32", "values": "*fp16", "outlier_columns": "*u16", "row_offsets": "*i32", "ids": "*i64"}
    found["scatter outliers"] = built(
        *(device_rows.scatter_outliers, {**sparse, "table_rows": "i32", "columns": "i32"}),
        {"REPLACE": False, "HAS_IDS": True, "BLOCK": rows.BLOCK_OUTLIERS},
    )
    floats = dict.fromkeys(("scales", "zeros", "token_scales"), "*fp32")
    found["round tokens"] = built(
        *(device_rounding.round_tokens, {"input": "*fp16", "output": "*i8", "columns": "i32", **floats}),
        {"LEVELS": 256, "DYNAMIC": True, "HAS_ZEROS": True, "BLOCK": rounding.BLOCK},
    )
    for text in ("affine3:group128:asym", "bcq3:row"):
        format = WeightFormat.parse(text)
        segments = simulated.Segments.of(torch.empty(ROWS, COLUMNS, device="meta"), format.group_size, False)
        names = ("count", "elements", "columns", "size", "groups", "row_stride", "table_rows", "row_bytes")
        types = {**dict.fromkeys(("zeros", "to_scale", "to_zero"), "*fp32"), **dict.fromkeys(names, "i32")}
        asked = {"TO_SCALE": True, "TO_ZERO": not format.symmetric, "RAGGED": False, **segments.blocks()}
        found[f"gradients of dequantize of {text}"] = built(
            *(device_gradients.dequantize_gradients, {**types, "gradient": "*bf16", "codes": "*u8"}),
            {**gradients.constants(format, not format.symmetric), **asked},
            aligned=("elements", "columns", "size"),
        )
    return found | rounding_kernels()


def rounding_kernels() -> dict[str, Any]:
    """Those of the simulated ops, on a bfloat16 weight with groups, and on a float32 one whose scales have a tensor."""
    found = {}
    for text, inputs in (("affine4:group128:asym", "*bf16"), ("ternary:tensor", "*fp32")):
        format = WeightFormat.parse(text)
        weight = torch.empty(ROWS, COLUMNS, device="meta")
        scale = torch.empty(format.scale_shape(ROWS, COLUMNS), device="meta")
        segments = simulated.Segments.of(weight, format.group_size, scale.numel() == 1)
        constants = simulated.format_constants(format, scale, None if format.symmetric else scale)
        counts = dict.fromkeys(("count", "elements", "columns", "size", "groups", "row_stride"), "i32")
        types = {**dict.fromkeys(("scales", "zeros", "to_scale", "to_zero"), "*fp32"), **counts}
        types |= dict.fromkeys(("input", "output", "gradient", "to_input"), inputs)
        shape = {**constants, **simulated.shape_constants(segments)}
        needs = {"TO_INPUT": True, "TO_SCALE": True, "TO_ZERO": not format.symmetric}
        aligned = ("elements", "columns", "size")
        found[f"fake quantize to {text}"] = built(device_simulated.fake_quantize, types, shape, aligned=aligned)
        gradients = built(device_simulated.fake_quantize_gradients, types, {**shape, **needs}, aligned=aligned)
        found[f"gradients of fake quantize to {text}"] = gradients
        counts = dict.fromkeys(("count", "columns", "units", "row_bytes", "row_stride"), "i32")
        codes = {**types, **counts, "output": "*u8", "strange": "*i32"}
        del constants["TINY"]
        units = {
            **simulated.unit_constants(format),
            "BITS": format.bits,
            "BASE3": format.base3,
            "GROUP": format.group_size,
        }
        found[f"quantize to {text}"] = built(device_simulated.quantize, codes, {**constants, **units}, aligned=aligned)
    tokens = simulated.Segments.of(weight, 0, False)
    found["dynamic scales"] = built(
        *(device_simulated.largest, {**types, "output": "*fp32"}),
        {"LEVELS": 256, "SCALE": True, "FLAT": False, **tokens.blocks()},
        aligned=aligned,
    )
    return found


def machine_code(kernel: Any) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """Instructions with their operands, loop labels as ``(":", label)``, and what the compiler says of resources."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia
        listing = subprocess.run([tool.nvdisasm.path, "-c", file.name], capture_output=True, text=True, check=True)
        usage = subprocess.run(
            [tool.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    found = []
    for line in listing.stdout.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            found.append((":", label[1]))
        elif operation := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)\s?(.*)", line):
            found.append((operation[1], operation[2]))
    resources = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage.stdout)}
    return found, resources


def main_loop(code: list[tuple[str, str]]) -> list[str]:
    """Names of the instructions of the longest loop."""
    labels = {operand: at for at, (name, operand) in enumerate(code) if name == ":"}
    longest: list[tuple[str, str]] = []
    for at, (name, operand) in enumerate(code):
        target = re.search(r"\.L_x_\d+", operand)
        if name.startswith("BRA") and target and (start := labels.get(target[0], at)) < at:
            longest = max(longest, code[start : at + 1], key=len)
    return [name for name, _ in longest if name != ":"]


def row_of(text: str, inputs: str, tokens: int, everything: bool, linears: int) -> dict[str, Any]:
    """What one kernel is made of."""
    format = WeightFormat.parse(text)
    tiles = tables.default_tiles(tokens, ROWS, COLUMNS, tables.planes_of(format))
    kernel = compiled(text, inputs, tiles, everything, linears)
    code, resources = machine_code(kernel)
    loop = main_loop(code)
    kinds = collections.Counter(name.split(".")[0] for name in loop)
    loads = [name for name in loop if name.startswith(("LDGSTS", "LDG.", "LDL"))]
    return {
        "format": text,
        "linears": linears,
        "inputs": inputs,
        "tokens": tokens,
        "tile": f"{tiles.rows}x{tiles.tokens}/{tiles.split}, {tiles.warps} warps, {tiles.stages} stages",
        "registers": resources["REG"],
        "spilled": resources["STACK"],
        "shared": kernel.metadata.shared,
        "pending": max(map(int, re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", kernel.asm["ptx"])), default=0),
        "loads": " ".join(sorted(set(loads))),
        "product": next((name for name in MATRIX if kinds[name]), "none"),
        "per_weight": len(loop) / (tiles.rows * 128 / (32 * tiles.warps)),
    }


def main() -> None:
    """Print a line for each kernel."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--inputs", default="float16,bfloat16,int8")
    parser.add_argument("--tokens", default="1,64,512")
    parser.add_argument("--everything", default="", help="formats to compile with all that a call may have, as well")
    parser.add_argument("--together", default="", help="formats to compile for three linears in a launch, as well")
    parser.add_argument("--small", action="store_true", help="the other kernels as well")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each kernel, in place of a table")
    options = parser.parse_args()
    if not options.json:
        names = (
            "format | linears | inputs | tokens | tile | registers | spilled | shared | pending | loads | product | "
            "per weight"
        )
        print(f"| {names} |")
        print(f"|{'---|' * (names.count('|') + 1)}")
    asked = [(text, False, 1) for text in options.formats.split(",")]
    asked += [(text, True, 1) for text in filter(None, options.everything.split(","))]
    asked += [(text, False, 3) for text in filter(None, options.together.split(","))]
    for text, everything, linears in asked:
        for inputs in options.inputs.split(","):
            for tokens in map(int, options.tokens.split(",")):
                row = row_of(text, inputs, tokens, everything, linears)
                if not options.json:
                    row["per_weight"] = f"{row['per_weight']:.1f}"
                print(json.dumps(row) if options.json else f"| {' | '.join(map(str, row.values()))} |", flush=True)
    for name, kernel in small_kernels().items() if options.small else ():
        resources = machine_code(kernel)[1]
        row = {"kernel": name, "registers": resources["REG"], "spilled": resources["STACK"]}
        print(
            json.dumps(row) if options.json else ", ".join(f"{key} {value}" for key, value in row.items()), flush=True
        )


if __name__ == "__main__":
    main()
