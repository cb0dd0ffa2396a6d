"""Decoding in llama.cpp: the same random weights, written as GGUF in its own formats."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
from decode_contenders import Decoding, Source  # type: ignore[import-not-found]

LAYER_TENSORS = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
"""GPT-2's modules in a layer, and what llama.cpp calls them."""
OTHER_TENSORS = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}


class LlamaDecoder(Decoding):
    """llama.cpp through its C interface; each text of a batch is a sequence of its own. ``type`` is one of GGUF's."""

    library = "llama.cpp"

    def __init__(self, type: str, bits: int) -> None:
        super().__init__(f"llama.cpp {type}", bits)
        self.type = type

    def prepare(self, source: Source, folder: Path) -> None:
        import gguf

        model = source.model()
        config = model.config
        writer = gguf.GGUFWriter(folder / "model.gguf", "gpt2")
        writer.add_context_length(config.n_positions)
        writer.add_embedding_length(config.n_embd)
        writer.add_feed_forward_length(4 * config.n_embd)
        writer.add_block_count(config.n_layer)
        writer.add_head_count(config.n_head)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        writer.add_tokenizer_model("none")
        writer.add_vocab_size(config.vocab_size)
        kind = gguf.GGMLQuantizationType[self.type]
        for name, tensor in model.transformer.state_dict().items():
            *module, leaf = name.split(".")
            weight = tensor.float()
            if module[0] == "h":
                called = f"blk.{module[1]}.{LAYER_TENSORS['.'.join(module[2:])]}"
                weight = weight.T.contiguous() if weight.dim() == 2 else weight  # Conv1D keeps [in, out]
            else:
                called = OTHER_TENSORS[module[0]]
            matrix = weight.dim() == 2 and module[0] != "wpe"
            # What llama.cpp's own conversion leaves in float32 is so here.
            stored = kind if matrix else gguf.GGMLQuantizationType.F32
            values = gguf.quants.quantize(weight.numpy(), stored)
            writer.add_tensor(f"{called}.{leaf}", values, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def imports(self) -> None:
        """Also starts llama.cpp up, without its messages."""
        import llama_cpp

        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()

    def load(self, folder: Path, source: Source, threads: int) -> None:
        import llama_cpp

        self._api: Any = llama_cpp
        self._threads, self._source = threads, source
        path = str(folder / "model.gguf").encode()
        self._model = llama_cpp.llama_model_load_from_file(path, llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path.decode()}")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._context: Any = None
        self._batch: Any = None
        self.begin(source.batches[0])

    def begin(self, batch: int) -> None:
        if self._context is not None:
            self._api.llama_free(self._context)
            self._api.llama_batch_free(self._batch)
        parameters = self._api.llama_context_default_params()
        parameters.n_ctx = batch * (self._source.prompt + self._source.new)
        parameters.n_batch = parameters.n_ubatch = max(512, batch * self._source.prompt)
        parameters.n_seq_max = batch
        parameters.n_threads = parameters.n_threads_batch = self._threads
        self._context = self._api.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RuntimeError("llama.cpp makes no context")
        self._batch = self._api.llama_batch_init(parameters.n_batch, 0, 1)

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        self._position = 0
        return self._run(ids)

    def step(self, ids: np.ndarray) -> np.ndarray:
        return self._run(ids[:, None])

    def _run(self, ids: np.ndarray) -> np.ndarray:
        batch, (texts, length) = self._batch, ids.shape
        batch.n_tokens = texts * length
        for text in range(texts):
            for place in range(length):
                slot = text * length + place
                batch.token[slot] = int(ids[text, place])
                batch.pos[slot] = self._position + place
                batch.n_seq_id[slot] = 1
                batch.seq_id[slot][0] = text
                batch.logits[slot] = place == length - 1
        status = self._api.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        self._position += length
        rows = [self._api.llama_get_logits_ith(self._context, (text + 1) * length - 1) for text in range(texts)]
        return np.stack([np.ctypeslib.as_array(row, shape=(self._vocabulary,)) for row in rows])


def llama() -> list[Decoding]:
    """From wide to narrow."""
    return [LlamaDecoder("F32", 32), LlamaDecoder("BF16", 16), LlamaDecoder("Q8_0", 8), LlamaDecoder("Q4_0", 4)]
