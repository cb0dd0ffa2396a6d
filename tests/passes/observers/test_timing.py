import io
import threading
import time

import pytest
import torch
from rich.console import Console

from prequant.passes import Observer, PassError, Pipeline, Program, Report, Step, Timing

from ..support import tiny_mlp_program
from ..toys import Do, FailAt, Nothing

MEBIBYTE = 1 << 20


def spend(program: Program) -> None:
    block = torch.ones(200 * MEBIBYTE // 4)
    time.sleep(0.2)
    assert float(block[-1]) == 1.0


def test_seconds_and_memory_of_each_pass() -> None:
    timing = Timing()
    result = Pipeline([Nothing(), Do(spend), Nothing(2)])(tiny_mlp_program(), [timing])
    assert [step.pass_ for step in timing.steps] == ["nothing", "do{what=<spend>}", "nothing{count=2}"]
    quick, slow, last = timing.steps
    assert slow.seconds >= 0.2 > quick.seconds and timing.seconds == sum(step.seconds for step in timing.steps)
    assert [step.seconds for step in timing.steps] == [report.seconds for report in result.reports]
    assert 180 * MEBIBYTE < slow.growth < 400 * MEBIBYTE
    assert quick.growth < 50 * MEBIBYTE and last.growth < 50 * MEBIBYTE
    assert timing.growth >= slow.growth


def test_what_observers_spend_is_left_out() -> None:
    class Spends(Observer):
        def before(self, step: Step, program: Program) -> None:
            spend(program)

        def after(self, step: Step, program: Program, report: Report) -> None:
            spend(program)

    for order in ([Timing(), Spends()], [Spends(), Timing()]):
        timing = next(item for item in order if isinstance(item, Timing))
        Pipeline([Nothing()])(tiny_mlp_program(), order)
        assert timing.seconds < 0.2 and timing.growth < 50 * MEBIBYTE


def test_the_table_has_a_row_for_each_pass_and_a_total() -> None:
    timing = Timing()
    Pipeline([Nothing(), Do(spend)])(tiny_mlp_program(), [timing])
    console = Console(file=io.StringIO(), width=120)
    console.print(timing.table())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "do{what=<spend>}" in text and "peak growth (MiB)" in text
    total = next(line for line in text.splitlines() if "total" in line)
    assert f"{timing.seconds:.3f}" in total and f"{timing.growth / MEBIBYTE:.1f}" in total


def test_it_starts_anew_with_each_pipeline() -> None:
    timing = Timing()
    for _ in range(2):
        Pipeline([Nothing()])(tiny_mlp_program(), [timing])
    assert len(timing.steps) == 1


def test_a_failing_pass_leaves_no_thread_behind() -> None:
    with pytest.raises(PassError):
        Pipeline([FailAt()])(tiny_mlp_program(), [Timing()])
    assert not [thread for thread in threading.enumerate() if thread.name == "prequant-timing"]
