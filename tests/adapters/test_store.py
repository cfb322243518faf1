from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from chunkwise_adapters.format import TARGETS, AdapterConflict, AdapterNotFound, LoraWeights
from chunkwise_adapters.ladder import RankLadder, build_ladder
from chunkwise_adapters.store import AdapterStore, ResidentModule, TargetSlice
from chunkwise_adapters.whitening import Calibration, ShrinkMoments

CPU = torch.device("cpu")
SIZES = {"hidden": 48, "kv": 40, "mlp": 64}
COLUMN_PARALLEL = {"q_proj": "hidden", "k_proj": "kv", "v_proj": "kv", "gate_proj": "mlp", "up_proj": "mlp"}
ROW_PARALLEL = {"o_proj": "hidden", "down_proj": "mlp"}


def shard_slices(rank: int, world_size: int) -> dict[str, TargetSlice]:
    def part(size: int) -> slice:
        return slice(size * rank // world_size, size * (rank + 1) // world_size)

    return {target: TargetSlice(part(SIZES[size]), slice(None)) for target, size in COLUMN_PARALLEL.items()} | {
        target: TargetSlice(slice(None), part(SIZES[size])) for target, size in ROW_PARALLEL.items()
    }


@pytest.fixture
def ladder(make_weights: Callable[..., LoraWeights]) -> RankLadder:
    return build_ladder(make_weights("squad", rank=16))


def product(module: ResidentModule, k: int) -> torch.Tensor:
    return module.b_t[:k].T @ module.a[:k]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_shards_together_hold_the_whole_update_at_every_rank(ladder: RankLadder, world_size: int) -> None:
    whole = AdapterStore(None, torch.float32, CPU).add(ladder)
    stores = [AdapterStore(shard_slices(rank, world_size), torch.float32, CPU) for rank in range(world_size)]
    shards = [store.add(ladder) for store in stores]
    for key, module in whole.modules.items():
        for k in module.active_ranks:
            parts = [product(shard.modules[key], k) for shard in shards]
            joined = torch.cat(parts, dim=1 if key[1] in ROW_PARALLEL else 0)
            torch.testing.assert_close(joined, product(module, k))


@pytest.mark.parametrize("target", TARGETS)
def test_outputs_of_shards_sum_or_join_to_the_unsharded_output(ladder: RankLadder, target: str) -> None:
    whole = AdapterStore(None, torch.float32, CPU).add(ladder).modules[1, target]
    x = torch.randn(5, whole.a.shape[1])
    outputs = []
    for rank in range(2):
        slices = shard_slices(rank, 2)
        module = AdapterStore(slices, torch.float32, CPU).add(ladder).modules[1, target]
        outputs.append(x[:, slices[target].inp] @ module.a[:8].T @ module.b_t[:8])
    together = outputs[0] + outputs[1] if target in ROW_PARALLEL else torch.cat(outputs, dim=1)
    torch.testing.assert_close(together, x @ product(whole, 8).T)


def test_the_rank_is_never_sliced_and_the_replicated_half_is_whole(ladder: RankLadder) -> None:
    shard = AdapterStore(shard_slices(1, 2), torch.float32, CPU).add(ladder)
    for key, module in shard.modules.items():
        full = ladder.modules[key]
        assert len(module.a) == len(module.b_t) == len(full.a)
        assert module.active_ranks == ladder.active_ranks[key]
        replicated = (module.b_t, full.b_t) if key[1] in ROW_PARALLEL else (module.a, full.a)
        assert torch.equal(*replicated)


def test_bytes_count_the_local_factors_in_the_store_type(ladder: RankLadder) -> None:
    whole = AdapterStore(None, torch.float32, CPU).add(ladder)
    half = AdapterStore(None, torch.bfloat16, CPU).add(ladder)
    shards = [AdapterStore(shard_slices(rank, 2), torch.bfloat16, CPU).add(ladder) for rank in range(2)]
    assert whole.bytes == sum((m.a.numel() + m.b_t.numel()) * 4 for m in ladder.modules.values())
    assert half.bytes * 2 == whole.bytes
    assert half.bytes < shards[0].bytes + shards[1].bytes < 2 * half.bytes
    assert all(m.a.is_contiguous() and m.b_t.is_contiguous() for m in shards[1].modules.values())


def test_a_shard_does_not_keep_the_whole_factor_alive(ladder: RankLadder) -> None:
    for key, module in AdapterStore(shard_slices(0, 2), torch.float32, CPU).add(ladder).modules.items():
        whole = ladder.modules[key]
        for ours, theirs in ((module.a, whole.a), (module.b_t, whole.b_t)):
            assert ours.untyped_storage().data_ptr() != theirs.untyped_storage().data_ptr()


def test_resident_adapter_carries_the_ladder_s_description(ladder: RankLadder) -> None:
    store = AdapterStore(None, torch.float32, CPU)
    resident = store.add(ladder)
    assert store.get("squad") is resident
    (info,) = store.infos()
    for name in ("name", "content_hash", "trained_rank", "rungs", "kept_energy", "mean_active_rank"):
        assert getattr(info, name) == getattr(resident, name) == getattr(ladder, name)
    assert resident.rung_index(8) == ladder.rung_index(8)


def test_adding_the_same_adapter_again_changes_nothing(make_weights: Callable[..., LoraWeights]) -> None:
    store = AdapterStore(None, torch.float32, CPU)
    first = store.add(build_ladder(make_weights("squad", rank=16)))
    assert store.add(build_ladder(make_weights("squad", rank=16))) is first


def test_a_taken_name_is_refused_for_other_content_or_another_ladder(
    make_weights: Callable[..., LoraWeights],
) -> None:
    store = AdapterStore(None, torch.float32, CPU)
    resident = store.add(build_ladder(make_weights("squad", rank=16, seed=1)))
    with pytest.raises(AdapterConflict, match=r"squad.*1-hash-of.*2-hash-of.*remove it first"):
        store.add(build_ladder(make_weights("squad", rank=16, seed=2)))
    with pytest.raises(AdapterConflict, match=r"rungs \(0, 16\)"):
        store.add(build_ladder(make_weights("squad", rank=16, seed=1), rungs=(0,)))
    with pytest.raises(AdapterConflict, match="another ladder"):
        store.add(build_ladder(make_weights("squad", rank=16, seed=1), allocation="global"))
    weights = make_weights("squad", rank=16, seed=1)
    second = {key: torch.eye(16, dtype=torch.float64) for key in weights.modules}
    moments = ShrinkMoments(weights.content_hash, Calibration("text", 1), second)
    with pytest.raises(AdapterConflict, match="another ladder"):
        store.add(build_ladder(weights, fitted=moments))
    assert store.get("squad") is resident


def test_unknown_names_are_not_found_and_the_known_ones_listed(make_weights: Callable[..., LoraWeights]) -> None:
    store = AdapterStore(None, torch.float32, CPU)
    for name in ("wiki", "squad"):
        store.add(build_ladder(make_weights(name, rank=4)))
    assert store.names() == ("squad", "wiki")
    store.remove("wiki")
    assert store.names() == ("squad",)
    for call in (store.get, store.remove):
        with pytest.raises(AdapterNotFound, match=r"'wiki' is not known; known are \['squad'\]"):
            call("wiki")


@dataclass
class Shelf:
    """Ladders by name, the names of those that were read, in order, and of those whose files have changed."""

    ladders: dict[str, RankLadder]
    reads: list[str]
    changed: set[str]

    def stored(self, slots: int | None, spill: Path | None = None) -> AdapterStore:
        store = AdapterStore(None, torch.float32, CPU, slots, spill)
        for name, ladder in self.ladders.items():
            store.add(ladder, Book(self, name))
        return store


@dataclass
class Book:
    """One ladder's source on a shelf."""

    shelf: Shelf
    name: str

    def read(self) -> RankLadder:
        self.shelf.reads.append(self.name)
        self.shelf.changed.discard(self.name)
        return self.shelf.ladders[self.name]

    def unchanged(self) -> bool:
        return self.name not in self.shelf.changed


def fill_shelf(make_weights: Callable[..., LoraWeights], *names: str) -> Shelf:
    return Shelf({name: build_ladder(make_weights(name, rank=4, seed=len(name))) for name in names}, [], set())


def test_the_least_recently_asked_for_makes_room(make_weights: Callable[..., LoraWeights]) -> None:
    shelf = fill_shelf(make_weights, "a", "bb", "ccc")
    store = shelf.stored(2)
    assert store.resident() == ("bb", "ccc") and store.names() == ("a", "bb", "ccc") and shelf.reads == []
    assert len(store.infos()) == 3
    store.get("bb")
    assert torch.equal(store.get("a").modules[0, "q_proj"].a, shelf.ladders["a"].modules[0, "q_proj"].a)
    assert store.resident() == ("a", "bb") and shelf.reads == ["a"]
    store.get("ccc")
    assert store.resident() == ("a", "ccc") and shelf.reads == ["a", "ccc"]


def test_an_evicted_adapter_that_is_still_held_is_not_read_again(make_weights: Callable[..., LoraWeights]) -> None:
    shelf = fill_shelf(make_weights, "a", "bb")
    store = shelf.stored(1)
    held = store.get("a")
    assert store.get("bb").name == "bb" and store.resident() == ("bb",)
    assert store.get("a") is held and shelf.reads == ["a", "bb"]
    store.get("bb")
    del held
    store.get("a")
    assert shelf.reads == ["a", "bb", "bb", "a"]


def test_without_a_limit_or_a_way_back_nothing_is_evicted(make_weights: Callable[..., LoraWeights]) -> None:
    assert fill_shelf(make_weights, "a", "bb", "ccc").stored(None).resident() == ("a", "bb", "ccc")
    store = AdapterStore(None, torch.float32, CPU, slots=1)
    for ladder in fill_shelf(make_weights, "a", "bb").ladders.values():
        store.add(ladder)
    assert store.resident() == ("a", "bb")


def test_an_adapter_that_changed_since_it_was_added_is_refused(make_weights: Callable[..., LoraWeights]) -> None:
    shelf = fill_shelf(make_weights, "a", "bb")
    store = shelf.stored(1)
    shelf.ladders["a"] = build_ladder(make_weights("a", rank=4, seed=99))
    with pytest.raises(AdapterConflict, match="'a' is known with content"):
        store.get("a")
    assert store.resident() == ("bb",)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_spilled_adapter_comes_back_as_it_was_and_unread(
    make_weights: Callable[..., LoraWeights], tmp_path: Path, dtype: torch.dtype
) -> None:
    """Also with slices, of which no two modules need have one shape."""
    names = ("a", "bb", "ccc")
    shelf = fill_shelf(make_weights, *names)
    few, many = (AdapterStore(shard_slices(1, 2), dtype, CPU, slots, tmp_path) for slots in (1, None))
    for name, ladder in shelf.ladders.items():
        few.add(ladder, Book(shelf, name))
        many.add(ladder, Book(shelf, name))
    for name in (*names, *reversed(names)):
        back, kept = few.get(name), many.get(name)
        assert (few.resident(), back.rungs, back.kept_energy) == ((name,), kept.rungs, kept.kept_energy)
        assert back.modules.keys() == kept.modules.keys()
        for key, module in back.modules.items():
            assert module.active_ranks == kept.modules[key].active_ranks
            assert torch.equal(module.a, kept.modules[key].a) and torch.equal(module.b_t, kept.modules[key].b_t)
    assert shelf.reads == [] and list(tmp_path.iterdir()) == []


def test_a_spilled_adapter_is_read_again_once_its_files_have_changed(
    make_weights: Callable[..., LoraWeights], tmp_path: Path
) -> None:
    shelf = fill_shelf(make_weights, "a", "bb")
    store = shelf.stored(1, tmp_path)
    shelf.changed.add("a")
    for name in ("a", "bb", "a"):
        assert store.get(name).name == name
    assert shelf.reads == ["a"]


def test_a_spilled_adapter_is_refused_each_time_when_its_files_hold_another(
    make_weights: Callable[..., LoraWeights], tmp_path: Path
) -> None:
    shelf = fill_shelf(make_weights, "a", "bb")
    store = shelf.stored(1, tmp_path)
    shelf.ladders["a"] = build_ladder(make_weights("a", rank=4, seed=99))
    shelf.changed.add("a")
    for _ in range(2):
        with pytest.raises(AdapterConflict, match="'a' is known with content"):
            store.get("a")
    assert store.resident() == ("bb",)


def test_a_removed_adapter_is_not_found_in_the_spill_file_under_its_old_name(
    make_weights: Callable[..., LoraWeights], tmp_path: Path
) -> None:
    shelf = fill_shelf(make_weights, "a", "bb")
    store = shelf.stored(1, tmp_path)
    store.remove("a")
    shelf.ladders["a"] = build_ladder(make_weights("a", rank=4, seed=99))
    store.add(shelf.ladders["a"], Book(shelf, "a"))
    store.get("bb")
    assert torch.equal(store.get("a").modules[0, "q_proj"].a, shelf.ladders["a"].modules[0, "q_proj"].a)


def test_without_a_place_to_spill_adapters_are_read_again(
    make_weights: Callable[..., LoraWeights], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    shelf = fill_shelf(make_weights, "a", "bb")
    store = shelf.stored(1, tmp_path / "file" / "spill")
    assert store.get("a").name == "a" and shelf.reads == ["a"]
    assert "no file for evicted adapters" in caplog.text
