"""Programs cut into chains of modules, and what crosses a cut."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prequant.passes import (
    Input,
    PassError,
    Pipeline,
    Program,
    QuantizeActivations,
    QuantizeWeights,
    Train,
    calibrate,
    lower,
    partition,
    readable,
)
from prequant.runtime import Granularity
from prequant.trace import trace

from ..models import FAMILIES, traced
from .chains import (
    CUT,
    DEEP,
    F32,
    FOURS,
    SOME,
    T5,
    WEIGHTS_AND_INPUTS,
    assert_runs_as,
    assert_same,
    assert_same_tensors,
    blocks,
    canonical,
    deep,
    most,
    tower,
)
from .support import tiny_mlp_program

# ---- the chain is the whole ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CUT)
def test_the_chain_gives_what_the_whole_gives_and_joins_to_its_graph(name: str) -> None:
    program, make_inputs = canonical(name), FAMILIES[name]().make_inputs
    for modules in range(1, most(program) + 1):
        parts = partition(program, modules)
        assert len(parts) == modules and all(type(module).__mro__[1] is Program for module in parts.modules)
        assert_runs_as(parts, program, make_inputs)
        whole = parts.whole()
        assert readable(whole) == readable(program)
        assert_same_tensors(whole, program, shared=True)


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("modules", [3, 4])
def test_deeper_models_in_more_modules(name: str, modules: int) -> None:
    program, make_inputs = deep(name)
    for balance in ("parameters", "flops"):
        parts = partition(program, modules, balance=balance)
        assert_runs_as(parts, program, make_inputs)
        assert readable(parts.whole()) == readable(program)


@pytest.mark.parametrize("name", SOME)
def test_quantized_and_lowered_programs_are_cut_as_well(name: str) -> None:
    simulated, make_inputs = WEIGHTS_AND_INPUTS(canonical(name)), FAMILIES[name]().make_inputs
    for program in (simulated, lower(simulated)):
        parts = partition(program, most(program))
        assert_runs_as(parts, program, make_inputs)
        assert all(module.planned == program.planned for module in parts.modules)
        assert readable(parts.whole()) == readable(program)


def test_what_a_block_quantizes_for_all_is_no_border() -> None:
    program, make_inputs = canonical(T5), FAMILIES[T5]().make_inputs
    static = Pipeline([QuantizeWeights(bits=8), QuantizeActivations(dynamic=False, granularity=Granularity.TENSOR)])
    quantized = calibrate(static(program), [make_inputs(3, 9, padded=True)], progress=False)
    parts = partition(quantized, 4)
    assert [cut.border for cut in parts.cuts] == [cut.border for cut in partition(program, 4).cuts]
    assert_runs_as(parts, quantized, make_inputs)
    assert readable(parts.whole()) == readable(quantized)


def test_the_chain_drops_out_what_the_whole_drops_out() -> None:
    program, inputs = canonical(T5).copy().train(), FAMILIES[T5]().make_inputs(2, 7)
    parts, results = partition(program, 4), []
    for run in (program, parts, parts.whole()):
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(3)
            results.append(run(**inputs))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])
    assert parts.whole().training


def test_the_chain_is_called_like_the_model() -> None:
    program, inputs = canonical("bert-masked-lm"), FAMILIES["bert-masked-lm"]().make_inputs(2, 7)
    parts, labels = partition(program, 2), {"labels": inputs["input_ids"]}
    assert_same(parts(inputs["input_ids"]), program(inputs["input_ids"]))  # the mask is left out
    assert_same(parts(**inputs, **labels), program(**inputs, **labels))  # with the loss
    with pytest.raises(TypeError, match="unexpected input 'tokens'"):
        parts(tokens=inputs["input_ids"])


# ---- what a module is ------------------------------------------------------------------------------------------------


def test_what_crosses_is_in_the_signatures_and_passed_on() -> None:
    parts = partition(canonical(T5), boundaries=[1, 2, 3])
    hidden, decoded = (Input("hidden_states", F32, ("batch", axis, 32)) for axis in ("length", "decoder_length"))
    encoded = Input("dropout_7", F32, ("batch", "length", 32))
    bias = Input("unsqueeze_14", F32, (1, 4, "length", "length"))
    decoder_bias = Input("unsqueeze_41", F32, (1, 4, "decoder_length", "decoder_length"))
    crossing = [cut.crossing for cut in parts.cuts]
    assert crossing == [(hidden, bias), (decoded, encoded), (decoded, encoded, decoder_bias)]
    assert [(cut.border, cut.blocks) for cut in parts.cuts] == [("add_9", 1), ("dropout_8", 2), ("add_28", 3)]
    for module, following, cut in zip(parts.modules, parts.modules[1:], parts.cuts, strict=False):
        assert list(module.signature.outputs) == [item.name for item in cut.crossing]  # type: ignore[arg-type]
        assert following.signature.inputs[: len(cut.crossing)] == cut.crossing
    masks = [
        module.signature.names[len(crossed) :] for module, crossed in zip(parts.modules, [(), *crossing], strict=True)
    ]
    assert masks == [
        ("input_ids", "attention_mask"),
        ("attention_mask", "decoder_input_ids"),
        ("attention_mask",),
        ("attention_mask",),
    ]
    assert parts.modules[-1].signature.outputs == canonical(T5).signature.outputs


def test_masks_and_rotary_tables_are_computed_again_from_the_inputs() -> None:
    first, last = partition(canonical("llama-causal-lm"), 2).modules
    assert first.signature.names == ("input_ids", "attention_mask")
    assert last.signature.names == ("hidden_states", "attention_mask")
    assert "cos(" in readable(last) and "model.rotary_emb.inv_freq" in readable(last)


@pytest.mark.parametrize("name", CUT)
def test_a_module_holds_its_own_tensors_and_what_is_shared_is_told(name: str) -> None:
    program = canonical(name)
    parts = partition(program, most(program))
    held = [dict((*module.named_parameters(), *module.named_buffers())) for module in parts.modules]
    assert all(value is program.tensor(key) for tensors in held for key, value in tensors.items())
    assert parts.costs == tuple(sum(value.numel() for value in tensors.values()) for tensors in held)
    several = {key: tuple(n for n, tensors in enumerate(held) if key in tensors) for tensors in held for key in tensors}
    assert parts.shared == {key: numbers for key, numbers in several.items() if len(numbers) > 1}
    every = {*dict(program.named_parameters()), *dict(program.named_buffers())}
    assert set(several) == every
    again = sum(program.tensor(key).numel() * (len(numbers) - 1) for key, numbers in parts.shared.items())
    assert sum(parts.costs) == sum(program.tensor(key).numel() for key in every) + again


def test_a_tied_weight_is_in_both_modules_under_its_names() -> None:
    program = FOURS(canonical("bert-masked-lm"))
    parts, weight = partition(program, 2), "bert.embeddings.word_embeddings.weight"
    assert parts.shared == {f"{weight}.codes": (0, 1), f"{weight}.scale": (0, 1)}
    for module in parts.modules:
        assert module.names_of(weight) == program.names_of(weight) and len(module.names_of(weight)) > 1


def test_a_module_trains_by_itself() -> None:
    parts, inputs = partition(canonical("bert-encoder"), 2), FAMILIES["bert-encoder"]().make_inputs(2, 7)
    train = Pipeline([QuantizeWeights(bits=4, latent=True), Train(latents=True, scales=True)])
    student = parts.with_modules([train(module) for module in parts.modules])
    given = {"hidden_states": parts.modules[0](**inputs)["hidden_states"].detach()}
    given["attention_mask"] = inputs["attention_mask"]
    target = parts.modules[1](**given)["last_hidden_state"].detach()
    before = {name: value.clone() for module in student.modules for name, value in module.named_parameters()}
    optimizer = torch.optim.SGD([p for module in student.modules for p in module.parameters()], lr=0.01)
    ((student.modules[1](**given)["last_hidden_state"] - target) ** 2).mean().backward()
    optimizer.step()
    moved = {name for m in student.modules for name, p in m.named_parameters() if not torch.equal(p, before[name])}
    last = dict(student.modules[1].named_parameters())
    assert moved and moved <= {name for name in last if name.startswith("encoder.layer.1.")}
    whole = student.whole()
    assert all(torch.equal(whole.tensor(name), last[name]) and whole.tensor(name).requires_grad for name in moved)
    with torch.no_grad():
        assert_same(student(**inputs), whole(**inputs))


# ---- where it cuts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("boundaries", [[1, 4], ["layers.1", "layers.4"], [4, "layers.1"]])
def test_cuts_are_named_by_blocks(boundaries: list[int | str]) -> None:
    parts = partition(tower(), boundaries=boundaries)
    assert blocks(parts) == [1, 4]
    again = partition(tower(), boundaries=[cut.border for cut in parts.cuts])
    assert again.cuts == parts.cuts


def test_the_embeddings_and_the_head_can_be_modules_of_their_own() -> None:
    program, make_inputs = deep("bert")
    parts = partition(program, boundaries=[0, 5])
    assert_runs_as(parts, program, make_inputs)
    assert readable(parts.whole()) == readable(program)
    assert all(name.startswith("bert.encoder") for name, _ in parts.modules[1].named_parameters())


# ---- refusals --------------------------------------------------------------------------------------------------------


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x) + y, self.linear(y) * x


class Pairs(nn.Module):
    """Blocks that give two values each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Pair(), Pair()])

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        for layer in self.layers:
            x, y = layer(x, y)
        return x + y


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "say either into how many modules, or at which boundaries"),
        ({"modules": 2, "boundaries": [1]}, "say either into how many modules, or at which boundaries"),
        ({"modules": 6}, "6 modules of 5 blocks: each has one at least; choose 1 to 5"),
        ({"modules": 0}, "0 modules of 5 blocks"),
        ({"modules": 2, "balance": "bytes"}, "no balance 'bytes'; there are parameters and flops"),
        ({"modules": 2, "costs": [1.0]}, "1 costs given for 5 blocks"),
        ({"modules": 2, "balance": "flops", "sizes": {"length": 3}}, "no dynamic axis 'length'; it has rows"),
        ({"modules": 2, "balance": "flops", "sizes": {"rows": 0}}, "the axis 'rows' can't have the size 0"),
        ({"boundaries": [6]}, "no boundary 6; a boundary is a number of blocks from 0 to 5, or the path of a block"),
        ({"boundaries": ["layer.1"]}, "no boundary 'layer.1'.*layers.1"),
        ({"boundaries": [1, "layers.1"]}, "name one twice"),
    ],
)
def test_what_can_not_be_cut_so_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        partition(tower(), **options)


def test_programs_that_can_not_be_cut_are_refused() -> None:
    with pytest.raises(PassError, match="no blocks to cut between"):
        partition(tiny_mlp_program(), 2)
    pairs = trace(Pairs().eval(), {"x": torch.zeros(3, 4)})
    with pytest.raises(
        PassError, match=r"the 2 blocks 'layers' can't be parted: each gives the next more than one value"
    ):
        partition(pairs, 2)
    with pytest.raises(PassError, match="writes into some of its values: canonicalize"):
        partition(traced(T5), 2)
    with pytest.raises(PassError, match="2 modules of 1 blocks"):
        partition(canonical("bert-token-classification"), 2)


def test_modules_in_the_place_of_others_have_their_signatures() -> None:
    parts = partition(tower(), 2)
    with pytest.raises(PassError, match="1 modules given for a chain of 2"):
        parts.with_modules(parts.modules[:1])
    with pytest.raises(PassError, match="module 0 takes and returns something else"):
        parts.with_modules(parts.modules[::-1])
