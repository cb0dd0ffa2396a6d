"""Recorder: watches a pipeline and collects what there is to show of each of its stages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import networkx as nx
from torch import Tensor
from tqdm import tqdm

from prequant.inspection import other_bytes
from prequant.passes import Observer, Program, Report, Step, to_networkx, weights
from prequant.passes.weights import WeightView
from prequant.runtime.versions import version_of

from .changes import Changes, changes
from .measuring import Baseline, baseline, measure
from .record import NodeRecord, Record, Stage, TensorRecord, WeightRecord
from .weight_figures import weight_record

KINDS = {"placeholder": "input", "call_function": "op", "output": "output"}
NO_ORIGINAL = "The float weights that this was made of are not known, so errors of weights are not shown."
FEW_ERRORS = (
    "Errors of values are those of linears (without fused activations and sums) and embeddings, against the original."
)
NO_BATCH = "Nothing was measured on a batch: there are no errors of values and no times."
_T = TypeVar("_T")


class Recorder(Observer):
    """Collects a :class:`Record`: the Program that a pipeline is given is its first stage, what each pass makes of it
    the next.

    ``inputs``: a batch by input name, to measure errors and times of values on; without one there are none.
    ``original``: the float Program in canonical form that a compressed one was made of; else errors are measured
    against the Program given, as far as that is float. ``recorded``: errors of weights in dB as written down when it
    was saved. ``batch``: what the batch is, in words.
    """

    def __init__(
        self,
        title: str = "",
        inputs: Mapping[str, Tensor] | None = None,
        batch: str = "",
        original: Program | None = None,
        recorded: Mapping[str, float] | None = None,
        progress: bool = True,
    ) -> None:
        self.record = Record(title, batch=batch if inputs is not None else "")
        self.inputs, self.original, self.recorded = inputs, original, dict(recorded or {})
        self.progress = progress
        self._graph: nx.DiGraph = nx.DiGraph()
        self._baseline: Baseline | None = None
        self._origins: dict[str, str] = {}
        self._floats: dict[str, Tensor] = {}
        """Original weights by the name that they have now."""
        self._nodes: dict[NodeRecord, int] = {}
        self._place: dict[str, int] = {}
        self._weights: dict[tuple[Any, ...], int] = {}
        """Places of the weights of the last stage, by what their figures hang on."""
        self._held: list[Tensor] = []
        """Its tensors: while they are held, no other has the address of one."""

    # ---- watching ----------------------------------------------------------------------------------------------------

    def before(self, step: Step, program: Program) -> None:
        """Collect the Program that the pipeline was given."""
        if step.index == 0:
            self.start(program)

    def after(self, step: Step, program: Program, report: Report) -> None:
        """Collect what a pass made of it."""
        graph = to_networkx(program)
        difference = changes(self._graph, graph)
        self._floats = self._follow(graph, difference)
        self._origins = {
            name: self._origins[was] for name, was in difference.standing_for.items() if was in self._origins
        }
        removed = tuple(self._place[name] for name in difference.removed)
        rewritten = {name: self._place[difference.standing_for[name]] for name in difference.rewritten}
        self._add(
            program,
            graph,
            title=step.pass_.name,
            source=report.source,
            seconds=report.seconds,
            changed=len(report.changes),
            kept=len(report.kept),
            added=difference.added,
            removed=removed,
            rewritten=rewritten,
        )
        self.record.pipeline = ",".join(stage.source for stage in self.record.stages[1:])

    def start(self, program: Program) -> None:
        """Collect a Program as the first stage."""
        graph = to_networkx(program)
        compressed = any(view.tensors.keys() != {"dense"} for view in weights(program))
        if self.original is not None:
            self._floats = _originals(self.original, program)
        elif compressed and not self.recorded:
            self.record.notes.append(NO_ORIGINAL)
        if self.inputs is None:
            self.record.notes.append(NO_BATCH)
        else:
            self._measure_original(program, graph, compressed)
        self._add(program, graph, title="as saved" if compressed else "as traced", source="")
        first = self.record.stages[0]
        self.record.original_bytes = first.float_bytes if compressed else first.bytes

    def _measure_original(self, program: Program, graph: nx.DiGraph, compressed: bool) -> None:
        assert self.inputs is not None
        if self.original is not None:
            self._baseline = baseline(self.original, self.inputs)
            self._origins = _same_readers(to_networkx(self.original), graph)
            self.record.notes.append(FEW_ERRORS)
            return
        self._baseline = baseline(program, self.inputs)
        self._origins = {name: name for name in graph}
        if compressed:
            self.record.notes.append(
                "Errors of values are against the compressed model as it was saved: the float one is not known."
            )

    # ---- collecting --------------------------------------------------------------------------------------------------

    def _add(self, program: Program, graph: nx.DiGraph, title: str, **facts: Any) -> None:
        views = weights(program)
        for _, facts_of in graph.nodes(data=True):
            self.record.modules |= {path: kind for path, kind in facts_of["modules"] if path}
        uses: dict[str, list[str]] = {}
        for view in views:
            for consumer in view.consumers:
                uses.setdefault(consumer.name, []).append(view.name)
        self._place = {
            name: self._place_of(_node_record(graph, name, tuple(uses.get(name, ()))))
            for name, op in graph.nodes(data="op")
            if op != "get_attr"
        }
        self._graph = graph
        places = self._weight_places(self._shown(views, f"figures of weights, {title}"))
        if self._baseline is not None:
            measured = measure(program, self._baseline, self._origins)
            facts["times"] = {name: float(f"{seconds:.3g}") for name, seconds in measured.seconds.items()}
            if self.record.stages or self.original is not None:  # the first stage has nothing to differ from
                facts |= {"errors": _rounded(measured.errors), "results": _rounded(measured.results)}
        other = other_bytes(program)
        elements = sum(view.shape[0] * view.shape[1] for view in views)
        held = [self.record.weights[place] for place in places]
        total = sum(weight.bytes for weight in held)
        self.record.stages.append(
            Stage(
                title=title,
                bytes=total + other,
                float_bytes=sum(weight.float_bytes for weight in held) + other,
                mean_bits=8 * total / elements if elements else None,
                nodes=tuple(self._place.values()),
                weights=places,
                **{"source": "", "seconds": 0.0, "changed": 0, "kept": 0, **facts},
            )
        )

    def _place_of(self, node: NodeRecord) -> int:
        if node not in self._nodes:
            self._nodes[node] = len(self.record.nodes)
            self.record.nodes.append(node)
        return self._nodes[node]

    def _weight_places(self, views: Iterable[WeightView]) -> tuple[int, ...]:
        """Places of the figures of weights, computed anew where its tensors are other ones than in the last stage."""
        places: dict[tuple[Any, ...], int] = {}
        held: list[Tensor] = []
        for view in views:
            tensors = [view.program.tensor(name) for name in view.tensors.values()]
            facts = (view.name, view.format, view.input_format, view.kind, view.lowered, view.outliers_replace)
            key = (*facts, *((tensor.data_ptr(), version_of(tensor), tuple(tensor.shape)) for tensor in tensors))
            held += tensors
            if key in self._weights:
                places[key] = self._weights[key]
            else:
                places[key] = len(self.record.weights)
                self.record.weights.append(self._figures(view))
        self._weights, self._held = places, held
        return tuple(places.values())

    def _figures(self, view: WeightView) -> WeightRecord:
        if view.tensors.keys() == {"dense"} and view.name not in self._floats:
            self._floats[view.name] = view.value().detach()
        recorded = None if self.record.stages else self.recorded.get(view.name)
        return weight_record(view, self._floats.get(view.name), recorded)

    def _follow(self, graph: nx.DiGraph, difference: Changes) -> dict[str, Tensor]:
        """The originals by the names that weights have after a pass: other ones, where layers before were dropped."""
        followed: dict[str, Tensor] = {}
        for name, was in difference.standing_for.items():
            old, new = self._graph.nodes[was]["weight"], graph.nodes[name]["weight"]
            if old in self._floats and new is not None:
                followed.setdefault(new, self._floats[old])
        return followed

    def _shown(self, items: list[_T], what: str) -> Iterator[_T]:
        return iter(tqdm(items, desc=what, unit="weight", leave=False, disable=not self.progress))


def record_of(program: Program, recorder: Recorder | None = None) -> Record:
    """A Record of one stage: a Program as it is, without the way that it came."""
    recorder = recorder or Recorder(progress=False)
    recorder.start(program)
    return recorder.record


def _rounded(errors: Mapping[str, float]) -> dict[str, float]:
    """To what a page shows: a hundredth of a dB."""
    return {name: round(error, 2) for name, error in errors.items()}


def _node_record(graph: nx.DiGraph, name: str, uses: tuple[str, ...]) -> NodeRecord:
    facts = graph.nodes[name]
    sources = list(graph.predecessors(name))
    held = [graph.nodes[source] for source in sources if graph.nodes[source]["op"] == "get_attr"]
    return NodeRecord(
        name=name,
        kind=KINDS[facts["op"]],
        data=facts["data"],
        target=facts["target"].removeprefix("prequant."),
        text=facts["text"],
        module=facts["module"],
        shape=_shape(facts["shape"]),
        dtype=facts["dtype"] or "",
        inputs=tuple(source for source in sources if graph.nodes[source]["op"] != "get_attr"),
        tensors=tuple(
            TensorRecord(tensor["target"], _shape(tensor["shape"]), tensor["dtype"] or "", tensor["bytes"])
            for tensor in held
        ),
        uses=uses,
        makes=facts["weight"] if not uses else None,
    )


def _shape(shape: tuple[int | str, ...] | None) -> str:
    return "" if shape is None else " × ".join(map(str, shape)) or "scalar"


def _originals(original: Program, program: Program) -> dict[str, Tensor]:
    """Values of the original's weights by the names that they have in ``program``."""
    floats = {name: view for view in weights(original) for name in original.names_of(view.name)}
    found = {}
    for view in weights(program):
        same = next((floats[name] for name in program.names_of(view.name) if name in floats), None)
        if same is not None and same.shape == view.shape:
            found[view.name] = same.value().detach()
    return found


def _same_readers(original: nx.DiGraph, graph: nx.DiGraph) -> dict[str, str]:
    """Nodes that compute with a weight, and those of the original that compute with the weight of that name."""
    old, new = _readers(original), _readers(graph)
    return {
        now: was
        for weight in new.keys() & old.keys()
        if len(old[weight]) == len(new[weight])
        for now, was in zip(new[weight], old[weight], strict=True)
    }


def _readers(graph: nx.DiGraph) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, facts in graph.nodes(data=True):
        if facts["op"] == "call_function" and facts["weight"] is not None and facts["shape"] is not None:
            expression = all(graph.nodes[source]["op"] == "get_attr" for source in graph.predecessors(name))
            if not (expression or facts["fused"] or facts["target"] == "prequant.add_outliers"):
                found.setdefault(facts["weight"], []).append(name)
    return found
