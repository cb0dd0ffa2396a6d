"""Where models come from: folders and hub names, as transformers models and as Programs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from prequant.checkpoint import load
from prequant.checkpoint.atomic import check_writable
from prequant.checkpoint.folder import CONFIG_FILE, GRAPH_FILE
from prequant.checkpoint.json_file import read_json
from prequant.losses import (
    CAUSAL_LM,
    QUESTION_ANSWERING,
    SEQ2SEQ_LM,
    SEQUENCE_CLASSIFICATION,
    TOKEN_CLASSIFICATION,
    task_of,
)
from prequant.model import MODEL_CLASS, ModelProgram
from prequant.passes import Canonicalize, Pipeline, Program
from prequant.quiet import no_load_report, no_progress_bars
from prequant.runtime import PrequantError
from prequant.runtime.metrics import all_finite
from prequant.tasks import Task
from prequant.trace import trace

EXAMPLE_TEXTS = ("one text", "and another one")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
TOKENIZER_FILES = ("tokenizer*", "vocab*", "spiece*", "*.model")
"""In a folder with a tokenizer there is at least one of these."""
AUTO_CLASSES: Mapping[str, Any] = {
    SEQUENCE_CLASSIFICATION: AutoModelForSequenceClassification,
    TOKEN_CLASSIFICATION: AutoModelForTokenClassification,
    QUESTION_ANSWERING: AutoModelForQuestionAnswering,
    CAUSAL_LM: AutoModelForCausalLM,
    SEQ2SEQ_LM: AutoModelForSeq2SeqLM,
}
"""What makes a model with a head for a kind of task."""
WRITERS = (CAUSAL_LM, SEQ2SEQ_LM)
"""Kinds of tasks whose head is the language model's own, and not new."""


class SourceError(PrequantError):
    """A model that is not there, can't be read, or is not what the job takes."""


def holds_program(source: str | Path) -> bool:
    """Whether ``source`` is a folder that prequant saved, compressed or not."""
    return (Path(source) / GRAPH_FILE).is_file()


def is_compressed(source: str | Path) -> bool:
    """Whether ``source`` is a folder that prequant saved of more than plain float weights, which transformers alone
    does not read. A student with fewer layers and nothing else is an ordinary model folder.

    Raises :class:`~prequant.checkpoint.CheckpointError` for one whose files don't belong together.
    """
    if not holds_program(source):
        return False
    if "quantization_config" in read_json(Path(source) / CONFIG_FILE):
        return True
    # Codes under a configuration that doesn't speak of them would leave a model whose weights are drawn at random.
    load(source)
    return False


def _is_folder(source: str | Path) -> bool:
    """Whether a source is a model folder; else it is a hub name. Raises :class:`SourceError` if it can be neither."""
    path, text = Path(source), str(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise SourceError(f"{text} has no config.json, so it is no model folder")
        return True
    if path.exists():
        raise SourceError(f"{text!r} is a file; a model is a folder or a hub name")
    # transformers would take a mistyped path for the name of a model on the hub, and complain about the network.
    if isinstance(source, Path) or not HUB_NAME.fullmatch(text):
        raise SourceError(f"the model folder {text!r} does not exist")
    return False


@contextmanager
def _reading(source: str | Path, what: str) -> Iterator[None]:
    """Around what transformers does with a source: its complaints become a :class:`SourceError` of one line."""
    local = _is_folder(source)
    try:
        # Reading a folder takes a moment; what comes from the hub may take long enough for a bar.
        with no_load_report(), no_progress_bars() if local else nullcontext():
            yield
    except PrequantError:
        raise
    except (
        Exception
    ) as error:  # OSError, ValueError, RuntimeError, safetensors' and tokenizers' own: by model and by file
        reason = " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__
        place = "" if local else " (no such folder here; taken for a name on the hub)"
        raise SourceError(f"{what} of {str(source)!r} can't be loaded{place}: {reason}") from error


def check_output(out: Path, *sources: str | Path) -> None:
    """Raise before any work if nothing could be saved to ``out``, or if it is one of the model folders that are read.

    Raises :class:`SourceError` or :class:`CheckpointError`.
    """
    for source in sources:
        if Path(source).is_dir() and out.exists() and out.samefile(source):
            raise SourceError(f"{out} is the model that is read: it would be lost; name another folder to write")
    check_writable(out)


def check_output_file(out: Path) -> None:
    """Raise :class:`SourceError` before any work if no file could be written to ``out``."""
    if out.is_dir():
        raise SourceError(f"{out} is a folder; name a file to write")
    nearest = next(path for path in out.absolute().parents if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise SourceError(f"{out} can't be written: {nearest} is no folder that can be written to")


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def find_tokenizer(source: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a folder or hub name, None if a folder has none; it pads with its end token if need be."""
    if _is_folder(source) and not any(list(Path(source).glob(pattern)) for pattern in TOKENIZER_FILES):
        return None
    with _reading(source, "the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name. Raises :class:`SourceError` if there is none, or one that can't pad."""
    tokenizer = find_tokenizer(source)
    if tokenizer is None:
        raise SourceError(f"{source} has no tokenizer, which it takes to read text")
    if tokenizer.pad_token is None:
        raise SourceError(
            f"the tokenizer of {str(source)!r} has neither a padding nor an end token, so it can't make batches"
        )
    return tokenizer


def check_length(config: PretrainedConfig, max_length: int) -> None:
    """Raise :class:`SourceError` if a model of that configuration has fewer positions than ``max_length``."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise SourceError(f"max_length={max_length}: the model has {positions} positions")


# ---- models ----------------------------------------------------------------------------------------------------------


def load_for(
    source: str | Path, task: Task, seed: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """A float32 model with a head for ``task``, and the names of the parameters that the source lacked: a new head,
    drawn from ``seed``.

    ``tokenizer``: whose padding a model without one of its own goes by. In eval mode. Raises :class:`SourceError`, also
    for a folder that prequant saved, unless its weights are plain floats, for a head of another task, and for weights
    that are not finite.
    """
    if is_compressed(source):
        raise SourceError(f"{source} is compressed already; give the float model, or use 'prequant opt' to rewrite it")
    with _reading(source, f"a model for {task.name}"):
        set_seed(seed)
        model, loading = AUTO_CLASSES[task.kind].from_pretrained(
            source,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # transformers' own error refers to a table that it logs
            **task.head_options(),
        )
    if others := sorted(loading["mismatched_keys"]):
        name, theirs, ours = others[0]
        raise SourceError(
            f"{source} does not fit {task.name}: its {name} is {list(theirs)} where {list(ours)} is needed; give a "
            "model with a head for the task, or one without a head"
        )
    check_weights(model, source)
    _pad_as(model, tokenizer)
    return model.eval(), tuple(sorted(loading["missing_keys"]))


def check_weights(model: PreTrainedModel, source: str | Path) -> None:
    """Raise :class:`SourceError` for a parameter that holds NaN or infinity, of which nothing can be learned."""
    for name, parameter in model.named_parameters():
        if not all_finite(parameter):
            bad = int((~torch.isfinite(parameter)).sum())
            raise SourceError(f"{source}: {bad} of the {parameter.numel()} numbers of {name} are NaN or infinite")


def _pad_as(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    if tokenizer is not None and model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def load_model(
    source: str | Path, dtype: torch.dtype | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> PreTrainedModel:
    """The model of a folder or hub name as the class that its config names, in eval mode.

    ``dtype``: the type of its weights; None takes the one that they are stored in. ``tokenizer``: whose padding a model
    without one of its own goes by. Raises SourceError.
    """
    with _reading(source, "the model"):
        config = AutoConfig.from_pretrained(source)
        for name in getattr(config, "architectures", None) or ():
            kind = getattr(transformers, name, None)
            if isinstance(kind, type) and issubclass(kind, PreTrainedModel):
                model = kind.from_pretrained(source, dtype=dtype or "auto").eval()
                _pad_as(model, tokenizer)
                return model
    raise SourceError(
        f"{source}: its config.json names no model class of transformers in 'architectures': {config.architectures}"
    )


def load_model_like(source: str | Path, program: Program) -> PreTrainedModel:
    """The float32 model ``source`` as the class that ``program`` was traced from, in eval mode. Raises
    :class:`SourceError`.
    """
    if is_compressed(source):
        raise SourceError(f"{source} is compressed; compare with the float model")
    name = str(program.info.extra.get(MODEL_CLASS, "")).rpartition(".")[2]
    kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise SourceError(
            f"the program was not traced from a model class of transformers, but from {name or 'another module'}"
        )
    with _reading(source, f"a {name}"):
        return kind.from_pretrained(source, dtype=torch.float32).eval()


def load_scored(
    source: str | Path, task: Task, adapter: Path | None = None
) -> tuple[PreTrainedModel | ModelProgram, PreTrainedTokenizerBase]:
    """A model with a head for ``task``, compressed or not, with an adapter if one is given, and its tokenizer.

    Raises :class:`SourceError` if the head is missing, and what :func:`with_adapter` does.
    """
    if not holds_program(source):
        if adapter is not None:
            raise SourceError(f"{source} is not compressed: it takes no adapter")
        tokenizer = load_tokenizer(source)
        model, fresh = load_for(source, task, 0, tokenizer)
        if fresh:
            raise SourceError(
                f"{source} has no head for {task.name}: {', '.join(fresh)} are missing; fine-tune it first"
            )
        return model, tokenizer
    program = with_adapter(load(source), source, adapter)
    if not isinstance(program, ModelProgram) or program.task != task.kind:
        raise SourceError(f"{source} has no head for {task.name}: it holds no model for {task.kind}")
    if misfit := task.misfit(program.config):
        raise SourceError(f"{source} does not serve {task.name}: {misfit}")
    return program, load_tokenizer(source)


def with_adapter(model: Any, source: str | Path, adapter: Path | None) -> Any:
    """A compressed model with the adapter of a file in use; as it is without one.

    Raises :class:`SourceError` for a model that is not compressed, and :class:`~prequant.adapters.AdapterError`.
    """
    if adapter is None:
        return model
    if not isinstance(model, ModelProgram):
        raise SourceError(f"{source} is no folder that prequant saved of a transformers model: it takes no adapter")
    model.load_adapter(adapter.stem, adapter)
    model.set_adapter(adapter.stem)
    return model


def head_of(model: PreTrainedModel, task: Task) -> tuple[str, ...]:
    """Names of the parameters that belong to ``task``; none where the language model's own head serves it."""
    return () if task.kind in WRITERS else head_parameters(model)


def head_parameters(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the parameters outside the base model: the task head. Raises :class:`SourceError` for a model without
    one.
    """
    prefix = model.base_model_prefix + "."
    names = [name for name, _ in model.named_parameters()]
    head = tuple(name for name in names if not name.startswith(prefix))
    if not head or len(head) == len(names):
        raise SourceError(f"{type(model).__name__} has no task head beside its base model {model.base_model_prefix!r}")
    return head


# ---- Programs --------------------------------------------------------------------------------------------------------


def example_inputs(
    model: PreTrainedModel | ModelProgram, tokenizer: PreTrainedTokenizerBase | None
) -> Mapping[str, Tensor]:
    """Inputs to trace a model with: two short texts, padded; made-up ids without a tokenizer that can pad."""
    if tokenizer is not None and tokenizer.pad_token is not None:
        inputs: dict[str, Any] = dict(tokenizer(list(EXAMPLE_TEXTS), return_tensors="pt", padding=True))
    else:
        ids = torch.arange(8).reshape(2, 4) % model.config.vocab_size
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    task = model.task if isinstance(model, ModelProgram) else task_of(model)
    if model.config.is_encoder_decoder and task != SEQUENCE_CLASSIFICATION:  # that one reads the same text once more
        inputs["decoder_input_ids"] = inputs["input_ids"].clone()
    return inputs


def example_inputs_of(program: Program, tokenizer: PreTrainedTokenizerBase | None) -> Mapping[str, Tensor]:
    """Inputs to call a Program with. Raises :class:`SourceError` for one that did not come from transformers."""
    if not isinstance(program, ModelProgram):
        raise SourceError("the program did not come from transformers: give it a sample batch in Python")
    return {
        name: value for name, value in example_inputs(program, tokenizer).items() if name in program.signature.names
    }


def canonical_program(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Program:
    """The model as a Program in canonical form, in eval mode."""
    return Pipeline([Canonicalize()])(trace(model.eval(), example_inputs(model, tokenizer)))


def load_program(source: str | Path, dtype: torch.dtype | None = None) -> Program:
    """A Program from whatever ``source`` is: a folder that prequant saved, a model folder, or a hub name.

    ``dtype``: as for :func:`load_model`. Raises :class:`SourceError`, also for another type than a folder was made in.
    """
    if holds_program(source):
        if dtype is not None:
            raise SourceError(f"{source} was made by prequant, and its type is settled; give the float model")
        return load(source)
    model = load_model(source, dtype)
    return trace(model, example_inputs(model, find_tokenizer(source)))
