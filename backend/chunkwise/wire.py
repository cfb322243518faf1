"""Protobuf messages to `core` values and back. Total functions: every message maps, and what is missing takes
generate.v3's neutral value. Checking that a request can be served is not done here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from chunkwise import core
from chunkwise.pb import generate_pb2 as pb
from chunkwise.pb import steering_pb2 as steer_pb

_KV_NAMES = {core.KvFormat.FULL: "full", core.KvFormat.INT8: "int8", core.KvFormat.INT4: "int4"}
_KV_FORMATS = {name: kind for kind, name in _KV_NAMES.items()}
_GRAMMAR_TYPES: dict[Literal["regex", "json"], pb.GrammarType.ValueType] = {
    "json": pb.GRAMMAR_TYPE_JSON,
    "regex": pb.GRAMMAR_TYPE_REGEX,
}
_GRAMMAR_KINDS = {number: kind for kind, number in _GRAMMAR_TYPES.items()}
# A reason that this build does not know reads as the end of the sequence.
_FINISH_REASONS = {int(reason): reason for reason in core.FinishReason}


def _text(request: pb.Request) -> str:
    """The prompt's text: text chunks joined; images are skipped, and without chunks `inputs` counts."""
    texts = [chunk.text for chunk in request.input_chunks.chunks if chunk.HasField("text")]
    return "".join(texts) if texts else request.inputs


def _grammar_from_pb(parameters: pb.NextTokenChooserParameters) -> core.Grammar | None:
    """An empty text is no grammar, and neither is one of no type or of a type that this build does not know."""
    kind = _GRAMMAR_KINDS.get(parameters.grammar_type)
    return core.Grammar(kind, parameters.grammar) if kind and parameters.grammar else None


def request_from_pb(request: pb.Request) -> core.GenerationRequest:
    """One generate.v3 Request. Zero temperature, top_p, typical_p and repetition_penalty (unset) read as neutral 1."""
    p, s = request.parameters, request.stopping_parameters
    return core.GenerationRequest(
        id=request.id,
        inputs=_text(request),
        sampling=core.SamplingParams(
            temperature=p.temperature or 1.0,
            top_k=p.top_k,
            top_p=p.top_p or 1.0,
            typical_p=p.typical_p or 1.0,
            do_sample=p.do_sample,
            seed=p.seed,
            repetition_penalty=p.repetition_penalty or 1.0,
            frequency_penalty=p.frequency_penalty,
            watermark=p.watermark,
            grammar=_grammar_from_pb(p),
        ),
        stopping=core.StoppingParams(s.max_new_tokens, tuple(s.stop_sequences), s.ignore_eos_token),
        prompt_ids=tuple(request.prompt_ids) or None,
        truncate=request.truncate,
        add_special_tokens=request.add_special_tokens,
        adapter_id=request.adapter_id or None,
        top_n_tokens=request.top_n_tokens,
        chunk_len=request.chunk_len if request.HasField("chunk_len") else None,
        prefill_logprobs=request.prefill_logprobs,
        resumed_ids=tuple(request.resumed_ids),
    )


def request_to_pb(request: core.GenerationRequest) -> pb.Request:
    """The inverse of `request_from_pb`."""
    p, s = request.sampling, request.stopping
    return pb.Request(
        id=request.id,
        inputs=request.inputs,
        input_chunks=pb.Input(chunks=[pb.InputChunk(text=request.inputs)]),
        truncate=request.truncate,
        parameters=pb.NextTokenChooserParameters(
            temperature=p.temperature,
            top_k=p.top_k,
            top_p=p.top_p,
            typical_p=p.typical_p,
            do_sample=p.do_sample,
            seed=p.seed,
            repetition_penalty=p.repetition_penalty,
            frequency_penalty=p.frequency_penalty,
            watermark=p.watermark,
            grammar=p.grammar.value if p.grammar else "",
            grammar_type=_GRAMMAR_TYPES[p.grammar.kind] if p.grammar else pb.GRAMMAR_TYPE_NONE,
        ),
        stopping_parameters=pb.StoppingCriteriaParameters(
            max_new_tokens=s.max_new_tokens, stop_sequences=s.stop_sequences, ignore_eos_token=s.ignore_eos
        ),
        top_n_tokens=request.top_n_tokens,
        adapter_id=request.adapter_id,
        add_special_tokens=request.add_special_tokens,
        chunk_len=request.chunk_len,
        prefill_logprobs=request.prefill_logprobs,
        prompt_ids=request.prompt_ids or (),
        resumed_ids=request.resumed_ids,
    )


def batch_to_pb(batch_id: int, requests: Sequence[core.GenerationRequest]) -> pb.Batch:
    """A new batch of requests."""
    return pb.Batch(
        id=batch_id,
        requests=[request_to_pb(request) for request in requests],
        size=len(requests),
        max_tokens=sum(len(r.prompt_ids or ()) + r.stopping.max_new_tokens for r in requests),
    )


def cached_batch_from_pb(batch: pb.CachedBatch) -> core.CachedBatch:
    """A batch that the shard holds."""
    free_pages = batch.free_pages if batch.HasField("free_pages") else None
    return core.CachedBatch(batch.id, tuple(batch.request_ids), batch.max_tokens, batch.current_tokens, free_pages)


def cached_batch_to_pb(batch: core.CachedBatch) -> pb.CachedBatch:
    """The inverse of `cached_batch_from_pb`."""
    return pb.CachedBatch(
        id=batch.id,
        request_ids=batch.request_ids,
        size=len(batch.request_ids),
        max_tokens=batch.max_tokens,
        current_tokens=batch.current_tokens,
        free_pages=batch.free_pages,
    )


def _fill_tokens(message: pb.Tokens, tokens: Iterable[core.Token]) -> None:
    for token in tokens:
        message.ids.append(token.id)
        message.logprobs.append(token.logprob)
        message.texts.append(token.text)
        message.is_special.append(token.special)


def _tokens_from_pb(tokens: pb.Tokens) -> tuple[core.Token, ...]:
    rows = zip(tokens.ids, tokens.logprobs, tokens.texts, tokens.is_special, strict=False)
    return tuple([core.Token(*row) for row in rows])


def _fill_generation(message: pb.Generation, generation: core.Generation) -> None:
    """Sets what is there field by field: there is one per request and step, and this is three times as fast as making
    messages to be copied."""
    message.request_id = generation.request_id
    _fill_tokens(message.tokens, (generation.token,))
    if generation.text is not None:
        text = generation.text
        message.generated_text.text = text.text
        message.generated_text.generated_tokens = text.generated_tokens
        message.generated_text.finish_reason = pb.FinishReason.ValueType(text.finish_reason)
        message.generated_text.kv_bytes = text.kv_bytes
        message.generated_text.kv_full_bytes = text.kv_full_bytes
        if text.seed is not None:
            message.generated_text.seed = text.seed
    if generation.top_tokens:
        _fill_tokens(message.top_tokens.add(), generation.top_tokens)
    if generation.prefill_tokens:
        _fill_tokens(message.prefill_tokens, generation.prefill_tokens)
    if generation.error is not None:
        message.error.message = generation.error.message
        message.error.kind = generation.error.kind


def generations_from_pb(generation: pb.Generation) -> tuple[core.Generation, ...]:
    """One value per token: a speculating shard may send several tokens at once, and the end belongs to the last."""
    text = error = None
    if generation.HasField("generated_text"):
        g = generation.generated_text
        reason = _FINISH_REASONS.get(g.finish_reason, core.FinishReason.EOS_TOKEN)
        seed = g.seed if g.HasField("seed") else None
        text = core.GeneratedText(g.text, g.generated_tokens, reason, seed, g.kv_bytes, g.kv_full_bytes)
    if generation.HasField("error"):
        error = core.RequestError(generation.error.message, generation.error.kind)
    prefill = _tokens_from_pb(generation.prefill_tokens) if generation.HasField("prefill_tokens") else ()
    tokens = _tokens_from_pb(generation.tokens)
    tops = [_tokens_from_pb(top) for top in generation.top_tokens] + [()] * len(tokens)
    last = len(tokens) - 1
    return tuple(
        [
            core.Generation(
                generation.request_id,
                token,
                text if i == last else None,
                tops[i],
                error if i == last else None,
                prefill if i == 0 else (),
            )
            for i, token in enumerate(tokens)
        ]
    )


def result_from_pb(response: pb.PrefillResponse | pb.DecodeResponse) -> core.StepResult:
    """Outcome of a step."""
    return core.StepResult(
        generations=tuple([g for message in response.generations for g in generations_from_pb(message)]),
        batch=cached_batch_from_pb(response.batch) if response.HasField("batch") else None,
        forward_ns=response.forward_ns,
        decode_ns=response.decode_ns,
        total_ns=response.total_ns,
    )


def _fill_result(message: pb.PrefillResponse | pb.DecodeResponse, result: core.StepResult) -> None:
    for generation in result.generations:
        _fill_generation(message.generations.add(), generation)
    if result.batch is not None:
        message.batch.CopyFrom(cached_batch_to_pb(result.batch))
    message.forward_ns = result.forward_ns
    message.decode_ns = result.decode_ns
    message.total_ns = result.total_ns


def result_to_prefill_pb(result: core.StepResult) -> pb.PrefillResponse:
    """Outcome of a step that admitted requests."""
    message = pb.PrefillResponse()
    _fill_result(message, result)
    return message


def result_to_decode_pb(result: core.StepResult) -> pb.DecodeResponse:
    """Outcome of a step over cached batches."""
    message = pb.DecodeResponse()
    _fill_result(message, result)
    return message


def outcome_to_pb(result: core.StepResult, signals: core.StepSignals | None) -> steer_pb.DecodeOutcome:
    """Outcome of a step of a Decode stream that went well."""
    message = steer_pb.DecodeOutcome()
    message.response.SetInParent()
    _fill_result(message.response, result)
    if signals is not None:
        message.signals.CopyFrom(signals_to_pb(signals))
    return message


def info_to_pb(info: core.ShardInfo) -> pb.InfoResponse:
    """Answer to Info."""
    return pb.InfoResponse(
        requires_padding=False,
        dtype=info.dtype,
        device_type=info.device_type,
        support_chunking=True,
        use_prefix_caching=False,
        attention_impl="paged",
        block_size=info.page_size,
        adapters=[
            pb.AdapterInfo(
                adapter_id=a.adapter_id,
                content_hash=a.content_hash,
                trained_rank=a.trained_rank,
                rungs=a.rungs,
                kept_energy=a.kept_energy,
                mean_active_rank=a.mean_active_rank,
            )
            for a in info.adapters
        ],
        model_sha=info.model_sha,
        max_position_embeddings=info.max_position_embeddings,
    )


def info_from_pb(info: pb.InfoResponse) -> core.ShardInfo:
    """The inverse of `info_to_pb`."""
    return core.ShardInfo(
        dtype=info.dtype,
        device_type=info.device_type,
        page_size=info.block_size,
        max_position_embeddings=info.max_position_embeddings,
        model_sha=info.model_sha,
        adapters=tuple(
            core.AdapterInfo(
                a.adapter_id,
                a.content_hash,
                a.trained_rank,
                tuple(map(core.rank_budget, a.rungs)),
                tuple(a.kept_energy),
                tuple(a.mean_active_rank),
            )
            for a in info.adapters
        ),
    )


def state_to_pb(state: core.ShardState) -> pb.ShardState:
    """What a shard holds."""
    return pb.ShardState(
        sequences=state.sequences,
        steered_requests=state.steered_requests,
        kv_pages=[pb.KvPages(format=_KV_NAMES[u.format], used=u.pages, bytes=u.bytes, idle=u.idle) for u in state.kv],
        kv_bytes_budget=state.kv_bytes_budget,
        resident_bytes=state.resident_bytes,
        reused_tokens=state.reused_tokens,
        kv_rewritten_pages=state.kv_rewritten_pages,
        kv_dropped_tokens=state.kv_dropped_tokens,
        kv_full_bytes=state.kv_full_bytes,
        kv_free_pages=state.kv_free_pages,
        kv_evicted_pages=state.kv_evicted_pages,
    )


def state_from_pb(state: pb.ShardState) -> core.ShardState:
    """The inverse of `state_to_pb`; formats this build does not know are left out."""
    return core.ShardState(
        sequences=state.sequences,
        steered_requests=state.steered_requests,
        kv=tuple(
            core.KvUsage(_KV_FORMATS[u.format], u.used, u.bytes, u.idle)
            for u in state.kv_pages
            if u.format in _KV_FORMATS
        ),
        kv_bytes_budget=state.kv_bytes_budget,
        resident_bytes=state.resident_bytes,
        reused_tokens=state.reused_tokens,
        kv_rewritten_pages=state.kv_rewritten_pages,
        kv_dropped_tokens=state.kv_dropped_tokens,
        kv_full_bytes=state.kv_full_bytes,
        kv_free_pages=state.kv_free_pages,
        kv_evicted_pages=state.kv_evicted_pages,
    )


def update_to_pb(update: core.SteeringUpdate) -> steer_pb.SteeringUpdate:
    """One steering update. Scale 1 is sent as unset, its meaning on the wire."""
    return steer_pb.SteeringUpdate(
        seq=update.seq,
        chunks=[
            steer_pb.ChunkDecision(
                request_id=c.request_id,
                start=c.start,
                rung=c.rung,
                scale=None if c.scale == 1.0 else c.scale,
                crossfade=c.crossfade,
                table=c.table,
            )
            for c in update.chunks
        ],
        kv=[
            steer_pb.KvDecision(
                request_id=k.request_id,
                start=k.start,
                end=k.end,
                format=steer_pb.KvFormat.ValueType(k.format),
                drop_percent=k.drop_percent,
                scorer=steer_pb.KvScorer.ValueType(k.scorer),
                effective=k.effective,
            )
            for k in update.kv
        ],
        released=update.released,
        tables=[steer_pb.RungTable(id=t.id, token_ids=t.rungs.keys(), rungs=t.rungs.values()) for t in update.tables],
    )


def update_from_pb(update: steer_pb.SteeringUpdate) -> core.SteeringUpdate:
    """The inverse of `update_to_pb`; a KV format or scorer this build does not know reads as the zero value."""
    formats, scorers = set(map(int, core.KvFormat)), set(map(int, core.KvScorer))
    return core.SteeringUpdate(
        seq=update.seq,
        chunks=tuple(
            core.ChunkDecision(
                c.request_id,
                c.start,
                rung=core.rank_budget(c.rung) if c.HasField("rung") else None,
                scale=c.scale if c.HasField("scale") else 1.0,
                crossfade=c.crossfade,
                table=c.table,
            )
            for c in update.chunks
        ),
        kv=tuple(
            core.KvDecision(
                k.request_id,
                k.start,
                k.end,
                core.KvFormat(k.format if int(k.format) in formats else 0),
                k.drop_percent,
                core.KvScorer(k.scorer if int(k.scorer) in scorers else 0),
                k.effective,
            )
            for k in update.kv
        ),
        released=tuple(update.released),
        tables=tuple(
            core.RungTable(t.id, dict(zip(t.token_ids, map(core.rank_budget, t.rungs), strict=False)))
            for t in update.tables
        ),
    )


def _signal_to_pb(signal: core.SequenceSignals) -> steer_pb.SequenceSignals:
    return steer_pb.SequenceSignals(
        request_id=signal.request_id,
        position=signal.position,
        entropy=signal.entropy,
        attention_spread=signal.attention_spread,
    )


def signals_to_pb(signals: core.StepSignals) -> steer_pb.StepSignals:
    """The signals of one step."""
    return steer_pb.StepSignals(step=signals.step, signals=[_signal_to_pb(s) for s in signals.signals])


def signals_from_pb(signals: steer_pb.StepSignals) -> core.StepSignals:
    """The inverse of `signals_to_pb`."""

    def each(messages: Iterable[steer_pb.SequenceSignals]) -> Iterable[core.SequenceSignals]:
        for s in messages:
            spread = s.attention_spread if s.HasField("attention_spread") else None
            yield core.SequenceSignals(s.request_id, s.position, s.entropy, spread)

    return core.StepSignals(signals.step, tuple(each(signals.signals)))
