"""prequant in ``transformers.exporters``: a quantizer for its Dynamo exports, and a runner that runs them natively.

::

    from prequant.transformers_exporter import PrequantConfig, PrequantExporter, PrequantQuantizer

    PrequantExporter().export(model, inputs, PrequantConfig(dynamic=True, quantizer=PrequantQuantizer()))

An export is a folder with a ``torch.export`` archive in it. Exports of the format ``"prequant"``, which importing
prequant registers, run by a plan; :class:`PrequantQuantizer` goes with ``DynamoConfig``, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.fx import _pytree as fx_pytree
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree
from transformers.exporters import DynamoConfig, DynamoExporter, ExportFormat, ExportQuantizer, register_backend
from transformers.exporters.metadata import ExportMetadata
from transformers.exporters.runners.runner_dynamo import DynamoModelRunner

from prequant.passes import Input, Pipeline, Program, ProgramInfo, Signature, calibrate, lower
from prequant.passes.plan import is_lowered
from prequant.runtime import PrequantError, ops

FORMAT = "prequant"
DEFAULT_PIPELINE = "canonicalize,quantize-weights{bits=4,granularity=group,group_size=64}"


class PrequantQuantizer(ExportQuantizer):
    """Takes an export's graph through a pipeline of passes, given as text or as it is, and lowers it.

    Activations with static scales are calibrated on ``calibration_dataset``, or on the export's sample inputs. Other
    formats than Dynamo's and prequant's own have no form for its operators: ``prequant export`` writes ONNX.
    """

    quantizes_fx_graph = True
    supported_formats: tuple[Any, ...] = (ExportFormat.DYNAMO, FORMAT)
    required_packages = ("torch",)

    def __init__(
        self, pipeline: str | Pipeline = DEFAULT_PIPELINE, calibration_dataset: Iterable[dict[str, Any]] | None = None
    ) -> None:
        super().__init__(calibration_dataset)
        self.pipeline = Pipeline.parse(pipeline) if isinstance(pipeline, str) else pipeline

    def quantize(
        self, model: fx.GraphModule, sample_inputs: dict[str, Any], export_format: ExportFormat | str
    ) -> fx.GraphModule:
        """The exported graph after the passes, called as before. Raises :class:`PrequantError` as they do."""
        program = self.pipeline(program_of(model))
        if program.graph.find_nodes(op="call_function", target=ops.uncalibrated):
            batches = [named(model, program, sample) for sample in self.traced_calibration(sample_inputs)]
            program = calibrate(program, batches)
        program = lower(program)
        graph = fx.Graph()
        graph.output(graph.graph_copy(program.graph, {}))
        graph.set_codegen(model.graph._codegen)
        return fx.GraphModule(program, graph)


@dataclass
class PrequantConfig(DynamoConfig):
    """As ``DynamoConfig``; without a quantizer, weights have 4 bits, a scale for 64 of them."""

    export_format: ExportFormat | str = FORMAT  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.quantizer is None:
            self.quantizer = PrequantQuantizer()


class PrequantExporter(DynamoExporter):
    """As ``DynamoExporter``; what it exports runs by a plan."""

    export_format: ExportFormat | str = FORMAT
    config_class = PrequantConfig


class PrequantRunner(DynamoModelRunner):
    """Runs an export as a Program: by its plan on a CPU, by its graph elsewhere."""

    def __init__(self, module: fx.GraphModule, metadata: ExportMetadata) -> None:
        super().__init__(module, metadata)
        self._graph_module = module
        self.program = program_of(module)
        self.program.planned = is_lowered(self.program)

    @classmethod
    def from_program(cls, program: ExportedProgram, metadata: ExportMetadata, device: Any = None) -> PrequantRunner:
        """A runner on a device."""
        module: Any = program.module()
        return cls(module if device is None else module.to(device), metadata)

    def __call__(self, share_inputs: bool = True, share_outputs: bool = False, **kwargs: Any) -> Any:
        """Call with the model's arguments; returns what it does. Raises ``TypeError`` for one that is missing."""
        given = {**self.metadata.in_constants, **kwargs}
        if missing := [name for name in self.traced_kwarg_order if name not in given]:
            raise TypeError(f"input {missing[0]!r} is missing; the export takes {', '.join(self.traced_kwarg_order)}")
        inputs = flat_inputs(self._graph_module, {name: given[name] for name in self.traced_kwarg_order})
        with torch.no_grad():
            return self.unflatten(list(self.program.flat_results(inputs)))


# ---- an exported module as a Program ---------------------------------------------------------------------------------


def program_of(module: fx.GraphModule) -> Program:
    """The graph of ``ExportedProgram.module()`` as a Program over the same tensors, with flat inputs and results.

    Raises :class:`PrequantError` for a graph that calls modules.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "call_module" and str(node.target) == "_guards_fn":
            continue  # compares its inputs' sizes with those of the trace: what follows does so again
        if node.op == "call_module":
            raise PrequantError(f"the exported graph calls a module, {node.target!r}; prequant takes one of operators")
        if node.op != "output":
            copies[node] = graph.node_copy(node, copies.__getitem__)
            continue
        results = [copies.get(leaf, leaf) for leaf in _pytree.tree_leaves(node.args[0])]
        graph.output(tuple(results))
    placeholders = graph.find_nodes(op="placeholder")
    inputs = tuple(_input(node) for node in placeholders)
    info = ProgramInfo(Signature(inputs, tuple(range(len(results)))))
    return Program(module, graph, info).eval()


def _input(node: fx.Node) -> Input:
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        raise PrequantError(f"the exported graph takes {node.name!r}, a {type(value).__name__}; prequant takes tensors")
    return Input(str(node.target), value.dtype, tuple(_size(size) for size in value.shape))


def _size(size: Any) -> int | str:
    return int(size) if isinstance(size, int) or size.node.expr.is_number else str(size.node.expr)


def flat_inputs(module: fx.GraphModule, kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    """The arguments of an exported module as its graph takes them."""
    codegen = module.graph._codegen
    assert isinstance(codegen, _PyTreeCodeGen)
    return tuple(fx_pytree.tree_flatten_spec(((), kwargs), codegen.pytree_info.in_spec))


def named(module: fx.GraphModule, program: Program, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """The same by the names of the Program's inputs."""
    return dict(zip(program.signature.names, flat_inputs(module, kwargs), strict=True))


register_backend(PrequantExporter, PrequantRunner)
