"""llama.cpp by its C interface (llama-cpp-python), so that no Python sampling or detokenisation counts.

A context has one set of adapters at a time. So the streams of a run are grouped by adapter; a group is one batch, and
the groups run one after another, which is the best that llama.cpp can do with them.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from chunkwise.bench.runners.protocol import Json, RunResult, StartOrder, StreamOrder, StreamResult

llama: Any = importlib.import_module("llama_cpp")

_MICRO_BATCH = 512


class Engine:
    """One context with all adapters loaded."""

    def __init__(self) -> None:
        self._model: Any = None
        self._context: Any = None
        self._adapters: dict[str, Any] = {}
        self._vocabulary = 0

    def start(self, order: StartOrder) -> Json:
        """Loads the GGUF files."""
        began = time.perf_counter()
        llama.llama_backend_init()
        parameters = llama.llama_model_default_params()
        self._model = llama.llama_model_load_from_file(order.model.encode(), parameters)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {order.model}")
        self._context = llama.llama_init_from_model(self._model, self._context_parameters(order))
        if not self._context:
            raise RuntimeError("llama.cpp cannot make a context")
        for name, path in order.adapters.items():
            self._adapters[name] = llama.llama_adapter_lora_init(self._model, path.encode())
            if not self._adapters[name]:
                raise RuntimeError(f"llama.cpp cannot load the adapter {path}")
        self._vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        return {
            "versions": {"llama-cpp-python": llama.__version__},
            "settings": {"threads": order.threads, "system": llama.llama_print_system_info().decode().strip(" |")},
            "start_seconds": round(time.perf_counter() - began, 1),
        }

    def run(self, streams: Sequence[StreamOrder]) -> RunResult:
        """One batch per adapter.

        Raises:
            ValueError: answers or starting times differ.
            RuntimeError: llama.cpp refuses a batch.
        """
        if len({(s.new_tokens, s.start_ms) for s in streams}) != 1:
            raise ValueError("streams of different lengths or starts; this runner has no continuous batching")
        by_adapter: dict[str | None, list[int]] = {}
        for index, stream in enumerate(streams):
            by_adapter.setdefault(stream.adapter, []).append(index)
        results: list[StreamResult | None] = [None] * len(streams)
        began = time.perf_counter()
        for adapter, group in by_adapter.items():
            self._apply(adapter)
            prompts = [streams[index].ids for index in group]
            times, answers = self._generate(prompts, streams[0].new_tokens, began)
            for index, answer in zip(group, answers, strict=True):
                results[index] = StreamResult(times, answer)
        return RunResult([r for r in results if r is not None], list(by_adapter.values()), {})

    def pids(self) -> list[int]:
        """This process."""
        return [os.getpid()]

    def stop(self) -> None:
        """Nothing outlives the process."""

    @staticmethod
    def _context_parameters(order: StartOrder) -> Any:
        parameters = llama.llama_context_default_params()
        parameters.n_ctx = order.streams * order.tokens
        parameters.n_batch = order.streams * order.tokens
        parameters.n_ubatch = _MICRO_BATCH
        parameters.n_seq_max = order.streams
        # Room for the logits of one token of each stream, not of a whole batch of prompts.
        parameters.n_outputs_max = order.streams
        parameters.n_threads = order.threads
        parameters.n_threads_batch = order.threads
        return parameters

    def _apply(self, name: str | None) -> None:
        if name is None:
            llama.llama_set_adapters_lora(self._context, None, 0, None)
            return
        adapters = (llama.llama_adapter_lora_p_ctypes * 1)(self._adapters[name])
        llama.llama_set_adapters_lora(self._context, adapters, 1, (ctypes.c_float * 1)(1.0))

    def _generate(self, prompts: list[list[int]], new_tokens: int, began: float) -> tuple[list[float], list[list[int]]]:
        """Milliseconds after ``began`` of every token, which the whole batch gets at once, and the answers."""
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        batch = llama.llama_batch_init(sum(map(len, prompts)), 0, 1)
        times: list[float] = []
        answers: list[list[int]] = [[] for _ in prompts]
        pieces, position = prompts, [0] * len(prompts)
        for _ in range(new_tokens):
            tokens = self._step(batch, pieces, position)
            times.append(1000 * (time.perf_counter() - began))
            position = [start + len(piece) for start, piece in zip(position, pieces, strict=True)]
            pieces = [[token] for token in tokens]
            for answer, token in zip(answers, tokens, strict=True):
                answer.append(token)
        llama.llama_batch_free(batch)
        return times, answers

    def _step(self, batch: Any, pieces: list[list[int]], position: list[int]) -> list[int]:
        """Feeds a piece of each sequence from its position on; the likeliest next token of each."""
        last, row = [], 0
        for sequence, piece in enumerate(pieces):
            for offset, token in enumerate(piece):
                batch.token[row] = token
                batch.pos[row] = position[sequence] + offset
                batch.n_seq_id[row] = 1
                batch.seq_id[row][0] = sequence
                batch.logits[row] = offset == len(piece) - 1
                row += 1
            last.append(row - 1)
        batch.n_tokens = row
        code = llama.llama_decode(self._context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode answered {code} for {row} tokens of {len(pieces)} sequences")
        return [self._likeliest(row) for row in last]

    def _likeliest(self, row: int) -> int:
        logits = llama.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())
