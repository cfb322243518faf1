from __future__ import annotations

from pathlib import Path

import pytest

from chunkwise.evaluation.results import ForeignResults, ResultFile

HEADER = {"task": "squad", "seed": 0, "policy": {"rank": 4}}


def write(path: Path, records: int) -> None:
    with ResultFile(path, HEADER) as results:
        results.resume([1] * records)
        for n in range(records):
            results.append([{"id": n, "text": "é"}])


def test_a_file_holds_the_header_and_one_line_per_record(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out.jsonl"
    write(path, 2)
    assert path.read_text(encoding="utf-8").splitlines() == [
        '{"task": "squad", "seed": 0, "policy": {"rank": 4}}',
        '{"id": 0, "text": "é"}',
        '{"id": 1, "text": "é"}',
    ]


@pytest.mark.parametrize("cut", range(1, 60))
def test_a_file_cut_anywhere_goes_on_behind_its_last_whole_group(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "out.jsonl"
    write(path, 4)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with ResultFile(path, HEADER) as results:
        done = results.resume([2, 2])
        assert done == (1 if whole[:-cut].count(b"\n") >= 3 else 0)
        assert len(results.records) == 2 * done
        for n in range(2 * done, 4, 2):
            results.append([{"id": n, "text": "é"}, {"id": n + 1, "text": "é"}])
    assert path.read_bytes() == whole


def test_a_finished_file_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, 4)
    before = path.read_bytes()
    with ResultFile(path, HEADER) as results:
        assert results.resume([2, 2]) == 2
        assert [record["id"] for record in results.records] == [0, 1, 2, 3]
    assert path.read_bytes() == before


def test_the_file_of_another_run_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, 2)
    before = path.read_bytes()
    with pytest.raises(ForeignResults, match=r"another run: seed is 0, not 1, limit is null, not 5; name another file"):
        ResultFile(path, {**HEADER, "seed": 1, "limit": 5})
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["not json\n", "[1, 2]\n", '{"id": 0}\n', "\n"])
def test_another_kind_of_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(content)
    with pytest.raises(ForeignResults, match="--out"):
        ResultFile(path, HEADER)
    assert path.read_text() == content
