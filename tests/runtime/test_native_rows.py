"""Unpacking on the native kernels: the numbers are the reference's, to the last bit."""

import pytest
import torch
from torch import Tensor

from prequant.runtime import Scheme, WeightFormat, native, ops, reference

from .native_layers import FORMATS, Layer

OTHERS = ["affine3:group8", "affine4:group24:asym", "ternary:group40:base3", "bcq3:group16", "affine8:tensor:asym"]


@pytest.fixture
def truth(monkeypatch: pytest.MonkeyPatch) -> object:
    """The reference's ``dequantize``, which is not there for anybody else."""
    dequantize = reference.dequantize

    def refuse(*arguments: object) -> Tensor:
        raise AssertionError("the reference ran")

    monkeypatch.setattr(reference, "dequantize", refuse)
    return dequantize


@pytest.mark.parametrize("text", FORMATS + OTHERS)
def test_rows_are_those_of_the_reference(isa: str, truth: object, text: str) -> None:
    for rows, columns in ((5, 23), (40, 300), (1, 1), (9, 128)):
        layer = Layer(text, rows, columns, "replace")
        expected = truth(layer.codes, layer.scale, layer.zero_point, layer.format, columns)  # type: ignore[operator]
        options = {"format": text, "columns": columns}
        if layer.format.scheme is Scheme.BCQ:
            result = ops.dequantize_bcq(layer.codes, layer.scale, **options)
        else:
            result = ops.dequantize(layer.codes, layer.scale, layer.zero_point, **options)
        assert torch.equal(result, expected)
        ids = torch.randint(0, rows, (2, 7), dtype=torch.int32)
        assert layer.outliers is not None
        operands = (layer.codes, layer.scale, layer.zero_point, *layer.outliers)
        looked_up = ops.packed_embedding(ids, *operands, **options)
        assert torch.equal(looked_up, reference.add_outliers(expected, layer.outliers)[ids])


def test_many_rows_on_several_threads(isa: str) -> None:
    layer = Layer("affine4:group64", 3000, 384)
    expected = reference.dequantize(layer.codes, layer.scale, None, layer.format, 384)
    torch.set_num_threads(3)
    assert torch.equal(ops.dequantize(layer.codes, layer.scale, None, format="affine4:group64", columns=384), expected)


def test_ids_outside_of_the_table_are_named(isa: str) -> None:
    layer = Layer("affine4:row", 5, 16)
    for ids in ([0, 5], [-1, 2], [2**40]):
        with pytest.raises(IndexError, match=f"ids reach from {min(ids)} to {max(ids)}; the table has rows 0 to 4"):
            ops.packed_embedding(
                *(torch.tensor(ids), layer.codes, layer.scale, None, None, None, None, False),
                format="affine4:row",
                columns=16,
            )


@pytest.mark.parametrize("text", ["affine4:row", "affine3:group64:asym", "ternary:row", "bcq2:row"])
@pytest.mark.parametrize("outliers", ["", "add", "replace"])
def test_a_linear_that_trains_computes_and_learns_as_on_the_reference(isa: str, text: str, outliers: str) -> None:
    layer, input = Layer(text, 30, 70, outliers), torch.randn(4, 70)
    trained = [layer.scale, *([layer.outliers.values] if layer.outliers else [])]
    results = []
    for name in (isa, native.REFERENCE):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PREQUANT_ISA", name)
            native.chosen_isa.cache_clear()
            for tensor in trained:
                tensor.requires_grad_().grad = None
            output = layer(input, "affine8:row")
            output.square().sum().backward()
            results.append([output.detach(), *(tensor.grad for tensor in trained)])
    native.chosen_isa.cache_clear()
    for ours, theirs in zip(*results, strict=True):
        assert ours is not None and torch.equal(ours, theirs)


def test_weights_that_train_keep_their_gradients(isa: str) -> None:
    layer = Layer("affine4:row", 6, 16)
    layer.scale.requires_grad_()
    ops.dequantize(layer.codes, layer.scale, None, format="affine4:row", columns=16).sum().backward()
    units = reference.dequantize(layer.codes, torch.ones(6, 1), None, WeightFormat.parse("affine4:row"), 16)
    assert layer.scale.grad is not None
    torch.testing.assert_close(layer.scale.grad, units.sum(1, keepdim=True))
