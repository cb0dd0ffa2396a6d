"""Program: the one type that travels between passes, training, lowering and files.

A Program is an ``fx.GraphModule`` over ATen and prequant ops. Its parameters and buffers keep the names they had in the
model, each has one ``get_attr`` node, and its ``forward`` takes flat tensors in the order of its signature. Calling the
Program takes what the model took and returns what the model returned.
"""

from __future__ import annotations

import functools
import threading
import types
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx, nn

from prequant.runtime import PrequantError

from .modes import set_training
from .nesting import OutputTree, nest
from .planned_call import enrol, planned_call

if TYPE_CHECKING:
    from torch.fx.graph import PythonCode

    from .plan.runner import PlanRunner
    from .reports import Report


@dataclass(frozen=True)
class Input:
    """One tensor input: its name, dtype, and shape, where a string names a dynamic axis (equal names, equal sizes)."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]

    def check(self, value: Tensor, sizes: dict[str, int]) -> None:
        """Raise :class:`PrequantError` if a value has another shape, ``TypeError`` if it is no tensor.

        ``sizes`` collects the sizes of the dynamic axes. The graph has its fixed sizes built in: some others would
        compute something else instead of failing.
        """
        if not isinstance(value, Tensor):
            raise TypeError(f"the input {self.name!r} is a {type(value).__name__}; it takes a tensor")
        shape = value.shape
        if len(shape) == len(self.shape):
            for wanted, size in zip(self.shape, shape, strict=True):
                if wanted != size and (isinstance(wanted, int) or sizes.setdefault(wanted, size) != size):
                    break
            else:
                return
        known = "".join(f", {name} = {size}" for name, size in sizes.items() if name in self.shape)
        wanted_shape = ", ".join(map(str, self.shape))
        raise PrequantError(f"the input {self.name!r} has the shape {list(shape)}; it takes [{wanted_shape}]{known}")


@dataclass(frozen=True)
class Signature:
    """How to call a Program: its inputs in order, and how its flat results are nested.

    ``exposed``: flat results beside these that :class:`prequant.passes.ExposeOutputs` added, by name.
    """

    inputs: tuple[Input, ...]
    outputs: OutputTree
    exposed: Mapping[str, int] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Input names in order."""
        return tuple(item.name for item in self.inputs)


@dataclass(frozen=True)
class ProgramInfo:
    """What a Program knows beside its graph; copied with it.

    ``aliases``: further names of a tied parameter, by its own name. ``extra`` belongs to the layers above (config,
    classes, ...). ``constants``: tensors that the model's own state dict does not hold (constants of its code, buffers
    that it does not save). ``transposed``: weights that are stored as ``[out, in]`` here and the other way round in the
    model.
    """

    signature: Signature
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    constants: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()


PLANNED, RUNNER = "planned", "_plan_runner"
"""The key in a Program's ``meta`` that says whether it is planned, and the attribute that keeps its plan."""


_planning = threading.RLock()


class Program(fx.GraphModule):
    """A traced model: graph, tensors under the model's own names, and how to call it (see the module's docstring)."""

    def __init__(
        self,
        root: nn.Module | dict[str, Any],
        graph: fx.Graph,
        info: ProgramInfo | None = None,
        class_name: str = "Program",
    ) -> None:
        super().__init__(root, graph, class_name)
        if info is not None:
            self.meta["prequant"] = info

    # ---- what it knows ----------------------------------------------------------------------------------------------

    @property
    def info(self) -> ProgramInfo:
        """Signature, aliases and whatever the layer above put there."""
        return cast(ProgramInfo, self.meta["prequant"])

    @property
    def signature(self) -> Signature:
        """Inputs and the nesting of outputs."""
        return self.info.signature

    @property
    def reports(self) -> tuple[Report, ...]:
        """What every pass that this Program has been through did, in order; pipelines append theirs."""
        return cast("tuple[Report, ...]", self.meta.get("reports", ()))

    @reports.setter
    def reports(self, reports: tuple[Report, ...]) -> None:
        self.meta["reports"] = tuple(reports)

    def update_info(self, **changes: Any) -> None:
        """Replace fields of :attr:`info`."""
        self.meta["prequant"] = replace(self.info, **changes)
        if "signature" in changes:
            self.drop_plan()

    def set_depth(self, stack: str, depth: int, kept: Sequence[int]) -> None:
        """Note that of ``depth`` blocks, whose modules are ``stack.0`` and so on, those numbered ``kept`` are left.

        A graph says so itself; a layer above may have a configuration that does.
        """

    def names_of(self, tensor_name: str) -> tuple[str, ...]:
        """A tensor's own name and its aliases (tied weights)."""
        return (tensor_name, *self.info.aliases.get(tensor_name, ()))

    # ---- calling ----------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call like the model: inputs by position or name; the result is nested like the model's."""
        return self.call_with_exposed(*args, **kwargs)[0]

    def call_with_exposed(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        """What a call returns, and beside it the exposed values by name."""
        flat = self.flat_results(self.bind(args, kwargs))
        return self.nest_outputs(flat), {name: flat[index] for name, index in self.signature.exposed.items()}

    def flat_results(self, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """The flat results for inputs that are bound: by the plan where there is one and it can."""
        if self.planned and not self.training:
            if torch.compiler.is_compiling():
                if self._is_called_by_plan(inputs):
                    return planned_call(self._key, inputs)
            elif (runner := self.runner) is not None and (plan := runner.plan(self, inputs)) is not None:
                return plan(*inputs)
        return cast("tuple[Any, ...]", fx.GraphModule._call_impl(self, *inputs))

    @staticmethod
    def _is_called_by_plan(inputs: tuple[Tensor, ...]) -> bool:
        """Whether a compiled call is left to the plan. Exported graphs keep theirs: there is no Program to call."""
        on_cpu = all(value.device.type == "cpu" for value in inputs)
        return on_cpu and not (torch.is_grad_enabled() or torch.compiler.is_exporting())

    @property
    def planned(self) -> bool:
        """Whether calls go by a plan where they can; see :class:`prequant.passes.Plan`."""
        return bool(self.meta.get(PLANNED, False))

    @planned.setter
    def planned(self, planned: bool) -> None:
        self.meta[PLANNED] = planned

    @property
    def runner(self) -> PlanRunner | None:
        """What runs the plan of the graph as it is now; None for a Program that is not planned."""
        if not self.planned:
            return None
        runner: PlanRunner | None = self.__dict__.get(RUNNER)
        if runner is None:
            from .plan.runner import PlanRunner  # plans are made by passes, which are made of Programs

            with _planning:  # one thread at a time: the others take what it made
                runner = self.__dict__.get(RUNNER) or PlanRunner(self)
                self.__dict__[RUNNER] = runner
        return runner

    def drop_plan(self) -> None:
        """Make the plan anew when it is next asked for."""
        self.__dict__.pop(RUNNER, None)

    def recompile(self) -> PythonCode:
        """Generate the code of the graph anew; the plan of another graph goes."""
        before = self.__dict__.get("_code")
        code = super().recompile()
        # Not fx's own, which explains errors in ways that a compiler trips over. torch.compile gives up on a code
        # object that it has compiled eight times: every Program has its own.
        kind, text = cast(Any, type(self)), str(self._code)
        kind.__call__ = _own_call(kind, self.written_class)
        kind._call_impl = kind.__call__  # by which a compiled function calls any fx module
        # The same text is the same function: a compiler knows both modes of a Program after it has seen each once.
        kind.forward = self.__dict__.setdefault("_forwards", {}).setdefault(text, kind.forward)
        self._key = enrol(self, self.__dict__.setdefault("_serial", uuid.uuid4()), text)
        if self._code != before:
            self.drop_plan()
        return code

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """Flat inputs in the order of the signature.

        Raises ``TypeError`` for one that is missing, unknown, given twice, or no tensor, and :class:`PrequantError` for
        a shape that the signature rules out.
        """
        names = self.signature.names
        if len(args) > len(names):
            raise TypeError(f"{len(args)} positional inputs given; this Program takes {len(names)}: {', '.join(names)}")
        given = dict(zip(names, args, strict=False))
        for name, value in kwargs.items():
            if name not in names:
                raise TypeError(f"unexpected input {name!r}; this Program was traced with {', '.join(names)}")
            if name in given:
                raise TypeError(f"input {name!r} given twice")
            given[name] = value
        flat = tuple(given[name] if given.get(name) is not None else self.default_input(name, given) for name in names)
        sizes: dict[str, int] = {}
        for item, value in zip(self.signature.inputs, flat, strict=True):
            item.check(value, sizes)
        return flat

    def default_input(self, name: str, given: Mapping[str, Any]) -> Tensor:
        """Value of an input the caller left out. A plain Program has none: raises ``TypeError``."""
        raise TypeError(f"input {name!r} is missing; this Program takes {', '.join(self.signature.names)}")

    def nest_outputs(self, flat: tuple[Any, ...]) -> Any:
        """The flat results in the model's nesting."""
        return nest(self.signature.outputs, flat)

    def train(self, mode: bool = True) -> Program:
        """Switch dropout (and attention's) on or off: the graph itself carries the mode."""
        if set_training(self.graph, mode):
            self.recompile()
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Program:
        """What ``to``, ``cuda``, ``half`` and the like call: the graph follows its tensors.

        With another floating-point type the graph computes in it (see :mod:`prequant.passes.dtypes`). Codes stay, and
        so do constants that the model's state dict does not hold. Raises :class:`PrequantError` for a type that no
        graph computes in.
        """
        from .moving import move  # which knows Programs

        move(self, fn, functools.partial(super()._apply, fn, recurse))
        return self

    # ---- tensors ----------------------------------------------------------------------------------------------------

    def tensor(self, name: str) -> Tensor:
        """The parameter or buffer of that name. Raises :class:`PrequantError` if there is none."""
        module, leaf = self._owner(name)
        value = getattr(module, leaf, None) if module is not None else None
        if not isinstance(value, Tensor):
            raise PrequantError(f"the Program has no tensor {name!r}")
        return value

    def set_tensor(self, name: str, value: Tensor, trainable: bool | None = None) -> None:
        """Create or replace the tensor ``name``. A new float becomes a parameter, everything else a buffer.

        A buffer stays one, unless it is to be trainable. ``trainable`` defaults to what the parameter of that name was,
        or True. Raises :class:`PrequantError` where something else has the name, or that of a module on its way.
        """
        module: nn.Module = self
        *path, leaf = name.split(".")
        for part in path:
            child = module._modules.get(part)
            if child is None:
                if hasattr(module, part):
                    raise PrequantError(f"can't create {name!r}: {part!r} on its way is not a module")
                child = nn.Module()
                module.add_module(part, child)
            module = child
        old = module._parameters.get(leaf)
        if old is None and leaf not in module._buffers and hasattr(module, leaf):
            raise PrequantError(f"can't create {name!r}: the Program has something else of that name")
        if value.is_floating_point() and (trainable or leaf not in module._buffers):
            wanted = trainable if trainable is not None else (old is None or old.requires_grad)
            module._buffers.pop(leaf, None)
            module._parameters[leaf] = nn.Parameter(value.detach(), requires_grad=wanted)
        else:
            module._parameters.pop(leaf, None)
            module.register_buffer(leaf, value.detach(), leaf not in module._non_persistent_buffers_set)

    def delete_tensor(self, name: str) -> None:
        """Remove a tensor, and the modules that it leaves empty. Raises :class:`PrequantError` if there is none."""
        self.tensor(name)
        self.drop_plan()
        trail: list[tuple[nn.Module, str]] = []
        module: nn.Module = self
        *path, leaf = name.split(".")
        for part in path:
            trail.append((module, part))
            module = module.get_submodule(part)
        delattr(module, leaf)
        for parent, part in reversed(trail):
            child = parent._modules[part]
            assert child is not None
            if child._modules or child._parameters or child._buffers:
                break
            del parent._modules[part]

    def _owner(self, name: str) -> tuple[nn.Module | None, str]:
        path, _, leaf = name.rpartition(".")
        try:
            return self.get_submodule(path), leaf
        except AttributeError:
            return None, leaf

    def prune(self) -> tuple[str, ...]:
        """Drop every tensor that no node reads, and the aliases of weights that are gone. Returns the names dropped."""
        read = {str(node.target) for node in self.graph.find_nodes(op="get_attr")}
        named = chain(self.named_parameters(remove_duplicate=False), self.named_buffers(remove_duplicate=False))
        dropped = tuple(name for name, _ in named if name not in read)
        for name in dropped:
            self.delete_tensor(name)
        # A compressed weight has no tensor of its own name any more, but parts below it.
        left = {
            weight: names
            for weight, names in self.info.aliases.items()
            if any(name == weight or name.startswith(f"{weight}.") for name in read)
        }
        self.update_info(aliases=left)
        return dropped

    @property
    def written_class(self) -> type[Program]:
        """The class to construct: every GraphModule has one of its own, for its generated code, below the written."""
        return next(kind for kind in type(self).__mro__ if not kind.__qualname__.endswith("GraphModuleImpl"))

    def copy(self) -> Program:
        """A Program with its own graph and module tree over the *same* tensors, without those that no node reads.

        What is rewritten in one stays as it was in the other; what is written into a tensor shows in both.
        """
        graph = fx.Graph()
        values: dict[fx.Node, fx.Node] = {}
        result = graph.graph_copy(self.graph, values)
        output = graph.output(result)
        output.meta = dict(self.graph.output_node().meta)
        copied = self.written_class(self, graph)
        copied.meta = dict(self.meta)
        return copied


def _own_call(kind: Any, written: type[Program]) -> Any:
    """The ``__call__`` of the class that is written, as a function of this class alone; always the same."""
    if "_call" not in vars(kind):
        kind._call = _with_own_code(written.__call__)
    return kind._call


def _with_own_code(function: Any) -> Any:
    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return functools.wraps(function)(own)


def attribute_node(program: Program, name: str, before: fx.Node) -> fx.Node:
    """The one ``get_attr`` node of a tensor; made before ``before`` if there is none, moved up if it comes later."""
    for node in program.graph.find_nodes(op="get_attr", target=name):
        if before < node:
            before.prepend(node)
        return node
    with program.graph.inserting_before(before):
        return program.graph.create_node("get_attr", name)
