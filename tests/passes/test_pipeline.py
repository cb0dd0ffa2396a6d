from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from prequant.passes import (
    Freeze,
    Observer,
    Pass,
    PassError,
    Pipeline,
    Program,
    QuantizeWeights,
    Report,
    ScopeError,
    Step,
    readable,
)
from prequant.passes.pipeline import _attributed

from .support import mlp_inputs, tiny_mlp, tiny_mlp_program
from .toys import Do, FailAt, Nothing


def state(program: Program) -> tuple[str, dict[str, Any], tuple[Report, ...]]:
    """All of a Program that a pipeline must not touch."""
    tensors = {name: (value.clone(), value.requires_grad) for name, value in program.named_parameters()}
    return readable(program), tensors, program.reports


def assert_same_state(before: Any, program: Program) -> None:
    text, tensors, reports = state(program)
    assert text == before[0] and reports == before[2] and tensors.keys() == before[1].keys()
    for name, (value, requires_grad) in tensors.items():
        assert torch.equal(value, before[1][name][0]) and requires_grad == before[1][name][1]


# ---- forms


def test_text_both_ways() -> None:
    pipeline = Pipeline([QuantizeWeights(bits=3), Freeze()])
    assert str(pipeline) == "quantize-weights{bits=3},freeze"
    assert Pipeline.parse(str(pipeline)) == pipeline
    assert Pipeline.parse("") == Pipeline() and str(Pipeline()) == ""


def test_pipelines_add_up() -> None:
    first, second = Pipeline([QuantizeWeights(bits=3)]), Pipeline([Freeze()])
    assert first + second == Pipeline([QuantizeWeights(bits=3), Freeze()])
    with pytest.raises(TypeError):
        first + Freeze()  # type: ignore[operator]


def test_a_class_is_no_pass() -> None:
    with pytest.raises(PassError, match=r"made of passes, not .*Freeze.*; write Freeze\(\.\.\.\)"):
        Pipeline([Freeze])  # type: ignore[list-item]


# ---- running


def test_it_runs_the_passes_in_order_on_a_copy() -> None:
    model, program, order = tiny_mlp(), tiny_mlp_program(), []
    before = state(program)
    first, second = Do(lambda p: order.append("first")), Do(lambda p: order.append("second"))
    result = Pipeline([first, QuantizeWeights(bits=8), second])(program)
    assert order == ["first", "second"]
    assert_same_state(before, program)
    assert "dequantize" in readable(result) and result is not program
    torch.testing.assert_close(program(**mlp_inputs())["logits"], model(**mlp_inputs())["logits"])
    close = (result(**mlp_inputs())["logits"] - model(**mlp_inputs())["logits"]).abs().max()
    assert 0 < close < 0.05


def test_reports_tell_all_that_a_program_went_through() -> None:
    once = Pipeline([QuantizeWeights(bits=8, include=("first*",)), Nothing(3)])(tiny_mlp_program())
    assert [report.source for report in once.reports] == [
        "quantize-weights{bits=8,include=[first*]}",
        "nothing{count=3}",
    ]
    assert [change.what for change in once.reports[0].changes] == ["first.weight"]
    assert all(report.seconds > 0 for report in once.reports)
    twice = Pipeline([Freeze()])(once)
    assert [report.source for report in twice.reports][2:] == ["freeze"] and len(once.reports) == 2
    assert tiny_mlp_program().reports == ()


def test_a_pass_by_itself_is_a_pipeline_of_one() -> None:
    result = QuantizeWeights(bits=4)(tiny_mlp_program())
    assert len(result.reports) == 1 and "dequantize" in readable(result)


# ---- failing


def test_a_failing_pass_names_itself_its_options_and_the_weight() -> None:
    program = tiny_mlp_program()
    before = state(program)
    with pytest.raises(PassError) as caught:
        Pipeline([QuantizeWeights(include=("first*",)), FailAt(weight="second.weight", exclude=("first*",))])(program)
    assert str(caught.value) == ("pass 2 of 2, fail-at{exclude=[first*]}: RuntimeError: out of luck (at second.weight)")
    assert caught.value.node is not None and caught.value.node.name == "second.weight"  # type: ignore[union-attr]
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert_same_state(before, program)


def test_a_pass_that_fails_halfway_leaves_the_input_alone() -> None:
    program = tiny_mlp_program()
    before = state(program)
    with pytest.raises(PassError, match=r"at second\.weight"):
        FailAt()(program)
    assert_same_state(before, program)


def test_a_failure_says_its_node() -> None:
    def fail(program: Program) -> None:
        raise PassError("can't be", node=next(node for node in program.graph.nodes if node.name == "relu"))

    with pytest.raises(PassError, match=r"^pass 1 of 1, do\{what=<fail>\}: can't be \(at relu\)$"):
        Do(fail)(tiny_mlp_program())


def test_a_failure_after_the_weights_names_none() -> None:
    def fail(program: Program) -> None:
        list(QuantizeWeights().sites(program, Report("x")))
        raise KeyError("gone")

    with pytest.raises(PassError, match=r"KeyError: 'gone'$") as caught:
        Do(fail)(tiny_mlp_program())
    assert caught.value.node is None


def test_a_pattern_that_matches_nothing_comes_through() -> None:
    with pytest.raises(
        PassError, match=r"quantize-weights\{include=\[thrid\*\]\}: the pattern 'thrid\*' matches none"
    ) as caught:
        QuantizeWeights(include=("thrid*",))(tiny_mlp_program())
    assert isinstance(caught.value.__cause__, ScopeError)


def test_a_pass_that_returns_no_report() -> None:
    class Silent(Nothing):
        def run(self, program: Program) -> Report:
            return None  # type: ignore[return-value]

    with pytest.raises(PassError, match="its run returned None instead of a Report"):
        Silent()(tiny_mlp_program())


def test_a_graph_that_is_left_broken() -> None:
    def swap(program: Program) -> None:
        first, second = (node for node in program.graph.nodes if node.name in ("relu", "linear_1"))
        second.append(first)

    with pytest.raises(PassError, match=r"the graph it left: RuntimeError: .*relu"):
        Do(swap)(tiny_mlp_program())


def test_writing_into_a_shared_tensor_is_an_error() -> None:
    def write(program: Program) -> None:
        with torch.no_grad():
            program.tensor("first.weight").mul_(2)

    with pytest.raises(PassError, match=r"it wrote into 'first\.weight' in place"):
        Do(write)(tiny_mlp_program())
    with pytest.raises(PassError, match=r"it set requires_grad of 'first\.bias' in place"):
        Do(lambda program: program.tensor("first.bias").requires_grad_(False))(tiny_mlp_program())


# ---- requires and ensures


@dataclass(frozen=True)
class Lowered(Nothing):
    """Wants a Program without simulated weights."""

    name: ClassVar[str] = "wants-lowered"
    requires: ClassVar[tuple[str, ...]] = ("lowered",)


@dataclass(frozen=True)
class Promises(Do):
    """Promises what it may not keep."""

    name: ClassVar[str] = "promises"
    ensures: ClassVar[tuple[str, ...]] = ("no-orphans",)


def test_what_a_pass_requires_is_checked_before() -> None:
    Lowered()(tiny_mlp_program())
    with pytest.raises(
        PassError,
        match=r"its requirement 'lowered': does not hold before it: %dequantize\w* unpacks first\.weight\.codes",
    ):
        Pipeline([QuantizeWeights(), Lowered()])(tiny_mlp_program())


def test_what_a_pass_ensures_is_checked_after() -> None:
    Promises(lambda program: None)(tiny_mlp_program())
    with pytest.raises(PassError, match=r"its promise 'no-orphans': does not hold after it: no node reads 'spare'"):
        Promises(lambda program: program.set_tensor("spare", torch.zeros(1)))(tiny_mlp_program())


def test_a_requirement_says_which_pass_ensures_it() -> None:
    @dataclass(frozen=True)
    class WantsValid(Nothing):
        requires: ClassVar[tuple[str, ...]] = ("valid-formats",)

    def corrupt(program: Program) -> None:
        program.set_tensor("first.weight.scale", torch.ones(3, 1))

    with pytest.raises(PassError, match=r"scale of affine4:row should .*; run .*quantize-weights.* first"):
        Pipeline([QuantizeWeights(), Do(corrupt), WantsValid()])(tiny_mlp_program())


def test_an_unknown_property_is_an_error() -> None:
    @dataclass(frozen=True)
    class Odd(Nothing):
        requires: ClassVar[tuple[str, ...]] = ("canonicle",)

    with pytest.raises(PassError, match=r"there is no property 'canonicle'; did you mean canonical\?"):
        Odd()(tiny_mlp_program())


# ---- observers


class Log(Observer):
    def __init__(self, label: str, log: list[str]) -> None:
        self.label, self.log = label, log

    def before(self, step: Step, program: Program) -> None:
        self.log.append(f"{self.label} before {step.index} {step.pass_.name} {readable(program).count('dequantize<')}")

    def after(self, step: Step, program: Program, report: Report) -> None:
        self.log.append(
            f"{self.label} after {step.index} {len(report.changes)} {readable(program).count('dequantize<')}"
        )

    def failed(self, step: Step, program: Program, error: BaseException) -> None:
        self.log.append(f"{self.label} failed {step.index} {error}")


class Inner(Log):
    innermost = True


def test_observers_nest_around_each_pass_and_see_it_before_and_after() -> None:
    log: list[str] = []
    Pipeline([QuantizeWeights(), Nothing()])(tiny_mlp_program(), [Inner("in", log), Log("a", log), Log("b", log)])
    assert log == [
        "a before 0 quantize-weights 0",
        "b before 0 quantize-weights 0",
        "in before 0 quantize-weights 0",
        "in after 0 2 2",
        "b after 0 2 2",
        "a after 0 2 2",
        "a before 1 nothing 2",
        "b before 1 nothing 2",
        "in before 1 nothing 2",
        "in after 1 0 2",
        "b after 1 0 2",
        "a after 1 0 2",
    ]


def test_observers_hear_of_a_failure() -> None:
    log: list[str] = []
    with pytest.raises(PassError):
        FailAt()(tiny_mlp_program())
    with pytest.raises(PassError):
        Pipeline([FailAt(exclude=("first*",))])(tiny_mlp_program(), [Log("a", log), Log("b", log)])
    assert [entry.partition(" pass 1")[0] for entry in log[2:]] == ["b failed 0", "a failed 0"]
    assert "out of luck" in log[-1]


def test_a_failing_observer_names_itself_and_the_pass() -> None:
    class Picky(Observer):
        def after(self, step: Step, program: Program, report: Report) -> None:
            raise ZeroDivisionError("too small")

    with pytest.raises(PassError, match=r"^pass 1 of 1, nothing: Picky after it: ZeroDivisionError: too small$"):
        Pipeline([Nothing()])(tiny_mlp_program(), [Picky()])


def test_nothing_of_a_failure_stays_for_the_next() -> None:
    with pytest.raises(PassError):
        FailAt()(tiny_mlp_program())
    step = Step(Nothing(), 0, 1)
    with pytest.raises(PassError) as caught, _attributed(step):
        raise PassError("plain")
    assert caught.value.node is None


def test_step_reads_as_a_place() -> None:
    assert str(Step(QuantizeWeights(bits=2), 1, 3)) == "2 of 3, quantize-weights{bits=2}"
    assert isinstance(QuantizeWeights(), Pass)
