"""Plain modules: what can be traced, what becomes of ties, constants and norms, and what an error says."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prequant.passes import Input
from prequant.runtime import PrequantError
from prequant.trace import BOUND, TraceError, trace

from ..models import FAMILIES, random_inputs, small_model

aten = torch.ops.aten


class Forward(nn.Module):
    """A module of one function of its inputs."""

    def __init__(self, function: Any, **tensors: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in tensors.items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value, persistent=not name.startswith("_"))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


# ---- what comes out --------------------------------------------------------------------------------------------------


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, first: Tensor, second: Tensor, scale: float = 1.0, flag: bool = False) -> Any:
        y = self.linear(first) * scale
        return {"sum": y + second, "parts": (y, [second, None]), "flag": y if flag else None}


def test_inputs_by_position_and_nested_outputs() -> None:
    module = Nested().eval()
    program = trace(module, (torch.randn(1, 4), torch.randn(1, 4), 2.0, True))
    assert program.signature.inputs == (
        Input("first", torch.float32, ("batch", 4)),
        Input("second", torch.float32, ("batch", 4)),
    )
    assert program.info.extra[BOUND] == {"scale": 2.0, "flag": True}
    first, second = torch.randn(5, 4), torch.randn(5, 4)
    expected = module(first, second, 2.0, True)
    for actual in (program(first, second), program(second=second, first=first), program(first, second=second)):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_a_single_tensor_in_and_out() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval()
    program = trace(module, torch.randn(1, 4))
    x = torch.randn(7, 4)
    assert program.signature.outputs == 0
    torch.testing.assert_close(program(x), module(x), rtol=0, atol=1e-6)
    assert not trace(module, torch.randn(1, 4)).training
    assert trace(module.train(), torch.randn(1, 4)).training


def test_axes_of_a_module_are_dynamic_where_its_code_allows() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1).eval()
    program = trace(encoder, torch.randn(1, 3, 16))
    assert program.signature.inputs[0].shape == ("batch", "length", 16)
    x = torch.randn(4, 9, 16)
    torch.testing.assert_close(program(x), encoder(x), rtol=0, atol=1e-5)

    convolution = nn.Conv1d(4, 5, 3).eval()
    program = trace(convolution, torch.randn(2, 4, 8))
    assert program.signature.inputs[0].shape == ("batch", 4, "input.2")
    x = torch.randn(3, 4, 20)
    torch.testing.assert_close(program(x), convolution(x), rtol=0, atol=1e-6)


def test_a_fixed_axis_is_checked_in_a_call() -> None:
    program = trace(
        Forward(lambda self, x: x.reshape(-1, 6).sum(1)), torch.randn(2, 2, 3), dynamic_axes={"x": {0: "rows"}}
    )
    assert program.signature.inputs[0].shape == ("rows", 2, 3)
    with pytest.raises(PrequantError, match=re.escape("input 'x' has the shape [4, 3, 2]; it takes [rows, 2, 3]")):
        program(torch.randn(4, 3, 2))
    with pytest.raises(PrequantError, match=re.escape("has the shape [4, 6]")):
        program(torch.randn(4, 6))


def test_axes_of_the_same_name_have_the_same_size() -> None:
    program = trace(Nested(), (torch.randn(2, 4), torch.randn(2, 4)))
    message = "input 'second' has the shape [1, 4]; it takes [batch, 4], batch = 3"
    with pytest.raises(PrequantError, match=re.escape(message)):
        program(torch.randn(3, 4), torch.randn(1, 4))


def test_missing_unknown_and_doubled_inputs() -> None:
    program = trace(Nested(), (torch.randn(2, 4), torch.randn(2, 4)))
    x = torch.randn(2, 4)
    with pytest.raises(TypeError, match="input 'second' is missing; this Program takes first, second"):
        program(x)
    with pytest.raises(TypeError, match="unexpected input 'third'"):
        program(x, x, third=x)
    with pytest.raises(TypeError, match="input 'first' given twice"):
        program(x, first=x)
    with pytest.raises(TypeError, match="3 positional inputs given"):
        program(x, x, x)


# ---- tensors ---------------------------------------------------------------------------------------------------------


def test_one_parameter_under_two_names() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(7, 4)
            self.mixer = nn.Linear(4, 4)
            self.again = self.mixer
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embedding.weight
            self.other = nn.Linear(4, 7, bias=False)
            self.other.weight = nn.Parameter(self.embedding.weight.detach())  # another object, the same memory

        def forward(self, ids: Tensor) -> Tensor:
            x = self.again(self.mixer(self.embedding(ids)))
            return self.head(x) + self.other(x)

    module = Tied().eval()
    program = trace(module, torch.tensor([[1, 2]]))
    assert sorted(name for name, _ in program.named_parameters()) == ["embedding.weight", "mixer.bias", "mixer.weight"]
    assert program.info.aliases == {
        "embedding.weight": ("head.weight", "other.weight"),
        "mixer.weight": ("again.weight",),
        "mixer.bias": ("again.bias",),
    }
    ids = torch.randint(7, (3, 5))
    torch.testing.assert_close(program(ids), module(ids), rtol=0, atol=1e-6)


def test_tensors_that_share_a_storage_come_apart() -> None:
    flat = torch.randn(12)
    left, right = nn.Parameter(flat[:8].view(2, 4)), nn.Parameter(flat[8:])
    module = Forward(lambda self, x: (x @ self.left.t()).sum(-1, keepdim=True) + self.right, left=left, right=right)
    program = trace(module, torch.randn(2, 4))
    storages = {parameter.untyped_storage().data_ptr() for parameter in program.parameters()}
    assert len(storages) == 2
    x = torch.randn(3, 4)
    torch.testing.assert_close(program(x), module(x), rtol=0, atol=1e-6)

    both = torch.randn(4)
    module = Forward(lambda self, x: x * self.scale + self.offset, scale=both[:2], offset=both[2:])
    program = trace(module, torch.randn(2, 2))
    assert len({buffer.untyped_storage().data_ptr() for buffer in program.buffers()}) == 2
    x = torch.randn(3, 2)
    torch.testing.assert_close(program(x), module(x), rtol=0, atol=1e-6)

    overlapping = Forward(lambda self, x: x * self.left * self.right, left=left, right=nn.Parameter(flat[4:8]))
    with pytest.raises(TraceError, match="parameters 'left' and 'right' overlap in memory"):
        trace(overlapping, torch.randn(2, 4))


def test_constants_of_the_code_are_told_from_the_state() -> None:
    module = Forward(
        lambda self, x: (x * self.kept + self._dropped) * torch.tensor([2.0, 3.0]),
        kept=torch.tensor([1.0, 5.0]),
        _dropped=torch.tensor([0.5, 0.25]),
        unused=torch.ones(3),
    )
    program = trace(module, torch.randn(2, 2))
    x = torch.randn(4, 2)
    torch.testing.assert_close(program(x), module(x))
    held = {name for name, _ in program.named_buffers()}
    assert not list(program.parameters())
    assert held - set(program.info.constants) == {"kept"}
    assert "_dropped" in program.info.constants and len(program.info.constants) == 2
    assert program.info.extra["unread"] == ("unused",)


# ---- modes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module",
    [
        nn.BatchNorm1d(4),
        nn.BatchNorm1d(4, track_running_stats=False),
        nn.Sequential(nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2, track_running_stats=True)),
        nn.AlphaDropout(0.4),
        nn.RReLU(),
    ],
    ids=["batch", "batch-without-statistics", "instance", "alpha-dropout", "rrelu"],
)
def test_modes_of_other_ops(module: nn.Module) -> None:
    program = trace(module.eval(), torch.randn(3, 4))
    for training in (False, True, False):
        x = torch.randn(6, 4)
        before = {name: value.clone() for name, value in module.named_buffers()}
        torch.manual_seed(1)
        actual = program.train(training)(x)
        changed = {name: value.clone() for name, value in module.named_buffers()}
        with torch.no_grad():
            for name, value in module.named_buffers():  # the Program shares them
                value.copy_(before[name])
        torch.manual_seed(1)
        torch.testing.assert_close(actual, module.train(training)(x))
        for name, value in module.named_buffers():
            if "tracked" not in name:
                torch.testing.assert_close(changed[name], value)


def test_recurrent_dropout() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 6, 2, dropout=0.5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x)[0]

    module = Last().eval()
    program = trace(module, torch.randn(2, 5, 4))
    x = torch.randn(3, 5, 4)
    torch.testing.assert_close(program(x), module(x), rtol=0, atol=1e-6)
    program.train()
    assert not torch.equal(program(x), program(x))
    torch.testing.assert_close(program.eval()(x), module(x), rtol=0, atol=1e-6)


# ---- what can't be traced --------------------------------------------------------------------------------------------


def test_a_branch_on_values_names_the_line() -> None:
    def branches(self: Forward, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x + 1
        return x - 1

    with pytest.raises(TraceError) as caught:
        trace(Forward(branches), torch.randn(2, 4))
    message = str(caught.value)
    assert message.startswith("can't trace Forward: ")
    assert "test_trace_modules.py" in message and "if x.sum() > 0:" in message
    assert "try: the code branches on, or takes a size from, the values of a tensor" in message
    assert isinstance(caught.value, PrequantError)


@pytest.mark.parametrize(
    ("function", "fixed_to"),
    [
        (
            lambda self, x: x.view(3, 4) * 2,
            "axis 0 of 'x', the batch, has to be dynamic; the model's code fixes it to 3",
        ),
        (lambda self, x: x + torch.arange(3)[:, None], "the model's code fixes it to 3"),
        (lambda self, x: x.unflatten(0, (-1, 1)) if int(x.shape[0]) == 3 else x, "the model's code fixes it to 3"),
    ],
)
def test_a_fixed_batch_is_an_error(function: Any, fixed_to: str) -> None:
    with pytest.raises(TraceError, match=re.escape(fixed_to)):
        trace(Forward(function), torch.randn(3, 4))


def test_a_fixed_length_is_an_error_where_it_has_to_be_dynamic() -> None:
    module = Forward(lambda self, x: x + self.positions, positions=torch.randn(5))
    assert trace(module, torch.randn(3, 5)).signature.inputs[0].shape == ("batch", 5)
    axes = {"x": {0: "batch", 1: "length"}}
    with pytest.raises(
        TraceError, match="axis 1 of 'x', the length, has to be dynamic; the model's code fixes it to 5"
    ):
        trace(module, torch.randn(3, 5), dynamic_axes=axes)


def test_axes_that_are_forced_to_be_equal_are_an_error() -> None:
    module = Forward(lambda self, x: x + x.transpose(0, 1))
    axes = {"x": {0: "batch", 1: "length"}}
    with pytest.raises(TraceError, match="takes axis 1 of 'x', the length, to be as large as the batch"):
        trace(module, torch.randn(3, 3), dynamic_axes=axes)
    program = trace(module, torch.randn(3, 3), dynamic_axes={"x": {0: "size", 1: "size"}})
    x = torch.randn(6, 6)
    torch.testing.assert_close(program(x), x + x.t())


def test_writing_into_the_state_or_the_input_is_an_error() -> None:
    class Counter(nn.Module):
        count: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return x * self.count

    with pytest.raises(TraceError, match=r"it writes into the tensor 'count'[^\0]*self.count \+= 1"):
        trace(Counter(), torch.randn(2, 4))
    with pytest.raises(TraceError, match="it writes into its input 'x'"):
        trace(Forward(lambda self, x: x[:, :2].mul_(2)), torch.randn(2, 4))


def test_control_flow_with_graphs_of_its_own_is_an_error() -> None:
    def conditional(self: Forward, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))

    with pytest.raises(TraceError, match=r"has a cond node .*graphs of its own[^\0]*torch.where"):
        trace(Forward(conditional), torch.randn(2, 4))


class Odd:
    """No tensor and no container."""


@pytest.mark.parametrize(
    ("returned", "message"),
    [(lambda x: Odd(), "Odd"), (lambda x: {1: x, "a": Odd()}, "Odd")],
)
def test_outputs_that_are_no_tensors(returned: Any, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        trace(Forward(lambda self, x: returned(x)), torch.randn(2, 4))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"input_ids": [[1, 2]]}, "the example input 'input_ids' is a list\n  try: pass tensors"),
        ({"input_ids": torch.tensor([[1]]), "mask": torch.ones(1, 1)}, "it takes the input 'mask' and does not use it"),
        ({"attention_mask": True}, "the example inputs hold no tensor"),
        ({"input_ids": torch.ones(1, 0, dtype=torch.int64)}, "axis 1 of 'input_ids' is empty"),
        (
            {"input_ids": torch.ones(2, 3, dtype=torch.int64), "attention_mask": torch.ones(2, 4)},
            "the inputs disagree on the axis 'length': 3 in 'input_ids', 4 in 'attention_mask'",
        ),
        ({"input_ids": torch.tensor([[1]]), "use_cache": True}, "use_cache=True in the example inputs"),
        ({"token_type_ids": torch.tensor([[1, 0]])}, "BertModel: ValueError: You must specify exactly one of"),
    ],
)
def test_bad_examples(example: Any, message: str) -> None:
    model = small_model("Bert", "Model", num_hidden_layers=1)
    with pytest.raises(TraceError, match=re.escape(message)):
        trace(model, example)


def test_inputs_that_forward_does_not_take() -> None:
    with pytest.raises(
        TraceError, match="can't trace Nested: its forward has no input 'third'\n  try: those it has: first"
    ):
        trace(Nested(), {"first": torch.randn(2, 4), "third": torch.randn(2, 4)})
    with pytest.raises(TraceError, match="5 example inputs given; its forward takes 4 named inputs"):
        trace(Nested(), (torch.randn(2, 4),) * 5)
    with pytest.raises(TraceError, match="dynamic_axes names 'y', which is no tensor input"):
        trace(Nested(), (torch.randn(2, 4), torch.randn(2, 4)), dynamic_axes={"y": {0: "batch"}})
    with pytest.raises(TraceError, match="axis 2 of 'first' is to be dynamic, its shape is"):
        trace(Nested(), (torch.randn(2, 4), torch.randn(2, 4)), dynamic_axes={"first": {2: "batch"}})
    with pytest.raises(TraceError, match=r"Nested: TypeError: .*second"):
        trace(Nested(), (torch.randn(2, 4),))


def test_attention_that_there_is_not() -> None:
    model = FAMILIES["mpnet-encoder"]().model
    with pytest.raises(TraceError, match="can't trace MPNetModel: its attention can't be set to 'sdpa'"):
        trace(model, random_inputs(model, 1, 3), attn_implementation="sdpa")
    with pytest.raises(TraceError, match="attn_implementation is for transformers models"):
        trace(Nested(), (torch.randn(2, 4), torch.randn(2, 4)), attn_implementation="eager")
    model = small_model("Bert", "Model", num_hidden_layers=1)
    with pytest.raises(TraceError, match="attn_implementation='fast'"):
        trace(model, random_inputs(model, 1, 3), attn_implementation="fast")
    assert model.config._attn_implementation == "sdpa"
