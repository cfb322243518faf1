from __future__ import annotations

import numpy as np
import pytest

from chunkwise.core import AdapterInfo
from chunkwise.evaluation.prices import cheapest_rungs, cross_fit, find_price, fit_prices, measure_price
from chunkwise.evaluation.rank_labels import RankLabels
from chunkwise.steering.plans import PricePlan
from chunkwise.steering.ranks import rank_choices

ADAPTER = AdapterInfo("a", "h", 4, (0, 1, 4), (0.0, 0.5, 1.0), (0.0, 1.0, 4.0))
NEEDY, EASY = 7, 8


def labels(texts: int = 6, length: int = 200) -> list[RankLabels]:
    """Token 7 loses 1 nat at rung 0 and 0.1 at rung 1, token 8 a tenth of that; each is every other one; with noise."""
    generator = np.random.default_rng(0)
    made = []
    for _ in range(texts):
        ids = generator.choice([NEEDY, EASY], length + 1)
        need = np.where(ids[:-1] == NEEDY, 1.0, 0.1)
        loss = np.stack([need, 0.1 * need, 0.0 * need])
        noise = generator.normal(0.0, 0.01, loss.shape)
        noise[-1] = 0.0
        made.append(RankLabels(tuple(ids.tolist()), loss, 3.0 + loss + noise, np.zeros(length)))
    return made


def test_prices_are_shrunk_means_by_id() -> None:
    made = labels(texts=2, length=20)
    prices = fit_prices(made)
    fed = [(i, t, text) for text in made for t, i in enumerate(text.ids[:-1])]
    for k in range(3):
        mean_kl = sum(text.kl[k, t] for _, t, text in fed) / len(fed)
        mean_excess = sum(text.excess[k, t] for _, t, text in fed) / len(fed)
        assert prices.default[k] == pytest.approx((mean_kl + mean_excess) / 2, abs=1e-6)
        for token_id, row in prices.tokens.items():
            own = [(text.kl[k, t], text.excess[k, t]) for i, t, text in fed if i == token_id]
            kl = (sum(v for v, _ in own) + 8 * mean_kl) / (len(own) + 8)
            excess = (sum(v for _, v in own) + 32 * mean_excess) / (len(own) + 32)
            assert row[k] == pytest.approx((kl + excess) / 2, abs=1e-6)


def test_prices_never_rise_end_at_nothing_and_need_two_tokens() -> None:
    kl = np.array([[0.1, 0.1, 0.1], [0.3, 0.2, 0.5], [0.0, 0.0, 0.0]])
    prices = fit_prices([RankLabels((5, 5, 6, 9), kl, kl, np.zeros(3))])
    assert set(prices.tokens) == {5}
    for row in (prices.default, prices.tokens[5]):
        assert row[0] == row[1] >= row[2] == 0.0


def test_a_price_per_rank_meets_the_target_and_gives_rank_to_those_who_need_it() -> None:
    folds = cross_fit(labels())
    for target in (0.6, 2.0, 3.0):
        low, high = find_price(folds, ADAPTER, 1, lambda rank, loss, target=target: rank > target)
        assert measure_price(folds, ADAPTER, 1, low)[0] > target >= measure_price(folds, ADAPTER, 1, high)[0]
    _, price = find_price(folds, ADAPTER, 1, lambda rank, loss: rank > 0.6)
    share = sum(text.ids[:-1].count(NEEDY) for fold in folds for text in fold.texts) / 1200
    rank, loss = measure_price(folds, ADAPTER, 1, price)
    assert rank == pytest.approx(share)
    assert loss == pytest.approx(0.1 * share + 0.1 * (1 - share), abs=1e-3)


def test_single_tokens_take_the_rung_that_a_chunk_of_one_would() -> None:
    prices = fit_prices(labels())
    for price in (0.01, 0.05, 0.3, 5.0):
        usual, others = cheapest_rungs(prices, ADAPTER, price)
        choices = rank_choices(ADAPTER, 0.0)
        plan = PricePlan(choices, choices[-1], prices, price, 1)
        for token_id in (NEEDY, EASY, 99):
            assert plan.chunks([token_id, token_id])[0].choice.rung == others.get(token_id, usual)
        assert usual not in others.values()


def test_a_loss_may_be_the_aim() -> None:
    folds = cross_fit(labels())
    low, high = find_price(folds, ADAPTER, 1, lambda rank, loss: loss <= 0.2)
    assert measure_price(folds, ADAPTER, 1, low)[1] <= 0.2 < measure_price(folds, ADAPTER, 1, high)[1]


def test_chunks_cost_what_their_tokens_lose_at_the_chunks_rung() -> None:
    folds = cross_fit(labels(length=40))
    rank, loss = measure_price(folds, ADAPTER, 100, 1e-6)
    assert (rank, loss) == (4.0, 0.0)
    rank, loss = measure_price(folds, ADAPTER, 100, 1e6)
    texts = [text for fold in folds for text in fold.texts]
    assert rank == 0.0
    assert loss == pytest.approx(np.mean([text.loss[0].mean() for text in texts]))
