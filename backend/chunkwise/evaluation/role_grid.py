"""The ranks of prompt and answer, chosen by the answers' NLL: for adapters whose prompts carry no loss of their own.

A prompt's rank works through the keys and values that the answer attends to, which no label of a prompt's own tokens
shows; so pairs of ranks are tried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from chunkwise.config.policy import KvPolicy, RankPolicy, SteeringPolicy
from chunkwise.core import AdapterInfo
from chunkwise.evaluation.driver import Evaluator
from chunkwise.evaluation.modes import SteeringMode
from chunkwise.evaluation.nll import Passage, evaluate_nll


@dataclass(frozen=True, slots=True)
class RolePair:
    """Rungs of prompt and answer, the mean rank over all tokens of the passages, and the answers' NLL per token."""

    prompt_rung: float
    answer_rung: float
    mean_rank: float
    nll: float


class RoleGrid:
    """Tries pairs on passages, whose first scored token begins the answer; every pair is run once.

    Attributes:
        tried: the pairs so far, in the order of trial.
    """

    def __init__(
        self, evaluator: Evaluator, adapter: AdapterInfo, passages: Sequence[Passage], done: Callable[[], object]
    ) -> None:
        self._evaluator = evaluator
        self._adapter = adapter
        self._passages = passages
        self._done = done
        self.tried: list[RolePair] = []
        # The last prompt token counts as answer, and the last token of all is never fed.
        self._prompt = sum(passage.first - 1 for passage in passages)
        self._answer = sum(len(passage.ids) - passage.first for passage in passages)

    def mean_rank(self, prompt_rung: float, answer_rung: float) -> float:
        """Active rank averaged over the fed tokens of all passages."""
        ranks = dict(zip(self._adapter.rungs, self._adapter.mean_active_rank, strict=True))
        total = self._prompt * ranks[prompt_rung] + self._answer * ranks[answer_rung]
        return total / (self._prompt + self._answer)

    def measure(self, prompt_rung: float, answer_rung: float) -> RolePair:
        """The NLL of the answers at a pair."""
        for pair in self.tried:
            if (pair.prompt_rung, pair.answer_rung) == (prompt_rung, answer_rung):
                return pair
        rank = RankPolicy(prompt_rung=prompt_rung, answer_rung=answer_rung)
        policy = SteeringPolicy(rank=rank, kv=KvPolicy(kind="full"))
        mode = SteeringMode("roles", self._adapter.adapter_id, policy)
        scores = evaluate_nll(self._evaluator, self._passages, mode, "decode")
        nll = sum(map(sum, (score.nll for score in scores))) / sum(len(score.nll) for score in scores)
        pair = RolePair(prompt_rung, answer_rung, self.mean_rank(prompt_rung, answer_rung), nll)
        self.tried.append(pair)
        self._done()
        return pair

    def within_rank(self, target: float) -> RolePair:
        """The best pair of at most the mean rank ``target``: with every rung for the answer, the largest for the prompt
        that the target still allows, but none above the answer's. The smallest pair, if none is allowed."""
        rungs = self._adapter.rungs
        pairs = []
        for answer in rungs:
            allowed = [prompt for prompt in rungs if prompt <= answer and self.mean_rank(prompt, answer) <= target]
            if allowed:
                pairs.append(self.measure(allowed[-1], answer))
        return min(pairs, key=lambda pair: pair.nll) if pairs else self.measure(rungs[0], rungs[0])

    def within_loss(self, most: float) -> RolePair:
        """A cheap pair whose NLL exceeds that of full rank by at most ``most`` nats per token: the smallest rung for
        the prompt that allows it with a full-rank answer, then the smallest for the answer. Full rank, if none does."""
        rungs = self._adapter.rungs
        best = self.measure(rungs[-1], rungs[-1])
        limit = best.nll + most
        for prompt in rungs:
            pair = self.measure(prompt, rungs[-1])
            if pair.nll <= limit:
                best = pair
                break
        for answer in rungs:
            pair = self.measure(best.prompt_rung, answer)
            if pair.nll <= limit:
                return pair
        return best
