"""Steps of optimizers are seen as what they are, writes to their parameters, also where PyTorch does not."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from prequant.runtime.versions import version_of

from .native_layers import Layer
from .test_native_linear import assert_linear

OPTIMIZERS = [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_counts_as_a_write_to_what_it_wrote_to(kind: Callable[..., torch.optim.Optimizer], fused: bool) -> None:
    trained, without_gradient, other = (Parameter(torch.ones(4)) for _ in range(3))
    trained.grad = torch.ones(4)
    optimizer = kind([{"params": [trained]}, {"params": [without_gradient]}], lr=0.1, fused=fused)
    for _ in range(2):
        before = version_of(trained)
        optimizer.step()
        assert version_of(trained) > before
    assert trained[0] < 1 and version_of(without_gradient) == version_of(other) == 0


class Descent(torch.optim.Optimizer):
    """Writes past PyTorch, as kernels from elsewhere do."""

    def __init__(self, parameters: list[Parameter]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            parameter.detach().numpy()[:] -= parameter.grad.numpy()


def test_so_does_one_that_pytorch_knows_nothing_of() -> None:
    parameter = Parameter(torch.ones(4))
    parameter.grad = torch.ones(4)
    Descent([parameter]).step()
    assert parameter[0] == 0 and version_of(parameter) == 1


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_is_compiled_counts_as_well(fused: bool) -> None:
    parameter = Parameter(torch.ones(4))
    parameter.grad = torch.ones(4)
    optimizer = torch.optim.AdamW([parameter], lr=torch.tensor(0.1), fused=fused)
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(2):
        before = version_of(parameter)
        step()
        assert version_of(parameter) > before
    assert parameter[0] < 0.9


@pytest.mark.parametrize("trained", ["scale", "bias", "outliers"])
def test_kernels_see_what_a_fused_step_wrote(isa: str, trained: str) -> None:
    layer, input = Layer("affine4:group32:asym", 32, 64, "add"), torch.randn(3, 64)
    parameters: dict[str, Tensor] = {"scale": layer.scale, "bias": layer.bias}
    if layer.outliers is not None:
        parameters["outliers"] = layer.outliers.values
    parameter = parameters[trained]
    before = layer(input)
    parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    for _ in range(2):  # the second time, after a call that repeated an earlier one
        layer(input)
        optimizer.step()
        after = layer(input)
        assert_linear(after, input, layer)
        assert not torch.equal(after, before)
        before = after
