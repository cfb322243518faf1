"""The watermark against transformers' own, which seeds as TGI does, and what a detector makes of marked texts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, WatermarkDetector, WatermarkingConfig, WatermarkLogitsProcessor

from chunkwise.core import SamplingParams, StoppingParams
from chunkwise.shard.watermark import Watermark
from conftest import TinyWorld
from serving import Driver, request


@given(
    previous=st.integers(0, 10**6),
    vocab=st.integers(2, 300),
    gamma=st.floats(0.05, 0.95),
    delta=st.floats(-5.0, 5.0),
)
def test_scores_equal_transformers(previous: int, vocab: int, gamma: float, delta: float) -> None:
    scores = torch.randn(vocab, generator=torch.Generator().manual_seed(previous))
    before = scores.clone()
    got = Watermark(gamma, delta).apply(scores, previous)
    oracle = WatermarkLogitsProcessor(vocab, "cpu", greenlist_ratio=gamma, bias=delta)
    torch.testing.assert_close(got, oracle(torch.tensor([[5, previous]]), before[None])[0])
    assert torch.equal(scores, before)


def test_defaults_are_tgis() -> None:
    """Gamma 0.5, delta 2.0, hash key 15485863, spelt out."""
    generator = torch.Generator().manual_seed(15_485_863 * 77)
    expected = torch.zeros(100)
    expected[torch.randperm(100, generator=generator)[:50]] = 2.0
    assert torch.equal(Watermark().apply(torch.zeros(100), 77), expected)


@pytest.fixture(scope="module")
def driver(tiny: TinyWorld) -> Driver:
    return Driver(tiny.model)


def test_a_detector_finds_the_watermark_in_marked_texts_and_in_no_other(driver: Driver) -> None:
    wanted = {
        id: request(
            id,
            sampling=SamplingParams(do_sample=True, temperature=2.0, seed=id, watermark=id < 4),
            stopping=StoppingParams(250, ignore_eos=True),
        )
        for id in range(8)
    }
    texts = driver.run(*wanted.values())
    detector = WatermarkDetector(
        LlamaConfig(vocab_size=259), "cpu", WatermarkingConfig(greenlist_ratio=0.5, bias=2.0, seeding_scheme="lefthash")
    )
    z = {id: float(detector(torch.tensor([ids]), return_dict=True).z_score[0]) for id, ids in texts.items()}
    assert all(z[id] > 5 for id in range(4)), z
    assert all(abs(z[id]) < 3.5 for id in range(4, 8)), z


def test_company_leaves_a_marked_text_as_it_is(driver: Driver) -> None:
    marked = request(1, new=12, sampling=SamplingParams(watermark=True, repetition_penalty=1.1))
    driver.tokens.clear()
    alone = driver.run(marked)[1]
    plain = driver.run(request(2, new=12))[2]
    driver.tokens.clear()
    assert driver.run(request(2, new=12), marked) == {1: alone, 2: plain}
    assert alone != plain
