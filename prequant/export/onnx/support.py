"""What each format becomes in each style, and what has no form, as a table."""

from __future__ import annotations

from typing import NamedTuple

from rich.table import Table


class Support(NamedTuple):
    """A kind of weight or input, formats that are examples of it, and what it becomes in each style."""

    what: str
    examples: tuple[str, ...]
    qdq: str
    matmulnbits: str


WEIGHTS = (
    Support("2 bits", ("affine2:row", "affine2:group32"), "int2; int4 below opset 25", "2-bit codes"),
    Support("3, 4 bits", ("affine3:row", "affine4:tensor"), "int4", "4-bit codes"),
    Support("5 to 8 bits", ("affine5:row", "affine8:group64"), "int8", "8-bit codes"),
    Support(
        "asymmetric, zero points that are levels",
        ("affine4:row:asym", "affine2:group16:asym"),
        "uint2, uint4, uint8",
        "packed zero points",
    ),
    Support("asymmetric, others", ("affine4:group32:asym",), "+ an offset of each group", "+ an offset of each group"),
    Support("ternary", ("ternary:row", "ternary:row:base3"), "int2; int4 below opset 25", "2-bit codes"),
    Support("binary", ("binary:row",), "int2; int4 below opset 25", "2-bit codes"),
    Support(
        "bcq", ("bcq3:row", "bcq2:group32"), "of each plane as binary, summed", "of each plane 2-bit codes, summed"
    ),
    Support("bcq of uniform codes", ("bcq5:row",), "int4 or int8", "4- or 8-bit codes"),
    Support("groups of a multiple of 16", ("affine4:group48",), "blocks of the group", "blocks of 16 to 256"),
    Support(
        "groups of another size", ("affine4:group24",), "blocks of the group", "no: blocks are powers of two, from 16"
    ),
)
INPUTS = (
    Support(
        "8 bits, dynamic per token",
        ("affine8:row",),
        "QuantizeLinear of the input over its scale",
        "accuracy_level 4: 8 bits for each block of a token",
    ),
    Support(
        "8 bits, per tensor",
        ("affine8:tensor", "affine8:tensor:asym"),
        "QuantizeLinear",
        "QuantizeLinear, then accuracy_level 4",
    ),
    Support("2 to 7 bits", ("affine4:row", "affine6:tensor"), "elementary operators", "elementary operators"),
)
NEVER = "latent weights (freeze them first), weights that are not float32 beside their codes, caches of codes"


def support_table() -> Table:
    """What can be exported, and how."""
    table = Table(title="ONNX")
    for heading in ("", "qdq", "matmulnbits"):
        table.add_column(heading)
    for what, rows in (("weights", WEIGHTS), ("outliers", ()), ("inputs of products", INPUTS)):
        for row in rows:
            table.add_row(f"{what}: {row.what}", row.qdq, row.matmulnbits)
        if what == "outliers":
            table.add_row(what, *["a sparse product beside, Gather and ReduceSum"] * 2)
    table.caption = f"No form: {NEVER}."
    return table
