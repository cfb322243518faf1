import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from chunkwise_adapters.errors import BrokenAdapter, BrokenLadder, ForeignLadder
from chunkwise_adapters.format import LoraWeights, ModuleKey
from chunkwise_adapters.ladder import Allocation, RankLadder, build_ladder
from chunkwise_adapters.ladder_file import LADDER_FILE, find_ladder, ladder_digest, load_ladder, save_ladder
from chunkwise_adapters.sensitivity import Sensitivity
from chunkwise_adapters.whitening import Calibration, ShrinkMoments

RANKS: dict[ModuleKey, int] = {(0, "q_proj"): 8, (0, "v_proj"): 2, (1, "down_proj"): 8}
ENTRY = "chunkwise_ladder"
Q_A, Q_SPECTRUM, Q_RANKS = (f"layers.0.q_proj.{part}" for part in ("a", "singular_values", "active_ranks"))


@pytest.fixture
def weights(make_weights: Callable[..., LoraWeights]) -> LoraWeights:
    return make_weights(rank=RANKS)


def whitened(weights: LoraWeights, allocation: Allocation = "uniform") -> RankLadder:
    generator = torch.Generator().manual_seed(5)
    second = {}
    for key, pair in weights.modules.items():
        h = torch.randn(50, pair.a.shape[1], generator=generator).double() @ pair.a.double().T
        second[key] = h.T @ h / 50
    moments = ShrinkMoments(weights.content_hash, Calibration("text-hash", 50), second)
    return build_ladder(weights, (0, 1, 3), allocation, moments)


def sensitive(weights: LoraWeights, allocation: Allocation = "global") -> RankLadder:
    fisher = {key: torch.linspace(3.0, 1.0, rank, dtype=torch.float64) / (1 + key[0]) for key, rank in RANKS.items()}
    measured = Sensitivity(weights.content_hash, Calibration("text-hash", 50), fisher)
    return build_ladder(weights, (0, 1, 3), allocation, measured)


@pytest.fixture
def saved(weights: LoraWeights, tmp_path: Path) -> Path:
    path = tmp_path / LADDER_FILE
    save_ladder(whitened(weights), path, "base")
    return path


def rewrite(path: Path, tensors: dict[str, Tensor | None] | None = None, **fields: Any) -> None:
    """Saves the file again with tensors replaced (None: left out) and fields of its entry changed."""
    with safe_open(path, framework="pt") as file:
        stored = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        entry = json.loads(file.metadata()[ENTRY])
    merged = {**stored, **(tensors or {})}
    kept = {name: tensor for name, tensor in merged.items() if tensor is not None}
    save_file(kept, path, metadata={ENTRY: json.dumps(entry | fields)})


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize(
    "make", [whitened, sensitive, lambda weights, allocation: build_ladder(weights, None, allocation)]
)
def test_what_is_loaded_is_what_was_saved(
    weights: LoraWeights, tmp_path: Path, make: Callable[..., RankLadder], allocation: Allocation
) -> None:
    ladder = make(weights, allocation)
    save_ladder(ladder, tmp_path / "l", "base")
    loaded = load_ladder(tmp_path / "l", weights, "base")
    for name in ("name", "content_hash", "trained_rank", "rungs", "kept_energy", "mean_active_rank", "active_ranks"):
        assert getattr(loaded, name) == getattr(ladder, name), name
    assert (loaded.kind, loaded.allocation, loaded.calibration) == (ladder.kind, allocation, ladder.calibration)
    for key, module in ladder.modules.items():
        other = loaded.modules[key]
        assert torch.equal(other.a, module.a) and torch.equal(other.b_t, module.b_t)
        assert torch.equal(other.singular_values, module.singular_values)
        assert (other.sensitivity is None) == (module.sensitivity is None)
        if module.sensitivity is not None and other.sensitivity is not None:
            assert torch.equal(other.sensitivity, module.sensitivity)
    assert ladder_digest(loaded) == ladder_digest(ladder)


def test_a_file_with_rungs_in_whole_ranks_is_still_read(weights: LoraWeights, saved: Path) -> None:
    with safe_open(saved, framework="pt") as file:
        assert json.loads(file.metadata()[ENTRY])["rungs"][:3] == [0, 1, 3]
    assert load_ladder(saved, weights, "base").rungs == whitened(weights).rungs


def test_digest_tells_ladders_of_one_adapter_apart(weights: LoraWeights) -> None:
    ladders = [build_ladder(weights), build_ladder(weights, (0,)), whitened(weights), whitened(weights, "global")]
    ladders.append(sensitive(weights))
    module = ladders[0].modules[0, "q_proj"]
    flipped = replace(module, a=-module.a, b_t=-module.b_t)
    ladders.append(replace(ladders[0], modules={**ladders[0].modules, (0, "q_proj"): flipped}))
    assert len({ladder_digest(ladder) for ladder in ladders}) == 6


def test_loaded_factors_do_not_change_with_the_file(weights: LoraWeights, saved: Path) -> None:
    loaded = load_ladder(saved, weights, "base")
    before = loaded.modules[0, "q_proj"].a.clone()
    with saved.open("r+b") as file:
        file.seek(-2000, 2)
        file.write(b"\0" * 2000)
    assert torch.equal(loaded.modules[0, "q_proj"].a, before)


def test_a_file_is_replaced_whole_or_not_at_all(weights: LoraWeights, saved: Path) -> None:
    save_ladder(build_ladder(weights), saved, "base")
    assert load_ladder(saved, weights, "base").kind == "plain"
    with pytest.raises(OSError):
        save_ladder(build_ladder(weights), saved.parent / "missing" / "l", "base")
    assert [entry.name for entry in saved.parent.iterdir()] == [LADDER_FILE]


def test_ladder_of_an_adapter_with_other_content_is_refused(
    weights: LoraWeights, saved: Path, make_weights: Callable[..., LoraWeights]
) -> None:
    retrained = make_weights(rank=RANKS, seed=1)
    with pytest.raises(ForeignLadder, match=r"adapter of content '0-hash-of-a'.*'1-hash-of-a'.*chunkwise ladder"):
        load_ladder(saved, retrained, "base")


def test_ladder_for_another_base_model_is_refused(weights: LoraWeights, saved: Path) -> None:
    with pytest.raises(ForeignLadder, match=r"base model of content 'base', but .* 'other'; delete the file"):
        load_ladder(saved, weights, "other")


def test_factors_of_another_adapter_under_the_right_hash_are_refused(
    weights: LoraWeights, saved: Path, make_weights: Callable[..., LoraWeights]
) -> None:
    other = replace(make_weights(rank=RANKS, seed=1), content_hash=weights.content_hash)
    with pytest.raises(BrokenLadder, match="layer 0 q_proj do not multiply to the adapter's update"):
        load_ladder(saved, other, "base")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 1}, "format 1; this version reads format 2"),
        ({"kind": "bent"}, "kind is 'bent'"),
        ({"allocation": ["uniform"]}, "allocation is"),
        ({"adapter_hash": 3}, "adapter_hash is 3"),
        ({"base_hash": None}, "base_hash is None"),
        ({"calibration_hash": None}, "calibration_hash is None"),
        ({"calibration_tokens": "50"}, "calibration_tokens is '50'"),
        ({"calibration_tokens": True}, "calibration_tokens is True"),
        ({"rungs": 8}, "rungs is 8"),
        ({"rungs": [0, 1, 3, "8"]}, "rungs is"),
        ({"rungs": [0, 1, math.nan, 8]}, "rungs is"),
        ({"rungs": [0.5, 1, 3, 8]}, r"\[0\.5\] are fractions"),
        ({"rungs": [0, 1, 3, 9]}, r"\[9\] are outside 0\.\.8"),
        ({"rungs": [-1, 1, 3, 8]}, r"\[-1\] are outside"),
        ({"rungs": [3, 1, 0, 8]}, "active ranks are not those"),
        ({"rungs": [0, 0, 3, 8]}, "active ranks are not those"),
        ({"rungs": [0, 1, 3, 4]}, "active ranks are not those"),
        ({"rungs": [0, 1, 2, 8]}, "active ranks are not those"),
        ({"rungs": [0, 1, 8]}, "active_ranks"),
    ],
)
def test_wrong_entries_are_refused(weights: LoraWeights, saved: Path, change: dict[str, Any], message: str) -> None:
    rewrite(saved, **change)
    with pytest.raises(BrokenLadder, match=message):
        load_ladder(saved, weights, "base")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({Q_A: None}, "1 tensors are missing or of no module, the first is 'layers.0.q_proj.a'"),
        ({"layers.1.q_proj.a": torch.zeros(8, 48)}, "layers.1.q_proj.a"),
        ({Q_A: torch.zeros(8, 47)}, r"\[8, 47\]"),
        ({Q_A: torch.zeros(7, 48)}, r"\[7, 48\]"),
        ({Q_A: torch.zeros(8, 48, dtype=torch.bfloat16)}, "BF16"),
        ({Q_A: torch.zeros(8, 48)}, "do not multiply"),
        ({Q_A: torch.full((8, 48), float("nan"))}, "do not multiply"),
        ({Q_A: torch.full((8, 48), float("inf"))}, "do not multiply"),
        ({Q_SPECTRUM: torch.arange(8.0)}, "not finite and descending"),
        ({Q_SPECTRUM: -torch.arange(8.0)}, "not finite and descending"),
        ({Q_SPECTRUM: torch.full((8,), float("nan"))}, "not finite and descending"),
        ({Q_SPECTRUM: torch.tensor([float("inf"), *range(7, 0, -1)])}, "not finite and descending"),
        ({Q_RANKS: torch.tensor([0, 1, 3, 9])}, "active ranks are not those"),
        ({Q_RANKS: torch.tensor([0, 3, 1, 8])}, "active ranks are not those"),
        ({Q_RANKS: torch.tensor([0, 1, 8])}, r"\[3\]"),
    ],
)
def test_wrong_tensors_are_refused(
    weights: LoraWeights, saved: Path, change: dict[str, Tensor | None], message: str
) -> None:
    rewrite(saved, change)
    with pytest.raises(BrokenLadder, match=message):
        load_ladder(saved, weights, "base")


@pytest.mark.parametrize("values", [torch.arange(8.0), torch.full((8,), float("nan"))])
def test_wrong_sensitivities_are_refused(weights: LoraWeights, tmp_path: Path, values: Tensor) -> None:
    save_ladder(sensitive(weights), tmp_path / "l", "base")
    rewrite(tmp_path / "l", {"layers.0.q_proj.sensitivity": values})
    with pytest.raises(BrokenLadder, match=r"the sensitivities of layer 0 q_proj are not finite and descending"):
        load_ladder(tmp_path / "l", weights, "base")
    save_ladder(sensitive(weights), tmp_path / "l", "base")
    rewrite(tmp_path / "l", kind="whitened")
    with pytest.raises(BrokenLadder, match="3 tensors are missing or of no module"):
        load_ladder(tmp_path / "l", weights, "base")


def test_a_file_larger_than_any_ladder_of_the_adapter_is_not_read(weights: LoraWeights, saved: Path) -> None:
    rewrite(saved, {"padding": torch.zeros(1 << 20)})
    with pytest.raises(BrokenLadder, match=r"has \d+ bytes; a ladder of this adapter has at most"):
        load_ladder(saved, weights, "base")


@pytest.mark.parametrize("content", [b"", b"no safetensors", b"\xff" * 100, b"\x80\x04K\x01."])
def test_files_that_are_no_safetensors_are_refused(weights: LoraWeights, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / LADDER_FILE
    path.write_bytes(content)
    with pytest.raises(BrokenLadder, match="not a readable safetensors file"):
        load_ladder(path, weights, "base")


def test_a_cut_file_is_refused(weights: LoraWeights, saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:-1])
    with pytest.raises(BrokenLadder, match="not a readable safetensors file"):
        load_ladder(saved, weights, "base")


@pytest.mark.parametrize("metadata", [None, {"other": "x"}, {ENTRY: "{"}, {ENTRY: "[" * 100_000}, {ENTRY: "[1]"}])
def test_safetensors_files_that_are_no_ladders_are_refused(
    make_weights: Callable[..., LoraWeights], tmp_path: Path, metadata: dict[str, str] | None
) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "l", metadata=metadata)
    with pytest.raises(BrokenLadder, match=r"chunkwise_ladder|has format None"):
        load_ladder(tmp_path / "l", make_weights(rank=16), "base")


def test_ladder_is_found_in_the_adapters_directory_only(saved: Path, tmp_path: Path) -> None:
    assert find_ladder(tmp_path, "a") == saved
    other = tmp_path / "other"
    other.mkdir()
    assert find_ladder(other, "a") is None
    (other / LADDER_FILE).symlink_to(saved)
    with pytest.raises(BrokenAdapter, match="outside the adapter's directory"):
        find_ladder(other, "a")


def test_an_update_of_zeros_is_its_own_ladder(weights: LoraWeights, tmp_path: Path) -> None:
    silent = replace(
        weights, modules={key: replace(pair, b=torch.zeros_like(pair.b)) for key, pair in weights.modules.items()}
    )
    save_ladder(build_ladder(silent), tmp_path / "l", "base")
    assert load_ladder(tmp_path / "l", silent, "base").kept_energy == (1.0,) * 5
