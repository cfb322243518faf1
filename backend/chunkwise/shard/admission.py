"""Requests become sequences here, or are refused one by one; a refusal never touches the rest of the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from chunkwise.core import GenerationRequest, InvalidRequest, UnknownAdapter, WarmupLimits
from chunkwise.shard.detokenizer import Detokenizer
from chunkwise.shard.grammar import GrammarCompiler
from chunkwise.shard.sampler import ForcedChooser, TokenChooser
from chunkwise.shard.sequence import Sequence
from chunkwise.shard.watermark import Watermark
from chunkwise.tokenizer import Tokenizer
from chunkwise_adapters.errors import AdapterError
from chunkwise_adapters.store import AdapterStore, ResidentAdapter


@dataclass(frozen=True, slots=True)
class Admission:
    """What a request is checked against. ``vocab`` is the number of token ids the model knows;
    ``agree`` tells whether all tensor-parallel ranks say yes, and is called on all of them or on none."""

    tokenizer: Tokenizer
    adapters: AdapterStore
    vocab: int
    grammars: GrammarCompiler
    watermark: Watermark
    agree: Callable[[bool], bool] = bool

    def admit(self, request: GenerationRequest, limits: WarmupLimits) -> Sequence:
        """A sequence ready for its first step; one that was pre-empted is where it was, but for its keys and values.

        Raises:
            InvalidRequest: an empty or too long prompt, ids beyond the vocabulary, no token to generate, or a grammar
                that cannot be used; forced tokens that are not one per new token; or no token left to resume.
            UnknownAdapter: there is no such adapter. The base model never answers in its place.
            AdapterError: the adapter was evicted and cannot be read again, here or on another rank.
        """
        ids = self._prompt(request)
        _check_length(request, len(ids), limits)
        adapter = self._adapter(request.adapter_id)
        sequence = Sequence(
            request=request,
            prompt_tokens=len(ids),
            ids=ids,
            chooser=self._chooser(request, ids),
            detokenizer=Detokenizer(self.tokenizer, ids, request.stopping.stop_sequences),
            adapter=adapter,
        )
        self._resume(sequence)
        return sequence

    def _resume(self, sequence: Sequence) -> None:
        request = sequence.request
        resumed, new = request.resumed_ids, request.stopping.max_new_tokens
        if not resumed:
            return
        if len(resumed) >= new:
            raise InvalidRequest(f"{len(resumed)} tokens are resumed but max_new_tokens is {new}; none is left")
        if max(resumed) >= self.vocab:
            raise InvalidRequest(f"resumed id {max(resumed)} is beyond the vocabulary of {self.vocab} ids")
        for id in resumed:
            sequence.chooser.replay(id)
            sequence.detokenizer.append(id)
            sequence.ids.append(id)

    def _prompt(self, request: GenerationRequest) -> list[int]:
        if request.prompt_ids is None:
            ids = self.tokenizer.encode(
                request.inputs, add_special_tokens=request.add_special_tokens, truncate=request.truncate
            )
        else:
            ids = list(request.prompt_ids)
        if not ids:
            raise InvalidRequest("the prompt has no tokens; send at least one")
        if max(ids) >= self.vocab:
            raise InvalidRequest(f"prompt id {max(ids)} is beyond the vocabulary of {self.vocab} ids")
        return ids

    def _chooser(self, request: GenerationRequest, ids: list[int]) -> TokenChooser:
        if request.forced_ids:
            _check_forced(request, self.vocab)
            return ForcedChooser(request.forced_ids)
        sampling = request.sampling
        grammar = self.grammars.compile(sampling.grammar) if sampling.grammar is not None else None
        return TokenChooser(sampling, ids, grammar, self.watermark if sampling.watermark else None)

    def _adapter(self, adapter_id: str | None) -> ResidentAdapter | None:
        if adapter_id is None:
            return None
        if adapter_id not in self.adapters.names():
            raise UnknownAdapter(f"adapter {adapter_id!r} is not served; served are {list(self.adapters.names())}")
        try:
            adapter = self.adapters.get(adapter_id)
        except (AdapterError, OSError) as error:
            self.agree(False)
            raise AdapterError(f"adapter {adapter_id!r} cannot be read again: {error}") from error
        # A rank that computed without the others' part would wait for them for ever.
        if not self.agree(True):
            raise AdapterError(f"adapter {adapter_id!r} could not be read by another shard; see its log")
        return adapter


def _check_forced(request: GenerationRequest, vocab: int) -> None:
    forced, new = request.forced_ids, request.stopping.max_new_tokens
    if len(forced) != new:
        raise InvalidRequest(f"{len(forced)} tokens are forced but max_new_tokens is {new}; make them equal")
    if max(forced) >= vocab:
        raise InvalidRequest(f"forced id {max(forced)} is beyond the vocabulary of {vocab} ids")


def _check_length(request: GenerationRequest, prompt_tokens: int, limits: WarmupLimits) -> None:
    new = request.stopping.max_new_tokens
    if new < 1:
        raise InvalidRequest("max_new_tokens is 0; ask for at least 1")
    if prompt_tokens > limits.max_input_tokens:
        raise InvalidRequest(
            f"the prompt has {prompt_tokens} tokens, the limit is {limits.max_input_tokens}; shorten it or set truncate"
        )
    if prompt_tokens + new > limits.max_total_tokens:
        raise InvalidRequest(
            f"{prompt_tokens} prompt tokens and max_new_tokens {new} exceed max_total_tokens "
            f"{limits.max_total_tokens}; lower either"
        )
