"""GenerativeProgram: what transformers' ``generate`` asks of a model, over graphs with a cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast, Seq2SeqLMOutput

from prequant.model import ModelProgram
from prequant.passes import Program
from prequant.passes.lifted import lifted

from .caches import QUANTIZED, QUANTIZED_BITS, STATIC, QuantizedCache, held_by, kind_of_cache, store
from .errors import GenerationError
from .graphs import Graphs, with_quantized_cache
from .static_cache import StaticCache, StaticDecoder

MODES = ("greedy_search", "sample", "beam_search", "beam_sample")
"""What needs no more than the logits of the last position."""
CACHE = "past_key_values"


class _Steps:
    """The graphs of a step, as functions of flat inputs, and the cache that they begin with."""

    def __init__(self, graphs: Graphs) -> None:
        self.graphs = graphs
        self.prefill, self.decode = lifted(graphs.prefill), lifted(graphs.decode)
        self._cached = [item for item in graphs.prefill.signature.inputs if item.name.startswith("past_")]

    def no_past(self, batch: int, device: torch.device) -> list[Tensor]:
        """What the cache holds before the first position."""
        sizes = [(batch, int(item.shape[1]), 0, int(item.shape[3])) for item in self._cached]
        return [
            torch.empty(size, dtype=item.dtype, device=device) for size, item in zip(sizes, self._cached, strict=True)
        ]


class GenerativeProgram(GenerationMixin, ABC):
    """A Program's graphs with a cache, and transformers' ``generate`` over them.

    ``graphs.prefill`` takes any number of new positions, ``graphs.decode`` one. Both compute on the tensors of the
    Program that they were made from, in eval mode. The cache is a ``DynamicCache`` of plain layers, also for a model
    with sliding windows, whose graph masks what is out of sight; with ``cache_implementation="quantized"`` it holds
    8-bit codes, and other graphs read and write those. With ``"static"`` it is a
    :class:`~prequant.generation.static_cache.StaticCache`, which decode steps write into.
    """

    main_input_name = "input_ids"
    input_modalities = "text"
    base_model_prefix = ""
    _is_stateful = False
    _supported_generation_modes = MODES

    def __init__(self, program: ModelProgram, graphs: Graphs) -> None:
        self.graphs = graphs
        self._steps = _Steps(graphs)
        self.config, self.generation_config = program.config, cast(GenerationConfig, program.generation_config)
        self.device, self.dtype = program.device, program.dtype

    @cached_property
    def _quantized_steps(self) -> _Steps:
        return _Steps(with_quantized_cache(self.graphs, QUANTIZED_BITS))

    def _steps_with(self, cache: Cache | None) -> _Steps:
        """The graphs that fill such a cache."""
        return self._quantized_steps if isinstance(cache, QuantizedCache) else self._steps

    @cached_property
    def static(self) -> StaticDecoder:
        """The decode graph over buffers of a fixed length. Raises :class:`PassError` where the graph has no such form,
        and :class:`GenerationError` where that computes something else.
        """
        from .check import check_static  # which runs what is made here

        decoder = StaticDecoder(self.graphs, self.device)
        check_static(self, decoder)
        return decoder

    # ---- what generate asks ------------------------------------------------------------------------------------------

    def can_generate(self) -> bool:
        """It does nothing else."""
        return True

    @classmethod
    def is_remote_code(cls) -> bool:
        """No code comes with a Program."""
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        """None: a graph has its experts fixed."""
        return {}

    def _prepare_cache_for_generation(  # type: ignore[override]  # what it returns is not used
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
        *_: Any,
    ) -> None:
        kind = kind_of_cache(generation_config)
        given = model_kwargs.get(CACHE)
        if given is not None:
            if kind in (QUANTIZED, STATIC):
                raise GenerationError(f"give {CACHE}, or cache_implementation={kind!r}, which makes one")
            given._is_user_defined = True
        elif generation_config.use_cache and kind == STATIC:
            batch = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            length = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
            compiling = generation_config.compile_config
            backend = None if compiling is None else compiling.backend
            model_kwargs[CACHE] = self.static_cache(batch, length, model_kwargs.get("encoder_outputs"), backend)
        elif generation_config.use_cache:
            model_kwargs[CACHE] = self._new_cache(kind == QUANTIZED)

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
        """Of a Program, what a static cache was made for is compiled, and not its call."""
        cache = model_kwargs.get(CACHE)
        cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        if isinstance(cache, StaticCache):
            return False
        return bool(super()._valid_auto_compile_criteria(model_kwargs, generation_config))  # type: ignore[misc]

    def static_cache(
        self,
        batch: int,
        length: int,
        encoder_outputs: BaseModelOutput | None = None,
        backend: str | None = None,
    ) -> Cache:
        """An empty cache of a fixed length, in positions, for so many texts (or beams).

        ``encoder_outputs`` are those of a seq2seq model. Steps go through ``torch.compile`` with ``backend``, if there
        is one; ``generate`` has it from ``compile_config``. Raises what :attr:`static` does.
        """
        return self.static.cache(batch, length, backend=backend)

    def _new_cache(self, quantized: bool = False) -> Cache:
        return QuantizedCache() if quantized else DynamicCache()

    # ---- running the graphs ------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One step, called like the model."""

    def _past(self, cache: Cache | None, batch: int) -> list[Tensor]:
        """What a cache holds, in the order of the graph's inputs. Raises :class:`GenerationError` for another cache."""
        if cache is not None and (held := held_by(cache)):
            return held
        return self._steps_with(cache).no_past(batch, self.device)

    def _attention_mask(self, mask: Tensor | None, batch: int, total: int) -> Tensor:
        if mask is None:
            return torch.ones((batch, total), dtype=torch.int64, device=self.device)
        if mask.shape != (batch, total):
            raise GenerationError(
                f"the attention mask is {list(mask.shape)}; with past and new positions it has to be {[batch, total]}"
            )
        return mask if mask.dtype is torch.int64 else mask.to(torch.int64)


class GenerativeDecoder(GenerativeProgram):
    """Of a decoder-only model."""

    def __init__(self, program: ModelProgram, graphs: Graphs) -> None:
        super().__init__(program, graphs)
        self._takes_positions = "position_ids" in graphs.prefill.signature.names

    def prepare_inputs_for_generation(  # type: ignore[override]  # names each input: generate refuses others
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool = True,
        is_first_iteration: bool = False,
        **others: Any,
    ) -> dict[str, Any]:
        """The inputs of one step: what is not in the cache yet. Raises :class:`GenerationError` for what the graphs
        can't return.
        """
        _refuse(others)
        if next_sequence_length is not None:
            input_ids = input_ids[:, -next_sequence_length:]
        if position_ids is not None:
            position_ids = position_ids[:, -input_ids.shape[1] :]
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        return _on(self.device, inputs) | {CACHE: past_key_values, "use_cache": use_cache}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = True,
        return_dict: bool = True,
    ) -> CausalLMOutputWithPast:
        """Logits ``[batch, 1, vocabulary]`` of the last position, and the cache, which is written into.

        ``attention_mask`` ``[batch, past + length]`` (ones by default); ``position_ids`` ``[batch, length]``, or one
        row for all (those that the mask leaves, by default).
        """
        batch, length = input_ids.shape
        past = self._past(past_key_values, batch)
        mask = self._attention_mask(attention_mask, batch, past[0].shape[2] + length)
        inputs = [input_ids, mask]
        if self._takes_positions:
            if position_ids is None:
                position_ids = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)[:, -length:]
            inputs.append(position_ids if position_ids.shape[0] == batch else position_ids.expand(batch, -1))
        if isinstance(past_key_values, StaticCache):
            past_key_values.check(batch, length)
            if length == 1:
                logits = past_key_values.step(inputs)
                return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
        steps = self._steps_with(past_key_values)
        logits, *present = (steps.decode if length == 1 else steps.prefill)(*inputs, *past)
        cache = self._new_cache() if past_key_values is None and use_cache else past_key_values
        if cache is not None:
            store(cache, present)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)


class GenerativeSeq2Seq(GenerativeProgram):
    """Of a model with an encoder, whose keys and values for the decoder are computed once."""

    def __init__(self, program: ModelProgram, graphs: Graphs) -> None:
        super().__init__(program, graphs)
        assert graphs.encoder is not None
        self.encoder = Encoder(graphs.encoder)

    def get_encoder(self, *_: Any, **__: Any) -> Encoder:
        """The encoder, which ``generate`` calls once."""
        return self.encoder

    def _new_cache(self, quantized: bool = False) -> Cache:
        new = super()._new_cache
        return EncoderDecoderCache(new(quantized), new(quantized))

    def static_cache(
        self,
        batch: int,
        length: int,
        encoder_outputs: BaseModelOutput | None = None,
        backend: str | None = None,
    ) -> Cache:
        """See :meth:`GenerativeProgram.static_cache`. What the encoder gives is kept as it comes, and copied once."""
        if encoder_outputs is None:
            raise GenerationError("a static cache of a seq2seq model is made for what its encoder returned")
        source = int(cast(Tensor, encoder_outputs[0]).shape[1])
        return EncoderDecoderCache(self.static.cache(batch, length, source, backend), DynamicCache())

    def prepare_inputs_for_generation(  # type: ignore[override]  # names each input: generate refuses others
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        use_cache: bool = True,
        is_first_iteration: bool = False,
        **others: Any,
    ) -> dict[str, Any]:
        """The inputs of one step: what is not in the cache yet. Raises :class:`GenerationError` for what the graphs
        can't return.
        """
        _refuse(others)
        if next_sequence_length is not None:
            input_ids = input_ids[:, -next_sequence_length:]
        inputs = {
            "decoder_input_ids": input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            "attention_mask": attention_mask,
        }
        rest = {"encoder_outputs": encoder_outputs, CACHE: past_key_values, "use_cache": use_cache}
        return _on(self.device, inputs) | rest

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = True,
        return_dict: bool = True,
    ) -> Seq2SeqLMOutput:
        """Logits ``[batch, length, vocabulary]`` of the new positions, and the cache, which is written into.

        ``attention_mask`` ``[batch, source]`` is the encoder's, ``decoder_attention_mask`` ``[batch, past + length]``
        the decoder's (both ones by default). ``encoder_outputs`` is made of ``input_ids`` where it is left out.
        """
        if decoder_input_ids is None or (encoder_outputs is None and input_ids is None):
            raise GenerationError("one step takes decoder_input_ids, and input_ids or encoder_outputs")
        cache = self._new_cache() if past_key_values is None and use_cache else past_key_values
        if cache is not None and not isinstance(cache, EncoderDecoderCache):
            raise GenerationError(f"a {type(cache).__name__} has no place for the encoder: give an EncoderDecoderCache")
        if encoder_outputs is None:
            encoder_outputs = self.encoder(cast(Tensor, input_ids), attention_mask)
        hidden = cast(Tensor, encoder_outputs[0])
        batch, length = decoder_input_ids.shape
        own: Cache | None = None if cache is None else cache.self_attention_cache
        past, steps = self._past(own, batch), self._steps_with(own)
        mask = self._attention_mask(decoder_attention_mask, batch, past[0].shape[2] + length)
        source_mask = self._attention_mask(attention_mask, batch, hidden.shape[1])
        cross = [] if cache is None else held_by(cache.cross_attention_cache)
        if isinstance(own, StaticCache):
            own.check(batch, length, hidden.shape[1])
        if isinstance(own, StaticCache) and length == 1 and cross:
            logits, present = own.step([decoder_input_ids, mask, source_mask], cross), []
        elif length == 1 and cross:
            logits, *present = steps.decode(decoder_input_ids, mask, source_mask, *past, *cross)
        else:
            logits, *present = steps.prefill(decoder_input_ids, mask, source_mask, hidden, *past)
        if cache is not None and present:
            store(cache.self_attention_cache, present[: len(past)])
            if not cross:
                store(cache.cross_attention_cache, present[len(past) :])
                cache.is_updated = dict.fromkeys(range(len(cache.cross_attention_cache.layers)), True)
        return Seq2SeqLMOutput(logits=logits, past_key_values=cache, encoder_last_hidden_state=hidden)


class Encoder:
    """An encoder's graph, called like the module."""

    main_input_name = "input_ids"

    def __init__(self, program: Program) -> None:
        self.program = program

    def __call__(self, *args: Any, **kwargs: Any) -> BaseModelOutput:
        return self.forward(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool = True,
    ) -> BaseModelOutput:
        """Hidden states ``[batch, source, size]``. Raises :class:`GenerationError` for what the graph can't return."""
        _refuse({"output_attentions": output_attentions, "output_hidden_states": output_hidden_states})
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return BaseModelOutput(last_hidden_state=self.program.forward(input_ids, mask)[0])


def _refuse(others: dict[str, Any]) -> None:
    if asked := [name for name, value in others.items() if value]:
        raise GenerationError(f"a Program can't generate with {asked[0]}: that is not in its graphs")


def _on(device: torch.device, inputs: dict[str, Tensor | None]) -> dict[str, Any]:
    return {
        name: value if value is None or value.device == device else value.to(device) for name, value in inputs.items()
    }
