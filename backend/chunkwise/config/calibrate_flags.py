"""Flags of ``chunkwise calibrate``. They have no environment variables: names like OUT mean other things there."""

from __future__ import annotations

import argparse
from pathlib import Path

from chunkwise.config.eval_flags import EVAL_TARGETS


def add_calibrate_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the ``calibrate`` command to the parser of all commands."""
    parser = commands.add_parser(
        "calibrate", help="measure where an adapter needs rank, and write the policy that spends it there"
    )
    add = parser.add_argument
    add("adapter", metavar="[NAME=]DIR", help="the adapter, by the name it is served under (default: its directory's)")
    add("--model-id", "--model", required=True, help="the base model: directory of a checkpoint, or its id on the Hub")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="running text, for an adapter that goes on with text: ranks follow prices of token ids",
    )
    data.add_argument(
        "--answers",
        type=Path,
        metavar="FILE",
        help="JSON lines of prompts with answers (SQuAD rows, src/tgt pairs, or prompt/completion), for an adapter "
        "that answers: one rank for prompts, one for answers",
    )
    aim = parser.add_mutually_exclusive_group(required=True)
    aim.add_argument("--target-rank", type=float, help="mean active rank to spend, prompts included")
    aim.add_argument("--max-loss", type=float, help="nats per token to lose against full rank, to save rank")
    add("--out", required=True, type=Path, metavar="TOML", help="file to write; `serve --policy` takes it")
    add("--share", default="0:1", metavar="FROM:TO", help="part of the data to use (default: 0:1); report on another")
    add("--tokens", type=int, default=16384, help="text: tokens to read, drawn from the part (default: 16384)")
    add("--window", type=int, default=512, help="text: tokens per window (default: 512)")
    add("--min-length", type=int, default=4, help="text: fewest tokens of a chunk (default: 4)")
    add("--limit", type=int, default=64, help="answers: rows to use, drawn from the part (default: 64)")
    add("--target", choices=EVAL_TARGETS, default="fra", help="language to translate English into (default: fra)")
    add("--cache", type=Path, metavar="DIR", help="text: keep labels here, to try other aims or go on after a stop")
    add("--seed", type=int, default=0, help="seed of the draw (default: 0)")
    add("--threads", type=int, help="CPU threads; default: the machine's cores")
    add("--batch-tokens", type=int, default=8192, help="tokens held at once, answers included (default: 8192)")
    add("--step-tokens", type=int, default=1024, help="most tokens computed in one step (default: 1024)")
