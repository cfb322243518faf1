"""Gated LoRA in the CPU kernels against torch with the reference operator, over punica's popularity matrix."""

from __future__ import annotations

import dataclasses
import gc
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from chunkwise.core import ChunkDecision
from chunkwise.model.spec import ModelSpec
from chunkwise_adapters.format import LoraWeights, ModuleKey
from chunkwise_adapters.ladder import Allocation, build_ladder
from chunkwise_adapters.ops import reference
from chunkwise_adapters.store import AdapterStore, ResidentAdapter
from ragged import CPU, Line, Part, Rig, distance, random_lora, step_of, write_model

POPULARITY: dict[str, Sequence[float]] = {
    "uniform": (1, 1, 1, 1, 1),
    "zipf": (1, 1 / 2, 1 / 3, 1 / 4, 1 / 5),
    "identical": (1, 0, 0, 0, 0),
    "skewed": (20, 1, 1, 0, 0),
}
PHASES = {"prefill": [11, 5, 9], "decode": [1] * 9, "both": [1, 1, 1, 1, 7, 1, 12]}
CLOSE = 3e-5


def adapters_of(spec: ModelSpec, allocation: Allocation) -> list[ResidentAdapter]:
    """Ranks 64, 64, 32, 64 without v and up, and 64 in a single layer; the stored rank is no larger than a matrix."""
    some = {(i, t): 64 for i in range(spec.layers) for t in ("q_proj", "k_proj", "o_proj", "gate_proj", "down_proj")}
    last = {key: 64 for key in spec.target_shapes() if key[0] == spec.layers - 1}
    ranks: list[int | dict[ModuleKey, int]] = [64, 64, 32, some, last]
    store = AdapterStore(None, torch.float32, CPU)
    return [
        store.add(build_ladder(random_lora(spec, f"a{i}", rank, seed=i), allocation=allocation))
        for i, rank in enumerate(ranks)
    ]


def chunks_of(rank: str, rng: random.Random) -> list[ChunkDecision]:
    if rank != "mixed":
        return [ChunkDecision(1, 0, int(rank), rng.choice((1.0, 0.7)))]
    rungs = (0, 4, 8, 16, 32, None)
    return [
        ChunkDecision(1, start, rng.choice(rungs), rng.choice((1.0, 1.0, 0.7, 1.9)), rng.choice((0, 3)))
        for start in range(rng.randrange(2), 60, rng.choice((1, 4, 7)))
    ]


def parts_of(rig: Rig, adapters: Sequence[ResidentAdapter], popularity: str, rank: str, phase: str) -> list[Part]:
    """One step; some of its lines have no adapter. An adapter of rank 32 runs at 32 where 64 is asked for."""
    rng = random.Random(f"{popularity} {rank} {phase}")
    parts = []
    for i, tokens in enumerate(PHASES[phase]):
        distinct = popularity == "distinct"
        adapter = adapters[i % len(adapters)] if distinct else rng.choices(adapters, POPULARITY[popularity])[0]
        position = rng.randrange(40) if tokens == 1 else rng.choice((0, 10))
        asked = "32" if rank == "64" and adapter.trained_rank == 32 else rank
        line = rig.line(position + tokens, None if rng.random() < 0.15 else adapter, chunks_of(asked, rng))
        parts.append(Part(line, position, tokens))
    return parts


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), seed=3, attention_bias=True)


@pytest.fixture(scope="module")
def rigs(path: Path) -> list[Rig]:
    """Torch with the reference operator, kernels on one thread and on two; a test makes the same lines on all."""
    return [Rig(path, threads, pages=4096, lora=reference.gated_lora_) for threads in (None, 1, 2)]


@pytest.fixture
def rig(path: Path) -> Rig:
    """Kernels alone."""
    return Rig(path, 2)


@pytest.fixture(scope="module", params=["uniform", "global"])
def adapters(request: pytest.FixtureRequest, rigs: list[Rig]) -> list[ResidentAdapter]:
    return adapters_of(rigs[0].model.spec, request.param)


@pytest.mark.parametrize("rank", ["0", "4", "8", "16", "32", "64", "mixed"])
@pytest.mark.parametrize("popularity", ["distinct", *POPULARITY])
def test_equals_the_reference(rigs: list[Rig], adapters: list[ResidentAdapter], popularity: str, rank: str) -> None:
    for phase in PHASES:
        parts = [parts_of(rig, adapters, popularity, rank, phase) for rig in rigs]
        want, one, two = (rig.run(rig_parts) for rig, rig_parts in zip(rigs, parts, strict=True))
        assert distance(one.logits, want.logits) < CLOSE
        assert torch.equal(one.logits, two.logits)
        for rig_part, our_part in zip(parts[0], parts[1], strict=True):
            assert distance(rigs[1].kept(our_part.line), rigs[0].kept(rig_part.line)) < CLOSE


def test_the_adapters_matter(rig: Rig, adapters: list[ResidentAdapter]) -> None:
    """Else all of the above would pass without LoRA."""
    line = rig.line(20)
    plain = rig.run([Part(line, 0, 20)]).logits
    for adapter in adapters:
        for rung in (4, None):
            line.adapter, line.chunks = adapter, [ChunkDecision(1, 0, rung)]
            assert distance(rig.run([Part(line, 0, 20)]).logits, plain) > 20 * CLOSE


def test_rank_zero_and_scale_zero_are_the_base_to_the_bit(rig: Rig, adapters: list[ResidentAdapter]) -> None:
    line = rig.line(20)
    plain = rig.run([Part(line, 0, 20)]).logits
    line.adapter = adapters[0]
    for chunk in (ChunkDecision(1, 0, 0), ChunkDecision(1, 0, 8, scale=0.0)):
        line.chunks = [chunk]
        assert torch.equal(rig.run([Part(line, 0, 20)]).logits, plain)


def test_int8_base_matrices_with_adapters(path: Path) -> None:
    rigs = [Rig(path, threads, storage=torch.int8, pages=512) for threads in (None, 1, 2)]
    adapters = adapters_of(rigs[0].model.spec, "global")
    for phase in PHASES:
        want, one, two = (rig.run(parts_of(rig, adapters, "distinct", "mixed", phase)) for rig in rigs)
        assert distance(one.logits, want.logits) < 1e-3
        assert torch.equal(one.logits, two.logits)


def test_factors_beyond_the_widest_rung_needed_are_never_read(rig: Rig, adapters: list[ResidentAdapter]) -> None:
    """The unused rows are NaN: one read of them would spoil the output."""
    whole = adapters[0]
    at = whole.rung_index(8)
    modules = {}
    for key, module in whole.modules.items():
        a, b_t = module.a.clone(), module.b_t.clone()
        a[module.active_ranks[at] :], b_t[module.active_ranks[at] :] = float("nan"), float("nan")
        modules[key] = dataclasses.replace(module, a=a, b_t=b_t)
    poisoned = dataclasses.replace(whole, modules=modules)
    line = rig.line(30, None, [ChunkDecision(1, 0, 8), ChunkDecision(1, 9, 4, 0.7, 5), ChunkDecision(1, 20, 0, 1.0, 3)])
    outputs = []
    for adapter in (poisoned, whole):
        line.adapter = adapter
        outputs.append(rig.run([Part(line, 0, 30)]).logits)
    assert torch.equal(*outputs)


def test_adapters_of_different_ladders_in_one_step(rigs: list[Rig]) -> None:
    """Other numbers of rungs, ranks that are no power of two, a rank of 1."""
    spec = rigs[0].model.spec

    def make(rank: int, *rungs: int) -> ResidentAdapter:
        weights: LoraWeights = random_lora(spec, f"r{rank}", rank, seed=rank)
        return AdapterStore(None, torch.float32, CPU).add(build_ladder(weights, rungs or None, "global"))

    made = [make(1), make(3, 0, 1, 2), make(70), make(17, 5)]

    def parts(rig: Rig) -> list[Part]:
        lines = [rig.line(12, adapter) for adapter in (*made, *reversed(made))]
        lines[1].chunks = [ChunkDecision(1, 0, 2), ChunkDecision(1, 6, 1, crossfade=4)]
        lines[4].chunks = [ChunkDecision(1, 3, 5, crossfade=100)]
        return [Part(line, 11) for line in lines[:4]] + [Part(line, 0, 12) for line in lines[4:]]

    want, one, two = (rig.run(parts(rig)) for rig in rigs)
    assert distance(one.logits, want.logits) < CLOSE
    assert torch.equal(one.logits, two.logits)


def test_an_adapter_that_comes_where_another_was_is_not_taken_for_it(path: Path) -> None:
    rig = Rig(path, 1)
    line, spec = rig.line(20), rig.model.spec
    for seed in range(6):
        store = AdapterStore(None, torch.float32, CPU)
        adapter = store.add(build_ladder(random_lora(spec, "same name", 8, seed)))
        line.adapter = adapter
        first = rig.run([Part(line, 0, 20)]).logits
        fresh = Rig(path, 1)
        same = Line(line.ids, fresh.line(20).pages, adapter)
        assert torch.equal(first, fresh.run([Part(same, 0, 20)]).logits)
        line.adapter = None
        del adapter, store, fresh, same
        gc.collect()
    assert step_of([Part(line, 0, 1)], 16).segments == ()
