from pathlib import Path

import pytest
import torch

from chunkwise_adapters.spill import SpillFile


def test_lists_of_tensors_come_back_from_their_offsets_in_any_order(tmp_path: Path) -> None:
    lists = [
        [torch.randn(3, 5), torch.randn(1, 7, dtype=torch.bfloat16)],
        [torch.arange(6).view(2, 3)],
        [torch.randn(100, 1000)],
    ]
    file = SpillFile(tmp_path / "made" / "on demand")
    offsets = [file.write(tensors) for tensors in lists]
    for index in (2, 0, 1, 0):
        back = [torch.empty_like(tensor) for tensor in lists[index]]
        file.read(offsets[index], back)
        for found, tensor in zip(back, lists[index], strict=True):
            assert torch.equal(found, tensor)


def test_the_file_has_no_name(tmp_path: Path) -> None:
    SpillFile(tmp_path).write([torch.zeros(10)])
    assert list(tmp_path.iterdir()) == []


def test_what_was_not_written_is_an_error(tmp_path: Path) -> None:
    file = SpillFile(tmp_path)
    offset = file.write([torch.zeros(10)])
    with pytest.raises(OSError, match="ended early"):
        file.read(offset, [torch.empty(11)])


def test_a_full_disk_keeps_what_was_there(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk; Python ignores the signal that comes with it."""
    resource = pytest.importorskip("resource")
    file = SpillFile(tmp_path)
    first = file.write([torch.ones(10)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            file.write([torch.zeros(5), torch.zeros(50)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    second = file.write([torch.full((10,), 2.0)])
    for offset, value in ((first, 1.0), (second, 2.0)):
        back = torch.empty(10)
        file.read(offset, [back])
        assert back.eq(value).all()
