"""The order of codes and scales for the Triton kernels, by the formula that layout.py states; and when it is made."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from prequant.runtime import Scheme, WeightFormat
from prequant.runtime.packing import unpack

from ..native_layers import FORMATS, Layer

pytest.importorskip("triton")
from prequant.runtime.triton_kernels import availability, layout, prepared, tables, workspace


@pytest.mark.parametrize("text", [*FORMATS, "affine4:group6"])
@pytest.mark.parametrize("columns", [1, 128, 200])
def test_codes_stand_where_the_layout_says(text: str, columns: int) -> None:
    format, rows = WeightFormat.parse(text), 3
    layer = Layer(text, rows, columns)
    arranged = layout.arrange_codes(layer.codes, format, columns)
    chunks, start = layout.chunks_of(columns), 0
    planes = format.bits if format.scheme is Scheme.BCQ else 1
    found = np.zeros((planes, rows, 128 * chunks), dtype=np.int64)
    shift = 0
    for index, width in enumerate(layout.field_widths(format)):
        size = chunks * rows * 16 * width
        field = arranged[start : start + size].numpy().reshape(chunks, rows, 16 * width)
        start += size
        for column in range(128 * chunks):
            chunk, within = divmod(column, 128)
            block, rest = divmod(within, 128 // width)
            plane, place = divmod(rest, 16)
            code = field[chunk, :, 16 * block + place] >> (plane * width) & (2**width - 1)
            found[index if planes > 1 else 0, :, column] += code.astype(np.int64) << shift
        shift += width if planes == 1 else 0
    assert start == arranged.numel()
    expected = unpack(layer.codes, format, columns).numpy().reshape(planes, rows, columns)
    assert (found[..., :columns] == expected).all() and not found[..., columns:].any()


def test_what_is_arranged_is_kept_and_made_again_when_it_changes(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            made.append(name)
            return function(*arguments)

        return call

    monkeypatch.setattr(prepared, "arrange_codes", noting("codes", prepared.arrange_codes))
    monkeypatch.setattr(prepared, "_arrange", noting("scales", prepared._arrange))
    layer, input = Layer("affine4:row", 32, 64, "replace").to(gpu), torch.randn(3, 64, device=gpu)
    assert layer.outliers is not None

    def runs() -> list[str]:
        made.clear()
        seen = layer(input).double()
        expected = input.double() @ layer.weight().T + layer.bias.double()
        torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5)
        return made

    assert runs() == ["codes", "scales"]
    assert runs() == []
    for tensor in (layer.scale, layer.outliers.values):
        tensor.mul_(2)
        assert runs() == ["scales"]
    layer.codes.mul_(2)
    assert runs() == ["codes", "scales"]
    first = layer.scale
    layer.scale = first * 0.5
    assert runs() == ["scales"]
    layer.scale = first  # both tasks' are kept
    assert runs() == []
    layer.outliers = layer.outliers._replace(values=layer.outliers.values + 1)
    assert runs() == ["scales"]
    layer.bias.add_(1)
    assert runs() == []
    first.requires_grad_()  # scales that train change at every step
    assert runs() == ["scales"]


def test_what_is_kept_is_made_in_memory_of_its_own(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a thread of its own: CUDA graphs of torch.compile take for theirs what their thread allocates."""
    monkeypatch.setattr(tables, "splits", lambda *_: 2)
    monkeypatch.setattr(workspace, "_counters", {})
    seen: list[tuple[bool, bool]] = []

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            seen.append((threading.current_thread() is not threading.main_thread(), torch.is_grad_enabled()))
            return function(*arguments, **options)

        return call

    for module, name in ((prepared, "arrange_codes"), (prepared, "_arrange"), (prepared, "unpacked")):
        monkeypatch.setattr(module, name, noting(getattr(module, name)))
    layer, input = Layer("affine4:row", 32, 600, "replace").to(gpu), torch.randn(3, 600, device=gpu)
    operands = "affine8:tensor:asym", torch.full((1, 1), 0.1, device=gpu), torch.full((1, 1), 3.0, device=gpu)
    first = layer(input, *operands)
    assert seen == [(True, False)] * 3 and workspace._counters
    assert torch.equal(layer(input, *operands), first) and len(seen) == 3
    monkeypatch.setattr(workspace, "capturing", lambda device: True)
    assert torch.equal(layer(input, *operands), first)
    layer.scale.mul_(2)
    with pytest.raises(availability.TritonError, match="run them once with the same tensors"):
        layer(input, *operands)


def test_what_is_arranged_lives_as_long_as_its_tensors(gpu: torch.device) -> None:
    before, layer = len(prepared._kept), Layer("affine4:row", 32, 64).to(gpu)
    input = torch.randn(1, 64, device=gpu)
    layer(input)
    assert len(prepared._kept) == before + 1
    scales = prepared._kept[layer.codes].scales
    layer.scale = layer.scale * 2
    layer(input)
    assert len(scales) == 1
    del scales, layer
    assert len(prepared._kept) == before
