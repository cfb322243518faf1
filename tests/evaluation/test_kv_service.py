"""The measurement of KV policies on a tiny model: what it reports is what the engine held, and costs nothing itself."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from chunkwise.evaluation.driver import make_engine
from chunkwise.evaluation.kv_service import ALWAYS, Service, serve
from chunkwise.evaluation.kv_speed import decode_seconds
from chunkwise.model.llama import Llama
from chunkwise.model.parallel import SingleProcess
from chunkwise_adapters.store import AdapterStore
from conftest import TinyWorld

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc")
PROMPTS = [tuple((7 * i + 31 * row) % 256 for i in range(400)) for row in range(2)]


@pytest.fixture(scope="module")
def services(tiny: TinyWorld) -> dict[str, Service]:
    model = Llama(tiny.model, SingleProcess(), torch.float32, CPU, kernel_threads=1)
    engine, decisions = make_engine(tiny.model, model, AdapterStore(None, torch.float32, CPU), 2048)
    engine.warmup([], 128, None, None)
    made = {name: serve(engine, decisions, policy, PROMPTS, 100) for name, policy in ALWAYS.items()}
    engine.check_integrity()
    assert engine.state().sequences == 0
    return made


def test_policies_hold_what_they_say(services: dict[str, Service]) -> None:
    full = services["full"]
    # Both prompts and nearly all of both answers, before the first ends.
    assert full.held == {"full": 63, "int8": 0, "int4": 0}
    assert full.held_bytes == full.held_peak == 63 * 12288
    assert services["int8"].held["int8"] > services["int8"].held["full"]
    assert services["int4"].held_bytes < services["int8"].held_bytes < full.held_bytes
    for kept in ("keep50-norm", "keep50-diversity"):
        assert sum(services[kept].held.values()) < 0.7 * 64
    assert services["window"].held == full.held, "no token lies further back than the window"


def test_perplexity_is_that_of_the_prompts(services: dict[str, Service], tiny: TinyWorld) -> None:
    from transformers import LlamaForCausalLM

    ids = torch.tensor(PROMPTS)
    with torch.inference_mode():
        model = LlamaForCausalLM.from_pretrained(tiny.model)
        logp = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])
    assert services["full"].nll == pytest.approx(-float(logp.mean()), abs=1e-4)
    for service in services.values():
        assert service.perplexity == pytest.approx(math.exp(service.nll))
        assert service.nll == pytest.approx(services["full"].nll, abs=0.3)
        assert service.prompt_seconds > 0 and service.decode_ms > 0


def test_every_format_takes_its_turn(tiny: TinyWorld) -> None:
    model = Llama(tiny.model, SingleProcess(), torch.float32, CPU, kernel_threads=1)
    seconds = decode_seconds(model, batch=2, context=64, page_size=16, rounds=3)
    assert {name: len(measured) for name, measured in seconds.items()} == dict.fromkeys(
        ("full", "int8", "int4", "mixed"), 3
    )
