"""The CPU kernels against the torch decoder: shapes, mixed steps, pages of every format, buffers, tensor ranks."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chunkwise.core import ChunkDecision, UnsupportedModel
from chunkwise.model import kernel_decoder
from chunkwise.model.kernel_decoder import KernelDecoder
from chunkwise.model.kernels.attention import STRETCH
from chunkwise.model.linear import FOUR_BITS
from chunkwise.model.llama import Llama, target_slices
from chunkwise.model.parallel import Group, SingleProcess
from chunkwise.model.step import StepOutput
from chunkwise_adapters.ladder import build_ladder
from chunkwise_adapters.store import AdapterStore, ResidentAdapter
from ragged import CPU, Part, Rig, distance, random_lora, write_model

FP32, INTS = 3e-5, 1e-3
CLOSE = {torch.float32: FP32, torch.bfloat16: FP32, torch.int8: INTS, FOUR_BITS: INTS}
"""How far the kernels may be from torch by the type of the base matrices, which is the same for both. With 8 and 4 bits
the kernels round what is multiplied with them to 16 bits."""

EVERY_STORAGE = pytest.mark.parametrize("storage", CLOSE, ids=["fp32", "bf16", "int8", "int4"])

SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "narrow": {"hidden_size": 40, "intermediate_size": 72, "num_attention_heads": 5, "num_key_value_heads": 1}
    | {"head_dim": 20},
    "multi-head": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 18},
    "groups of seven": {"num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 6, "hidden_size": 33},
    "wide": {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4, "num_key_value_heads": 1}
    | {"head_dim": 64, "vocab_size": 1000},
    "deep": {"num_hidden_layers": 6},
    "one of everything": {"hidden_size": 2, "intermediate_size": 1, "num_attention_heads": 1}
    | {"num_key_value_heads": 1, "head_dim": 2, "vocab_size": 3, "num_hidden_layers": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "untied": {"tie_word_embeddings": False},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3 rope": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


def mixed(rig: Rig) -> list[Part]:
    """Decoding rows at the seams of pages and stretches, then longer spans, two of one token among them."""
    decoding = [0, 1, 15, 16, STRETCH - 2, STRETCH - 1, STRETCH, 2 * STRETCH - 1, 2 * STRETCH, 300, 383, 384]
    longer = [(0, 5), (120, 20), (40, 1), (250, 30), (STRETCH - 4, 4), (STRETCH, 9), (384, 1), (0, 2), (5, 131)]
    size = rig.cache.shape.page_size
    parts = [Part(rig.line(p + 1, small=p // size), p) for p in decoding]
    # Some have more pages than they need yet.
    return parts + [Part(rig.line(p + n + 20, small=p // size), p, n, scored=n % 2 == 1) for p, n in longer]


def assert_close(got: StepOutput, want: StepOutput, most: float) -> None:
    assert distance(got.logits, want.logits) < most
    assert distance(got.scores, want.scores) < most
    if want.attention_spread is None:
        assert got.attention_spread is None
        return
    assert got.attention_spread is not None
    assert float((got.attention_spread - want.attention_spread).abs().max()) < most


def assert_same(one: StepOutput, other: StepOutput) -> None:
    assert torch.equal(one.logits, other.logits)
    assert torch.equal(one.scores, other.scores)
    if one.attention_spread is not None and other.attention_spread is not None:
        assert torch.equal(one.attention_spread, other.attention_spread)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """models(shape): a checkpoint, written once."""
    root, made = tmp_path_factory.mktemp("models"), dict[str, Path]()

    def make(shape: str) -> Path:
        if shape not in made:
            made[shape] = write_model(root / shape, seed=len(shape), **SHAPES[shape])
        return made[shape]

    return make


@EVERY_STORAGE
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_torch(models: Callable[[str], Path], shape: str, storage: torch.dtype) -> None:
    rigs = [Rig(models(shape), threads, storage=storage) for threads in (None, 1, 2)]
    parts = [mixed(rig) for rig in rigs]
    before = [[rig.kept(part.line) for part in rig_parts] for rig, rig_parts in zip(rigs, parts, strict=True)]
    want, one, two = (rig.run(rig_parts) for rig, rig_parts in zip(rigs, parts, strict=True))
    most = CLOSE[storage]
    assert_close(one, want, most)
    assert_same(one, two)
    for i, part in enumerate(parts[0]):
        reference, ours = rigs[0].kept(parts[0][i].line), rigs[1].kept(parts[1][i].line)
        computed = slice(part.position, part.position + part.tokens)
        assert distance(ours[:, :, computed], reference[:, :, computed]) < most
        assert torch.equal(ours, rigs[2].kept(parts[2][i].line))
        ours[:, :, computed] = before[1][i][:, :, computed]
        assert torch.equal(ours, before[1][i]), "positions outside the step must stay as they were"


@pytest.mark.parametrize("page_size", [1, 8, 64, STRETCH])
def test_any_page_size_that_divides_a_stretch(models: Callable[[str], Path], page_size: int) -> None:
    rigs = [Rig(models("grouped"), threads, page_size=page_size, pages=4096 // page_size + 32) for threads in (None, 2)]
    want, got = (rig.run(mixed(rig)) for rig in rigs)
    assert_close(got, want, FP32)


def test_only_decoding_and_only_a_prompt(models: Callable[[str], Path]) -> None:
    rigs = [Rig(models("grouped"), threads) for threads in (None, 1)]
    for position, tokens in ((299, 1), (0, 300)):
        want, got = (rig.run([Part(rig.line(300), position, tokens)]) for rig in rigs)
        assert_close(got, want, FP32)


def test_spread_of_a_single_token_is_zero_and_of_equal_keys_one(models: Callable[[str], Path]) -> None:
    rig = Rig(models("grouped"), 1)
    line = rig.line(200)
    slots = torch.tensor([page.number * 16 + i for page in line.pages for i in range(16)])
    for layer in range(2):
        rig.cache.write(layer, slots, torch.zeros(len(slots), 3, 8), torch.zeros(len(slots), 3, 8))
    spread = rig.run([Part(rig.line(1), 0), Part(line, 199)]).attention_spread
    assert spread is not None and spread[0] == 0.0
    assert 0.99 < float(spread[1]) <= 1.01


@EVERY_STORAGE
def test_steps_of_any_size_may_follow_each_other(models: Callable[[str], Path], storage: torch.dtype) -> None:
    """Buffers grow and are then larger than a step needs; what an earlier step left in them must not show."""
    rig, fresh = Rig(models("grouped"), 2, storage=storage), Rig(models("grouped"), 2, storage=storage)
    sizes = [(0, 1), (0, 3), (40, 200), (7, 1), (400, 1), (0, 40), (260, 2)]
    lines = [rig.line(p + n) for p, n in sizes]
    after = [rig.run([Part(line, p, n)]) for line, (p, n) in zip(lines, sizes, strict=True)]
    for i, (p, n) in reversed(list(enumerate(sizes))):
        alone = Rig(models("grouped"), 2, storage=storage)
        line = [alone.line(q + m) for q, m in sizes][i]
        assert_same(after[i], alone.run([Part(line, p, n)]))
    lines = [fresh.line(p + n) for p, n in sizes]
    for i, (p, n) in reversed(list(enumerate(sizes))):
        assert_same(after[i], fresh.run([Part(lines[i], p, n)]))


def test_a_decoder_takes_every_step_s_own_cache(models: Callable[[str], Path]) -> None:
    """What it knows of the cache of the step before must not be taken for another's."""
    rigs = [Rig(models("grouped"), 2, seed=seed) for seed in (1, 2)]
    parts = [[Part(rig.line(100), 90, 2)] for rig in rigs]
    alone = [rig.run(own) for rig, own in zip(rigs, parts, strict=True)]
    rigs[0].model = rigs[1].model
    for i in (0, 1, 0):
        assert_same(rigs[i].run(parts[i]), alone[i])


@EVERY_STORAGE
def test_logits_of_more_rows_than_any_step_had(models: Callable[[str], Path], storage: torch.dtype) -> None:
    plain, kernels = (Rig(models("untied"), threads, storage=storage).model._decoder for threads in (None, 2))
    x = torch.randn(300, 72, generator=torch.Generator().manual_seed(1))
    got = kernels.logits(x, torch.arange(300))
    assert distance(got, plain.logits(x, torch.arange(300))) < CLOSE[storage]
    for rows in ([0], [3, 4, 5, 6, 7], [299, 17, 17], []):
        chosen = torch.tensor(rows, dtype=torch.int64)
        assert torch.equal(kernels.logits(x, chosen), got[chosen])


class GuardedTorch:
    """torch, but `empty` gives memory full of NaN between guards."""

    GUARD, WIDTH = 12345, 64

    def __init__(self) -> None:
        self.made: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        whole = torch.full((math.prod(shape) + 2 * self.WIDTH,), self.GUARD, dtype=dtype)
        inside = whole[self.WIDTH : -self.WIDTH]
        if dtype.is_floating_point:
            inside.fill_(math.nan)
        self.made.append(whole)
        return inside.view(shape)

    def check_integrity(self) -> None:
        for whole in self.made:
            for end in (whole[: self.WIDTH], whole[-self.WIDTH :]):
                assert (end == self.GUARD).all(), f"written outside a buffer of {len(whole) - 2 * self.WIDTH}"


@EVERY_STORAGE
def test_buffers_are_large_enough_and_never_read_before_they_are_written(
    models: Callable[[str], Path], storage: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shape in ("biases", "narrow", "groups of seven"):
        expected = _serve(models(shape), SingleProcess(), 2, storage)
        guarded = GuardedTorch()
        with monkeypatch.context() as patch:
            patch.setattr(kernel_decoder, "torch", guarded)
            got = _serve(models(shape), SingleProcess(), 2, storage)
        assert len(guarded.made) > 20
        guarded.check_integrity()
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other)


def test_hidden_states_are_good_until_the_next_step(models: Callable[[str], Path]) -> None:
    """A prompt's scores are made behind the logits of the step, with buffers that may have grown in between."""
    rigs = [Rig(models("grouped"), threads) for threads in (None, 2)]
    want, got = (rig.run([Part(rig.line(200), 0, 199, scored=True)]) for rig in rigs)
    assert_close(got, want, FP32)


def test_other_types_are_refused(models: Callable[[str], Path]) -> None:
    with pytest.raises(UnsupportedModel, match=r"not in torch\.bfloat16"):
        Llama(models("grouped"), SingleProcess(), torch.bfloat16, CPU, kernel_threads=1)


def test_the_decoder_follows_the_argument(models: Callable[[str], Path]) -> None:
    assert isinstance(Rig(models("grouped"), 1).model._decoder, KernelDecoder)
    assert not isinstance(Rig(models("grouped"), None).model._decoder, KernelDecoder)


class Ranks:
    """Tensor-parallel ranks as threads of this process; `group` is a `Group` for each."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.parts: list[Tensor] = [torch.empty(0)] * world
        self.barrier = threading.Barrier(world)

    def exchange(self, rank: int, x: Tensor, join: Callable[[Sequence[Tensor]], Tensor]) -> Tensor:
        """``join`` of all ranks' tensors."""
        self.parts[rank] = x
        self.barrier.wait(timeout=60)
        joined = join(self.parts)
        self.barrier.wait(timeout=60)
        return joined


class ThreadGroup(SingleProcess):
    """A `Group` of the ranks of `Ranks`."""

    def __init__(self, ranks: Ranks, rank: int) -> None:
        self.rank, self.world_size, self._ranks = rank, ranks.world, ranks

    def sum_(self, x: Tensor) -> Tensor:
        return x.copy_(self._ranks.exchange(self.rank, x, lambda parts: torch.stack(list(parts)).sum(dim=0)))

    def gather_columns(self, x: Tensor, total: int) -> Tensor:
        joined = self._ranks.exchange(self.rank, x, lambda parts: torch.cat(list(parts), dim=1))
        assert joined.shape[1] == total
        return joined


def in_parallel(world: int, serve: Callable[[ThreadGroup], Any]) -> Iterator[Any]:
    ranks = Ranks(world)
    with ThreadPoolExecutor(world) as pool:
        yield from pool.map(serve, [ThreadGroup(ranks, rank) for rank in range(world)])


def _adapted(rig: Rig) -> list[ResidentAdapter]:
    """Two adapters as this rank holds them."""
    store = AdapterStore(target_slices(rig.model.spec, rig.model.plan), torch.float32, CPU)
    weights = [random_lora(rig.model.spec, f"a{rank}", rank, seed=rank) for rank in (8, 16)]
    return [store.add(build_ladder(w)) for w in weights]


def _serve(path: Path, group: Group, threads: int | None, storage: torch.dtype) -> list[StepOutput]:
    """A mixed step and a second one, with adapters."""
    rig = Rig(path, threads, storage=storage, group=group)
    adapters = _adapted(rig)
    parts = mixed(rig)
    for i, part in enumerate(parts):
        part.line.adapter = [*adapters, None][i % 3]
        part.line.chunks = [ChunkDecision(1, 0, rung=4), ChunkDecision(1, 130, rung=8, scale=0.5, crossfade=6)]
    small = [Part(rig.line(150, adapter), 149) for adapter in (*adapters, None)]
    return [rig.run(parts), rig.run(small)]


@EVERY_STORAGE
@pytest.mark.parametrize("world", [2, 3, 4])
def test_tensor_parallel_ranks_equal_one(models: Callable[[str], Path], world: int, storage: torch.dtype) -> None:
    """In 8 and 4 bits a rank scales its part of a row by itself, so ranks on kernels are compared with ranks on
    torch."""
    path = models("biases")
    ranks = list(in_parallel(world, lambda group: _serve(path, group, 2, storage)))
    if not storage.is_floating_point:
        expected = next(in_parallel(world, lambda group: _serve(path, group, None, storage)))
    else:
        expected = _serve(path, SingleProcess(), 1, storage)
    for i, want in enumerate(expected):
        assert_close(ranks[0][i], want, 2 * CLOSE[storage])
        for others in ranks[1:]:
            assert others[i].attention_spread is None, "one rank reports the signal"
            assert torch.equal(others[i].logits, ranks[0][i].logits)
