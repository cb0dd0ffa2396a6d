"""Calls of prequant's operators, for the tests of those in C++: right ones of every kind, and hostile ones."""

from typing import Any

import torch
from torch import Tensor

from prequant.runtime import Quantizer, WeightFormat, binary_code, ops

Call = tuple[str, tuple[Any, ...], dict[str, Any]]
COLUMNS = 96
FORMATS = [
    *("affine4:row", "affine3:group32:asym", "affine8:tensor", "affine5:row:asym", "affine6:group64", "affine4:group8"),
    *("affine2:group7:asym", "ternary:row", "ternary:group32:base3", "ternary:tensor", "binary:row", "binary:group64"),
    *("bcq3:row", "bcq2:group32", "bcq1:group9"),
]
NO_FORMATS = [
    *("", "int4", "affine4", "affine9:row", "affine4:row0", "affine04:row", "affine4:group", "bcq2", "bcq2:tensor"),
    *("affine4:group" + 30 * "9", "ternary2:row", "binary:row:asym", "affine4:row:base3", "affine4:row:", ":::"),
    *("affine4:row:asym:asym", "affine4:group-8", "affine\N{ARABIC-INDIC DIGIT FOUR}:row"),
]
DYNAMIC, STATIC = "affine8:row", "affine8:tensor:asym"


def packed(text: str, rows: int = 20, columns: int = COLUMNS) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scale and zero point of a random weight; ternary ones have the threshold of their rounding beside them."""
    format, weight = WeightFormat.parse(text), torch.randn(rows, columns)
    return binary_code(weight, format) if text.startswith("bcq") else Quantizer(format, "minmax")(weight)


def outliers(rows: int = 20, replace: bool = False, wide: bool = False) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Two in every other row."""
    offsets = torch.arange(rows + 1).div(2, rounding_mode="floor").mul(2)
    columns = (
        torch.randperm(COLUMNS)[: int(offsets[-1])] if rows < COLUMNS else torch.arange(int(offsets[-1])) % COLUMNS
    )
    types = (torch.int32, torch.int64) if wide else (torch.uint16, torch.int32)
    return torch.randn(int(offsets[-1])), columns.to(types[0]), offsets.to(types[1]), replace


NONE = (None, None, None, False)


def linear_call(
    text: str,
    input: Tensor,
    sparse: tuple[Any, ...] = NONE,
    mode: str = "",
    bias: bool = True,
    residual: bool = False,
    activation: str = "",
    scales: torch.dtype = torch.float32,
) -> Call:
    codes, scale, zero_point = packed(text)
    kind = {"": (None, None), "dynamic": (None, None), "static": (torch.full((1, 1), -0.03), torch.full((1, 1), 100.0))}
    options = {
        "format": text,
        "columns": COLUMNS,
        "input_format": {"": "", "dynamic": DYNAMIC, "static": STATIC}[mode],
        "activation": activation,
    }
    return (
        "packed_linear",
        (
            *(input, codes, scale.to(scales), None if zero_point is None else zero_point.to(scales), *sparse),
            torch.randn(20) if bias else None,
            *kind[mode],
            torch.randn(*input.shape[:-1], 20, dtype=input.dtype) if residual else None,
        ),
        options,
    )


def changed(call: Call, position: int | str, value: Any) -> Call:
    name, arguments, options = call
    if isinstance(position, str):
        return name, arguments, {**options, position: value}
    return name, (*arguments[:position], value, *arguments[position + 1 :]), options


def linear_calls() -> list[Call]:
    """Of all formats, with all that may go with them; what native kernels take and what they do not."""
    calls = []
    for index, text in enumerate(FORMATS):
        sparse = (NONE, outliers(), outliers(replace=True, wide=True))[index % 3]
        activation = ("", "relu", "gelu", "gelu_tanh")[index % 4]
        for mode in ("", "dynamic", "static"):
            input = torch.randn(5, COLUMNS)
            calls.append(linear_call(text, input, sparse, mode, index % 2 == 0, index % 3 == 0, activation))
    calls += [
        linear_call("affine4:row", torch.randn(2, 3, COLUMNS, dtype=torch.bfloat16), outliers(), "dynamic", True, True),
        linear_call("affine4:row", torch.randn(2, COLUMNS, dtype=torch.float64), outliers(), "dynamic"),
        linear_call("affine4:row", torch.randn(COLUMNS)),
        linear_call("affine4:row", torch.randn(0, COLUMNS)),
        linear_call("affine4:row", torch.randn(COLUMNS, 4).T, outliers(), residual=True),
        linear_call("affine4:row:asym", torch.randn(3, COLUMNS), outliers(), scales=torch.float64),
        linear_call("affine4:group32", torch.randn(3, COLUMNS), outliers(), scales=torch.bfloat16),
    ]
    calls.append(changed(calls[0], "input_format", "affine4:tensor"))  # dynamic: no kernel takes it
    return [*calls, *changing_calls()]


def changing_calls() -> list[Call]:
    """Of one layer, whose tensors are written to between them."""
    call = linear_call("affine4:row", torch.randn(3, COLUMNS), outliers())
    codes, scale, values, bias = (call[1][position] for position in (1, 2, 4, 8))
    calls = [call, call]
    for tensor in (scale, values, bias):
        calls += [("aten.mul_", (tensor, 3.0), {}), call]
    return [*calls, ("aten.bitwise_xor_", (codes, 0x5A), {}), call]


def linears_call(texts: list[str], input: Tensor, mode: str) -> Call:
    calls = [linear_call(text, input, outliers() if n % 2 else NONE, mode, n != 1) for n, text in enumerate(texts)]
    weights = [list(each) for each in zip(*(arguments[1:9] for _, arguments, _ in calls), strict=True)]
    formats, activations = [text for text in texts], ["relu" if n == 1 else "" for n in range(len(texts))]
    parts = (*calls[0][1][9:11], formats, activations, COLUMNS, calls[0][2]["input_format"])
    return "packed_linears", (input, *weights, *parts), {}


def other_calls() -> list[Call]:
    calls: list[Call] = []
    ids = torch.randint(0, 20, (3, 4))
    for index, text in enumerate(FORMATS):
        codes, scale, zero_point = packed(text)
        options = {"format": text, "columns": COLUMNS}
        sparse = (NONE, outliers(wide=True), outliers(replace=True))[index % 3]
        typed = {**options, "dtype": torch.bfloat16 if index % 2 else None}
        calls.append(("dequantize", (codes, scale, zero_point), typed))
        calls.append(("packed_embedding", (ids, codes, scale, zero_point, *sparse), {**typed, "padding_idx": 3}))
        if text.startswith("bcq"):
            calls.append(("dequantize_bcq", (codes, scale), typed))
            continue
        weight = torch.randn(20, COLUMNS)
        calls.append(("quantize", (weight, scale, zero_point), {"format": text}))
        for input in (weight, weight.bfloat16(), torch.randn(COLUMNS, 20).T):
            calls.append(("fake_quantize", (input, -scale, zero_point), {"format": text, "clipped": index % 2 == 0}))
    tokens = torch.randn(2, 5, 3, COLUMNS)
    tokens[0, 0, 0] = 0
    tokens[1, 0, 0, 7] = torch.inf
    for input in (tokens, tokens.transpose(1, 2), tokens.bfloat16()):
        for text in ("affine8:row", "affine5:tensor"):
            calls.append(("dynamic_scale", (input,), {"format": text}))
    cached = torch.randn(2, 3, 4, COLUMNS)
    scale = ops.dynamic_scale(cached, format="affine8:row")
    codes = ops.quantize(cached, scale, None, format="affine8:row")
    calls += [
        ("quantize", (cached, scale, None), {"format": "affine8:row"}),
        ("dequantize", (codes, scale, None), {"format": "affine8:row", "columns": COLUMNS}),
        ("fake_quantize", (cached, torch.tensor(0.1), torch.tensor(3.0)), {"format": "affine4:tensor:asym"}),
        ("add_outliers", (torch.randn(20, COLUMNS), *outliers()[:3]), {"replace": False}),
        ("add_outliers", (torch.randn(COLUMNS, 20).T, *outliers(wide=True)[:3]), {"replace": True}),
        ("add_outliers", (torch.randn(20, COLUMNS).bfloat16(), *outliers()[:3]), {"replace": False}),
        ("scale_gradient", (torch.randn(3),), {"factor": 0.5}),
        linears_call(["affine4:row", "ternary:row", "bcq3:row"], torch.randn(2, 3, COLUMNS), "dynamic"),
        linears_call(["affine4:row", "affine4:group8", "affine8:row"], torch.randn(5, COLUMNS), ""),  # one not native
        linears_call(["affine3:row"] * 18, torch.randn(5, COLUMNS), "static"),  # more than the library takes at once
    ]
    return calls


def hostile_calls() -> list[tuple[Call, str]]:
    """Each with what its error says, as a pattern."""
    linear = linear_call("affine4:row", torch.randn(3, COLUMNS), outliers(), "static", residual=True)
    _, arguments, _ = linear
    codes, scale, values, places, offsets = arguments[1], arguments[2], arguments[4], arguments[5], arguments[6]
    table = (torch.tensor([[1, 2]]), codes, scale, None, *NONE)
    embedding: Call = ("packed_embedding", table, {"format": "affine4:row", "columns": COLUMNS})
    many = linears_call(["affine4:row", "ternary:row"], torch.randn(3, COLUMNS), "")
    rounding: Call = ("fake_quantize", (torch.randn(3, 8), torch.ones(3, 1), None), {"format": "affine4:row"})
    far, back = places.clone(), offsets.clone()
    far[0], back[2] = COLUMNS, 10**6  # of row 1
    return [
        *((changed(linear, "format", text), "packed_linear: .* is not a weight format") for text in NO_FORMATS),
        *((changed(linear, "columns", columns), "columns") for columns in (0, -1, 95, 97, 2**62, -(2**63))),
        (changed(linear, 0, torch.randn(3, COLUMNS + 1)), r"input \[3, 97\] does not fit a weight with 96 columns"),
        (changed(linear, 0, torch.ones(3, COLUMNS, dtype=torch.int64)), "input of a matmul is of floats, not Long"),
        (changed(linear, 0, torch.tensor(1.0)), r"input \[\] does not fit"),
        (changed(linear, 1, codes[:, 1:]), "codes of affine4:row with 96 columns have a shape like"),
        (changed(linear, 1, codes[0]), "have a shape like"),
        (changed(linear, 1, codes.int()), "codes are uint8, not Int"),
        (changed(linear, 2, scale[1:]), r"go with a scale \[20, 1\], not \[19, 1\]"),
        (changed(linear, 2, torch.ones(20, 1, dtype=torch.int32)), "scales are floats"),
        (changed(linear, 3, scale), "symmetric and takes no zero point"),
        (changed(linear, 4, values[1:]), "vectors of one length"),
        (changed(linear, 5, None), "come with their columns"),
        (changed(linear, 5, places.to(torch.int64)), "uint16 or int32 columns"),
        (changed(linear, 5, far), r"a weight that makes no sense .*\[20, 48\] of affine4:row"),
        (changed(linear, 6, offsets[1:]), r"row offsets of 20 rows have shape \[21\]"),
        (changed(linear, 6, back), "a weight that makes no sense"),
        (changed(linear, 8, torch.randn(21)), r"bias \[21\] does not fit a weight with 20 rows"),
        (changed(linear, 9, torch.ones(2, 1)), r"goes with a scale of floats"),
        (changed(linear, 9, None), "input zero point needs an input scale"),
        (changed(linear, 10, None), "asymmetric and needs a zero point"),
        (changed(linear, 11, torch.randn(3, 21)), r"residual \[3, 21\] of Float does not fit a result \[3, 20\]"),
        (changed(linear, 11, torch.randn(3, 20).double()), r"residual \[3, 20\] of Double"),
        (changed(linear, "activation", "tanh"), "activation 'tanh' is none of"),
        (changed(linear, "input_format", ""), "needs an input format"),
        (changed(embedding, 0, torch.tensor([20])), "IndexError: prequant::packed_embedding: .* reach from 20 to 20"),
        (changed(embedding, 0, torch.tensor([-1, 3])), "IndexError: .* reach from -1 to 3; the table has rows 0 to 19"),
        (changed(embedding, 0, torch.tensor([1.0])), "ids are int64 or int32, not Float"),
        ((embedding[0], (*table[:4], values, far, offsets, True), embedding[2]), "an outlier is in column 96"),
        ((embedding[0], (*table[:4], values, places, back, True), embedding[2]), "can't have outliers"),
        (changed(many, 0, torch.randn(3, 8)), "packed_linears: an input"),
        (changed(many, 2, many[1][2][:1]), "2 codes go with as many scales"),
        (("packed_linears", (torch.randn(3, 8), *[[]] * 8, None, None, [], [], 8), {}), "takes at least one linear"),
        (changed(rounding, 1, torch.ones(2, 1)), r"fake_quantize: affine4:row: an input \[3, 8\] goes with a scale"),
        (changed(rounding, "format", "bcq2:row"), "come from a solver"),
        (changed(rounding, "format", "affine4:row:asym"), "needs a zero point"),
        (("quantize", (torch.full((1, 8), torch.nan), torch.ones(1, 1), None), rounding[2]), "codes reach from .*nan"),
        (("dynamic_scale", (torch.randn(3),), {"format": "ternary:row"}), "dynamic scales are for symmetric affine"),
        (("dequantize", (codes[None], scale, None), embedding[2]), "have other rows than scales"),
        (("dequantize", (codes, scale, None), {**embedding[2], "format": "bcq2:row"}), "have a shape like"),
        (("add_outliers", (torch.randn(20), values, places, offsets), {"replace": True}), "a matrix of floats"),
        (("add_outliers", (torch.randn(20, 3), values, places, offsets), {"replace": True}), "of a weight with 3"),
        (("uncalibrated", (scale,), {"format": "x", "observer": "minmax", "name": "fc1"}), "'fc1' has no scale yet"),
    ]
