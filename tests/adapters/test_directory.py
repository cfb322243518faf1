import os
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from chunkwise_adapters.directory import file_stamp, open_directory, read_config, read_tensors
from chunkwise_adapters.format import AdapterNotFound, BrokenAdapter, UnsupportedAdapter

FILES = ("adapter_config.json", "adapter_model.safetensors")


def read(path: Path) -> list[str]:
    root = open_directory(path, "a")
    read_config(root, "a")
    return sorted(read_tensors(root, "a"))


@pytest.fixture
def adapter(write_adapter: Callable[..., Path], adapter_tensors: dict[str, Tensor]) -> Path:
    return write_adapter(adapter_tensors)


def hub_cache(adapter: Path, cache: Path) -> Path:
    """Lay the adapter's files out as the Hub's cache does; returns the snapshot."""
    snapshot, blobs = cache / "snapshots" / "abc123", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in FILES:
        (adapter / file).rename(blobs / f"sha-of-{file}")
        (snapshot / file).symlink_to(f"../../blobs/sha-of-{file}")
    return snapshot


def test_reads_a_directory_also_through_a_link_to_it(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(adapter)
    assert read(tmp_path / "link") == read(adapter) != []


def test_missing_directory_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFound, match="nowhere"):
        read(tmp_path / "nowhere")


def test_directory_without_config_is_not_found(adapter: Path) -> None:
    (adapter / FILES[0]).unlink()
    with pytest.raises(AdapterNotFound, match=r"adapter_config\.json"):
        read(adapter)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 100_000])
def test_config_that_is_no_json_is_broken(adapter: Path, content: bytes) -> None:
    (adapter / FILES[0]).write_bytes(content)
    with pytest.raises(BrokenAdapter, match="JSON"):
        read(adapter)


def test_pickle_only_is_refused_with_the_remedy(adapter: Path) -> None:
    (adapter / FILES[1]).unlink()
    (adapter / "adapter_model.bin").write_bytes(b"never opened")
    with pytest.raises(UnsupportedAdapter, match=r"adapter_model.bin.*convert it to safetensors"):
        read(adapter)


def test_pickle_beside_safetensors_is_ignored(adapter: Path) -> None:
    (adapter / "adapter_model.bin").write_bytes(b"never opened")
    assert read(adapter) != []


def test_missing_weights_are_broken(adapter: Path) -> None:
    (adapter / FILES[1]).unlink()
    with pytest.raises(BrokenAdapter, match=r"adapter_model\.safetensors"):
        read(adapter)


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_truncated_weights_are_broken(adapter: Path, length: int) -> None:
    weights = adapter / FILES[1]
    weights.write_bytes(weights.read_bytes()[:length])
    with pytest.raises(BrokenAdapter, match="safetensors"):
        read(adapter)


@pytest.mark.parametrize("file", FILES)
def test_link_out_of_the_directory_is_refused(adapter: Path, tmp_path: Path, file: str) -> None:
    (adapter / file).rename(tmp_path / "secret")
    (adapter / file).symlink_to("../secret")
    with pytest.raises(BrokenAdapter, match="outside"):
        read(adapter)


def test_link_inside_the_directory_is_followed(adapter: Path) -> None:
    (adapter / FILES[1]).rename(adapter / "v2.safetensors")
    (adapter / FILES[1]).symlink_to("v2.safetensors")
    assert read(adapter) != []


def test_link_to_itself_is_broken(adapter: Path) -> None:
    (adapter / FILES[1]).unlink()
    (adapter / FILES[1]).symlink_to(FILES[1])
    with pytest.raises(BrokenAdapter, match="cannot be read"):
        read(adapter)


@pytest.mark.parametrize("file", FILES)
def test_special_files_are_refused(adapter: Path, file: str) -> None:
    (adapter / file).unlink()
    os.mkfifo(adapter / file)
    with pytest.raises(BrokenAdapter, match="not a regular file"):
        read(adapter)


def test_snapshot_of_the_hub_cache_is_read(adapter: Path, tmp_path: Path) -> None:
    assert read(hub_cache(adapter, tmp_path / "hub" / "models--org--adapter")) != []


def test_subfolder_of_a_hub_snapshot_is_read(adapter: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(adapter, tmp_path / "models--org--adapter")
    folder = snapshot / "checkpoint"
    folder.mkdir()
    for file in FILES:
        (snapshot / file).unlink()
        (folder / file).symlink_to(f"../../../blobs/sha-of-{file}")
    assert read(folder) != []


def test_blobs_of_another_repository_are_refused(adapter: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(adapter, tmp_path / "models--org--adapter")
    (tmp_path / "models--org--adapter" / "blobs").rename(tmp_path / "blobs")
    other = tmp_path / "models--org--other"
    other.mkdir()
    (tmp_path / "blobs").rename(other / "blobs")
    for file in FILES:
        (snapshot / file).unlink()
        (snapshot / file).symlink_to(f"../../../models--org--other/blobs/sha-of-{file}")
    with pytest.raises(BrokenAdapter, match="outside"):
        read(snapshot)


def test_blobs_beside_a_folder_that_is_no_cache_are_refused(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(BrokenAdapter, match="outside"):
        read(hub_cache(adapter, tmp_path / "not-a-cache"))


def test_a_stamp_tells_every_way_a_file_can_change(adapter: Path, tmp_path: Path) -> None:
    """Also a copy of the same size that pretends to be as old."""
    config = adapter / FILES[0]
    (adapter / "copy").write_bytes(config.read_bytes())
    os.utime(adapter / "copy", ns=(config.stat().st_atime_ns, config.stat().st_mtime_ns))
    seen = [file_stamp(adapter, FILES[0], "a")]
    assert file_stamp(adapter, FILES[0], "a") == seen[0] is not None

    def changed() -> bool:
        seen.append(file_stamp(adapter, FILES[0], "a"))
        return len(set(seen)) == len(seen)

    (adapter / "copy").rename(config)
    assert changed()
    os.utime(config, ns=(0, 0))
    assert changed()
    config.write_text("{}")
    assert changed()
    config.unlink()
    assert changed() and seen[-1] is None
    (tmp_path / "outside").write_text("{}")
    config.symlink_to(tmp_path / "outside")
    with pytest.raises(BrokenAdapter, match="outside"):
        file_stamp(adapter, FILES[0], "a")
