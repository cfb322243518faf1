"""transformers with PEFT, stepped by hand over a KV cache: all streams of a run are one batch, each step is timed.

Nothing but the model's own work counts: no tokenizer, no sampling but argmax, no HTTP. The head is applied to the last
position alone, as ``generate`` does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from chunkwise.bench.runners.protocol import Json, RunResult, StartOrder, StreamOrder, StreamResult

_NO_ADAPTER = "__base__"


class Engine:
    """One model with all adapters loaded and none merged."""

    def __init__(self) -> None:
        self._model: Any = None
        self._adapters: list[str] = []

    def start(self, order: StartOrder) -> Json:
        """Loads the base, then every adapter."""
        torch.set_num_threads(order.threads)
        began = time.perf_counter()
        model: Any = AutoModelForCausalLM.from_pretrained(order.model, dtype=getattr(torch, order.dtype))
        self._adapters = list(order.adapters)
        for index, (name, path) in enumerate(order.adapters.items()):
            if index == 0:
                model = PeftModel.from_pretrained(model, path, adapter_name=name)
            else:
                model.load_adapter(path, adapter_name=name)
        self._model = model.eval()
        return {
            "versions": {name: version(name) for name in ("transformers", "peft", "torch")},
            "settings": {"threads": torch.get_num_threads(), "attention": model.config._attn_implementation},
            "start_seconds": round(time.perf_counter() - began, 1),
        }

    def run(self, streams: Sequence[StreamOrder]) -> RunResult:
        """One batch of prompts of equal length.

        Raises:
            ValueError: the prompts, answers or starting times differ.
        """
        if len({(len(s.ids), s.new_tokens, s.start_ms) for s in streams}) != 1:
            raise ValueError("streams of different lengths or starts; transformers has no continuous batching")
        extra, context = self._select([stream.adapter for stream in streams])
        with context:
            times, ids = self._generate([stream.ids for stream in streams], streams[0].new_tokens, extra)
        results = [StreamResult(times, answer) for answer in ids]
        return RunResult(results, [list(range(len(streams)))], {})

    def pids(self) -> list[int]:
        """This process."""
        return [os.getpid()]

    def stop(self) -> None:
        """Nothing is left to end."""

    def _select(self, adapters: Sequence[str | None]) -> tuple[Json, AbstractContextManager[None]]:
        """The cheapest way that PEFT has for these adapters: none, one for all, or a name for each row."""
        if not self._adapters:
            return {}, nullcontext()
        if len(set(adapters)) > 1:
            return {"adapter_names": [name or _NO_ADAPTER for name in adapters]}, nullcontext()
        if adapters[0] is None:
            return {}, self._model.disable_adapter()
        self._model.set_adapter(adapters[0])
        return {}, nullcontext()

    @torch.inference_mode()
    def _generate(self, prompts: list[list[int]], new_tokens: int, extra: Json) -> tuple[list[float], list[list[int]]]:
        began, times, steps = time.perf_counter(), [], []
        output = self._model(torch.tensor(prompts), use_cache=True, logits_to_keep=1, **extra)
        for step in range(new_tokens):
            token = output.logits[:, -1:].argmax(-1)
            times.append(1000 * (time.perf_counter() - began))
            steps.append(token)
            if step + 1 < new_tokens:
                output = self._model(token, past_key_values=output.past_key_values, use_cache=True, **extra)
        return times, torch.cat(steps, 1).tolist()
