"""A shard to be measured: the real engine, lane and gRPC server, with a model that keeps all cores busy for a step and
then returns logits that spell a text; with ``--step-ms 0``, with the real model. Started by scripts/bench_router.py.

It first runs steps alone, with no wire and nobody asking, then serves until SIGTERM and writes what it has measured.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import signal
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar, cast

import torch

from chunkwise.config.settings import ShardSettings
from chunkwise.core import GenerationRequest, SamplingParams, StepResult, StoppingParams
from chunkwise.kv.cache import KvCache, KvShape
from chunkwise.model.llama import Llama, target_slices
from chunkwise.model.parallel import SingleProcess, plan_shard
from chunkwise.model.spec import load_spec
from chunkwise.model.step import StepInput, StepOutput
from chunkwise.shard.decisions import DecisionTable
from chunkwise.shard.engine import Engine, EngineSettings
from chunkwise.shard.grammar import GrammarCompiler
from chunkwise.shard.lane import Lane
from chunkwise.shard.process import load_engine
from chunkwise.shard.server import build_server
from chunkwise.tokenizer import Tokenizer
from chunkwise_adapters.ladder import RankLadder
from chunkwise_adapters.store import AdapterStore

R = TypeVar("R")

CPU = torch.device("cpu")
TOTAL_TOKENS = 65_536
STUB_ADAPTERS = tuple(f"a{i}" for i in range(8))
TEXT = (
    "The harbour master wrote down the names of all the ships that had come in since the storm, and beside each one "
    "what it carried and who had paid for it. Some held salt and timber, some grain, and one a cargo of clocks. "
)
_VARIANTS = 8


def prompt(stream: int) -> str:
    """About 130 tokens that share no page with another stream's."""
    return f"{stream} {TEXT * 3}"


def _burn(until: float) -> None:
    """Keeps one core busy, mostly without the interpreter lock, as a model does."""
    a = torch.randn(256, 256)
    while time.perf_counter() < until:
        torch.mm(a, a)


class StubModel:
    """What the engine uses of a `Llama`. A step takes ``step_seconds`` of ``threads`` cores. Entropies differ from row
    to row and step to step, so that steering has something to decide. ``forward_ns``: how long the last step took."""

    def __init__(self, model_dir: Path, tokenizer: Tokenizer, rows: int, step_seconds: float, threads: int) -> None:
        self.group = SingleProcess()
        self.dtype = self.storage = torch.float32
        self.device = CPU
        self.spec = load_spec(model_dir)
        self.forward_ns = 0
        self._step_seconds = step_seconds
        self._steps = 0
        self._helpers = ThreadPoolExecutor(threads)
        self._threads = threads
        ids = tokenizer.encode(TEXT)
        random = torch.Generator().manual_seed(0)
        self._logits = []
        for variant in range(_VARIANTS):
            logits = torch.randn(rows, self.spec.vocab, generator=random)
            logits *= 2.0 * torch.rand(rows, 1, generator=random)
            likeliest = torch.tensor([ids[(row + variant) % len(ids)] for row in range(rows)])
            self._logits.append(logits.scatter_(1, likeliest[:, None], float(logits.max()) + 1.0))
        self._attention_spread = torch.rand(rows, generator=random)

    def kv_shape(self, page_size: int) -> KvShape:
        """See `Llama`; one layer, since nothing is stored."""
        return KvShape(1, self.spec.kv_heads, self.spec.head_dim, page_size)

    def forward(self, step: StepInput, cache: KvCache) -> StepOutput:
        """See `Llama`."""
        start = time.perf_counter_ns()
        rows = step.last_rows.shape[0]
        logits = self._logits[self._steps % _VARIANTS][:rows]
        self._steps += 1
        until = time.perf_counter() + self._step_seconds
        helpers = [self._helpers.submit(_burn, until) for _ in range(1, self._threads)]
        _burn(until)
        for helper in helpers:
            helper.result()
        self.forward_ns = time.perf_counter_ns() - start
        return StepOutput(logits, torch.empty(0), self._attention_spread[:rows])


def _stub_ladder(name: str) -> RankLadder:
    rungs = (0, 1, 2, 4, 8, 16, 32)
    energy = (0.0, 0.3, 0.5, 0.7, 0.85, 0.95, 1.0)
    return RankLadder(name, f"hash of {name}", 32, rungs, energy, tuple(float(rung) for rung in rungs), {}, {})


def _stub_engine(model: StubModel, tokenizer: Tokenizer, model_dir: Path, decisions: DecisionTable) -> Engine:
    store = AdapterStore(target_slices(model.spec, plan_shard(model.spec, 0, 1)), model.dtype, CPU)
    for name in STUB_ADAPTERS:
        store.add(_stub_ladder(name))
    grammars = GrammarCompiler(model_dir, tokenizer.eos_ids)
    return Engine(cast(Llama, model), tokenizer, store, decisions, grammars, EngineSettings(TOTAL_TOKENS))


@dataclass(slots=True)
class Step:
    """One step: when its call arrived, started, ended and was handed back, what the engine says of it, and the CPU time
    of the process at its end. All in nanoseconds."""

    arrived: int
    started: int = 0
    ended: int = 0
    returned: int = 0
    rows: int = 0
    forward: int = 0
    packing: int = 0
    sampling: int = 0
    cpu: int = 0


class TimedLane(Lane):
    """A lane that notes the times of every step. ``model`` is the stub, if it is one."""

    def __init__(self) -> None:
        super().__init__(SingleProcess())
        self.model: StubModel | None = None
        self.steps: list[Step] = []

    def submit(self, key: int, act: Callable[[], R]) -> asyncio.Future[R]:
        """See `Lane`."""
        step = Step(time.perf_counter_ns())

        def returned(_: asyncio.Future[R]) -> None:
            step.returned = time.perf_counter_ns()

        result = super().submit(key, lambda: self.timed(step, act))
        result.add_done_callback(returned)
        return result

    def timed(self, step: Step, act: Callable[[], R]) -> R:
        """The result of ``act``; if it is a step's, ``step`` is filled in and kept."""
        step.started = time.perf_counter_ns()
        result = act()
        step.ended = time.perf_counter_ns()
        if isinstance(result, tuple) and isinstance(result[0], StepResult):
            step.rows, step.sampling = len(result[0].generations), result[0].decode_ns
            step.forward = self.model.forward_ns if self.model else result[0].forward_ns
            step.packing = result[0].forward_ns - step.forward
            step.cpu = time.process_time_ns()
            self.steps.append(step)
        return result


def summary(steps: list[Step]) -> dict[str, float]:
    """Medians in milliseconds.

    ``gap`` is what the model waits between two steps: ``handover`` between the shard's threads, and ``between`` from
    the end of one call's work to the arrival of the next call, which is conversion, wire and router.
    """
    if len(steps) < 3:
        raise SystemExit(f"{len(steps)} steps were timed, at least 3 are needed; give the run more --steps")
    pairs = list(pairwise(steps))

    def median(values: list[int]) -> float:
        return round(statistics.median(values) / 1e6, 3)

    gaps = [b.started - a.ended for a, b in pairs]
    tenths = [round(gap / 1e6, 3) for gap in statistics.quantiles(gaps, n=10)]
    return {
        "steps": len(steps),
        "period": median([b.started - a.started for a, b in pairs]),
        "step": median([s.ended - s.started for s in steps]),
        "forward": median([s.forward for s in steps]),
        "packing": median([s.packing for s in steps]),
        "sampling": median([s.sampling for s in steps]),
        "rest": median([s.ended - s.started - s.forward - s.packing - s.sampling for s in steps]),
        "gap": median(gaps),
        "gap_p10": tenths[0],
        "gap_p90": tenths[-1],
        "handover": median([a.returned - a.ended + b.started - b.arrived for a, b in pairs]),
        "between": median([b.arrived - a.returned for a, b in pairs]),
        "shard_cpu": round((steps[-1].cpu - steps[0].cpu) / len(pairs) / 1e6, 3),
    }


def _run_alone(engine: Engine, lane: TimedLane, args: argparse.Namespace) -> None:
    stopping = StoppingParams(args.steps, ignore_eos=True)
    adapters = STUB_ADAPTERS if args.step_ms else (None,)
    requests = [
        GenerationRequest(i, prompt(i), SamplingParams(), stopping, adapter_id=adapters[i % len(adapters)])
        for i in range(args.streams)
    ]
    engine.warmup([], TOTAL_TOKENS, None, None)
    batch = engine.prefill(1, requests, None, 0, 0)[0].batch
    while batch is not None:
        batch = lane.timed(Step(0), lambda: engine.decode([1], 0, 0))[0].batch


def _make(args: argparse.Namespace, lane: TimedLane, decisions: DecisionTable) -> Engine:
    if not args.step_ms:
        settings = ShardSettings(
            str(args.model), (args.url,), dtype="float32", max_batch_total_tokens=TOTAL_TOKENS, threads=args.threads
        )
        return load_engine(settings, SingleProcess(), CPU, decisions)
    # The CPU kernels have threads of their own; what torch does beside them it does on one.
    torch.set_num_threads(1)
    tokenizer = Tokenizer(args.model)
    lane.model = StubModel(args.model, tokenizer, args.streams, args.step_ms / 1e3, args.threads)
    return _stub_engine(lane.model, tokenizer, args.model, decisions)


async def _serve(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    decisions, lane = DecisionTable(), TimedLane()
    engine = await lane.run(0, lambda: _make(args, lane, decisions))
    await lane.run(0, lambda: _run_alone(engine, lane, args))
    alone, lane.steps = lane.steps, []
    profile = cProfile.Profile()
    if args.profile:
        await lane.run(0, profile.enable)
    server = build_server(engine, decisions, lane, (args.url,))
    server.add_insecure_port(args.url.replace("unix://", "unix:", 1))
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    await server.start()
    await stopped.wait()
    await server.stop(None)
    if args.profile:
        await lane.run(0, profile.disable)
        profile.dump_stats(args.profile)

    def counted(steps: list[Step]) -> list[Step]:
        return [step for step in steps if step.rows == args.streams][args.skip :]

    return {"alone": summary(counted(alone)), "served": summary(counted(lane.steps))}


def main() -> None:
    """Runs the shard."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--url", required=True, help="unix://path")
    parser.add_argument("--streams", type=int, required=True, help="sequences in a step that counts")
    parser.add_argument("--steps", type=int, required=True, help="steps to run alone")
    parser.add_argument("--skip", type=int, default=10, help="first steps that do not count")
    parser.add_argument("--step-ms", type=float, required=True, help="length of the stub's step; 0: the real model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--record", type=Path, required=True, help="file for the measurements, JSON")
    parser.add_argument("--profile", type=Path, help="file for a cProfile of the engine's thread")
    args = parser.parse_args()
    args.record.write_text(json.dumps(asyncio.run(_serve(args))), encoding="utf-8")


if __name__ == "__main__":
    main()
