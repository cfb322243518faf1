"""Flags of ``chunkwise ladder``. They have no environment variables: names like OUT or KIND mean other things there."""

from __future__ import annotations

import argparse
from pathlib import Path

from chunkwise.config.eval_flags import EVAL_TARGETS


def add_ladder_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the ``ladder`` command to the parser of all commands."""
    parser = commands.add_parser(
        "ladder", help="order an adapter's ranks, save the result beside it, show its spectrum"
    )
    add = parser.add_argument
    add("adapter", metavar="ADAPTER", help="directory of a PEFT adapter, or its id on the Hub")
    add(
        "--model-id",
        "--model",
        required=True,
        help="the base model: directory of a Hugging Face LLaMA checkpoint, or its id on the Hub",
    )
    add(
        "--kind",
        choices=("plain", "whitened", "sensitive"),
        help="order ranks by the weights alone, by their output on the calibration data, or divide them among modules "
        "by how sensitive the loss on those data is (default: sensitive if there are data, else plain)",
    )
    add(
        "--calibration",
        type=Path,
        metavar="FILE",
        help='data like those to be served: text; a .jsonl file holds a document per line, as {"text": …}, or a prompt '
        "with its answer (SQuAD rows, src/tgt pairs, or prompt/completion), of which the answer's loss counts",
    )
    add("--share", default="0:1", metavar="FROM:TO", help="part of the data to use (default: 0:1); report on another")
    add("--target", choices=EVAL_TARGETS, default="fra", help="language to translate English into (default: fra)")
    add("--calibration-tokens", type=int, default=4096, help="tokens to read, spread over the file (default: 4096)")
    add("--window", type=int, default=512, help="most tokens of a document read as one sequence (default: 512)")
    add(
        "--rungs",
        help="rank budgets per module, by comma; with global allocation also fractions, like 0.25 (default: 0, with "
        "global allocation 0.25 and 0.5, and the powers of two); the trained rank is always added",
    )
    add(
        "--allocation",
        choices=("uniform", "global"),
        default="global",
        help="the budget for each module, or what that costs where it is worth most (default: global)",
    )
    add(
        "--out",
        type=Path,
        help="file to write (default: ladder.safetensors in the adapter's directory, where `serve` looks for it)",
    )
    add(
        "--plot",
        type=Path,
        metavar="PNG",
        help="draw spectrum and energy (needs matplotlib: pip install 'chunkwise[plot]')",
    )
    add("--threads", type=int, help="CPU threads; default: the machine's cores")
