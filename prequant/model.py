"""ModelProgram: a Program that is called like the transformers model it came from."""

from __future__ import annotations

import copy
import importlib
import inspect
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from prequant.passes import ProgramInfo
from prequant.runtime import PrequantError, ops

from .depth import shallower
from .losses import LABELS, LOGITS, accepts_loss_kwargs, counts_items, loss_of, shift_right
from .trace_errors import trace_error
from .traced import TracedProgram

if TYPE_CHECKING:
    from .adapters import Adapter
    from .adapters.loaded import Adapters

CONFIG = "config"
MODEL_CLASS = "model_class"
OUTPUT_CLASS = "output_class"
TASK = "task"
MAIN_INPUT = "main_input_name"
ACCEPTS_LOSS_KWARGS = "accepts_loss_kwargs"
COUNTS_ITEMS = "counts_items"
LOSS_TYPE = "loss_type"
GENERATION_CONFIG = "generation_config"
"""Keys of a ModelProgram's ``info.extra``: a PretrainedConfig, import paths of the model's and its output's class (None
where it returns tuples), a task (see ``losses.py``; None for a model without a loss), a name, two booleans (see
``losses.py``), the model's own ``loss_type``, and its GenerationConfig if it has one."""

ITEMS = "num_items_in_batch"
DECODER_INPUT = "decoder_input_ids"


class ModelProgram(TracedProgram):
    """A traced transformers model: it takes and returns what the model does, in ``Trainer`` and ``pipeline``, too.

    Inputs may be left out where the model has a default for them: ``attention_mask`` (ones), ``token_type_ids``
    (zeros), and ``decoder_input_ids`` where ``labels`` are given. With ``labels`` (or ``start_positions`` and
    ``end_positions``) the loss that the model would compute comes first in the output. ``return_dict=False`` gives a
    tuple.
    """

    def __init__(
        self,
        root: nn.Module | dict[str, Any],
        graph: fx.Graph,
        info: ProgramInfo | None = None,
        class_name: str = "ModelProgram",
    ) -> None:
        super().__init__(root, graph, info, class_name)
        self._present()

    # ---- what it knows -----------------------------------------------------------------------------------------------

    @property
    def config(self) -> PretrainedConfig:
        """The model's configuration: a copy of its own, which the ``Trainer`` writes into."""
        return cast(PretrainedConfig, self.info.extra[CONFIG])

    def update_info(self, **changes: Any) -> None:
        """See :meth:`Program.update_info`. Raises :class:`PrequantError` for an output class that is none."""
        super().update_info(**changes)
        self._present()

    def set_depth(self, stack: str, depth: int, kept: Sequence[int]) -> None:
        """See :meth:`Program.set_depth`; the configuration is one of fewer layers from then on."""
        config = shallower(self.config, stack, depth, kept)
        self.update_info(extra={**self.info.extra, CONFIG: config})

    @property
    def task(self) -> str | None:
        """``sequence-classification``, ``causal-lm``, ...; None for a model without a head that has a loss."""
        return cast("str | None", self.info.extra[TASK])

    @property
    def main_input_name(self) -> str:
        """``input_ids``, for all language models."""
        return cast(str, self.info.extra[MAIN_INPUT])

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether a call takes ``num_items_in_batch``; the ``Trainer`` scales accumulated losses by it."""
        return cast(bool, self.info.extra[ACCEPTS_LOSS_KWARGS])

    @property
    def loss_type(self) -> str | None:
        """The model's, by which the ``Trainer`` knows whether the loss shifts labels, and so how many items it has."""
        return cast("str | None", self.info.extra[LOSS_TYPE])

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the targets that the loss takes; none for a model without a loss."""
        return LABELS[self.task] if self.task is not None else ()

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self._tensors(), torch.empty(0)).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the floating-point tensors (the first of them)."""
        return next((t.dtype for t in self._tensors() if t.is_floating_point()), torch.get_default_dtype())

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters: floats only, so not the packed codes."""
        excluded = _embedding_tensors(self.graph) if exclude_embeddings else set()
        return sum(
            p.numel()
            for name, p in self.named_parameters()
            if (p.requires_grad or not only_trainable) and name not in excluded
        )

    _output_type: type[ModelOutput] | None = None

    input_modalities = "text"
    base_model_prefix = ""
    """Asked for by pipelines when they describe themselves."""

    output_modalities = ("text",)

    # ---- generating --------------------------------------------------------------------------------------------------

    def can_generate(self) -> bool:
        """Whether the model is a decoder, or seq2seq model, with a language model's head."""
        from .generation import generates

        return generates(self)

    @property
    def generation_config(self) -> GenerationConfig | None:
        """What :meth:`generate` goes by where it is not told: a copy of the model's own. None if it can't generate."""
        config = self.info.extra.get(GENERATION_CONFIG)
        if config is None and self.can_generate():
            self.generation_config = config = GenerationConfig.from_model_config(self.config)
        return cast("GenerationConfig | None", config)

    @generation_config.setter
    def generation_config(self, config: GenerationConfig | None) -> None:
        self.update_info(extra={**self.info.extra, GENERATION_CONFIG: config})

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Like ``transformers.GenerationMixin.generate``: greedy, sampling, beams, left-padded batches, streamers.

        Runs :func:`prequant.generation.with_cache`, whose graphs are made at the first call, and for each adapter.
        """
        from .generation import with_cache

        adapters = self._adapters
        program = self if adapters is None else adapters.program(adapters.active)
        return cast(Any, with_cache(program)).generate(*args, **kwargs)

    # ---- adapters ----------------------------------------------------------------------------------------------------

    def load_adapter(self, name: str, source: str | os.PathLike[str] | Adapter) -> None:
        """Load the file of a task that was tuned on this Program (or what it holds), to be chosen by ``name``.

        It takes the memory of its own tensors; all others are this Program's. Raises
        :class:`~prequant.adapters.AdapterError` for a file that is no adapter, or was made on another base.
        """
        from .adapters.loaded import Adapters

        (self._adapters or Adapters(self)).load(name, source)

    def set_adapter(self, name: str | None) -> None:
        """Become this Program with a loaded adapter: its graph, configuration and labels, too; None: the base again.

        What is saved then, or rewritten by passes, is the Program as it is. Raises
        :class:`~prequant.adapters.AdapterError` for a name that is not loaded.
        """
        if (adapters := self._adapters) is not None:
            adapters.choose(self, name)
        elif name is not None:
            raise PrequantError(f"no adapter {name!r} is loaded; there are none")

    def delete_adapter(self, name: str) -> None:
        """Unload an adapter that is not in use."""
        if (adapters := self._adapters) is None:
            raise PrequantError(f"no adapter {name!r} is loaded; there are none")
        adapters.delete(name)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters."""
        return () if self._adapters is None else self._adapters.names

    @property
    def active_adapter(self) -> str | None:
        """The adapter in use; None for the base."""
        return None if self._adapters is None else self._adapters.active

    @property
    def _adapters(self) -> Adapters | None:
        return self.__dict__.get("_loaded_adapters")

    def _tensors(self) -> Any:
        yield from self.parameters()
        yield from self.buffers()

    # ---- calling -----------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call like the model. ``adapters``: one loaded adapter (or None, the base) for each row of the batch.

        With adapters of one head there is one result; where heads differ, there is one for each row, in a tuple. Raises
        ``TypeError`` for an input that the Program does not have, and one that is missing and has no default.
        """
        if (names := kwargs.pop("adapters", None)) is not None:
            return self._call_by_rows(names, args, kwargs)
        return self.call_with_exposed(*args, **kwargs)[0]

    def call_with_exposed(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        """What a call returns, and beside it the exposed values by name; see :class:`prequant.passes.ExposeOutputs`."""
        return_dict = kwargs.pop("return_dict", None)
        items = kwargs.pop(ITEMS, None) if self.accepts_loss_kwargs else None
        targets = {name: kwargs.pop(name) for name in self.labels if name in kwargs}
        targets = {name: value for name, value in targets.items() if value is not None}
        if "labels" in targets and DECODER_INPUT in self.signature.names and kwargs.get(DECODER_INPUT) is None:
            kwargs[DECODER_INPUT] = shift_right(targets["labels"], self.config)
        outputs, exposed = super().call_with_exposed(*args, **kwargs)
        if targets and len(targets) == len(self.labels):
            outputs = self._with_loss(outputs, targets, items)
        if return_dict is False and isinstance(outputs, ModelOutput):
            outputs = outputs.to_tuple()
        return outputs, exposed

    def _call_by_rows(self, names: Sequence[str | None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        from .adapters.rows import call_by_rows

        if self._adapters is None:
            raise PrequantError("adapters are named for the rows of a batch, and none is loaded")
        return call_by_rows(self._adapters, names, args, kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if self.adapters:
            raise PrequantError("a Program with adapters stays where it is: move it before loading them")
        from .generation import forget  # what it holds would keep the old tensors

        forget(self)
        return super()._apply(fn, recurse)

    def _with_loss(self, outputs: Any, targets: Mapping[str, Tensor], items: Any) -> Any:
        assert self.task is not None
        items = items if self.info.extra[COUNTS_ITEMS] else None
        if isinstance(outputs, ModelOutput):
            return type(outputs)(loss=loss_of(self.task, outputs, targets, self.config, items), **outputs)
        named = dict(zip(LOGITS[self.task], outputs, strict=False))
        return (loss_of(self.task, named, targets, self.config, items), *outputs)

    def default_input(self, name: str, given: Mapping[str, Any]) -> Tensor:
        """What the model takes for an input that is left out. Raises ``TypeError`` where it has no default."""
        if name in ("attention_mask", "token_type_ids"):
            like = given.get(self.main_input_name, given.get("inputs_embeds"))
        elif name == "decoder_attention_mask":
            like = given.get(DECODER_INPUT, given.get("decoder_inputs_embeds"))
        else:
            like = None
        if like is None:
            return super().default_input(name, given)
        dtype = next(item.dtype for item in self.signature.inputs if item.name == name)
        value = 0 if name == "token_type_ids" else 1
        return torch.full(like.shape[:2], value, dtype=dtype, device=like.device)

    def nest_outputs(self, flat: tuple[Any, ...]) -> Any:
        """The flat results as the model's own output class."""
        nested = super().nest_outputs(flat)
        return nested if self._output_type is None else self._output_type(**nested)

    # ---- being taken for a model -------------------------------------------------------------------------------------

    def recompile(self) -> Any:
        """Generate the code of the graph anew, behind a ``forward`` that stays the same function.

        ``accelerate`` wraps the ``forward`` that it finds for mixed precision; were that the generated code itself, it
        would go on running the mode (train or eval) of that moment.
        """
        code = super().recompile()
        kind = cast(Any, type(self))
        kind.generated_forward = kind.forward
        kind.forward = _forwarder(kind)
        self._present()
        return code

    def copy(self) -> ModelProgram:
        """See :meth:`Program.copy`."""
        copied = cast(ModelProgram, super().copy())
        copied._present()
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelProgram:
        """A Program over tensors of its own."""
        copied = cast(ModelProgram, super().__deepcopy__(memo))
        copied._present()
        return copied

    def _present(self) -> None:
        """Give the class of this object (``fx`` makes one for each) the model's class name and the signature of a call.

        The ``Trainer`` reads from them which columns and labels to hand over, ``pipeline`` which models a task goes
        with.
        """
        if "prequant" not in getattr(self, "meta", {}):
            return  # still being built
        kind = cast(Any, type(self))
        path = self.info.extra[OUTPUT_CLASS]
        kind._output_type = None if path is None else output_class(path)  # found now: compilers follow no imports
        kind.__name__ = self.info.extra[MODEL_CLASS].rpartition(".")[2]
        positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter("self", positional)]
        parameters += [inspect.Parameter(name, positional, annotation=Tensor) for name in self.signature.names]
        parameters += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in self.labels]
        kind.forward.__signature__ = inspect.Signature(parameters)


def _embedding_tensors(graph: fx.Graph) -> set[str]:
    """Names of the tensors that embedding tables are made of."""
    found: set[str] = set()
    for node in graph.nodes:
        if node.target is torch.ops.aten.embedding.default:
            operands = node.args[:1]
        elif node.target is ops.packed_embedding:
            operands = node.args[1:]
        else:
            continue
        pending = [operand for operand in operands if isinstance(operand, fx.Node)]
        while pending:
            operand = pending.pop()
            pending += operand.all_input_nodes
            if operand.op == "get_attr":
                found.add(str(operand.target))
    return found


def _forwarder(kind: Any) -> Any:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return kind.generated_forward(self, *args, **kwargs)

    return forward


def describe(model: PreTrainedModel, task: str | None, output_type: type | None) -> dict[str, Any]:
    """What a ModelProgram needs to know of its model, for ``info.extra``.

    Raises :class:`TraceError` for an output class that is not one of transformers' own.
    """
    if output_type is not None:
        try:
            output_class(_path(output_type))
        except PrequantError as error:
            advice = "return one of transformers' output classes, a tuple or a dict"
            raise trace_error(model, f"it returns a {_path(output_type)}", advice) from error
    return {
        CONFIG: copy.deepcopy(model.config),
        MODEL_CLASS: _path(type(model)),
        OUTPUT_CLASS: None if output_type is None else _path(output_type),
        TASK: task,
        MAIN_INPUT: model.main_input_name,
        ACCEPTS_LOSS_KWARGS: accepts_loss_kwargs(model),
        COUNTS_ITEMS: counts_items(model, task),
        LOSS_TYPE: getattr(model, "loss_type", None),
        GENERATION_CONFIG: copy.deepcopy(getattr(model, "generation_config", None)),
    }


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


@lru_cache(maxsize=64)
def output_class(path: str) -> type[ModelOutput]:
    """The class at an import path.

    Raises :class:`PrequantError` unless it is one of transformers' own ModelOutput classes: paths come from files, and
    importing what a file says would run it.
    """
    module, _, name = path.rpartition(".")
    found: Any = None
    if module.split(".")[0] == "transformers":
        try:
            found = getattr(importlib.import_module(module), name, None)
        except ImportError as error:
            raise PrequantError(f"output class {path!r}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, ModelOutput) and found is not ModelOutput):
        raise PrequantError(f"output class {path!r} is not one of transformers' ModelOutput classes")
    return found
