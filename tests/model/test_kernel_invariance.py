"""A row's numbers depend on its own sequence alone: the same bits in any batch, however its prompt is cut, on any
number of threads; and what is not finite in one sequence stays there and stays visible."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from chunkwise.core import ChunkDecision
from chunkwise.model.linear import FOUR_BITS
from chunkwise_adapters.ladder import build_ladder
from chunkwise_adapters.store import AdapterStore, ResidentAdapter
from ragged import CPU, Line, Part, Rig, random_lora, write_model

LENGTH = 270
NAN = float("nan")
CHUNKS = [
    ChunkDecision(1, 0, 4),
    ChunkDecision(1, 40, None, 0.7, 7),
    ChunkDecision(1, 50, 0),
    ChunkDecision(1, 64, 8, 1.3, 3),
    ChunkDecision(1, 200, 16, crossfade=30),
]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16, torch.int8, FOUR_BITS], ids=str)
def storage(request: pytest.FixtureRequest) -> torch.dtype:
    dtype: torch.dtype = request.param
    return dtype


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), seed=4, attention_bias=True, mlp_bias=True)


@pytest.fixture(scope="module")
def adapters(path: Path) -> list[ResidentAdapter]:
    spec, store = Rig(path, None).model.spec, AdapterStore(None, torch.float32, CPU)
    made = [random_lora(spec, f"a{rank}", rank, seed=rank) for rank in (16, 24)]
    return [store.add(build_ladder(weights, allocation="global")) for weights in made]


def twin(rig: Rig, line: Line) -> Line:
    """Another sequence of the same tokens, adapter and chunks, in pages of its own."""
    return Line(line.ids, rig.line(len(line.ids)).pages, line.adapter, line.chunks)


def company(rig: Rig, adapters: Sequence[ResidentAdapter], rng: random.Random, decoding: bool) -> list[Part]:
    """Other sequences of a step, some with the adapters of the one that is watched."""
    parts = []
    for _ in range(rng.randrange(6)):
        position, tokens = rng.randrange(200), 1 if decoding else rng.randrange(1, 40)
        line = rig.line(position + tokens, rng.choice((*adapters, None)), rng.choice((CHUNKS, [])))
        parts.append(Part(line, position, tokens))
    return parts


def compute(
    rig: Rig, line: Line, cuts: Sequence[int], adapters: Sequence[ResidentAdapter], seed: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """A line's first `LENGTH` tokens in spans of ``cuts`` tokens, among others if there is a ``seed``: the last one's
    logits, the log-probability of every token, and the keys and values."""
    rng, position, scores = random.Random(seed), 0, []
    for tokens in cuts:
        before = [] if seed is None else company(rig, adapters, rng, True)
        behind = [] if seed is None else company(rig, adapters, rng, False)
        output = rig.run([*before, Part(line, position, tokens, scored=True), *behind])
        scores.append(output.scores)
        logits = output.logits[len(before)]
        position += tokens
    assert position == LENGTH
    return logits, torch.cat(scores), rig.kept(line)[:, :, :LENGTH]


CUTS = {
    "token by token": [1] * LENGTH,
    "pages": [16] * 16 + [14],
    "stretches": [128, 128, 14],
    "off by one": [127, 1, 1, 126, 2, 13],
    "threes and ones": [3, 1] * 67 + [2],
    "odd": [5, 7, 1, 2, 3, 111, 13, 1, 1, 6, 120],
}


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapted"])
def test_a_prompt_has_the_same_bits_however_it_is_cut_and_in_any_company(
    path: Path, adapters: list[ResidentAdapter], storage: torch.dtype, adapted: bool
) -> None:
    """Alone on one thread, in company on two."""
    one, two = (Rig(path, threads, storage=storage, pages=2000) for threads in (1, 2))
    line = one.line(LENGTH, adapters[0] if adapted else None, CHUNKS if adapted else [])
    whole = compute(one, line, [LENGTH], adapters, None)
    assert all(part.isfinite().all() for part in whole)
    for seed, (name, cuts) in enumerate(CUTS.items()):
        got = [compute(one, twin(one, line), cuts, adapters, None)]
        if len(cuts) < 20:
            got.append(compute(two, twin(two, line), cuts, adapters, seed))
        for parts in got:
            for which, part, want in zip(("logits", "scores", "keys and values"), parts, whole, strict=True):
                assert torch.equal(part, want), f"{which} of {name}"


def test_a_decoded_row_has_the_same_bits_in_any_batch(
    path: Path, adapters: list[ResidentAdapter], storage: torch.dtype
) -> None:
    """Batches of 1 to 40 rows, which take every tile; contexts over several stretches; two numbers of threads."""
    rng = random.Random(5)
    rigs = [Rig(path, threads, storage=storage, pages=1500) for threads in (1, 2)]
    every = []
    for rig in rigs:
        rng.seed(5)
        lines = [
            rig.line(
                n := rng.randrange(2, 400), rng.choice((*adapters, None)), CHUNKS, small=rng.randrange(n // 16 + 1)
            )
            for _ in range(40)
        ]
        every.append([Part(line, len(line.ids) - 2) for line in lines])
    alone = [rigs[0].run([part]) for part in every[0]]
    for rig, parts in zip(rigs, every, strict=True):
        for size in (1, 2, 3, 4, 5, 7, 8, 9, 17, 40):
            chosen = rng.sample(range(40), size)
            batch = rig.run([parts[i] for i in chosen])
            assert batch.attention_spread is not None
            for row, i in enumerate(chosen):
                assert torch.equal(batch.logits[row], alone[i].logits[0])
                spread = alone[i].attention_spread
                assert spread is not None and torch.equal(batch.attention_spread[row], spread[0])


def poisoned(adapter: ResidentAdapter, key: tuple[int, str], half: str, value: float) -> ResidentAdapter:
    """The adapter with one number replaced, of its first rank."""
    module = adapter.modules[key]
    factor = getattr(module, half).clone()
    factor[0, 1] = value
    changed = dataclasses.replace(module, **{half: factor})
    return dataclasses.replace(adapter, modules={**adapter.modules, key: changed})


@pytest.mark.parametrize("value", [NAN, float("inf")])
@pytest.mark.parametrize(
    ("target", "half"),
    [("q_proj", "a"), ("k_proj", "b_t"), ("v_proj", "b_t"), ("o_proj", "b_t"), ("up_proj", "b_t"), ("down_proj", "a")],
)
def test_what_is_not_finite_in_an_adapter_reaches_its_own_sequences_and_no_other(
    path: Path, adapters: list[ResidentAdapter], storage: torch.dtype, target: str, half: str, value: float
) -> None:
    rig = Rig(path, 1, storage=storage)
    bad = poisoned(adapters[0], (0, target), half, value)
    # The last one has the bad adapter but skips it.
    lines = [rig.line(40, adapter) for adapter in (bad, adapters[0], adapters[1], None, bad, bad)]
    lines[5].chunks = [ChunkDecision(1, 0, 0)]
    good = [Part(line, p, n) for line, p, n in zip(lines[1:4], (20, 0, 5), (1, 9, 3), strict=True)]
    parts = [Part(lines[0], 30), good[0], Part(lines[5], 7), good[1], Part(lines[4], 4, 12), good[2]]
    everything = rig.run(parts)
    healthy = rig.run([good[0], Part(lines[5], 7), good[1], good[2]])
    assert torch.equal(everything.logits[[1, 2, 3, 5]], healthy.logits)
    assert healthy.logits.isfinite().all()
    for row in (0, 4):
        assert not everything.logits[row].isfinite().all(), "a sequence that is broken must not look healthy"


@pytest.mark.parametrize("value", [NAN, float("inf"), float("-inf")])
@pytest.mark.parametrize("head", [0, 1, 2])
@pytest.mark.parametrize("values", [False, True], ids=["keys", "values"])
def test_what_is_not_finite_in_the_cache_reaches_its_own_sequence_and_no_other(
    path: Path, storage: torch.dtype, values: bool, head: int, value: float
) -> None:
    rig = Rig(path, 1, storage=storage)
    lines = [rig.line(150) for _ in range(4)]
    kept = rig.kept(lines[0])[:, :, :150]
    kept[int(values), 1, 3, head, 2] = value
    slots = torch.tensor([lines[0].pages[p // 16].number * 16 + p % 16 for p in range(150)])
    for layer in range(2):
        rig.cache.write(layer, slots, kept[0, layer], kept[1, layer])
    good = [Part(lines[1], 149), Part(lines[2], 100, 30), Part(lines[3], 140, 2)]
    healthy = rig.run(good).logits
    decoded = rig.run([good[0], Part(lines[0], 140), *good[1:]]).logits
    prefilled = rig.run([*good[:2], Part(lines[0], 141, 5), good[2]]).logits
    assert torch.equal(decoded[[0, 2, 3]], healthy) and torch.equal(prefilled[[0, 1, 3]], healthy)
    if values or value != value:
        assert not decoded[1].isfinite().all() and not prefilled[2].isfinite().all()


def test_an_overflow_stays_visible(path: Path, adapters: list[ResidentAdapter], storage: torch.dtype) -> None:
    rig = Rig(path, 1, storage=storage)
    huge = rig.line(10, adapters[0], [ChunkDecision(1, 0, scale=3e38)])
    logits = rig.run([Part(huge, 0, 10), Part(rig.line(10), 0, 10)]).logits
    assert not logits[0].isfinite().all()
    assert logits[1].isfinite().all()


def test_leftovers_behind_a_context_are_never_read(path: Path, storage: torch.dtype) -> None:
    """Pages come from other sequences, whose numbers lie there until they are overwritten."""
    rig = Rig(path, 1, storage=storage)
    lines = [rig.line(200), rig.line(200)]
    for start, parts in ((150, [Part(lines[0], 149)]), (90, [Part(lines[1], 70, 20)])):
        before = rig.run(parts).logits
        line = parts[0].line
        slots = torch.tensor([line.pages[p // 16].number * 16 + p % 16 for p in range(start, 200)])
        for layer in range(2):
            rig.cache.write(layer, slots, *torch.full((2, len(slots), 3, 8), NAN))
        assert torch.equal(rig.run(parts).logits, before)


def test_a_step_run_twice_gives_the_same_bits_on_many_threads(path: Path, storage: torch.dtype) -> None:
    """Tasks go to whichever thread comes first; more threads than cores shuffle them thoroughly."""
    rig = Rig(path, 4, storage=storage)
    parts = [Part(rig.line(n), n - 1) for n in (300, 1, 17)] + [Part(rig.line(n), 0, n) for n in (50, 3, 129)]
    first = rig.run(parts).logits
    for _ in range(5):
        assert torch.equal(rig.run(parts).logits, first)
