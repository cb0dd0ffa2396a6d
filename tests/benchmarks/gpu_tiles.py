"""Which tiles a packed linear should run with on this GPU: what tables.py says, among what else it could.

python tests/benchmarks/gpu_tiles.py --format affine4:group128 --tokens 1 --tokens 16

Each is timed as in gpu_linear.py, on copies of the weight that the second-level cache can't hold. A line for each,
fastest first; nothing is written: what wins belongs into ``runtime/triton_kernels/tables.py``. --smoke runs the code
without a GPU, on a tiny shape.
"""

import itertools
from typing import Annotated

import gpu  # type: ignore[import-not-found]  # first: it may turn Triton's interpreter on
import torch
import triton
import typer
from tqdm import tqdm

from prequant.runtime import WeightFormat
from prequant.runtime.triton_kernels import linear, tables

ROWS, STAGES = (64, 128), (3, 4)


def candidates(tokens: int, rows: int, columns: int, format: WeightFormat) -> list[tables.Tiles]:
    """The tiles of tables.py first, then others: their heights, warps and depths, fewer and more splits, and tiles of
    fewer and more tokens where a call has many.
    """
    planes, processors = tables.planes_of(format), linear.workspace.multiprocessors(gpu.DEVICE)
    first = tables.default_tiles(tokens, rows, columns, planes, processors)
    widths = {first.tokens} | ({64, 128} if tokens > 64 else set())
    found = [first]
    for height, width, warps, stages in itertools.product(ROWS, sorted(widths), (4, 8), STAGES):
        count = -(-rows // height) * -(-tokens // width)
        split = tables.splits(count, columns, processors)
        found += [tables.Tiles(height, width, each, warps, stages) for each in {max(split // 2, 1), split, 2 * split}]
    most = -(-columns // 128)
    return [tiles for tiles in dict.fromkeys(found) if tiles.split <= min(most, tables.MAX_SPLIT)]


def weights(format: WeightFormat, rows: int, columns: int) -> tuple[list[linear.Linear], int]:
    """Random codes in as many copies as calls go through, and the bytes of one: which codes they are costs no time."""
    shape = format.codes_shape(rows, columns)
    scale = torch.rand(format.scale_shape(rows, columns), device=gpu.DEVICE)
    zero = None if format.symmetric else torch.full_like(scale, 2.0**format.bits / 2)
    bytes_ = torch.Size(shape).numel() + sum(part.nbytes for part in (scale, zero) if part is not None)
    made = []
    for _copy in range(gpu.rotations(bytes_)):
        codes = torch.randint(0, 256, shape, dtype=torch.uint8, device=gpu.DEVICE)
        made.append(linear.Linear(format, codes, scale.clone(), zero, None, columns, None, ""))
    return made, bytes_


def main(
    format: Annotated[list[str], typer.Option(help="Of the weight; not base-3.")] = ["affine4:group128"],  # noqa: B006
    shape: Annotated[str, typer.Option(help="Rows x columns of the weight, NxK.")] = "14336x4096",
    tokens: Annotated[list[int], typer.Option(min=1, help="Rows of the input, M.")] = [1, 16, 64, 512],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1)] = 10,
    smoke: Annotated[bool, typer.Option("--smoke", help="Tiny, in Triton's interpreter on the CPU.")] = False,
) -> None:
    """Print a line for each."""
    gpu.require_gpu()
    if smoke:
        shape, tokens = "40x256", [1]
    rows, columns = map(int, shape.split("x"))
    with gpu.kernels(), torch.inference_mode():
        rate = gpu.copy_rate(1 << (20 if smoke else 30), repeats)
        for text in format:
            parsed = WeightFormat.parse(text)
            copies, bytes_ = weights(parsed, rows, columns)
            for count in tokens:
                x = torch.randn(count, columns, device=gpu.DEVICE).bfloat16()
                output = x.new_empty(count, rows)
                found, tried = [], candidates(count, rows, columns, parsed)
                for tiles in tqdm(tried[: 2 if smoke else None], disable=None, leave=False):
                    calls = [
                        lambda each=each, t=tiles: linear.launch([each], x, None, None, None, [output], t)  # noqa: B023
                        for each in copies
                    ]
                    try:
                        found.append((gpu.seconds(calls, repeats), tiles))
                    except triton.runtime.errors.OutOfResources:
                        continue
                print(f"\n{text}, {shape}, M = {count}: tables.py has {tuple(tried[0])}")
                for time_, tiles in sorted(found):
                    share = 100 * bytes_ / time_ / rate
                    print(f"  {1e6 * time_:9.2f} µs  {share:3.0f} % of the copy rate  {tiles}", flush=True)


if __name__ == "__main__":
    typer.run(main)
