"""The default model with the demo adapter, as `scripts/serve` starts them; skipped where the model is not cached."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import TinyWorld
from e2e.conftest import Server, running
from fetch_model import cache_directory, is_complete

MODEL = cache_directory(os.environ)
DEMO = Path(__file__).parents[2] / "adapters" / "demo-squad-r8"
PROMPT = (
    "Context: The Eiffel Tower was completed in 1889. It stands in Paris and was designed by the company of Gustave "
    "Eiffel.\nQuestion: Who designed the Eiffel Tower?\nAnswer:"
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_complete(MODEL), reason=f"{MODEL} is not there; scripts/fetch_model.py gets it"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    world = TinyWorld(MODEL, {"demo": DEMO})
    with running(world, tmp_path_factory.mktemp("real") / "log", "--num-shard=2", "--no-steering") as server:
        yield server


def test_base_and_demo_adapter_answer_as_transformers_and_peft(server: Server) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    prompt = tokenizer(PROMPT, return_tensors="pt")
    for adapter in (None, "demo"):
        model = model if adapter is None else PeftModel.from_pretrained(model, str(DEMO)).eval()
        with torch.inference_mode():
            ids = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        answer = server.generate(PROMPT, max_new_tokens=16, adapter_id=adapter, details=True)
        assert [token["id"] for token in answer["details"]["tokens"]] == ids.tolist()
        assert answer["generated_text"] == tokenizer.decode(ids, skip_special_tokens=True)


def test_the_demo_adapter_answers_shortly_and_the_base_rambles(server: Server) -> None:
    base = server.generate(PROMPT, max_new_tokens=40, details=True)
    demo = server.generate(PROMPT, max_new_tokens=40, adapter_id="demo", details=True)
    assert demo["generated_text"] == " Gustave Eiffel"
    assert demo["details"]["finish_reason"] == "eos_token"
    assert base["details"]["generated_tokens"] > 2 * demo["details"]["generated_tokens"]
