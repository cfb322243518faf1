"""Teacher forcing, and the observer that evaluation reads a step's work off."""

from __future__ import annotations

from dataclasses import replace

import pytest

from chunkwise.core import GenerationRequest, StoppingParams
from conftest import TinyWorld
from serving import Driver, request


@pytest.fixture(scope="module")
def driver(tiny: TinyWorld) -> Driver:
    return Driver(tiny.model, tiny.adapters)


def forced(id: int, *ids: int, new: int | None = None) -> GenerationRequest:
    return request(id, forced_ids=ids, stopping=StoppingParams(len(ids) if new is None else new, ignore_eos=True))


def run(driver: Driver, request: GenerationRequest) -> tuple[list[int], list[float]]:
    """The tokens of a request served alone, and their logprobs."""
    result = driver.prefill([request])
    tokens = [generation.token for generation in result.generations]
    while result.batch is not None:
        result = driver.decode(result.batch)
        tokens.extend(generation.token for generation in result.generations)
    return [token.id for token in tokens], [token.logprob for token in tokens]


def test_a_free_answer_forced_again_has_the_same_logprobs(driver: Driver) -> None:
    ids, logprobs = run(driver, request(1, new=6, adapter_id="a8"))
    again_ids, again_logprobs = run(driver, replace(forced(2, *ids), adapter_id="a8"))
    assert again_ids == ids
    assert again_logprobs == pytest.approx(logprobs, abs=1e-5)


def test_forced_and_free_requests_share_a_batch(driver: Driver) -> None:
    alone = driver.run(request(10, new=4))[10]
    together = driver.run(forced(11, 7, 8, 9, 10), request(12, new=4))
    assert together == {11: [7, 8, 9, 10], 12: alone}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (forced(20, 1, 2, new=3), "2 tokens are forced but max_new_tokens is 3"),
        (forced(22, 1, 999), "forced id 999 is beyond the vocabulary of 259 ids"),
    ],
)
def test_forced_tokens_that_cannot_be_are_refused_alone(driver: Driver, bad: GenerationRequest, message: str) -> None:
    answers = driver.run(bad, request(bad.id + 1, new=2))
    assert message in driver.errors[bad.id]
    assert len(answers[bad.id + 1]) == 2


def test_the_observer_sees_every_step_before_pages_are_given_back(driver: Driver) -> None:
    seen: list[list[tuple[int, int, int]]] = []
    driver.engine.watch(lambda batch: seen.append([(s.request.id, s.computed, len(s.pages)) for s in batch]))
    driver.run(forced(30, 1, 2), forced(31, 3))
    prompt = len("Hello there, General.")  # a byte per token, so two pages
    assert seen == [[(30, prompt, 2), (31, prompt, 2)], [(30, prompt + 1, 2)]]
