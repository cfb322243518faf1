"""Flags of ``chunkwise experiments``. They have no environment variables, as those of ``chunkwise eval``."""

from __future__ import annotations

import argparse
from pathlib import Path

EXPERIMENTS = ("ablation", "crossfade", "ranks", "policies", "kv")


def add_experiments_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the ``experiments`` command to the parser of all commands."""
    parser = commands.add_parser(
        "experiments", help="one experiment on adapters and their tasks: tables (CSV, Markdown) and a plot (PNG)"
    )
    add = parser.add_argument
    add(
        "name",
        choices=EXPERIMENTS,
        help="ablation: signals of the complexity estimator; crossfade: its window; ranks: quality against rank for "
        "all ladders and the policies; policies: these alone; kv: quality and bytes of KV policies",
    )
    add("--model-id", required=True, help="directory of a Hugging Face LLaMA checkpoint, or its id on the Hub")
    add(
        "--subject",
        nargs=3,
        action="append",
        required=True,
        metavar=("TASK", "ADAPTER", "DATA"),
        help="an adapter (directory, Hub id, or NAME=either; else its name is the directory's) and what it is for: "
        "wikitext with a text file, squad or translation with JSON lines; may be given several times",
    )
    add("--out", required=True, type=Path, help="folder for tables, plot and runs; what it holds is not run again")
    add("--quick", action="store_true", help="few items and arms: to see that everything works, not to be quoted")
    add(
        "--policy",
        action="append",
        default=[],
        metavar="FILE.toml",
        help="ranks, policies, kv: a policy to measure; ablation, crossfade: the one to vary (default: built in); may "
        "be given several times, a policy made for other adapters is passed over; kv takes names of formats too",
    )
    add("--items", type=int, help="items per task instead of the experiment's own number")
    add(
        "--decode-text",
        action="store_true",
        help="policies: score text as if it were generated, in windows of 192 tokens, 32 of them as prompt",
    )
    add("--seed", type=int, default=0, help="seed of the draw of items and of the bootstrap (default: 0)")
    add("--calibration-tokens", type=int, help="ranks: tokens that whitened ladders are fitted to")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="as of serve")
    add("--threads", type=int, help="CPU threads; default: the machine's cores")
    add("--batch-tokens", type=int, default=8448, help="tokens held at once, answers included (default: 8448)")
    add("--step-tokens", type=int, default=1024, help="most tokens computed in one step (default: 1024)")
