import pytest
import torch

from prequant.passes import Canonicalize, Input, PassError
from prequant.passes.lifted import lifted
from prequant.passes.specialize import specialize
from prequant.trace import trace

from .support import embedding_inputs, mlp_inputs, tiny_embedding_program, tiny_mlp_program


class Positions(torch.nn.Module):
    """Adds every token's position, and the length, to its values [batch, length]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.arange(x.shape[1]) + x.shape[1]


def test_sizes_become_constants() -> None:
    program = Canonicalize()(trace(Positions(), {"x": torch.zeros(2, 5)}))
    name = str(program.signature.inputs[0].shape[1])
    one = specialize(program, {name: 1})
    x = torch.randn(4, 1)
    assert torch.equal(one(x), program(x)) and torch.equal(one(x), x + 1)
    assert not list(one.graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int))
    assert list(program.graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int)), "a copy was changed"
    assert one.signature.inputs == (Input("x", torch.float32, (program.signature.inputs[0].shape[0], 1)),)
    with pytest.raises(ValueError, match=r"the input 'x' has the shape \[4, 2\]; it takes \[.*, 1\]"):
        one(torch.zeros(4, 2))


def test_other_axes_stay_dynamic_and_tensors_shared() -> None:
    program = tiny_mlp_program()
    one = specialize(program, {"length": 1})
    for batch in (1, 4):
        torch.testing.assert_close(one(**mlp_inputs(batch, 1)), program(**mlp_inputs(batch, 1)), rtol=0, atol=0)
    assert one.tensor("first.weight") is program.tensor("first.weight")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"lenght": 1}, "no dynamic axis 'lenght'; it has batch, length"),
        ({"length": 0}, "'length' can't have the size 0"),
    ],
)
def test_what_is_no_axis_or_size_is_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(PassError, match=message):
        specialize(tiny_mlp_program(), sizes)


# ---- lifted ----------------------------------------------------------------------------------------------------------


def test_lifted_computes_the_same_over_the_same_tensors() -> None:
    program = tiny_embedding_program().train(False)
    function, ids = lifted(program), embedding_inputs()["input_ids"]
    assert torch.equal(function(ids)[0], program(ids)["logits"])
    before = function(ids)[0]
    with torch.no_grad():
        program.tensor("tokens.weight").mul_(2)
    after = function(ids)[0]
    assert torch.equal(after, program(ids)["logits"]) and not torch.equal(before, after)
    program.set_tensor("tokens.weight", torch.zeros(12, 8))
    assert torch.equal(function(ids)[0], after), "what replaces a tensor does not show"
    assert len(list(program.graph.find_nodes(op="placeholder"))) == 1, "the program stays as it is"
