import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from prequant import passes as P
from prequant.passes import Pass, Pipeline, RegistryError, broken_passes, describe, find_pass, known_passes
from prequant.passes.registry import registry

from .support import tiny_mlp_program

MODULE = '''
from dataclasses import dataclass
from typing import ClassVar

from prequant.passes import Pass, Program, Report


@dataclass(frozen=True)
class {kind}(Pass):
    """Counts the nodes of the graph, and changes nothing."""

    name: ClassVar[str] = "{name}"
    start: int = 0
    """Where counting starts."""

    def run(self, program: Program) -> Report:
        report = self.report()
        report.totals["nodes"] = self.start + len(program.graph.nodes)
        return report
'''


Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs a distribution with entry points, and modules, for one test."""

    def install_(distribution: str, entries: dict[str, str], **modules: str) -> None:
        site = tmp_path / distribution
        info = site / f"{distribution}-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        lines = "\n".join(f"{name} = {target}" for name, target in entries.items())
        (info / "entry_points.txt").write_text(f"[prequant.passes]\n{lines}\n")
        for name, source in modules.items():
            (site / f"{name}.py").write_text(textwrap.dedent(source))
        monkeypatch.syspath_prepend(site)

    return install_


def test_every_exported_pass_is_known() -> None:
    exported = {
        kind.name for kind in vars(P).values() if isinstance(kind, type) and issubclass(kind, Pass) and kind.name
    }
    assert exported and set(known_passes()) == exported
    assert known_passes()["quantize-weights"] is P.QuantizeWeights
    assert not broken_passes()


def test_passes_have_a_name_and_one_line_that_reads_well() -> None:
    for name, kind in known_passes().items():
        description = describe(kind)
        assert description.name == name
        assert description.summary and "\n" not in description.summary and "  " not in description.summary


def test_an_unknown_pass_is_answered_with_near_misses() -> None:
    with pytest.raises(RegistryError, match=r"there is no pass 'quantise-weights'; did you mean quantize-weights"):
        find_pass("quantise-weights")


def test_a_pass_of_another_package(install: Install) -> None:
    install(
        "counting",
        {"count-nodes": "counting_passes:CountNodes"},
        counting_passes=MODULE.format(kind="CountNodes", name="count-nodes"),
    )
    assert registry().origins["count-nodes"] == "counting 1.2"
    assert registry().origins["quantize-weights"] == "prequant"
    assert list(known_passes())[-1] == "count-nodes"
    description = describe(find_pass("count-nodes"))
    assert description.summary == "Counts the nodes of the graph, and changes nothing."
    assert [(option.name, option.default, option.help) for option in description.options] == [
        ("start", 0, "Where counting starts.")
    ]
    program = tiny_mlp_program()
    pipeline = Pipeline.parse("quantize-weights,count-nodes{start=100}")
    assert str(pipeline) == "quantize-weights,count-nodes{start=100}"
    result = pipeline(program)
    assert result.reports[-1].totals["nodes"] == 100 + len(result.graph.nodes)


def test_a_broken_entry_point_names_its_distribution_and_hides_no_other(install: Install) -> None:
    install(
        "mixed",
        {
            "gone": "no_such_module:Gone",
            "fails": "failing_module:X",
            "fine": "fine_module:Fine",
            "wrong": "fine_module:dataclass",
        },
        failing_module="raise RuntimeError('no licence found')",
        fine_module=MODULE.format(kind="Fine", name="fine"),
    )
    assert "fine" in known_passes() and "quantize-weights" in known_passes()
    broken = broken_passes()
    assert set(broken) == {"gone", "fails", "wrong"}
    assert "'gone' (no_such_module:Gone) of mixed 1.2 can't be loaded: ModuleNotFoundError" in broken["gone"]
    assert "of mixed 1.2 can't be loaded: RuntimeError: no licence found" in broken["fails"]
    assert "of mixed 1.2 is <function dataclass" in broken["wrong"]
    with pytest.raises(RegistryError, match=r"pass 'fails' can't be used: .* mixed 1.2 .*no licence found"):
        find_pass("fails")
    assert Pipeline.parse("quantize-weights,fine").passes[1].name == "fine"


def test_a_pass_without_a_name(install: Install) -> None:
    install(
        "nameless", {"nameless": "nameless_module:Nameless"}, nameless_module=MODULE.format(kind="Nameless", name="")
    )
    assert "of nameless 1.2 has no name" in broken_passes()["nameless"]


def test_a_name_that_prequant_has_itself_stays_prequants(install: Install) -> None:
    install("greedy", {"freeze": "greedy_module:Mine"}, greedy_module=MODULE.format(kind="Mine", name="freeze"))
    assert known_passes()["freeze"] is P.Freeze is find_pass("freeze")
    assert broken_passes() == {"freeze": "both prequant and greedy 1.2 have a pass 'freeze'"}


def test_a_name_that_two_packages_have_is_nobodys(install: Install) -> None:
    install("first", {"twice": "first_module:A"}, first_module=MODULE.format(kind="A", name="twice"))
    install("second", {"twice": "second_module:B"}, second_module=MODULE.format(kind="B", name="twice"))
    assert "twice" not in known_passes()
    with pytest.raises(
        RegistryError, match=r"'twice' can't be used: both first 1.2 and second 1.2 have a pass 'twice'"
    ):
        find_pass("twice")


def test_one_class_under_two_names_is_one_pass(install: Install) -> None:
    entries = {"same": "same_module:Same", "same-again": "same_module:Same"}
    install("doubled", entries, same_module=MODULE.format(kind="Same", name="same"))
    assert "same" in known_passes() and not broken_passes()
