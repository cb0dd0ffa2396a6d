"""When a Program runs by its plan, and what its calls are like."""

import gc
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from prequant.passes import Program
from prequant.passes.plan import runner
from prequant.passes.plan.compile import Draft, draft_plan

from .small import by_graph, inputs_of, planned

# ---- when


def test_calls_in_eval_mode_without_gradients(program: Program, calls: list[int]) -> None:
    assert planned(program, calls)
    x = inputs_of()
    with torch.inference_mode():
        program(**x)
    assert len(calls) == 2
    assert planned(program, calls)  # after memory was made in inference mode
    program(**x)  # records gradients
    assert len(calls) == 3
    program.requires_grad_(False)
    program(**x)
    assert len(calls) == 4


def test_programs_of_one_graph_share_the_draft_of_their_plans(
    program: Program, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    drafts: list[Program] = []

    def drafting(program: Program) -> Draft:
        drafts.append(program)
        return draft_plan(program)

    monkeypatch.setattr(runner, "draft_plan", drafting)
    monkeypatch.setattr(runner, "_DRAFTS", OrderedDict())
    other, third = program.copy(), program.copy()
    other.set_tensor("first.weight.scale", program.tensor("first.weight.scale").detach() * 2)
    assert planned(program, calls) and planned(other, calls) and planned(program, calls)
    assert len(drafts) == 1
    third.set_tensor("shift", torch.randn(1, 8))  # of another shape
    assert planned(third, calls) and len(drafts) == 2


def test_not_in_train_mode(program: Program, calls: list[int]) -> None:
    program.train()
    assert not planned(program, calls)
    program.eval()
    assert planned(program, calls)


def test_gradients_are_recorded_by_the_graph(program: Program, calls: list[int]) -> None:
    program(**inputs_of()).sum().backward()
    assert not calls
    assert program.get_parameter("norm.weight").grad is not None
    program.requires_grad_(False)
    inputs = inputs_of()
    inputs["x"].requires_grad_()
    program(**inputs).sum().backward()
    assert not calls
    assert inputs["x"].grad is not None


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class CountFunctions(torch.overrides.TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Count, CountFunctions])
def test_modes_see_the_ops(program: Program, calls: list[int], mode: Callable[[], Any]) -> None:
    assert planned(program, calls)
    with torch.no_grad(), mode() as seen:
        program(**inputs_of())
    assert len(calls) == 1
    assert any("packed_linear" in name for name in seen.names)


def test_hooks_are_called(program: Program, calls: list[int]) -> None:
    seen: list[str] = []
    for add in (program.register_forward_hook, program.register_forward_pre_hook):
        handle = add(lambda *_: seen.append("own"))
        assert not planned(program, calls)
        handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append("global"))
    try:
        assert not planned(program, calls)
    finally:
        handle.remove()
    assert seen == ["own", "own", "global"]
    assert planned(program, calls)


def test_a_forward_of_its_own_is_called(program: Program) -> None:
    program.forward = lambda *inputs: (torch.zeros(1),)
    with torch.no_grad():
        result = program(**inputs_of())
    assert (result[0] if isinstance(result, tuple) else result).sum() == 0


def test_autocast_and_vmap_and_tangents(program: Program, calls: list[int]) -> None:
    inputs = inputs_of()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        program(**inputs)
    with torch.no_grad():
        torch.func.vmap(lambda x: x * program(**inputs).sum())(torch.randn(3))
    with torch.no_grad(), forward_ad.dual_level():
        program(inputs["ids"], forward_ad.make_dual(inputs["x"], torch.ones_like(inputs["x"])))
    assert not calls


def test_other_inputs_go_by_the_graph(program: Program, calls: list[int]) -> None:
    inputs = inputs_of()
    assert not planned(program, calls, {**inputs, "ids": inputs["ids"].int()})
    assert not planned(program, calls, {**inputs, "x": nn.Parameter(inputs["x"])})
    subclass: Tensor = inputs["x"].as_subclass(type("Other", (Tensor,), {}))
    assert not planned(program, calls, {**inputs, "x": subclass})
    doubled = {**inputs, "x": inputs["x"].double()}
    with torch.no_grad(), pytest.raises(Exception, match=r".+") as by_plan:
        program(**doubled)
    with pytest.raises(type(by_plan.value)):
        by_graph(program, doubled)
    assert not calls


def test_inputs_may_lie_as_they_like(program: Program, calls: list[int]) -> None:
    inputs = inputs_of(3, 6)
    strange = {"ids": inputs["ids"].t().contiguous().t(), "x": torch.randn(8, 6, 3).permute(2, 1, 0)}
    assert planned(program, calls, strange)
    wide = torch.randn(3, 6, 16)
    assert planned(program, calls, {**inputs, "x": wide[..., 3:11]})
    assert planned(program, calls, {**inputs, "x": torch.randn(8).expand(3, 6, 8)})


def test_fake_and_meta_inputs(program: Program, calls: list[int]) -> None:
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        found = program(**{name: mode.from_tensor(value) for name, value in inputs_of().items()})
    assert found.shape == (2, 4, 8)
    assert not calls


def test_the_reference_is_no_plan(program: Program, calls: list[int], reference_kernels: None) -> None:
    assert not planned(program, calls)


def test_export_and_compile(program: Program, calls: list[int]) -> None:
    inputs = inputs_of()
    planned(program, calls, inputs)
    exported = torch.export.export(program, (), inputs, strict=False)
    assert len(calls) == 1
    assert "packed_linear" in exported.graph_module.code
    compiled = torch.compile(program, backend="eager")
    with torch.no_grad():
        found = compiled(**inputs)
    assert len(calls) == 2
    torch.testing.assert_close(found, by_graph(program, inputs), atol=1e-6, rtol=1e-5)


# ---- calls


def test_an_id_without_a_row_is_the_same_error(program: Program, calls: list[int]) -> None:
    inputs = inputs_of()
    inputs["ids"][1, 2] = 12
    with torch.no_grad(), pytest.raises(IndexError) as by_plan:
        program(**inputs)
    assert len(calls) == 1
    assert planned(program, calls)  # and the next call is as good as any
    program.planned = False
    with torch.no_grad(), pytest.raises(IndexError) as without:
        program(**inputs)
    assert str(by_plan.value) == str(without.value)


def test_several_threads_call_at_once(program: Program) -> None:
    inputs = [inputs_of(2, length) for length in (3, 40, 11, 25)]
    expected = [by_graph(program, item) for item in inputs]
    wrong: list[int] = []
    runners: list[Any] = []
    together = threading.Barrier(3)

    def work(number: int) -> None:
        together.wait()  # the first call makes the plan
        runners.append(program.runner)
        for turn in range(30):
            at = (number + turn) % len(inputs)
            with torch.no_grad():
                found = program(**inputs[at])
            if not torch.allclose(found, expected[at], atol=1e-5):
                wrong.append(at)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(runners) == 3
    assert len(set(runners)) == 1


class Rows(torch.utils.data.Dataset[Tensor]):
    """What a program gives, computed where the row is asked for."""

    def __init__(self, program: Program, inputs: dict[str, Tensor]) -> None:
        self.program, self.inputs = program, inputs

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            return self.program(**self.inputs)


def test_a_forked_worker_calls_after_its_parent(program: Program, calls: list[int]) -> None:
    inputs = inputs_of()
    torch.set_num_threads(2)
    assert planned(program, calls, inputs)
    loader = torch.utils.data.DataLoader(
        Rows(program, inputs), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60
    )
    expected = by_graph(program, inputs)
    for found in loader:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_calls_leave_no_memory_behind(program: Program) -> None:
    inputs = [inputs_of(8, length) for length in range(200, 232)]  # 0.5 MB for a result, and as much for each step
    with torch.no_grad():
        for item in inputs:
            program(**item)
        gc.collect()
        before = resident()
        for turn in range(100):
            program(**inputs[turn % len(inputs)])
    assert resident() - before < 8 << 20


def test_results_belong_to_the_caller(program: Program) -> None:
    first, second = inputs_of(), inputs_of()
    with torch.no_grad():
        result = program(**first)
        kept = result.clone()
        program(**second)
        assert torch.equal(result, kept)
        result.fill_(7)
        assert (program(**second) - by_graph(program, second)).abs().max() < 1e-5
