"""Checks the GPU code on a machine with a CUDA device, measures it, and prints one JSON object last.

    scripts/gpu_check [--model DIR] [--quick]

Kernels run their own tests on the device; the model's logits are compared with those of the CPU in fp32, decode graphs
with the same steps run eagerly, and two ranks over nccl with one where there are two devices. Exit status: 0 if all
agree, 1 if not, 2 without a CUDA device (nothing is checked then).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from chunkwise.model.llama import Llama
from chunkwise.model.parallel import DistributedGroup, Group, SingleProcess
from chunkwise.model.spec import load_spec
from chunkwise_adapters.ops import choose_op, cpu
from fetch_model import cache_directory
from gpu_session import Session, random_ladders

ROOT = Path(__file__).parent.parent
KERNEL_TESTS = ["tests/adapters/ops", "tests/model/test_paged_decode.py", "tests/model/test_flash.py"]
RANK = 32
# Largest relative error of a step's logits, as a ratio of norms.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# An 8-bit page may hold the neighbouring step of a value that lies between two.
_INT8_TOLERANCE = 1e-2
_TP_PORT = 29641

Result = dict[str, Any]


def load(
    model: Path, dtype: torch.dtype, device: torch.device, group: Group | None = None, *, cuda_graphs: bool = False
) -> Llama:
    """The model in torch operations and whatever the device's own kernels are."""
    return Llama(model, group or SingleProcess(), dtype, device, cuda_graphs=cuda_graphs)


def play(session: Session, *, compress: bool = False) -> list[Tensor]:
    """Logits of a fixed scenario: prompts of three sequences at once, then decode steps of two and three of them, with
    adapters, rungs and cross-fades mixed; then a step with a fourth prompt."""
    generator = torch.Generator().manual_seed(1)

    def draw(n: int) -> list[int]:
        return torch.randint(0, session.model.spec.vocab, (n,), generator=generator).tolist()

    session.open("a", 0, [(0, 8, 0), (20, None, 4), (37, 2, 3)])
    session.open("b", 1, [(0, 16, 0), (66, 0, 2)])
    session.open("c")
    outputs = [session.step({"a": draw(37), "b": draw(70), "c": draw(17)})]
    if compress:
        session.compress("b")
    for names in ("ab", "abc", "bca", "c", "ca", "abc"):
        outputs.append(session.step({name: draw(1) for name in names}))
    session.open("d", 0, [(0, 4, 0)])
    outputs.append(session.step({"a": draw(1), "d": draw(21), "b": draw(1)}))
    return [output.logits.float().cpu() for output in outputs]


def compare(got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> Result:
    """Largest relative error over the steps, share of equal likeliest tokens, and whether the error is tolerable."""
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True)]
    same = torch.cat([(a.argmax(-1) == b.argmax(-1)).float() for a, b in zip(got, expected, strict=True)])
    worst = max(errors)
    finite = all(bool(step.isfinite().all()) for step in got)
    return {
        "ok": finite and worst <= tolerance,
        "error": worst,
        "same_top1": float(same.mean()),
        "tolerance": tolerance,
    }


def check_model(model: Path, device: torch.device, dtypes: Sequence[torch.dtype]) -> dict[str, Result]:
    """The model on ``device`` against itself on the CPU in fp32, and its graphs against eager steps."""
    cpu = torch.device("cpu")
    ladders = random_ladders(load_spec(model), 2, RANK)
    results: dict[str, Result] = {}
    reference = load(model, torch.float32, cpu)
    for compress in (False, True):
        expected = play(Session(reference, ladders, 64), compress=compress)
        for dtype in dtypes:
            name = f"{str(dtype).removeprefix('torch.')}{', small pages' if compress else ''}"
            tolerance = max(TOLERANCES[dtype], _INT8_TOLERANCE if compress else 0.0)
            eager = play(Session(load(model, dtype, device), ladders, 64), compress=compress)
            results[f"model, {name}"] = compare(eager, expected, tolerance)
            graphs = play(Session(load(model, dtype, device, cuda_graphs=True), ladders, 64), compress=compress)
            results[f"graphs, {name}"] = compare(graphs, eager, TOLERANCES[dtype])
    return results


def check_kernels() -> Result:
    """The kernels' own tests on the device."""
    # Triton 3.9 announces a change of its default on its first compilation, and the tests take warnings for errors.
    options = ["-p", "no:cacheprovider", "-W", "ignore:TRITON_DEFAULT_FP_FUSION"]
    command = [sys.executable, "-m", "pytest", *options, *KERNEL_TESTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    sys.stderr.write(done.stdout[-4000:] if done.returncode else "")
    return {"ok": done.returncode == 0, "summary": (done.stdout.strip().splitlines() or ["nothing was run"])[-1]}


def _rank(rank: int, world: int, model: Path, device_type: str, out: Path) -> None:
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device(device_type)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    group = DistributedGroup(rank, world, f"127.0.0.1:{_TP_PORT}", device, 300)
    logits = play(Session(load(model, torch.float32, device, group), random_ladders(load_spec(model), 2, RANK), 64))
    if rank == 0:
        torch.save(logits, out)
    group.close()


def check_ranks(model: Path, device_type: str) -> Result:
    """Two ranks, on two devices, against one on the first."""
    device = torch.device(device_type, 0) if device_type == "cuda" else torch.device(device_type)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "logits.pt"
        spawn(_rank, (2, model, device_type, out), nprocs=2)  # type: ignore[no-untyped-call]
        got: list[Tensor] = torch.load(out)
    ladders = random_ladders(load_spec(model), 2, RANK)
    expected = play(Session(load(model, torch.float32, device), ladders, 64))
    return compare(got, expected, TOLERANCES[torch.float32])


def median_ms(act: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median time of ``act``, results awaited, after three calls that do not count."""
    times = []
    for _ in range(rounds + 3):
        start = time.perf_counter()
        act()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1000 * (time.perf_counter() - start))
    return round(statistics.median(times[3:]), 3)


def bench_decode(model: Llama, streams: int, rung: int, rounds: int) -> float:
    """ms per decode step of ``streams`` sequences with 128 tokens of context and an adapter each (rung 0: without)."""
    ladders = random_ladders(model.spec, streams, RANK) if rung != 0 else []
    session = Session(model, ladders, streams * (2 + (128 + rounds + 3) // 16))
    names = [str(i) for i in range(streams)]
    for i, name in enumerate(names):
        session.open(name, None if rung == 0 else i, [(0, rung, 0)])
        session.step({name: [1] * 128})
    return median_ms(lambda: session.step({name: [1] for name in names}), model.device, rounds)


def bench_prefill(model: Llama, tokens: int, rounds: int) -> float:
    """ms for one prompt of ``tokens`` tokens with an adapter at full rank."""
    session = Session(model, random_ladders(model.spec, 1, RANK), (rounds + 4) * (1 + tokens // 16))
    names = iter(range(10_000))

    def prompt() -> None:
        name = str(next(names))
        session.open(name, 0)
        session.step({name: [1] * tokens})

    return median_ms(prompt, model.device, rounds)


def bench_lora(model: Llama, streams: int, rounds: int) -> dict[str, float]:
    """ms for the LoRA update of one module, q_proj, by operator: a decode step with an adapter per stream."""
    session = Session(model, random_ladders(model.spec, streams, RANK), streams)
    names = [str(i) for i in range(streams)]
    for i, name in enumerate(names):
        session.open(name, i)
    segments, key = session.prepare({name: [1] for name in names}).segments, (0, "q_proj")
    module = session.adapters[0].modules[key]
    x = torch.ones(streams, module.a.shape[1], dtype=model.dtype, device=model.device)
    y = torch.zeros(streams, module.b_t.shape[1], dtype=model.dtype, device=model.device)
    operators = {"torch": cpu.gated_lora_, "chosen": choose_op(model.device)}
    return {name: median_ms(partial(op, y, x, segments, key), model.device, rounds) for name, op in operators.items()}


def bench(
    model: Path, dtype: torch.dtype, device: torch.device, streams: Sequence[int], rounds: int, prompt: int = 1024
) -> Result:
    """Decode steps at several batch sizes, eagerly and as graphs, at base, rank 8 and full rank; one long prompt."""
    eager, graphs = load(model, dtype, device), load(model, dtype, device, cuda_graphs=True)
    decode = [
        {"streams": n, "mode": mode, "rung": rung, "ms": bench_decode(llama, n, rung, rounds)}
        for n in streams
        for rung in (0, 8, RANK)
        for mode, llama in (("eager", eager), ("graphs", graphs))
    ]
    prefill = bench_prefill(eager, prompt, max(rounds // 4, 1))
    lora = {str(n): bench_lora(eager, n, rounds) for n in streams}
    return {"dtype": str(dtype), "decode": decode, "prefill_tokens": prompt, "prefill_ms": prefill, "lora_ms": lora}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs everything; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=cache_directory(os.environ))
    parser.add_argument("--quick", action="store_true", help="one type, few rounds")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu_check: no CUDA device; nothing was checked", file=sys.stderr)
        return 2
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    dtypes = [torch.bfloat16] if args.quick else [torch.float32, torch.bfloat16, torch.float16]
    checks = {"kernels": check_kernels(), **check_model(args.model, device, dtypes)}
    if torch.cuda.device_count() > 1:
        checks["two ranks, float32"] = check_ranks(args.model, "cuda")
    report = {
        "device": torch.cuda.get_device_name(device),
        "versions": {package: _version(package) for package in ("torch", "triton", "flash-attn")},
        "checks": checks,
        "bench": bench(args.model, torch.bfloat16, device, [1, 8] if args.quick else [1, 8, 32], 20),
    }
    for name, result in checks.items():
        print(f"{'ok    ' if result['ok'] else 'FAILED'} {name}")
    print(json.dumps(report))
    return 0 if all(result["ok"] for result in checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
