"""One linear layer on a GPU: prequant's Triton kernels on packed weights against cuBLAS and other libraries' kernels.

python tests/benchmarks/gpu_linear.py

Fewest tokens come first, and what is measured is written after each cell: with --minutes it ends in time, and names
what it left out. All weights stay in memory, some 20 GB for the usual shapes. --smoke runs the code without a GPU, and
writes nothing.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import gpu  # type: ignore[import-not-found]  # first: it may turn Triton's interpreter on
import torch
import typer
from results_file import RESULTS, markdown, write  # type: ignore[import-not-found]
from torch import Tensor
from tqdm import tqdm

from prequant.runtime import Quantizer, WeightFormat, ops, reference
from prequant.runtime.bcq import binary_code
from prequant.runtime.formats import Scheme

GROUP = 128
SHAPES = ["4096x4096", "11008x4096", "14336x4096"]
TOKENS = [1, 4, 16, 64, 512, 4096]
CHECKED_ROWS, TOLERANCE = 64, 0.02
"""Rows of the weight that outputs are compared on, and how far they may be from those of what the codes stand for."""

# Weight format, whether there are outliers, and the format of inputs that are quantized as they come.
OURS: dict[str, tuple[str, bool, str]] = {
    **{f"{bits} bits": (f"affine{bits}:group{GROUP}", False, "") for bits in (2, 3, 4, 8)},
    "4 bits, asymmetric": (f"affine4:group{GROUP}:asym", False, ""),
    "ternary": ("ternary:row", False, ""),
    "binary": ("binary:row", False, ""),
    "2 binary planes": (f"bcq2:group{GROUP}", False, ""),
    "3 binary planes": (f"bcq3:group{GROUP}", False, ""),
    "4 bits, 0.5 % outliers": (f"affine4:group{GROUP}", True, ""),
    "4 bits, 8-bit inputs": (f"affine4:group{GROUP}", False, "affine8:row"),
    **{f"{bits} bits": (f"affine{bits}:group{GROUP}", False, "") for bits in (5, 6, 7)},
    "1 binary plane": (f"bcq1:group{GROUP}", False, ""),
    "4 binary planes": (f"bcq4:group{GROUP}", False, ""),
}
OUTLIERS = 0.005

Product = Callable[[Tensor], Tensor]
Prepare = Callable[[Tensor], "Prepared"]


@dataclass
class Prepared:
    """Products with copies of one weight ``[N, K]``: ``[M, K]`` to ``[M, N]``, and the weight that they stand for."""

    products: Sequence[Product]
    bytes: int
    meant: Tensor  # its first rows, those that are compared
    tolerance: float = TOLERANCE
    finish: Callable[[Tensor, Tensor], Tensor] = lambda _, output: output  # of an input and its product

    def __post_init__(self) -> None:
        self.meant = self.meant[:CHECKED_ROWS].clone()


@dataclass
class Found:
    """What was measured, one record for a contender, shape and number of tokens; why what is absent is, and what was
    left out for want of time.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)


class Converted:
    """An input as a product takes it, converted once, outside of what is timed."""

    def __init__(self, convert: Callable[[Tensor], Any]) -> None:
        self._convert = convert
        self._input: Tensor | None = None
        self._result: Any = None

    def __call__(self, x: Tensor) -> Any:
        if self._input is not x:
            self._input, self._result = x, self._convert(x)
        return self._result


# ---- prequant --------------------------------------------------------------------------------------------------------


def packed(name: str) -> Prepare:
    """``packed_linear`` in one of :data:`OURS`."""
    text, has_outliers, input_format = OURS[name]
    format = WeightFormat.parse(text)

    def prepare(weight: Tensor) -> Prepared:
        columns = weight.shape[1]
        coded = binary_code(weight, format) if format.scheme is Scheme.BCQ else Quantizer(format, "minmax")(weight)
        sparse: tuple[Tensor, Tensor, Tensor] | None = _outliers(weight) if has_outliers else None
        meant = reference.dequantize(*coded, format, columns)
        if sparse is not None:
            meant = reference.add_outliers(meant, reference.Outliers(*sparse, False))
        tensors = [tensor for tensor in (*coded, *(sparse or ())) if tensor is not None]
        bytes_ = sum(tensor.nbytes for tensor in tensors)
        options = {"format": text, "columns": columns, "input_format": input_format}

        def product() -> Product:
            own = [tensor if tensor is None else tensor.clone() for tensor in coded]  # its own place in memory
            outliers = (None, None, None) if sparse is None else tuple(tensor.clone() for tensor in sparse)
            return lambda x: ops.packed_linear(x, *own, *outliers, False, None, None, None, **options)

        products = [product() for _ in range(gpu.rotations(bytes_))]
        return Prepared(products, bytes_, meant, 0.03 if input_format else TOLERANCE)

    return prepare


def _outliers(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values to add, as many in each row, in random columns."""
    rows, columns = weight.shape
    each = max(1, round(OUTLIERS * columns))
    at = torch.rand(rows, columns, device=weight.device).topk(each).indices.sort(-1).values
    offsets = torch.arange(0, rows * each + 1, each, dtype=torch.int32, device=weight.device)
    return torch.randn(rows * each, device=weight.device), at.reshape(-1).to(torch.int32), offsets


# ---- others ----------------------------------------------------------------------------------------------------------


def cublas(weight: Tensor) -> Prepared:
    """bfloat16, by cuBLAS."""
    half = weight.bfloat16()
    copies = [half.clone() for _ in range(gpu.rotations(half.nbytes))]
    products = [lambda x, w=w: torch.nn.functional.linear(x, w) for w in copies]
    return Prepared(products, half.nbytes, half.float())


def _codes(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes around 0, scales ``[N, K / group]``, and the weight that they stand for."""
    grouped = weight.view(len(weight), -1, group)
    scale = (grouped.abs().amax(2) / (2 ** (bits - 1) - 1)).bfloat16().float()
    codes = (grouped / scale[..., None]).round().clamp(1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)
    return codes.to(torch.int32).view_as(weight), scale, (codes * scale[..., None]).view_as(weight)


def torch_int4(weight: Tensor) -> Prepared:
    """``aten._weight_int4pack_mm``, bfloat16."""
    codes, scale, meant = _codes(weight, 4, GROUP)
    nibbles = (codes + 8).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(nibbles[:, ::2] << 4 | nibbles[:, 1::2], 8)
    scales = torch.stack([scale.T, torch.zeros_like(scale.T)], -1).bfloat16().contiguous()
    bytes_ = packed.nbytes + scales.nbytes
    copies = [(packed.clone(), scales.clone()) for _ in range(gpu.rotations(bytes_))]
    products = [lambda x, p=p, s=s: torch.ops.aten._weight_int4pack_mm(x, p, GROUP, s) for p, s in copies]
    return Prepared(products, bytes_, meant)


def torch_int8(weight: Tensor) -> Prepared:
    """``torch._int_mm``: the product of integers alone, its input quantized before."""
    codes, scale, meant = _codes(weight, 8, weight.shape[1])
    integers = codes.to(torch.int8)
    copies = [integers.clone() for _ in range(gpu.rotations(integers.nbytes))]

    def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
        unit = x.float().abs().amax(-1, keepdim=True) / 127
        return (x.float() / unit).round().to(torch.int8), unit

    quantized = Converted(quantize)

    def finish(x: Tensor, output: Tensor) -> Tensor:  # what is timed is without the scales
        return output.float() * quantized(x)[1] * scale[:, 0]

    def product(w: Tensor) -> Product:
        return lambda x: torch._int_mm(quantized(x)[0], w.T)

    return Prepared([product(w) for w in copies], integers.nbytes, meant, 0.03, finish)


def gemlite(weight: Tensor) -> Prepared:
    """GemLite's Triton kernels, 4 bits, float16."""
    from gemlite.core import DType, GemLiteLinearTriton  # type: ignore[import-not-found]

    codes, scale, meant = _codes(weight, 4, GROUP)
    rows, columns = weight.shape
    bytes_ = rows * columns // 2 + 2 * scale.numel()
    products: list[Product] = []
    halves = Converted(Tensor.half)
    for _copy in range(gpu.rotations(bytes_)):
        layer = GemLiteLinearTriton(4, GROUP, columns, rows, DType.FP16, DType.FP16)
        layer.pack((codes + 8).to(torch.uint8), scale.half(), torch.full_like(scale, 8).half(), None)
        products.append(_after(halves, layer))
    return Prepared(products, bytes_, meant)


def _after(convert: Converted, layer: Any) -> Product:
    return lambda x: layer(convert(x))


def bitsandbytes(weight: Tensor) -> Prepared:
    """bitsandbytes' NF4, blocks of 64, bfloat16."""
    import bitsandbytes as bnb  # type: ignore[import-not-found]

    coded, state = bnb.functional.quantize_4bit(weight.bfloat16(), blocksize=64, quant_type="nf4")
    meant = bnb.functional.dequantize_4bit(coded, state).float()
    bytes_ = coded.nbytes + state.absmax.nbytes
    copies = [coded.clone() for _ in range(gpu.rotations(bytes_))]
    products = [lambda x, w=w: bnb.matmul_4bit(x, w.t(), quant_state=state) for w in copies]
    return Prepared(products, bytes_, meant)


CUBLAS = "cuBLAS bf16"
PEERS: dict[str, Prepare] = {
    CUBLAS: cublas,
    "torch _weight_int4pack_mm": torch_int4,
    "torch _int_mm (inputs quantized before)": torch_int8,
    "GemLite 4 bits, fp16": gemlite,
    "bitsandbytes NF4": bitsandbytes,
}


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(
    name: str, prepared: Prepared, shape: tuple[int, ...], tokens: int, repeats: int, rate: float, found: Found
) -> None:
    """Check a contender for a weight of some shape on ``tokens`` tokens, then time it."""
    x = torch.randn(tokens, shape[1], device=gpu.DEVICE).bfloat16()
    output = prepared.products[0](x)
    expected = x.float() @ prepared.meant.T
    error = float((prepared.finish(x, output).float()[:, :CHECKED_ROWS] - expected).norm() / expected.norm())
    if not error <= prepared.tolerance:
        raise ValueError(f"its output is {error:.3g} from that of its own weight")
    time_ = gpu.seconds([lambda p=p: p(x) for p in prepared.products], repeats)
    found.records.append(
        {
            "shape": "x".join(map(str, shape)),
            "tokens": tokens,
            "name": name,
            "microseconds": 1e6 * time_,
            "bytes": prepared.bytes,
            "bytes_per_second": prepared.bytes / time_,
            "of_copy_rate": prepared.bytes / time_ / rate,
            "error": error,
        }
    )


def tables(found: Found) -> dict[str, list[dict[str, str]]]:
    """A table of times for each shape, with ratios to cuBLAS, and one of the share of the copy rate."""
    result: dict[str, list[dict[str, str]]] = {}
    for shape in dict.fromkeys(record["shape"] for record in found.records):
        cell = {(r["name"], r["tokens"]): r for r in found.records if r["shape"] == shape}
        tokens = sorted({key[1] for key in cell})
        times, shares = [], []
        for name in dict.fromkeys(key[0] for key in cell):
            time_row, share_row = {"": name}, {"": name}
            for count in tokens:
                record, base = cell.get((name, count)), cell.get((CUBLAS, count))
                text = share = "–"
                if record is not None:
                    text, share = f"{record['microseconds']:,.1f}", f"{100 * record['of_copy_rate']:.0f} %"
                    if base is not None and name != CUBLAS:
                        text += f" ({base['microseconds'] / record['microseconds']:.2f})"
                time_row[f"M = {count}"], share_row[f"M = {count}"] = text, share
            times.append(time_row)
            shares.append(share_row)
        result[f"{shape}: µs a call (cuBLAS's time over it)"] = times
        result[f"{shape}: bytes of the weight a second, of the copy rate"] = shares
    if found.absent:
        result["Absent"] = [{"what": name, "why": reason} for name, reason in found.absent.items()]
    return result


def main(
    shape: Annotated[list[str], typer.Option(help="Rows x columns of the weight, NxK.")] = SHAPES,
    tokens: Annotated[list[int], typer.Option(min=1, help="Rows of the input, M.")] = TOKENS,
    contender: Annotated[list[str], typer.Option(help="Only those with this in their name; cuBLAS always.")] = [""],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1)] = 20,
    copied_mib: Annotated[int, typer.Option(min=1, help="That the copy rate is measured on.")] = 1024,
    minutes: Annotated[float, typer.Option(help="After so many, what is left is left out.")] = 9,
    smoke: Annotated[bool, typer.Option("--smoke", help="Tiny, in Triton's interpreter on the CPU.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for gpu_linear.md and gpu_linear.json.")] = RESULTS,
) -> None:
    """Measure, and write gpu_linear.md and gpu_linear.json."""
    gpu.require_gpu()
    if smoke:
        shape, tokens, copied_mib = ["32x256"], [1, 3], 1
    shapes = [tuple(map(int, text.split("x"))) for text in shape]
    if any(len(size) != 2 or size[1] % GROUP for size in shapes):
        raise typer.BadParameter(f"--shape {shape}: expected NxK, such as 4096x4096, with K a multiple of {GROUP}")
    chosen = {CUBLAS: cublas} | {name: packed(name) for name in OURS} | PEERS
    chosen = {n: prepare for n, prepare in chosen.items() if n == CUBLAS or any(part in n for part in contender)}
    found, started = Found(), time.monotonic()
    prepared: dict[tuple[str, tuple[int, ...]], Prepared] = {}
    with gpu.kernels(), torch.inference_mode():
        rate = gpu.copy_rate(copied_mib << 20, repeats)
        torch.manual_seed(0)
        cells = [(count, size, name) for count in sorted(tokens) for size in shapes for name in chosen]
        for count, size, name in tqdm(cells, disable=None):
            label = f"{name}, {size[0]}x{size[1]}, M = {count}"
            if time.monotonic() - started > 60 * minutes:
                found.left.append(label)
                continue
            if name in found.absent:
                continue
            try:
                if (name, size) not in prepared:
                    weight = torch.randn(size, device=gpu.DEVICE) / size[1] ** 0.5
                    prepared[name, size] = chosen[name](weight)
                measure(name, prepared[name, size], size, count, repeats, rate, found)
            except Exception as error:  # whatever a library raises is why its row is missing; it is written down
                if name in OURS or name == CUBLAS:
                    raise
                text = str(error).strip().splitlines()[0] if str(error).strip() else ""
                found.absent[name if isinstance(error, ImportError) else label] = (
                    f"{type(error).__name__}: {text[:120]}"
                )
            if not smoke:
                _write(found, rate, repeats, out)
        if found.left:
            _write(found, rate, repeats, out)
    for heading, rows in tables(found).items():
        print(f"\n## {heading}\n\n{markdown(rows)}")


def _write(found: Found, rate: float, repeats: int, out: Path) -> None:
    left = f" Left out for want of time: {'; '.join(found.left)}." if found.left else ""
    notes = f"""
`Y = X Wᵀ`, `X [M, K]` bfloat16, `W [N, K]`, no bias, on {gpu.device_text()}. Microseconds of a call, in parentheses
cuBLAS's time over it: the median of {repeats} launches of one CUDA graph that goes through copies of the weight, three
times the second-level cache together. A call that can't be recorded is timed between events, with what the host takes
to launch it. Shares are the weight's bytes a second over the {rate / 1e9:,.0f} GB/s that a copy on the device reads and
writes, in the same run. Every output was compared with that of the weight that its codes stand for. Groups have {GROUP}
columns; those of bitsandbytes 64.{left}
"""
    write(
        "gpu_linear",
        "One linear layer on a GPU",
        ["python", "tests/benchmarks/gpu_linear.py", *sys.argv[1:]],
        notes,
        tables(found),
        folder=out,
        packages=gpu.PACKAGES,
        measurements={"device": gpu.device_text(), "copy_rate": rate, **asdict(found)},
    )


if __name__ == "__main__":
    typer.run(main)
