"""Rows of packed codes on the Triton kernels: the reference's values, to the last bit."""

from typing import Any

import pytest
import torch

from prequant.runtime import FormatError, WeightFormat, ops, reference
from prequant.runtime.triton_kernels import backends

from ..oracle import COLUMNS, FEW, FORMATS, ROWS, Weight, assert_close

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def kernels_only(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference must not step in."""

    def refuse(*arguments: object) -> None:
        raise AssertionError("the reference ran")

    monkeypatch.setattr(reference, "packed_embedding", refuse)


def on(device: torch.device, weight: Weight) -> tuple[Any, ...]:
    return tuple(part.to(device) if isinstance(part, torch.Tensor) else part for part in weight.operands())


@pytest.mark.parametrize("outliers", ["", "add", "replace"])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_embedding(gpu: torch.device, format: WeightFormat, outliers: str) -> None:
    weight = Weight(format, outliers=outliers)
    ids = torch.tensor([[4, 0, 4], [2, 2, 1]])
    result = ops.packed_embedding(ids.to(gpu), *on(gpu, weight), **weight.options()).cpu()
    assert_close(result, weight.true[ids.numpy()])
    values, *rest = (weight.values, weight.column_indices, weight.row_offsets)
    sparse = None if values is None else reference.Outliers(values, rest[0], rest[1], weight.replace)  # type: ignore[arg-type]
    operands = (weight.codes, weight.scale, weight.zero_point, sparse, format, COLUMNS)
    assert torch.equal(result, reference.packed_weight(*operands)[ids])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("format", FEW, ids=str)
def test_dequantize(gpu: torch.device, format: WeightFormat, dtype: torch.dtype) -> None:
    weight = Weight(format, rows=9, columns=600)  # more than one program in both directions
    codes, scale, zero, *_ = on(gpu, weight)
    result = ops.dequantize(codes, scale, zero, **weight.options(), dtype=dtype).cpu()
    assert result.dtype == dtype
    assert_close(result.float(), weight.true, max(torch.finfo(dtype).eps, 1e-6))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0), (2, 1, 2)])
@pytest.mark.parametrize("id_type", [torch.int64, torch.int32])
def test_ids_of_any_shape(gpu: torch.device, shape: tuple[int, ...], id_type: torch.dtype) -> None:
    weight = Weight(FEW[1], outliers="replace")
    ids = torch.randint(0, ROWS, shape).to(id_type)
    result = ops.packed_embedding(ids.to(gpu), *on(gpu, weight), **weight.options())
    assert result.is_contiguous()
    assert_close(result.cpu(), weight.true[ids.numpy()])


def test_ids_outside_of_the_table(gpu: torch.device) -> None:
    """The CPU says so. A GPU that were asked would have to be waited for: there such a row is NaN, and no other."""
    from prequant.runtime.triton_kernels import rows

    weight = Weight(FEW[0], outliers="add")
    ids = torch.tensor([1, ROWS, -1, 2], device=gpu)
    sparse = reference.Outliers(weight.values, weight.column_indices, weight.row_offsets, False)  # type: ignore[arg-type]
    sparse = sparse._replace(**{name: getattr(sparse, name).to(gpu) for name in sparse._fields[:3]})
    codes, scale, *_ = on(gpu, weight)
    taken = rows.unpacked(weight.format, codes, scale, None, sparse, COLUMNS, torch.float32, ids).cpu()
    assert bool(taken[1:3].isnan().all())
    assert_close(taken[[0, 3]], weight.true[[1, 2]])
    if gpu.type == "cpu":
        with pytest.raises(IndexError, match="reach from -1 to 5; the table has rows 0 to 4"):
            ops.packed_embedding(ids, *weight.operands(), **weight.options())


def test_operands_of_two_devices_are_refused(gpu: torch.device) -> None:
    weight = Weight(FEW[0])
    codes, scale, *_ = on(gpu, weight)
    with pytest.raises(FormatError, match=r"packed_embedding: ids on .*, but scale on meta"):
        backends.kernel_of("packed_embedding")(
            *(weight.format, torch.tensor([1], device=gpu), codes, scale.to("meta")),
            *(None, None, COLUMNS, torch.float32),
        )
