"""The command on the tiny model, from flags to the file that `serve` takes."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from chunkwise.cli import main
from chunkwise.config.flags import InvalidFlags, build_parser
from chunkwise.config.settings import AdapterSource
from chunkwise.core import ChunkwiseError
from chunkwise.evaluation import ladder_command
from chunkwise.evaluation.ladder_command import LadderFailed
from chunkwise.evaluation.ladder_report import rung_rows, spectrum_rows
from chunkwise.model.parallel import SingleProcess
from chunkwise.shard.adapters import load_adapters
from chunkwise_adapters.format import LoraPair, LoraWeights
from chunkwise_adapters.ladder import build_ladder
from conftest import TinyWorld


@pytest.fixture
def adapter(tiny: TinyWorld, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.adapters["a16"], tmp_path / "mine"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("It was the best of times, it was the worst of times. " * 8)
    return path


def run(tiny: TinyWorld, adapter: Path, *flags: str) -> None:
    arguments = ["ladder", str(adapter), f"--model={tiny.model}", *flags]
    ladder_command.run(build_parser({}).parse_args(arguments))


def result(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return document


def test_a_plain_ladder_with_global_ranks_by_default(
    tiny: TinyWorld, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["ladder", str(adapter), "--model-id", str(tiny.model)])
    output = capsys.readouterr().out
    assert '"rung": 0.25' in output and '"rung": 4,' in output
    assert "ladder: plain, global ranks" in output and "weight error" in output and "down_proj" in output
    summary = json.loads(output.splitlines()[-1])
    assert (summary["kind"], summary["allocation"], summary["calibration"]) == ("plain", "global", None)
    assert [row["rung"] for row in summary["rungs"]] == [0, 0.25, 0.5, 1, 2, 4, 8, 16]
    assert summary["file"] == str(adapter / "ladder.safetensors")
    assert summary["file_bytes"] == (adapter / "ladder.safetensors").stat().st_size


def test_what_the_command_saves_is_what_is_served(
    tiny: TinyWorld, adapter: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tiny, adapter, f"--calibration={text}", "--calibration-tokens=128", "--window=32", "--rungs=0,0.5,3,6")
    summary = result(capsys)
    assert summary["kind"] == "sensitive" and summary["calibration"]["tokens"] == 128
    source, cpu = AdapterSource("any", str(adapter)), torch.device("cpu")
    served = load_adapters([source], tiny.model, SingleProcess(), torch.float32, cpu).get("any")
    assert served.rungs == (0, 0.5, 3, 6, 16)
    assert list(served.kept_energy) == [row["kept_energy"] for row in summary["rungs"]]
    assert list(served.mean_active_rank) == [row["mean_active_rank"] for row in summary["rungs"]]


def test_the_same_call_gives_the_same_ladder(
    tiny: TinyWorld, adapter: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        run(
            tiny,
            adapter,
            f"--calibration={text}",
            f"--out={tmp_path / name}",
            "--kind=whitened",
            "--allocation=uniform",
        )
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert not (adapter / "ladder.safetensors").exists()


def test_plot(tiny: TinyWorld, adapter: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "spectrum.png"
    run(tiny, adapter, f"--calibration={text}", f"--plot={picture}")
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_plot_without_matplotlib_is_refused_before_anything_is_made(
    tiny: TinyWorld, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "chunkwise.evaluation.ladder_plot", raising=False)
    for module in ("matplotlib", "matplotlib.axes", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(LadderFailed, match=r"--plot needs matplotlib.*pip install 'chunkwise\[plot\]'"):
        run(tiny, adapter, f"--plot={tmp_path / 'x.png'}")
    assert not (adapter / "ladder.safetensors").exists()


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (["--kind=whitened"], InvalidFlags, "--kind whitened needs --calibration FILE"),
        (["--kind=sensitive"], InvalidFlags, "--kind sensitive needs --calibration FILE"),
        (["--calibration=x", "--allocation=uniform"], InvalidFlags, "drop --allocation uniform"),
        (["--calibration=x", "--share=0.9:0.1"], InvalidFlags, "--share is"),
        (["--kind=plain", "--calibration=x"], InvalidFlags, "takes no --calibration"),
        (["--rungs=1,two"], InvalidFlags, "--rungs is '1,two'"),
        (["--rungs=1,nan"], InvalidFlags, "--rungs is '1,nan'"),
        (["--rungs=0.5", "--allocation=uniform"], LadderFailed, r"rungs \[0\.5\] are fractions"),
        (["--window=0"], InvalidFlags, "--window is 0"),
        (["--calibration-tokens=0"], InvalidFlags, "--calibration-tokens is 0"),
        (["--plot=x.pdf"], InvalidFlags, r"x\.pdf.*\.png"),
        (["--rungs=17"], LadderFailed, r"rungs \[17\] are outside 0\.\.16"),
        (["--calibration=/missing"], ChunkwiseError, "/missing cannot be read"),
        (["--out=/missing/ladder.safetensors"], LadderFailed, "cannot be written.*--out"),
    ],
)
def test_what_cannot_be_done_is_refused(
    tiny: TinyWorld, adapter: Path, flags: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(tiny, adapter, *flags)
    assert not (adapter / "ladder.safetensors").exists()


def test_an_adapter_of_another_model_is_refused(tiny: TinyWorld, adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(LadderFailed, match="peft_type"):
        run(tiny, adapter)


def test_spectrum_of_equal_and_of_single_directions() -> None:
    """Four equal singular values have effective rank 4, one alone has 1, none has 0."""
    factors = {(0, "q_proj"): 1.0 * torch.eye(4), (1, "q_proj"): torch.diag(torch.tensor([2.0, 0, 0, 0]))}
    factors[0, "up_proj"] = torch.zeros(4, 4)
    pairs = {key: LoraPair(torch.eye(4), b, 4, 1.0) for key, b in factors.items()}
    rows = {row.target: row for row in spectrum_rows(build_ladder(LoraWeights("a", "hash", pairs)))}
    assert list(rows) == ["q_proj", "up_proj", "all"]
    assert (rows["q_proj"].share, rows["up_proj"].share, rows["all"].share) == (1.0, 0.0, 1.0)
    assert rows["q_proj"].effective_rank == pytest.approx(2.5)
    assert (rows["q_proj"].rank_90, rows["up_proj"].rank_90) == (2.5, 0)


def test_rungs_count_the_parameters_they_use() -> None:
    pairs = {
        (0, "q_proj"): LoraPair(torch.randn(4, 10), torch.randn(6, 4), 4, 1.0),
        (0, "k_proj"): LoraPair(torch.randn(2, 10), torch.randn(8, 2), 2, 1.0),
    }
    rows = rung_rows(build_ladder(LoraWeights("a", "hash", pairs)))
    assert [row.parameters for row in rows] == [0, 16 + 18, 32 + 36, 64 + 36]
    assert [row.fp32_bytes for row in rows] == [4 * row.parameters for row in rows]
    assert rows[-1].truncation_error == 0.0 and not math.isclose(rows[0].truncation_error, 0.0)
