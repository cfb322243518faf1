"""Processors against transformers' own, and the properties of drawing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    WatermarkLogitsProcessor,
)

from chunkwise.core import Grammar, SamplingParams
from chunkwise.shard.grammar import GrammarCompiler
from chunkwise.shard.sampler import TokenChooser, keep_top_p
from chunkwise.shard.watermark import Watermark
from tiny import make_tokenizer

PROMPT = [3, 5, 5, 9]


def _scores(seed: int, size: int = 50) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


@given(
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 5, 49, 500]),
    top_p=st.sampled_from([0.1, 0.8, 1.0]),
    typical_p=st.sampled_from([0.2, 0.9, 1.0]),
    penalty=st.sampled_from([0.7, 1.0, 1.3]),
    watermark=st.booleans(),
)
def test_processed_scores_equal_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, typical_p: float, penalty: float, watermark: bool
) -> None:
    params = SamplingParams(temperature, top_k, top_p, typical_p, do_sample=True, repetition_penalty=penalty)
    logits = _scores(seed)
    _, log_p = TokenChooser(params, PROMPT, watermark=Watermark(0.4, 1.5) if watermark else None).choose(logits)
    expected, ids = logits[None].clone(), torch.tensor([PROMPT])
    chain = [
        (watermark, lambda: WatermarkLogitsProcessor(50, "cpu", greenlist_ratio=0.4, bias=1.5)),
        (penalty != 1.0, lambda: RepetitionPenaltyLogitsProcessor(penalty)),
        (temperature != 1.0, lambda: TemperatureLogitsWarper(temperature)),
        (top_k > 0, lambda: TopKLogitsWarper(top_k)),
        (top_p < 1.0, lambda: TopPLogitsWarper(top_p)),
        (typical_p < 1.0, lambda: TypicalLogitsWarper(typical_p)),
    ]
    for wanted, make in chain:
        if wanted:
            expected = make()(ids, expected)
    torch.testing.assert_close(log_p, expected[0].log_softmax(-1))


def test_frequency_penalty_counts_prompt_and_output_relative_to_their_number() -> None:
    chooser = TokenChooser(SamplingParams(frequency_penalty=0.5), PROMPT)
    logits = torch.zeros(10)
    logits[7] = 5.0
    first, log_p = chooser.choose(logits)
    assert first == 7
    assert (log_p[5] - log_p[0]).item() == pytest.approx(-0.5 * 2 / 4)
    _, log_p = chooser.choose(logits)
    assert (log_p[7] - log_p[0]).item() == pytest.approx(5.0 - 0.5 * 1 / 5)


@pytest.fixture(scope="module")
def grammars(tmp_path_factory: pytest.TempPathFactory) -> GrammarCompiler:
    directory = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(directory)
    return GrammarCompiler(directory, {257})


LETTER_A = ord("a") - ord("!")


@given(
    seed=st.integers(0, 1000),
    params=st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.3, 1.0, 1.7]),
        top_k=st.sampled_from([0, 1, 5, 10, 26]),
        top_p=st.sampled_from([0.1, 0.8, 1.0]),
        typical_p=st.sampled_from([0.2, 0.9, 1.0]),
        do_sample=st.booleans(),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        frequency_penalty=st.sampled_from([0.0, 0.7]),
    ),
    marked=st.booleans(),
)
def test_a_grammar_acts_after_the_penalties_and_before_the_warpers(
    grammars: GrammarCompiler, seed: int, params: SamplingParams, marked: bool
) -> None:
    """The warpers see a vocabulary of the allowed tokens: the result is that of a chooser which knows no others."""
    logits = _scores(seed, 259)
    watermark = Watermark() if marked else None
    prompt = [LETTER_A, LETTER_A, 3]
    grammar = grammars.compile(Grammar("regex", "[a-z]"))
    id, log_p = TokenChooser(params, prompt, grammar, watermark).choose(logits)
    letters = slice(LETTER_A, LETTER_A + 26)
    assert LETTER_A <= id < LETTER_A + 26
    assert torch.isfinite(log_p).sum() == torch.isfinite(log_p[letters]).sum() > 0
    # Greedy parameters without warpers leave the scores as watermark and penalties made them.
    plain = SamplingParams(repetition_penalty=params.repetition_penalty, frequency_penalty=params.frequency_penalty)
    _, processed = TokenChooser(plain, prompt, watermark=watermark).choose(logits)
    warpers = SamplingParams(params.temperature, params.top_k, params.top_p, params.typical_p, params.do_sample)
    _, expected = TokenChooser(warpers, []).choose(processed[letters])
    torch.testing.assert_close(log_p[letters], expected)


def test_a_grammar_follows_what_is_chosen(grammars: GrammarCompiler) -> None:
    logits = torch.arange(259.0)
    chooser = TokenChooser(SamplingParams(), [1], grammars.compile(Grammar("regex", "(ab|b)c")))
    ids = [chooser.choose(logits)[0] for _ in range(3)]
    assert ids == [LETTER_A + 1, LETTER_A + 2, 257]


def test_the_watermark_follows_what_is_chosen() -> None:
    """With a delta that outweighs everything, each token is green after the one before it, first after the prompt."""
    watermark = Watermark(0.1, 1000.0)
    chooser = TokenChooser(SamplingParams(do_sample=True, seed=1), PROMPT, watermark=watermark)
    previous = PROMPT[-1]
    for seed in range(20):
        id, _ = chooser.choose(_scores(seed, 200))
        assert id in watermark.greenlist(previous, 200)
        previous = id


def test_greedy_is_argmax_and_leaves_the_logits_alone() -> None:
    logits = _scores(1)
    before = logits.clone()
    chooser = TokenChooser(SamplingParams(repetition_penalty=1.2), PROMPT, watermark=Watermark())
    id, log_p = chooser.choose(logits)
    assert torch.equal(logits, before)
    assert id == int(log_p.argmax())


def test_top_k_one_equals_greedy() -> None:
    for seed in range(20):
        logits = _scores(seed)
        assert TokenChooser(SamplingParams(top_k=1, seed=seed), []).choose(logits)[0] == int(logits.argmax())


@given(
    seed=st.integers(0, 1000),
    size=st.sampled_from([1, 2, 50, 3000]),
    spread=st.sampled_from([0.0, 0.1, 1.0, 5.0, 50.0]),
    p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999, 1 - 1e-9]),
)
def test_top_p_keeps_the_fewest_tokens_that_reach_p(seed: int, size: int, spread: float, p: float) -> None:
    """Against its definition in fp64. Sums of fp32 may miss p by a little, so a token more or fewer is right, too."""
    scores = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread
    kept = torch.isfinite(keep_top_p(scores, p))
    probabilities = scores.double().softmax(dim=-1)
    least = probabilities[kept].min()
    assert kept.any()
    assert (probabilities[~kept] <= least).all()
    assert probabilities[kept].sum() >= p - 1e-4
    assert probabilities[probabilities > least].sum() < p + 1e-4


def test_a_token_without_probability_is_never_drawn() -> None:
    scores = torch.tensor([-math.inf, 0.0, -math.inf, -200.0, 0.0, -math.inf])
    chooser = TokenChooser(SamplingParams(do_sample=True, seed=5), [])
    assert {chooser.choose(scores)[0] for _ in range(300)} == {1, 4}


def test_draws_follow_the_distribution() -> None:
    """20,000 draws of a known distribution: every frequency lies within five standard errors."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    chooser = TokenChooser(SamplingParams(do_sample=True, seed=3), [])
    n = 20_000
    counts = torch.bincount(torch.tensor([chooser.choose(p.log())[0] for _ in range(n)]), minlength=4)
    assert ((counts / n - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()


def test_a_chooser_that_takes_the_likeliest_token_takes_that_of_the_raw_logits() -> None:
    for seed in range(20):
        logits = _scores(seed).round()
        chooser = TokenChooser(SamplingParams(), PROMPT)
        assert chooser.takes_likeliest
        id, log_p = chooser.choose(logits)
        assert id == int(logits.argmax())
        torch.testing.assert_close(log_p, logits.log_softmax(dim=-1))


@pytest.mark.parametrize("params", [SamplingParams(top_k=3), SamplingParams(frequency_penalty=0.1)])
def test_only_a_chooser_that_changes_nothing_takes_the_likeliest(params: SamplingParams) -> None:
    assert not TokenChooser(params, PROMPT).takes_likeliest
    assert not TokenChooser(SamplingParams(), PROMPT, watermark=Watermark()).takes_likeliest
