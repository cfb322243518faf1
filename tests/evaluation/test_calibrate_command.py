"""The command on the tiny model, from flags to the file that `serve` takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chunkwise.cli import main
from chunkwise.config.calibrate_settings import calibrate_settings
from chunkwise.config.eval_settings import EngineChoice
from chunkwise.config.flags import InvalidFlags, build_parser
from chunkwise.config.policy import load_policy
from chunkwise.config.settings import AdapterSource
from chunkwise.core import ChunkwiseError
from chunkwise.evaluation.driver import load_evaluator
from chunkwise.evaluation.modes import parse_mode
from chunkwise.steering.plans import make_plan
from chunkwise.tokenizer import Tokenizer
from conftest import TinyWorld

WORDS = b"It was the best of times, it was the worst of times, it was the age of wisdom. "


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(WORDS * 10)
    return path


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    path = tmp_path / "answers.jsonl"
    rows = [{"prompt": f"{i} times {i} is", "completion": f" {i * i}"} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(tiny: TinyWorld, out: Path, *flags: str) -> list[str]:
    adapter = f"mine={tiny.adapters['a8']}"
    return ["calibrate", adapter, f"--model={tiny.model}", f"--out={out}", "--threads=1", *flags]


def result(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return document


def test_text_gives_prices_that_meet_the_target_as_served(
    tiny: TinyWorld, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = Tokenizer(tiny.model).encode(WORDS.decode())
    out = tmp_path / "made" / "policy.toml"
    main(arguments(tiny, out, f"--text={text}", "--target-rank=2", "--tokens=512", "--window=64", "--min-length=4"))
    summary = result(capsys)
    policy = load_policy(out)
    section = policy.adapters["mine"]
    assert (section.min_length, section.prompt_rung) == (4, None)
    assert section.answer_tokens and section.answer_rung not in section.answer_tokens.values()
    assert section.prices is not None and set(section.prices.tokens) <= set(ids)
    assert summary["mean_rank"] <= 2.0 and 400 < summary["tokens"] <= 8 * 63
    assert [row["rung"] for row in summary["uniform"]] == [0, 0.25, 0.5, 1, 2, 4, 8]
    assert summary["uniform"][-1] == {"rung": 8, "kl": 0.0, "excess": 0.0}
    assert "price of the token id" in {row["signal"] for row in summary["correlations"]}
    assert '# "t"' in out.read_text()
    stack = load_evaluator(EngineChoice(str(tiny.model), AdapterSource("mine", str(tiny.adapters["a8"])), threads=1))
    mode = parse_mode(f"policy={out}", stack.adapters["mine"])
    assert mode.policy == policy
    plan = make_plan(policy, stack.adapters["mine"])
    assert plan is not None and plan.chunks(ids)[-1].choice.rung == section.answer_rung


def test_a_loss_gives_the_cheapest_that_keeps_it(
    tiny: TinyWorld, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks, before = [], dict[Path, int]()
    common = (f"--text={text}", "--tokens=256", "--window=64", f"--cache={tmp_path / 'labels'}")
    for loss in (0.0, 0.5, 100.0):
        main(arguments(tiny, tmp_path / "p", *common, f"--max-loss={loss}"))
        kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "labels").iterdir()}
        assert len(kept) == 4 and kept == (before or kept), "what is there is not measured again"
        before = kept
        summary = result(capsys)
        assert summary["loss"] <= max(loss, 1e-4)
        ranks.append(summary["mean_rank"])
    assert ranks[0] > ranks[1] > ranks[2] == 0.0
    assert load_policy(tmp_path / "p").adapters["mine"].answer_rung == 0


def test_answers_give_roles(tiny: TinyWorld, answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "policy.toml"
    main(arguments(tiny, out, f"--answers={answers}", "--target-rank=2", "--limit=3", "--share=0.5:1"))
    summary = result(capsys)
    section = load_policy(out).adapters["mine"]
    assert (section.prompt_rung, section.answer_rung) == (summary["prompt_rung"], summary["answer_rung"])
    assert summary["rows"] == 3 and summary["mean_rank"] <= 2.0
    assert summary["nll"] == min(pair["nll"] for pair in summary["tried"])


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (["--target-rank=-1"], InvalidFlags, "--target-rank is -1"),
        (["--max-loss=nan"], InvalidFlags, "--max-loss is nan"),
        (["--target-rank=1", "--share=0.5:0.2"], InvalidFlags, "--share is '0.5:0.2'"),
        (["--target-rank=1", "--share=half"], InvalidFlags, "--share is 'half'"),
        (["--target-rank=1", "--window=1"], InvalidFlags, "--window is 1"),
        (["--target-rank=1", "--min-length=0"], InvalidFlags, "--min-length is 0"),
        (["--target-rank=1", "--window=500", "--share=0:0.5"], ChunkwiseError, "has 1 windows of 500 tokens"),
        (["--target-rank=1", "--window=64", "--out=/proc/none/p"], ChunkwiseError, "cannot be written.*--out"),
    ],
)
def test_what_cannot_be_done_is_refused(
    tiny: TinyWorld, text: Path, tmp_path: Path, flags: list[str], error: type[Exception], message: str
) -> None:
    command = arguments(tiny, tmp_path / "p", f"--text={text}", "--tokens=128", *flags)
    with pytest.raises((error, SystemExit), match=message):
        main(command)


def test_an_adapter_is_named_as_it_is_served() -> None:
    parse = build_parser({}).parse_args
    common = ["--model=m", "--text=t", "--target-rank=1", "--out=o"]
    assert calibrate_settings(parse(["calibrate", "/x/law", *common])).adapter == AdapterSource("law", "/x/law")
    assert calibrate_settings(parse(["calibrate", "a=/x/law", *common])).adapter == AdapterSource("a", "/x/law")
    with pytest.raises(InvalidFlags, match="names 2 adapters"):
        calibrate_settings(parse(["calibrate", "a=/x,b=/y", *common]))
