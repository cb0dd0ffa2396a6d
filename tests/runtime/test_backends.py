"""A faster kernel is used when it accepts a call, and only then."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from prequant.runtime import (
    Backend,
    Outliers,
    PrequantError,
    Quantizer,
    WeightFormat,
    ops,
    reference,
    register_backend,
    registered_backends,
    unregister_backend,
)
from prequant.runtime import backends as module

ROWS, COLUMNS = 6, 16
FORMAT = WeightFormat.affine(4)
WEIGHT = torch.linspace(-1, 1, ROWS * COLUMNS).reshape(ROWS, COLUMNS)


@pytest.fixture(autouse=True)
def no_backends_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts with none, whatever native ones this installation has, and changes nothing for the others."""
    monkeypatch.setattr(module, "_backends", {})
    yield


LISTS = ("dequantize_gradients", "fake_quantize_gradients", "packed_linears")
"""Ops that give a list."""


class Spy:
    """A backend that notes its arguments and answers with a constant."""

    def __init__(
        self,
        name: str = "spy",
        op: str = "packed_linear",
        device: str = "cpu",
        accepts: bool = True,
        value: float = 7.0,
    ) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.ran: list[tuple[Any, ...]] = []
        self.accepts, self.value = accepts, value
        self.backend = Backend(name, op, device, self._accepts, self._run)

    def _accepts(self, *arguments: Any) -> bool:
        self.asked.append(arguments)
        return self.accepts

    def _run(self, *arguments: Any) -> Tensor | list[Tensor]:
        self.ran.append(arguments)
        result = torch.full((2, ROWS), self.value)
        return [result] if self.backend.op in LISTS else result


def linear(input: Tensor | None = None, **options: Any) -> Tensor:
    codes, scale, zero_point = Quantizer(FORMAT)(WEIGHT)
    input = torch.ones(2, COLUMNS) if input is None else input
    nothing = (None, None, None, False, None, None, None)
    return ops.packed_linear(input, codes, scale, zero_point, *nothing, format=str(FORMAT), columns=COLUMNS, **options)


def calls() -> dict[str, Callable[[], Tensor]]:
    """A call of every op, with the function of the reference that answers it."""
    codes, scale, zero_point = Quantizer(FORMAT)(WEIGHT)
    outliers = (
        torch.ones(1),
        torch.tensor([3], dtype=torch.int32),
        torch.tensor([0, 1] + [1] * (ROWS - 1), dtype=torch.int32),
    )
    packed: dict[str, Any] = {"format": str(FORMAT), "columns": COLUMNS}
    return {
        "quantize": lambda: ops.quantize(WEIGHT, scale, None, format=str(FORMAT)),
        "dequantize": lambda: ops.dequantize(codes, scale, zero_point, **packed),
        "dequantize_gradients": lambda: ops.dequantize_gradients(
            *(torch.ones(ROWS, COLUMNS), codes, scale, zero_point), format=str(FORMAT), needs=(True, False)
        )[0],
        "fake_quantize": lambda: ops.fake_quantize(WEIGHT, scale, None, format=str(FORMAT)),
        "fake_quantize_gradients": lambda: ops.fake_quantize_gradients(
            *(torch.ones(ROWS, COLUMNS), WEIGHT, scale, None),
            format=str(FORMAT),
            scale_gradient=True,
            needs=(True, False, False),
        )[0],
        "dynamic_scale": lambda: ops.dynamic_scale(WEIGHT, format="affine8:row"),
        "add_outliers": lambda: ops.add_outliers(WEIGHT, *outliers, replace=False),
        "packed_linear": linear,
        "packed_linears": lambda: ops.packed_linears(
            *(torch.ones(2, COLUMNS), [codes], [scale], [None], [None], [None], [None], [False], [None], None, None),
            *([str(FORMAT)], [""], COLUMNS),
        )[0],
        "packed_embedding": lambda: ops.packed_embedding(
            torch.tensor([1]), codes, scale, None, *outliers, False, **packed
        ),
    }


def test_every_op_that_takes_backends_is_called_here() -> None:
    assert tuple(calls()) == tuple(module.OPS)


@pytest.mark.parametrize("op", module.OPS)
def test_operands_are_called_what_the_reference_calls_them(op: str) -> None:
    own = {"packed_linears": ops.each_linear}.get(op) or getattr(ops, f"_reference_{op}", None)
    function = own or getattr(reference, op)
    assert tuple(inspect.signature(function).parameters) == ("format", *module.OPS[op])


@pytest.mark.parametrize("op", module.OPS)
def test_a_backend_takes_over_and_hands_back(op: str) -> None:
    call, spy = calls()[op], Spy(op=op)
    expected = call()
    register_backend(spy.backend)
    assert registered_backends(op, "cpu") == ("spy",)
    assert torch.equal(call(), torch.full((2, ROWS), 7.0))
    assert len(spy.ran) == 1
    unregister_backend(spy.backend)
    assert registered_backends(op, "cpu") == ()
    assert torch.equal(call(), expected)
    assert len(spy.ran) == 1


@pytest.mark.parametrize("op", module.OPS)
def test_a_backend_that_declines_is_asked_and_not_run(op: str) -> None:
    call, spy = calls()[op], Spy(op=op, accepts=False)
    expected = call()
    register_backend(spy.backend)
    assert torch.equal(call(), expected)
    assert len(spy.asked) == 1 and not spy.ran


def test_a_backend_sees_parsed_formats_and_gathered_outliers() -> None:
    spy = Spy()
    register_backend(spy.backend)
    codes, scale, _ = Quantizer(FORMAT)(WEIGHT)
    sparse = (
        torch.ones(1),
        torch.tensor([3], dtype=torch.uint16),
        torch.tensor([0, 1] + [1] * (ROWS - 1), dtype=torch.int32),
    )
    input, bias = torch.ones(2, COLUMNS), torch.zeros(ROWS)
    options: dict[str, Any] = {"format": str(FORMAT), "columns": COLUMNS, "input_format": "affine8:row"}
    with torch.no_grad():
        ops.packed_linear(input, codes, scale, None, *sparse, True, bias, None, None, **options)
    (arguments,) = spy.ran
    assert arguments == spy.asked[0]
    format, *tensors, columns, input_format, activation, residual = arguments
    assert format == FORMAT and input_format == WeightFormat.affine(8) and columns == COLUMNS
    assert activation == "" and residual is None
    assert isinstance(tensors[4], Outliers) and tensors[4].replace
    assert [tensors[i].data_ptr() for i in (0, 1, 2, 5)] == [t.data_ptr() for t in (input, codes, scale, bias)]
    assert tensors[3] is tensors[6] is tensors[7] is None


def test_the_arguments_are_those_of_the_reference() -> None:
    """So that a backend can be checked by calling both with the same arguments."""
    expected = linear()
    same = Backend("same", "packed_linear", "cpu", lambda *_: True, reference.packed_linear)
    register_backend(same)
    assert torch.equal(linear(), expected)


def test_the_newest_that_accepts_wins() -> None:
    old, new = Spy("old", value=1.0), Spy("new", value=2.0)
    register_backend(old.backend)
    register_backend(new.backend)
    assert registered_backends("packed_linear", "cpu") == ("new", "old")
    assert float(linear()[0, 0]) == 2.0
    new.accepts = False
    assert float(linear()[0, 0]) == 1.0
    unregister_backend(old.backend)
    assert float(linear()[0, 0]) not in (1.0, 2.0)


def test_backends_of_other_devices_and_ops_are_not_asked() -> None:
    spies = [Spy("gpu", device="cuda"), Spy("other", op="packed_embedding")]
    for spy in spies:
        register_backend(spy.backend)
    linear()
    assert not any(spy.asked for spy in spies)
    assert registered_backends("packed_linear", "cuda") == ("gpu",)


def test_the_device_of_the_first_tensor_decides() -> None:
    gpu, cpu = Spy("gpu", device="meta"), Spy("cpu")
    for spy in (gpu, cpu):
        register_backend(spy.backend)
    module.call("packed_linear", reference.packed_linear, FORMAT, torch.ones(1, device="meta"))
    assert len(gpu.ran) == 1 and not cpu.asked


def test_bcq_is_dequantized_by_the_backends_of_dequantize() -> None:
    spy = Spy(op="dequantize")
    register_backend(spy.backend)
    planes = torch.zeros(2, ROWS, 2, dtype=torch.uint8)
    ops.dequantize_bcq(planes, torch.ones(2, ROWS, 1), format="bcq2:row", columns=COLUMNS)
    assert spy.ran[0][0] == WeightFormat.bcq(2)


def test_a_backend_that_fails_raises() -> None:
    def fail(*arguments: Any) -> Tensor:
        raise RuntimeError("the kernel broke")

    register_backend(Backend("broken", "packed_linear", "cpu", lambda *_: True, fail))
    with pytest.raises(RuntimeError, match="the kernel broke"):
        linear()


def test_what_does_not_fit_is_refused_before_a_backend_sees_it() -> None:
    spy = Spy()
    register_backend(spy.backend)
    with pytest.raises(PrequantError, match="does not fit"):
        linear(torch.ones(2, COLUMNS + 1))
    assert not spy.asked


def test_the_backward_runs_through_backends_too() -> None:
    spy = Backend("twice", "dequantize", "cpu", lambda *_: True, lambda format, *a: torch.full((ROWS, COLUMNS), 2.0))
    register_backend(spy)
    input = torch.ones(2, COLUMNS, requires_grad=True)
    linear(input).sum().backward()
    assert input.grad is not None
    assert torch.equal(input.grad, torch.full((2, COLUMNS), 2.0 * ROWS))


def test_bad_registrations_are_refused() -> None:
    with pytest.raises(PrequantError, match=r"backend 'x' is for op 'matmul'; backends exist for \['quantize'"):
        register_backend(Spy("x", op="matmul").backend)
    with pytest.raises(PrequantError, match="'dequantize_bcq'"):
        register_backend(Spy("x", op="dequantize_bcq").backend)
    spy = Spy("x")
    with pytest.raises(PrequantError, match="backend 'x' for packed_linear on cpu is not registered"):
        unregister_backend(spy.backend)
    register_backend(spy.backend)
    with pytest.raises(PrequantError, match="a backend 'x' for packed_linear on cpu is already registered"):
        register_backend(Spy("x").backend)
    register_backend(Spy("x", device="cuda").backend)
    unregister_backend(spy.backend)
    with pytest.raises(PrequantError, match="is not registered"):
        unregister_backend(spy.backend)
