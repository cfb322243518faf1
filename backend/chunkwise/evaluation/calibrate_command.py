"""``chunkwise calibrate``: measures on the engine where an adapter needs rank, and writes a policy section for it."""

from __future__ import annotations

import argparse
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from chunkwise import __version__
from chunkwise.config.adapter_policy import AdapterPolicy
from chunkwise.config.calibrate_settings import Aim, AnswerSource, CalibrateSettings, TextSource, calibrate_settings
from chunkwise.config.eval_settings import Selection
from chunkwise.core import AdapterInfo, ChunkwiseError
from chunkwise.evaluation.correlations import Correlation, correlations
from chunkwise.evaluation.driver import Evaluator, load_evaluator
from chunkwise.evaluation.identity import file_hash, model_hash
from chunkwise.evaluation.perplexity import answer_passage, windows
from chunkwise.evaluation.policy_text import section_text
from chunkwise.evaluation.prices import Fold, cheapest_rungs, cross_fit, find_price, fit_prices, measure_price
from chunkwise.evaluation.progress import open_progress
from chunkwise.evaluation.rank_labels import LabelCache, RankLabels, measure_labels
from chunkwise.evaluation.role_grid import RoleGrid
from chunkwise.evaluation.rows import completion, draw, read_rows, read_text, take_share
from chunkwise.hub import locate

_DECIMALS = 5


class CalibrationFailed(ChunkwiseError):
    """Data from which no policy can be made, or one that cannot be written."""


@dataclass(frozen=True, slots=True)
class _Result:
    """A section, what was measured for it (JSON values), and the table for people."""

    section: AdapterPolicy
    summary: dict[str, Any]
    table: list[str]


def run(args: argparse.Namespace) -> None:
    """Calibrates, writes and prints the policy's section; the last line is JSON."""
    settings = calibrate_settings(args)
    evaluator = load_evaluator(settings.engine)
    adapter = evaluator.adapters[settings.adapter.name]
    if isinstance(settings.source, TextSource):
        result = _from_text(evaluator, adapter, settings.source, settings)
    else:
        result = _from_answers(evaluator, adapter, settings.source, settings)
    notes = [*_origin(settings), *result.table]
    text = section_text(adapter.adapter_id, result.section, notes, lambda i: evaluator.tokenizer.decode([i]))
    try:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        settings.out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CalibrationFailed(f"the policy cannot be written: {error}; choose another place with --out") from error
    print("\n".join([*notes, "", f"saved to {settings.out}"]))
    print(json.dumps({"adapter": adapter.adapter_id, **result.summary, "out": str(settings.out)}))


def _from_text(evaluator: Evaluator, adapter: AdapterInfo, source: TextSource, settings: CalibrateSettings) -> _Result:
    ids = take_share(evaluator.tokenizer.encode(read_text(source.file), add_special_tokens=False), source.share)
    passages = windows(ids, source.window, source.window)
    if len(passages) < 2:
        raise CalibrationFailed(
            f"{source.file} has {len(passages)} windows of {source.window} tokens in this share; prices need at least "
            "2; give more text, or a smaller --window"
        )
    limit = max(source.tokens // source.window, 2)
    texts = [passage.ids for passage in draw(passages, Selection(limit, 0.0, settings.seed))]
    progress = open_progress(len(texts), 0)
    cache = _cache(settings, evaluator)
    try:
        labels = measure_labels(evaluator, adapter, texts, lambda: progress.update(1), cache)
    except OSError as error:
        raise CalibrationFailed(f"labels cannot be kept: {error}; choose another folder with --cache") from error
    progress.close()

    folds, prices = cross_fit(labels), fit_prices(labels)
    price = _price(folds, adapter, source.min_length, settings.aim)
    rank, loss = measure_price(folds, adapter, source.min_length, price)
    # Tokens of an answer are steered one by one, so that their price per rank is another.
    answer_rung, answer_tokens = cheapest_rungs(prices, adapter, _price(folds, adapter, 1, settings.aim))
    section = AdapterPolicy(
        content_hash=adapter.content_hash,
        rungs=adapter.rungs,
        kept_energy=adapter.kept_energy,
        answer_rung=answer_rung,
        price_per_rank=price,
        min_length=source.min_length,
        prices=prices,
        answer_tokens=answer_tokens,
    )
    uniform = _uniform_rows(adapter, labels)
    found = correlations(folds, _level_of_interest(adapter, rank))
    tokens = sum(len(text.ids) - 1 for text in labels)
    summary = {
        "tokens": tokens,
        "mean_rank": round(rank, _DECIMALS),
        "loss": round(loss, _DECIMALS),
        "price_per_rank": price,
        "answer_rung": section.answer_rung,
        "uniform": uniform,
        "correlations": [asdict(row) for row in found],
    }
    table = [
        f"{tokens} tokens; cross-fitted: mean rank {rank:.3f}, loss {loss:.5f} nats per token against full rank",
        "all tokens at one rung (nats per token against full rank):",
        *(f"  rung {row['rung']:<5} divergence {row['kl']:.5f}  NLL {row['excess']:+.5f}" for row in uniform),
        *_correlation_table(found, adapter.rungs[_level_of_interest(adapter, rank)]),
    ]
    return _Result(section, summary, table)


def _from_answers(
    evaluator: Evaluator, adapter: AdapterInfo, source: AnswerSource, settings: CalibrateSettings
) -> _Result:
    rows = draw(take_share(read_rows(source.file), source.share), Selection(source.limit, 0.0, settings.seed))
    passages = [
        answer_passage(str(index), *completion(row, source.target), evaluator.tokenizer)
        for index, row in enumerate(rows)
    ]
    progress = open_progress(len(adapter.rungs), 0)
    grid = RoleGrid(evaluator, adapter, passages, lambda: progress.update(1))
    aim = settings.aim
    pair = grid.within_rank(aim.target_rank) if aim.target_rank is not None else grid.within_loss(aim.max_loss or 0.0)
    progress.close()
    section = AdapterPolicy(
        content_hash=adapter.content_hash,
        rungs=adapter.rungs,
        kept_energy=adapter.kept_energy,
        answer_rung=pair.answer_rung,
        prompt_rung=pair.prompt_rung,
    )
    tokens = sum(len(passage.ids) - passage.first for passage in passages)
    table = [
        f"{len(passages)} rows, {tokens} answer tokens: mean rank {pair.mean_rank:.3f}, NLL {pair.nll:.4f}; tried:",
        *(
            f"  prompt {p.prompt_rung:<5} answer {p.answer_rung:<5} mean rank {p.mean_rank:6.3f}  NLL {p.nll:.4f}"
            for p in grid.tried
        ),
    ]
    tried = [asdict(p) for p in grid.tried]
    return _Result(section, {"rows": len(passages), "answer_tokens": tokens, **asdict(pair), "tried": tried}, table)


def _cache(settings: CalibrateSettings, evaluator: Evaluator) -> LabelCache | None:
    if settings.cache is None:
        return None
    model = model_hash(locate(settings.engine.model_id, None))
    return LabelCache(settings.cache, f"{__version__} {model} {evaluator.dtype}")


def _price(folds: Sequence[Fold], adapter: AdapterInfo, min_length: int, aim: Aim) -> float:
    """The lowest price per rank that keeps the target rank, or the highest that keeps the loss."""
    low, high = find_price(folds, adapter, min_length, lambda rank, loss: _too_low(aim, rank, loss))
    return high if aim.target_rank is not None else low


def _too_low(aim: Aim, rank: float, loss: float) -> bool:
    """Whether a price per rank may rise: more rank is spent than wanted, or less is lost than allowed."""
    return rank > aim.target_rank if aim.target_rank is not None else loss <= (aim.max_loss or 0.0)


def _level_of_interest(adapter: AdapterInfo, rank: float) -> int:
    """Index of the largest rung of at most the mean rank: what a token would get if all got the same."""
    return max(bisect_right(adapter.mean_active_rank, rank) - 1, 0)


def _uniform_rows(adapter: AdapterInfo, labels: Sequence[RankLabels]) -> list[dict[str, float]]:
    tokens = sum(len(text.ids) - 1 for text in labels)
    kl, excess = (sum(part) / tokens for part in zip(*((t.kl.sum(1), t.excess.sum(1)) for t in labels), strict=True))
    return [
        {"rung": rung, "kl": round(float(kl[i]), _DECIMALS), "excess": round(float(excess[i]), _DECIMALS)}
        for i, rung in enumerate(adapter.rungs)
    ]


def _correlation_table(rows: Sequence[Correlation], rung: float) -> list[str]:
    return [
        f"Spearman's rank correlation at rung {rung} with divergence and NLL: per token | means of 16 tokens",
        *(
            f"  {row.signal:<44} {row.divergence:+.2f} {row.excess:+.2f} | "
            f"{row.stretch_divergence:+.2f} {row.stretch_excess:+.2f}"
            for row in rows
        ),
        "  ranks follow the price of the token id; the other signals are shown to be judged, and have no weight",
    ]


def _origin(settings: CalibrateSettings) -> list[str]:
    source, aim = settings.source, settings.aim
    kind = "text" if isinstance(source, TextSource) else "answers"
    goal = f"mean rank {aim.target_rank}" if aim.target_rank is not None else f"loss of at most {aim.max_loss} nats"
    return [
        f"chunkwise {__version__} calibrate, {kind} {source.file.name} ({file_hash(source.file)}), share "
        f"{source.share[0]}:{source.share[1]}, seed {settings.seed}; aim: {goal}"
    ]
