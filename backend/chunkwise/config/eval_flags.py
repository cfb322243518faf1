"""Flags of ``chunkwise eval``. They have no environment variables: names like DATA or LIMIT mean other things there."""

from __future__ import annotations

import argparse
from pathlib import Path

from chunkwise.config.settings import QUANTIZE

EVAL_TASKS = ("wikitext", "nll", "squad", "bleu")
EVAL_TARGETS = ("fra", "deu", "spa")


def add_eval_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the ``eval`` command to the parser of all commands."""
    parser = commands.add_parser("eval", help="quality of one model, adapter and steering mode on a data set")
    add = parser.add_argument
    add("--model-id", required=True, help="directory of a Hugging Face LLaMA checkpoint, or its id on the Hub")
    add("--adapter", metavar="NAME=DIR", help="the adapter to evaluate; default: the base model alone")
    add("--task", required=True, choices=EVAL_TASKS, help="perplexity of text, NLL of answers, SQuAD v2, or BLEU")
    add("--data", required=True, type=Path, help="text file (wikitext) or JSON lines (all others)")
    add("--mode", default="full", help="base, full, rung=K, or policy=FILE.toml (adaptive) (default: full)")
    add("--out", required=True, type=Path, help="result file (JSON lines); an interrupted run goes on where it stopped")
    add("--limit", type=int, help="items to evaluate, drawn with --seed, in the file's order; default: all")
    add("--skip-share", type=float, default=0.0, help="leading share of the data to leave out (default: 0)")
    add("--seed", type=int, default=0, help="seed of the draw and of the bootstrap (default: 0)")
    add("--window", type=int, default=512, help="wikitext: tokens per window (default: 512)")
    add("--stride", type=int, default=256, help="wikitext: new tokens per window (default: 256)")
    add(
        "--scoring",
        choices=("prompt", "decode"),
        help="wikitext, nll: score tokens as part of the prompt, or one by one as if they were generated, which steers "
        "them by the model's signals as an answer is (default: prompt for wikitext, decode for nll)",
    )
    add("--target", choices=EVAL_TARGETS, default="fra", help="language to translate English into (default: fra)")
    add("--max-new-tokens", type=int, help="longest answer (default: 32 for squad, 128 for bleu)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="as of serve")
    add("--quantize", choices=QUANTIZE, help="as of serve")
    add("--threads", type=int, help="CPU threads; default: the machine's cores")
    add("--batch-tokens", type=int, default=8192, help="tokens held at once, answers included (default: 8192)")
    add("--step-tokens", type=int, default=1024, help="most tokens computed in one step (default: 1024)")
