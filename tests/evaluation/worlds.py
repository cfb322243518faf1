"""Evaluators on tiny models, and what every test of them needs."""

from __future__ import annotations

import torch

from chunkwise.config.policy import ChunkerPolicy, EstimatorPolicy, KvPolicy, RankPolicy, SteeringPolicy
from chunkwise.evaluation.driver import Evaluator, make_engine
from chunkwise.evaluation.modes import SteeringMode
from chunkwise.model.llama import Llama, target_slices
from chunkwise.model.parallel import SingleProcess
from chunkwise.tokenizer import Tokenizer
from chunkwise_adapters.format import load_adapter
from chunkwise_adapters.ladder import build_ladder
from chunkwise_adapters.store import AdapterStore
from conftest import TinyWorld

# Short chunks, wide ranks and early compression, so that short texts see all of them.
POLICY = SteeringPolicy(
    estimator=EstimatorPolicy(gain=6.0),
    chunker=ChunkerPolicy(min_length=3, max_length=8, threshold=0.05, smoothing_tokens=2.0),
    rank=RankPolicy(source="complexity", min_rank=1, crossfade=2),
    kv=KvPolicy(kind="int8", when="always", sink_tokens=4, recent_tokens=8, block_tokens=16),
)
ADAPTIVE = SteeringMode("adaptive", "a16", POLICY)
FULL = SteeringMode("full", "a16")


def evaluator(tiny: TinyWorld, batch_tokens: int = 2048, step_tokens: int = 64) -> Evaluator:
    """An evaluator over the tiny model with all its adapters."""
    cpu = torch.device("cpu")
    model = Llama(tiny.model, SingleProcess(), torch.float32, cpu, kernel_threads=1)
    store = AdapterStore(target_slices(model.spec, model.plan), torch.float32, cpu)
    for name, path in tiny.adapters.items():
        store.add(build_ladder(load_adapter(path, name, model.spec.target_shapes())))
    engine, decisions = make_engine(tiny.model, model, store, batch_tokens)
    return Evaluator(engine, decisions, Tokenizer(tiny.model), batch_tokens, step_tokens)
