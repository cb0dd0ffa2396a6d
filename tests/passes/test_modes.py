from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from prequant.passes import Program
from prequant.passes.modes import ATTENTION_DROPOUT, set_training
from prequant.trace import trace

from .support import mlp_inputs, tiny_mlp, tiny_mlp_program

aten = torch.ops.aten


class Calls(nn.Module):
    """A function of the input and of the mode."""

    def __init__(self, function: Callable[[Tensor, bool], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.training)


def calling(function: Callable[[Tensor, bool], Tensor], training: bool = False) -> Program:
    return trace(Calls(function).train(training), {"x": torch.ones(2, 3, 64)})


ONES = torch.ones(64, 30, 64)


@pytest.mark.parametrize("traced_in", [False, True])
def test_dropout(traced_in: bool) -> None:
    program = calling(lambda x, training: F.dropout(x, 0.25, training), traced_in)
    for _ in range(2):
        assert program.eval() is program and torch.equal(program(ONES), ONES)
        assert program.train() is program
        dropped = program(ONES)
        assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
        assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)


def test_attention_dropout_comes_back() -> None:
    program = calling(
        lambda x, training: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5 if training else 0.0), True
    )
    exact = F.scaled_dot_product_attention(ONES, ONES, ONES)
    for _ in range(2):
        program.eval()
        assert torch.allclose(program(ONES), exact)
        (node,) = program.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
        assert node.meta[ATTENTION_DROPOUT] == 0.5
        program.train()
        # Equal values: what is left of the weights, 30 of 1/30 each, counted twice over.
        kept = program(ONES) * 30 / 2
        assert torch.allclose(kept, kept.round(), atol=1e-4) and kept.unique().numel() > 5
        assert kept.mean().item() == pytest.approx(15, abs=0.5)


def test_attention_dropout_survives_a_copy_in_eval_mode() -> None:
    program = calling(lambda x, training: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5), True).eval()
    copied = program.copy().train()
    assert not torch.allclose(copied(ONES), program(ONES))
    assert torch.allclose(program(ONES), ONES)


def test_attention_without_dropout_has_none_in_training() -> None:
    program = calling(lambda x, training: F.scaled_dot_product_attention(x, x, x))
    before = program.code
    assert torch.allclose(program.train()(ONES), ONES) and program.code == before


@pytest.mark.parametrize(
    "function",
    [
        lambda x, training: F.feature_alpha_dropout(x, 0.5, training),
        lambda x, training: F.alpha_dropout(x, 0.5, training),
        lambda x, training: F.dropout1d(x, 0.5, training),
        lambda x, training: F.rrelu(-x, training=training),
    ],
)
@pytest.mark.parametrize("traced_in", [False, True])
def test_other_random_ops(function: Callable[[Tensor, bool], Tensor], traced_in: bool) -> None:
    program = calling(function, traced_in)
    assert torch.equal(program.eval()(ONES), function(ONES, False))
    assert torch.equal(program(ONES), program(ONES))
    program.train()
    first, second = program(ONES), program(ONES)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    expected = function(ONES, True)
    torch.manual_seed(1)
    assert torch.equal(program(ONES), expected)


def test_batch_norm_uses_the_batch_in_training() -> None:
    def graph_of(running: bool) -> fx.Graph:
        graph = fx.Graph()
        x, mean = graph.placeholder("x"), graph.placeholder("mean")
        stats = (mean, mean) if running else (None, None)
        norm = graph.call_function(aten.batch_norm.default, (x, None, None, *stats, False, 0.1, 1e-5, False))
        graph.output(norm)
        return graph

    tracked, untracked = graph_of(True), graph_of(False)
    assert set_training(tracked, True) and not set_training(tracked, True)
    (node,) = tracked.find_nodes(op="call_function", target=aten.batch_norm.default)
    assert node.args[5] is True
    # Without running statistics there are only those of the batch.
    assert not set_training(untracked, True)


def test_instance_norm_uses_running_statistics_in_eval_if_there_are_any() -> None:
    graph = fx.Graph()
    x, mean = graph.placeholder("x"), graph.placeholder("mean")
    with_stats = graph.call_function(aten.instance_norm.default, (x, None, None, mean, mean, True, 0.1, 1e-5, False))
    without = graph.call_function(aten.instance_norm.default, (x, None, None, None, None, True, 0.1, 1e-5, False))
    graph.output((with_stats, without))
    assert set_training(graph, False)
    assert with_stats.args[5] is False and without.args[5] is True


@pytest.mark.filterwarnings("ignore:The tensor attributes")  # torch's own, about exporting recurrent layers
def test_recurrent_layers_drop_between_their_layers() -> None:
    model = nn.GRU(8, 8, num_layers=2, dropout=0.5, batch_first=True).eval()
    x = mlp_inputs()["x"]
    program = trace(model, {"input": x})
    assert torch.allclose(program(x)[0], model(x)[0], atol=1e-6)
    assert not torch.allclose(program.train()(x)[0], model(x)[0], atol=1e-3)
    assert torch.allclose(program.eval()(x)[0], model(x)[0], atol=1e-6)


def test_a_flag_by_keyword() -> None:
    graph = fx.Graph()
    node = graph.call_function(aten.dropout.default, (graph.placeholder("x"),), {"p": 0.5, "train": False})
    graph.output(node)
    assert set_training(graph, True) and node.kwargs["train"] is True
    assert not set_training(graph, True)


def test_only_what_changes_is_compiled_anew() -> None:
    program = tiny_mlp_program()
    code = type(program).forward
    program.eval()
    assert type(program).forward is code
    program.train()
    assert type(program).forward is not code
    inputs = mlp_inputs(4, 30)
    assert not torch.equal(program(**inputs)["logits"], program(**inputs)["logits"])
    assert torch.allclose(program.eval()(**inputs)["logits"], tiny_mlp()(**inputs)["logits"], atol=1e-6)
