"""The state in which a model is traced, and its own state restored afterwards, whatever happened."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from .trace_errors import trace_error

ATTENTION_ADVICE = "'eager' or 'sdpa'; a model that has one way only is traced without the argument"
_ABSENT = object()
_NORMS_WITH_STATISTICS = (nn.modules.batchnorm._NormBase,)


@contextmanager
def traceable(model: nn.Module, attn_implementation: str | None = None) -> Iterator[None]:
    """Within, ``model`` is in the state to be traced in; afterwards it is as it was.

    It is in train mode, so that every dropout is in its graph with its probability. What a graph can't hold is off:
    layer drop, key/value caches, gradient checkpointing. Norms that keep statistics are in eval mode, because they
    would write into their buffers. ``attn_implementation``: another attention for the time (``"eager"``).
    """
    with ExitStack() as undo:
        if attn_implementation is not None:
            _set_attention(model, attn_implementation, undo)
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        model.train()
        for module in model.modules():
            if isinstance(module, _NORMS_WITH_STATISTICS):
                module.training = False
            _switch_off(module, "layerdrop", 0.0, undo)
            _switch_off(module, "gradient_checkpointing", False, undo)
            _switch_off(getattr(module, "config", None), "use_cache", False, undo)
        yield


@contextmanager
def flat_forward(model: nn.Module, names: tuple[str, ...], constants: dict[str, Any]) -> Iterator[None]:
    """Within, ``model.forward`` takes the named tensors by position and nothing else; ``constants`` are bound.

    Constants that stayed arguments would become inputs of the graph, and arguments that ``forward`` takes as
    ``**kwargs`` need dynamic shapes in a nesting of their own.
    """
    original = model.forward

    def forward(*tensors: Tensor) -> Any:
        return original(**dict(zip(names, tensors, strict=True)), **constants)

    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with ExitStack() as undo:
        _assign(model, "forward", forward, undo)
        yield


def _switch_off(owner: Any, attribute: str, off: Any, undo: ExitStack) -> None:
    if getattr(owner, attribute, None):
        _assign(owner, attribute, off, undo)


def _assign(owner: Any, attribute: str, value: Any, undo: ExitStack) -> None:
    old = vars(owner).get(attribute, _ABSENT)
    restore: Callable[..., None] = delattr if old is _ABSENT else setattr
    undo.callback(restore, owner, attribute, *(() if old is _ABSENT else (old,)))
    setattr(owner, attribute, value)


def _set_attention(model: nn.Module, implementation: str, undo: ExitStack) -> None:
    if not isinstance(model, PreTrainedModel):
        raise trace_error(model, "attn_implementation is for transformers models", "leave it out")
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    for config in configs.values():
        undo.callback(setattr, config, "_attn_implementation_internal", config._attn_implementation_internal)
    try:
        model.set_attn_implementation(implementation)
    except (ValueError, ImportError) as error:
        raise trace_error(model, f"attn_implementation={implementation!r}: {error}", ATTENTION_ADVICE) from error
    if model.config._attn_implementation != implementation:
        raise trace_error(model, f"its attention can't be set to {implementation!r}", ATTENTION_ADVICE)
