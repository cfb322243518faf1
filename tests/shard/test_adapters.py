"""Adapters at start: with their saved ladders, on one rank and on several."""

from __future__ import annotations

import multiprocessing
import shutil
import socket
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from chunkwise.config.settings import AdapterSource, ShardSettings
from chunkwise.core import UnsupportedModel
from chunkwise.model.identity import base_hash
from chunkwise.model.parallel import DistributedGroup, Group, SingleProcess
from chunkwise.model.spec import load_spec
from chunkwise.shard import adapters
from chunkwise.shard.adapters import load_adapters
from chunkwise.shard.decisions import DecisionTable
from chunkwise.shard.process import load_engine
from chunkwise_adapters.directory import CONFIG_FILE, WEIGHTS_FILE
from chunkwise_adapters.format import LoraWeights, load_adapter
from chunkwise_adapters.ladder import Allocation, RankLadder, build_ladder
from chunkwise_adapters.ladder_file import LADDER_FILE, save_ladder
from chunkwise_adapters.store import ResidentAdapter
from conftest import TinyWorld
from serving import Driver, request

CPU = torch.device("cpu")


def load(tiny: TinyWorld, directory: Path, group: Group | None = None) -> ResidentAdapter:
    source = AdapterSource("mine", str(directory))
    return load_adapters([source], tiny.model, group or SingleProcess(), torch.float32, CPU).get("mine")


@pytest.fixture
def adapter(tiny: TinyWorld, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.adapters["a8"], tmp_path / "mine"))


@pytest.fixture
def save(tiny: TinyWorld, adapter: Path) -> Callable[..., None]:
    """save(directory, rungs, base): a ladder with global ranks."""

    def save_beside(directory: Path = adapter, rungs: tuple[int, ...] = (0, 3), base: str | None = None) -> None:
        weights = load_adapter(adapter, "mine", load_spec(tiny.model).target_shapes())
        ladder = build_ladder(weights, rungs, "global")
        save_ladder(ladder, directory / LADDER_FILE, base or base_hash(tiny.model))

    return save_beside


def test_without_a_ladder_the_plain_one_is_served(tiny: TinyWorld, adapter: Path) -> None:
    assert load(tiny, adapter).rungs == (0, 0.25, 0.5, 1, 2, 4, 8)


def test_adapters_are_read_before_the_weights(tiny: TinyWorld, adapter: Path, tmp_path: Path) -> None:
    """What reading them takes for a while would come on top of the weights; so a shard without weights reads them."""
    bare = tmp_path / "bare"
    shutil.copytree(tiny.model, bare, ignore=shutil.ignore_patterns("*.safetensors*"))
    settings = ShardSettings(str(bare), (), adapters=(AdapterSource("mine", str(adapter)),))
    with pytest.raises(UnsupportedModel, match="holds no"):
        load_engine(settings, SingleProcess(), CPU, DecisionTable())
    (adapter / WEIGHTS_FILE).unlink()
    with pytest.raises(UnsupportedModel, match="adapter 'mine' cannot be served"):
        load_engine(settings, SingleProcess(), CPU, DecisionTable())


def test_what_reading_an_adapter_took_is_given_back_before_the_next(
    tiny: TinyWorld, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factors: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def build(weights: LoraWeights, allocation: Allocation) -> RankLadder:
        ladder = build_ladder(weights, allocation=allocation)
        factors.extend(weakref.ref(module.a) for module in ladder.modules.values())
        return ladder

    monkeypatch.setattr(adapters, "build_ladder", build)
    monkeypatch.setattr(adapters, "trim_heap", lambda: alive.append(sum(a() is not None for a in factors)))
    sources = [AdapterSource(name, str(adapter)) for name in ("mine", "yours")]
    load_adapters(sources, tiny.model, SingleProcess(), torch.float32, CPU)
    assert alive == [0, 0]


def test_a_saved_ladder_is_served_under_any_name(tiny: TinyWorld, adapter: Path, save: Callable[..., None]) -> None:
    save()
    served = load(tiny, adapter)
    assert (served.name, served.rungs) == ("mine", (0, 3, 8))
    assert len({module.active_ranks for module in served.modules.values()}) > 1


def test_a_ladder_of_the_adapter_before_it_was_trained_on_is_refused(
    tiny: TinyWorld, adapter: Path, save: Callable[..., None]
) -> None:
    save()
    config = (adapter / "adapter_config.json").read_text()
    (adapter / "adapter_config.json").write_text(config.replace('"lora_alpha": 16', '"lora_alpha": 17'))
    with pytest.raises(UnsupportedModel, match=r"'mine' cannot be served.*was made for the adapter.*delete the file"):
        load(tiny, adapter)


def test_a_ladder_for_another_base_is_refused(tiny: TinyWorld, adapter: Path, save: Callable[..., None]) -> None:
    save(base="another")
    with pytest.raises(UnsupportedModel, match=r"was made for the base model of content 'another'"):
        load(tiny, adapter)


def _worker(rank: int, port: int, tiny: TinyWorld, runs: list[tuple[Path, Path]], results: Any) -> None:
    torch.set_num_threads(1)
    group = DistributedGroup(rank, 2, f"127.0.0.1:{port}", CPU, timeout_seconds=60)
    outcomes = []
    for directories in runs:
        try:
            outcomes.append(str(load(tiny, directories[rank], group).rungs))
        except UnsupportedModel as error:
            outcomes.append(str(error))
    results.put((rank, outcomes))
    group.close()


def load_on_two(tiny: TinyWorld, runs: list[tuple[Path, Path]]) -> list[tuple[str, str]]:
    """For each pair of directories, one per rank: the rungs that each rank serves, or why it refuses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [
        context.Process(target=_worker, args=(rank, port, tiny, runs, results), daemon=True) for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    try:
        got = dict(results.get(timeout=120) for _ in workers)
    finally:
        for worker in workers:
            worker.join(timeout=30)
    return list(zip(got[0], got[1], strict=True))


def test_ranks_serve_a_ladder_only_if_all_read_the_same(
    tiny: TinyWorld, adapter: Path, save: Callable[..., None], tmp_path: Path
) -> None:
    """As on two machines with copies of one adapter, of which the second got no ladder, or another one."""
    without, another = (Path(shutil.copytree(adapter, tmp_path / name)) for name in ("without", "another"))
    save()
    save(another, rungs=(0, 2))
    same, *different = load_on_two(tiny, [(adapter, adapter), (adapter, without), (adapter, another)])
    assert same == ("(0, 3, 8)", "(0, 3, 8)")
    for outcome in different:
        for rank, message in enumerate(outcome):
            assert "the shards found different ladders" in message and f"rank {rank}" in message


@pytest.fixture
def copies(tiny: TinyWorld, tmp_path: Path) -> dict[str, Path]:
    return {name: Path(shutil.copytree(path, tmp_path / name)) for name, path in tiny.adapters.items()}


def answers(driver: Driver, names: Sequence[str]) -> list[list[int]]:
    """Tokens of one request after another."""
    for id, name in enumerate(names):
        result = driver.prefill([request(id, "_the _cat", new=3, adapter_id=name)])
        while result.batch is not None:
            result = driver.decode(result.batch)
    return [driver.tokens.get(id, []) for id in range(len(names))]


def test_one_slot_answers_as_many_do(tiny: TinyWorld, copies: dict[str, Path]) -> None:
    names = [*copies, *reversed(copies)]
    few, all_of_them = (Driver(tiny.model, copies, adapter_slots=slots) for slots in (1, None))
    assert answers(few, names) == answers(all_of_them, names)
    assert not few.errors and len(few.engine.info().adapters) == len(copies)


def test_an_evicted_adapter_that_is_gone_ends_its_requests_alone(tiny: TinyWorld, copies: dict[str, Path]) -> None:
    first, *_, last = copies
    driver = Driver(tiny.model, copies, adapter_slots=1)
    shutil.rmtree(copies[last])
    result = driver.prefill(
        [request(1, new=3, adapter_id=first), request(2, new=3, adapter_id=last), request(3, new=3)]
    )
    assert result.batch is not None and result.batch.request_ids == (1, 3)
    assert list(driver.errors) == [2] and last in driver.errors[2]


def _double_the_weights(directory: Path) -> None:
    file = directory / WEIGHTS_FILE
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)


def _raise_the_scale(directory: Path) -> None:
    config = directory / CONFIG_FILE
    config.write_text(config.read_text().replace('"lora_alpha": 32', '"lora_alpha": 33'))


@pytest.mark.parametrize("swap", [_double_the_weights, _raise_the_scale])
def test_an_evicted_adapter_whose_files_were_swapped_is_refused(
    tiny: TinyWorld, copies: dict[str, Path], swap: Callable[[Path], None]
) -> None:
    """Its name stands for what was checked at start. A touched file is read again, and holds the same."""
    driver = Driver(tiny.model, copies, adapter_slots=1)
    (copies["a16"] / WEIGHTS_FILE).touch()
    assert driver.run(request(1, new=3, adapter_id="a16"))[1]
    driver.run(request(2, new=3, adapter_id="a4"))
    swap(copies["a16"])
    for id in (3, 4):
        driver.prefill([request(id, new=3, adapter_id="a16")])
        assert "'a16' is known with content" in driver.errors[id]
