"""What a Program's weights are, in a table: format, shape, bytes, and how far each is from the original."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from prequant.depth import depths
from prequant.model import ModelProgram
from prequant.passes import Program, weights
from prequant.passes.weights import WeightView, float_bytes
from prequant.runtime import PrequantError, sqnr


@dataclass(frozen=True)
class WeightRow:
    """One weight. ``bytes`` are those of all its tensors, ``float_bytes`` those it had as float32.

    ``format`` is a weight format's text or a dtype, ``input_format`` how the linears that read it quantize their
    inputs. ``sqnr`` is in dB: None if unknown, infinite if nothing changed.
    """

    name: str
    kind: str
    format: str
    input_format: str
    shape: tuple[int, int]
    outliers: int
    bytes: int
    float_bytes: int
    sqnr: float | None
    lowered: bool

    @property
    def is_compressed(self) -> bool:
        """Whether it is anything but a plain float matrix."""
        return ":" in self.format or self.outliers > 0


def weight_rows(
    program: Program, original: Program | None = None, recorded: Mapping[str, float] | None = None
) -> list[WeightRow]:
    """A row per weight, in the order of first use.

    The error of compressed ones is measured against ``original``, a float Program of the same model in canonical form,
    or taken from ``recorded`` (dB by weight name). Raises :class:`PrequantError` if ``original`` is of another model: a
    compressed weight is not in it, or is of another shape there, or there are more layers, so that names mean others.
    """
    if original is not None:
        check_depths(program, original)
    floats = {name: view for view in weights(original) for name in view.program.names_of(view.name)} if original else {}
    views = weights(program)
    pairs = {view.name: found for view in views if (found := _same_weight(view, floats)) is not None}
    if original is not None:
        for view in views:
            if view.name not in pairs and view.tensors.keys() != {"dense"}:
                has = next(iter(floats), "no weight")
                raise PrequantError(f"{view.name} is not in the original (it has {has}): this is another model")
    return [_row(program, view, pairs.get(view.name), (recorded or {}).get(view.name)) for view in views]


def check_depths(program: Program, original: Program) -> None:
    """Raise :class:`PrequantError` where a model has other numbers of layers than its original, if they are known."""
    if not (isinstance(program, ModelProgram) and isinstance(original, ModelProgram)):
        return
    originals = depths(original.config)
    for name, count in depths(program.config).items():
        if originals.get(name, count) != count:
            raise PrequantError(
                f"the model has {count} layers, the original {originals[name]} ({name}): which of them it was made of "
                "is not known, so no weight can be compared"
            )


def _same_weight(view: WeightView, originals: Mapping[str, WeightView]) -> WeightView | None:
    found = next((originals[name] for name in view.program.names_of(view.name) if name in originals), None)
    if found is not None and found.shape != view.shape:
        raise PrequantError(
            f"{view.name} is {list(view.shape)}, in the original {list(found.shape)}: this is another model"
        )
    return found


def _row(program: Program, view: WeightView, original: WeightView | None, recorded: float | None) -> WeightRow:
    values = view.tensors.get("outliers.values")
    changed = view.tensors.keys() != {"dense"}
    return WeightRow(
        name=view.name,
        kind=view.kind,
        format=view.format,
        input_format=view.input_format,
        shape=view.shape,
        outliers=program.tensor(values).numel() if values else 0,
        bytes=view.bytes,
        float_bytes=float_bytes(view),
        sqnr=sqnr(original.value(), view.value()) if original is not None and changed else recorded,
        lowered=view.lowered,
    )


def other_bytes(program: Program) -> int:
    """Bytes of the tensors that belong to no weight: biases, layer norms, constants."""
    inside = {name for view in weights(program) for name in view.tensors.values()}
    tensors = {**dict(program.named_parameters()), **dict(program.named_buffers())}
    return sum(t.numel() * t.element_size() for name, t in tensors.items() if name not in inside)


# ---- tables ----------------------------------------------------------------------------------------------------------


def weight_table(rows: Iterable[WeightRow], other: int, on_disk: int | None = None) -> Table:
    """The rows as a table with totals, 80 columns wide at most for names of usual length.

    ``other`` are the bytes of all other tensors, ``on_disk`` those of the files. The weights of one layer stand under
    its name.
    """
    rows = list(rows)
    total = sum(row.bytes for row in rows) + other
    before = sum(row.float_bytes for row in rows) + other
    table = Table(
        title="weights", title_justify="left", caption_justify="left", show_footer=True, padding=0, show_edge=False
    )
    table.box = box.SIMPLE_HEAD
    if total:
        ending = "" if on_disk is None else f"; {on_disk:,} bytes on disk"
        table.caption = Text(f"{before / total:.2f}x smaller than float32{ending}. SQNR in dB.")
    table.add_column("weight", footer="total", overflow="fold")
    table.add_column("format", overflow="fold")
    outliers = f"{sum(row.outliers for row in rows):,}"
    for heading, footer in (("shape", ""), ("outliers", outliers), ("bytes", f"{total:,}"), ("bits", ""), ("SQNR", "")):
        table.add_column(heading, footer=footer, justify="right", no_wrap=True)
    for group, members in groupby(rows, lambda row: _group(row.name)):
        if group:
            table.add_row(Text(group, style="bold"))
        for row in members:
            name = row.name.removesuffix(".weight").removeprefix(group)
            table.add_row(Text(f"  {name.removeprefix('.')}" if group else name), *_cells(row))
    table.add_row("everything else", "", "", "", f"{other:,}", "", "")
    return table


def _group(name: str) -> str:
    """The layer that a weight belongs to: up to the first number in its name, else all but its last part; empty if it
    has none.
    """
    parts = name.removesuffix(".weight").split(".")
    end = next((i + 1 for i, part in enumerate(parts[:-1]) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[:end])


def _cells(row: WeightRow) -> tuple[str, ...]:
    simulated = ["(simulated)"] if row.is_compressed and not row.lowered else []
    return (
        "\n".join([row.format, *([f"x {row.input_format}"] if row.input_format else []), *simulated]),
        "x".join(map(str, row.shape)),
        f"{row.outliers:,}" if row.outliers else "",
        f"{row.bytes:,}",
        f"{8 * row.bytes / (row.shape[0] * row.shape[1]):.2f}",
        "" if row.sqnr is None else f"{row.sqnr:.1f}",
    )


def error_summary(rows: Iterable[WeightRow], worst: int = 3) -> dict[str, Any]:
    """Median and least SQNR over the compressed weights, and the names of the worst."""
    known = sorted((row.sqnr, row.name) for row in rows if row.sqnr is not None and math.isfinite(row.sqnr))
    if not known:
        return {"median_sqnr": None, "least_sqnr": None, "worst": []}
    return {
        "median_sqnr": statistics.median(value for value, _ in known),
        "least_sqnr": known[0][0],
        "worst": [{"weight": name, "sqnr": value} for value, name in known[:worst]],
    }


def rows_to_json(rows: Iterable[WeightRow]) -> list[dict[str, Any]]:
    """Rows as plain data: an infinite SQNR (nothing changed) becomes None."""
    return [
        {**asdict(row), "sqnr": row.sqnr if row.sqnr is not None and math.isfinite(row.sqnr) else None} for row in rows
    ]
