"""What KV policies cost and save: decode steps by page format, memory and perplexity by policy, facts found again.

    .venv/bin/python scripts/bench_kv.py --text ../shared/data/wikitext/wiki.valid.raw

Every policy, and transformers' own caches where ``--rivals`` names them ("full", "hqq", "quanto"), is measured in a
process of its own. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from chunkwise.config.eval_settings import EngineChoice
from chunkwise.config.policy import SteeringPolicy
from chunkwise.evaluation.driver import load_evaluator, make_engine
from chunkwise.evaluation.jobs import Job
from chunkwise.evaluation.kv_service import ALWAYS, serve
from chunkwise.evaluation.kv_speed import decode_seconds
from chunkwise.evaluation.modes import SteeringMode
from chunkwise.evaluation.needle import needles, score
from chunkwise.model.llama import Llama
from chunkwise.model.parallel import SingleProcess
from chunkwise.shard.engine import PAGE_SIZE
from chunkwise.tokenizer import Tokenizer
from chunkwise_adapters.store import AdapterStore
from fetch_model import cache_directory

CPU = torch.device("cpu")


def load(arguments: argparse.Namespace) -> Llama:
    """The model on the kernels, in fp32."""
    return Llama(arguments.model, SingleProcess(), torch.float32, CPU, kernel_threads=arguments.threads)


def prompts(arguments: argparse.Namespace) -> list[tuple[int, ...]]:
    """``--batch`` pieces of the text, one behind the other."""
    ids, size = (
        Tokenizer(arguments.model).encode(arguments.text.read_text(), add_special_tokens=False),
        arguments.context,
    )
    return [tuple(ids[start : start + size]) for start in range(0, arguments.batch * size, size)]


def speed(arguments: argparse.Namespace) -> dict[str, Any]:
    """Median milliseconds of a decode step by page format, in turns."""
    measured = decode_seconds(load(arguments), arguments.batch, arguments.context, PAGE_SIZE, arguments.rounds)
    return {name: round(1e3 * statistics.median(seconds), 2) for name, seconds in measured.items()}


def policy(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """Serves the prompts under one policy."""
    tokens = arguments.batch * (arguments.context + arguments.new_tokens + PAGE_SIZE)
    engine, decisions = make_engine(arguments.model, load(arguments), AdapterStore(None, torch.float32, CPU), tokens)
    engine.warmup([], arguments.step_tokens, None, None)
    texts = prompts(arguments)
    # Buffers, scratch and torch's own memory are there before anything is counted.
    serve(engine, decisions, ALWAYS["int8"], [texts[-1][: 2 * arguments.step_tokens]], 4)
    made = serve(engine, decisions, ALWAYS[name], texts, arguments.new_tokens)
    return asdict(made) | {"perplexity": made.perplexity}


def rival(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """The same in transformers."""
    from chunkwise.evaluation.kv_rival import serve_with_transformers

    torch.set_num_threads(arguments.threads)
    backend = None if name == "full" else name
    made = serve_with_transformers(
        arguments.model, backend, prompts(arguments), arguments.step_tokens, arguments.new_tokens
    )
    return asdict(made) | {"perplexity": made.perplexity}


def needle(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """How many of the planted facts are found under one policy."""
    choice = EngineChoice(
        str(arguments.model),
        dtype="float32",
        threads=arguments.threads,
        batch_tokens=2 * arguments.hay,
        step_tokens=512,
    )
    evaluator = load_evaluator(choice)
    made = needles(evaluator.tokenizer, arguments.text.read_text(), arguments.hay, arguments.depths)
    jobs = [Job(f"{item.depth:.2f}", item.prompt, max_new_tokens=8) for item in made]
    mode = SteeringMode(name, None, SteeringPolicy(kv=ALWAYS[name]))
    texts = [outcome.text for outcome in evaluator.run(jobs, mode)]
    return {"found": score(made, texts), "of": len(made), "texts": texts}


def apart(kind: str, name: str) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", f"{kind}:{name}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    made: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    shown = {key: round(value, 3) if isinstance(value, float) else value for key, value in made.items()}
    print(f"{kind} {name}: {shown}", flush=True)
    return made


def parse() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description="Measures the mixed-format KV cache.")
    parser.add_argument("--model", type=Path, default=cache_directory(os.environ))
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to read, for example WikiText")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=2048, help="tokens per prompt, a multiple of 16")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--step-tokens", type=int, default=512, help="the most prompt tokens a step computes")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--policies", default=",".join(ALWAYS))
    parser.add_argument("--rivals", default="", help="of transformers: full, hqq, quanto")
    parser.add_argument("--hay", type=int, default=4096, help="tokens around a needle; 0 leaves needles out")
    parser.add_argument("--depths", type=int, default=10)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Runs everything that the flags ask for."""
    arguments = parse()
    kinds = {"speed": lambda name: speed(arguments)} | {
        kind.__name__: lambda name, kind=kind: kind(arguments, name) for kind in (policy, rival, needle)
    }
    if arguments.only:
        kind, _, name = arguments.only.partition(":")
        print(json.dumps(kinds[kind](name)))
        return
    policies, rivals = (list(filter(None, text.split(","))) for text in (arguments.policies, arguments.rivals))
    result: dict[str, Any] = {"cpus": os.cpu_count(), "batch": arguments.batch, "context": arguments.context}
    if arguments.rounds:
        result["decode_ms"] = apart("speed", "")
    result["policies"] = {name: apart("policy", name) for name in policies}
    result["transformers"] = {name: apart("rival", name) for name in rivals}
    if arguments.hay:
        result["needles"] = {name: apart("needle", name) for name in policies}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
