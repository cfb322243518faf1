from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from chunkwise import core, wire
from chunkwise.pb import generate_pb2 as pb
from chunkwise.pb import steering_pb2 as steer_pb

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
# The wire holds single precision; values of that width pass unchanged.
F32 = st.floats(width=32, allow_nan=False)
RUNG = st.integers(0, 64) | st.floats(0.0, 64.0).map(core.rank_budget)
POSITIVE = st.floats(min_value=2**-10, max_value=1024, width=32)
NAME = st.text(min_size=1)
IDS = st.lists(U32, min_size=1, max_size=8).map(tuple)

SAMPLING = st.builds(
    core.SamplingParams,
    temperature=POSITIVE,
    top_k=U32,
    top_p=POSITIVE,
    typical_p=POSITIVE,
    do_sample=st.booleans(),
    seed=U64,
    repetition_penalty=POSITIVE,
    frequency_penalty=F32,
    watermark=st.booleans(),
    grammar=st.none() | st.builds(core.Grammar, st.sampled_from(["regex", "json"]), NAME),
)
STOPPING = st.builds(core.StoppingParams, U32, st.lists(st.text()).map(tuple), st.booleans())
REQUEST = st.builds(
    core.GenerationRequest,
    id=U64,
    inputs=st.text(),
    sampling=SAMPLING,
    stopping=STOPPING,
    prompt_ids=st.none() | IDS,
    truncate=U32,
    add_special_tokens=st.booleans(),
    adapter_id=st.none() | NAME,
    top_n_tokens=U32,
    chunk_len=st.none() | U32,
    prefill_logprobs=st.booleans(),
    resumed_ids=st.lists(U32, max_size=8).map(tuple),
)
FREE = st.none() | st.integers(-(2**31), 2**31 - 1)
BATCH = st.builds(core.CachedBatch, U64, st.lists(U64).map(tuple), U32, U32, FREE)
TOKEN = st.builds(core.Token, U32, F32, st.text(), st.booleans())
ENDING = st.builds(core.GeneratedText, st.text(), U32, st.sampled_from(core.FinishReason), st.none() | U64, U64, U64)
GENERATION = st.builds(
    core.Generation,
    U64,
    TOKEN,
    text=st.none() | ENDING,
    top_tokens=st.lists(TOKEN, max_size=4).map(tuple),
    error=st.none() | st.builds(core.RequestError, st.text(), st.sampled_from(["validation", "generation"])),
)
RESULT = st.builds(core.StepResult, st.lists(GENERATION, max_size=4).map(tuple), st.none() | BATCH, U64, U64, U64)
ADAPTER = st.builds(
    core.AdapterInfo,
    st.text(),
    st.text(),
    U32,
    st.lists(RUNG).map(tuple),
    st.lists(F32).map(tuple),
    st.lists(F32).map(tuple),
)
INFO = st.builds(core.ShardInfo, st.text(), st.text(), U32, U32, st.text(), st.lists(ADAPTER, max_size=3).map(tuple))
KV_DECISION = st.builds(
    core.KvDecision,
    U64,
    U32,
    U32,
    st.sampled_from(core.KvFormat),
    st.integers(0, 100),
    st.sampled_from(core.KvScorer),
    U32,
)
USAGE = st.builds(core.KvUsage, st.sampled_from(core.KvFormat), U64, U64)
STATE = st.builds(core.ShardState, U32, U32, st.lists(USAGE, max_size=3).map(tuple), *[U64] * 8)
UPDATE = st.builds(
    core.SteeringUpdate,
    U64,
    st.lists(st.builds(core.ChunkDecision, U64, U32, st.none() | RUNG, F32, U32, U32), max_size=4).map(tuple),
    st.lists(KV_DECISION, max_size=4).map(tuple),
    st.lists(U64, max_size=4).map(tuple),
    st.lists(st.builds(core.RungTable, U32, st.dictionaries(U32, RUNG)), max_size=2).map(tuple),
)
SIGNALS = st.builds(
    core.StepSignals,
    U64,
    st.lists(st.builds(core.SequenceSignals, U64, U32, F32, st.none() | F32), max_size=4).map(tuple),
)


@given(REQUEST)
def test_requests_survive_the_wire(request: core.GenerationRequest) -> None:
    data = wire.request_to_pb(request).SerializeToString()
    assert wire.request_from_pb(pb.Request.FromString(data)) == request


@given(st.lists(REQUEST, max_size=3), U64)
def test_batches_survive_the_wire(requests: list[core.GenerationRequest], batch_id: int) -> None:
    small = [core.GenerationRequest(r.id, r.inputs, r.sampling, core.StoppingParams(5), (1, 2)) for r in requests]
    batch = pb.Batch.FromString(wire.batch_to_pb(batch_id, small).SerializeToString())
    assert (batch.id, batch.size, batch.max_tokens) == (batch_id, len(small), 7 * len(small))
    assert [wire.request_from_pb(request) for request in batch.requests] == small


@given(BATCH)
def test_cached_batches_survive_the_wire(batch: core.CachedBatch) -> None:
    message = pb.CachedBatch.FromString(wire.cached_batch_to_pb(batch).SerializeToString())
    assert wire.cached_batch_from_pb(message) == batch
    assert message.size == len(batch.request_ids)


@given(RESULT)
def test_results_survive_the_wire_in_both_responses(result: core.StepResult) -> None:
    prefill = pb.PrefillResponse.FromString(wire.result_to_prefill_pb(result).SerializeToString())
    decode = pb.DecodeResponse.FromString(wire.result_to_decode_pb(result).SerializeToString())
    assert wire.result_from_pb(prefill) == wire.result_from_pb(decode) == result


@given(INFO)
def test_info_survives_the_wire(info: core.ShardInfo) -> None:
    assert wire.info_from_pb(pb.InfoResponse.FromString(wire.info_to_pb(info).SerializeToString())) == info


@given(STATE)
def test_states_survive_the_wire(state: core.ShardState) -> None:
    assert wire.state_from_pb(pb.ShardState.FromString(wire.state_to_pb(state).SerializeToString())) == state


@given(UPDATE)
def test_updates_survive_the_wire(update: core.SteeringUpdate) -> None:
    data = wire.update_to_pb(update).SerializeToString()
    assert wire.update_from_pb(steer_pb.SteeringUpdate.FromString(data)) == update


@given(SIGNALS)
def test_signals_survive_the_wire(signals: core.StepSignals) -> None:
    data = wire.signals_to_pb(signals).SerializeToString()
    assert wire.signals_from_pb(steer_pb.StepSignals.FromString(data)) == signals


def test_an_empty_request_reads_as_neutral() -> None:
    request = wire.request_from_pb(pb.Request())
    assert request.sampling == core.SamplingParams()
    assert not request.sampling.samples
    assert (request.prompt_ids, request.adapter_id, request.chunk_len) == (None, None, None)


def test_an_empty_grammar_or_one_of_no_known_type_is_none() -> None:
    for type, text in ((pb.GRAMMAR_TYPE_REGEX, ""), (pb.GRAMMAR_TYPE_NONE, "a"), (7, "a")):
        parameters = pb.NextTokenChooserParameters(grammar=text, grammar_type=type)
        assert wire.request_from_pb(pb.Request(parameters=parameters)).sampling.grammar is None


def test_a_prompt_with_an_image_is_its_text() -> None:
    """TGI's warmup sends one to every model."""
    chunks = pb.Input(chunks=[pb.InputChunk(image=pb.Image(data=b"x", mimetype="y")), pb.InputChunk(text="_test ")])
    assert wire.request_from_pb(pb.Request(inputs="![](data)_test ", input_chunks=chunks)).inputs == "_test "
    assert wire.request_from_pb(pb.Request(inputs="plain")).inputs == "plain"


def test_several_tokens_of_one_step_end_with_the_last() -> None:
    tokens = pb.Tokens(ids=[1, 2], logprobs=[-1.0, -2.0], texts=["a", "b"], is_special=[False, True])
    text = pb.GeneratedText(text="ab", generated_tokens=2, finish_reason=pb.FINISH_REASON_EOS_TOKEN)
    first, second = wire.generations_from_pb(pb.Generation(request_id=4, tokens=tokens, generated_text=text))
    assert (first.token, first.text) == (core.Token(1, -1.0, "a", False), None)
    assert second.token == core.Token(2, -2.0, "b", True)
    assert second.text == core.GeneratedText("ab", 2, core.FinishReason.EOS_TOKEN, None)


def test_numbers_and_names_of_a_newer_peer_are_no_errors() -> None:
    ending = pb.GeneratedText.FromString(b"\x18\x63")
    tokens = pb.Tokens(ids=[1], logprobs=[0.0], texts=["a"], is_special=[False])
    (generation,) = wire.generations_from_pb(pb.Generation(tokens=tokens, generated_text=ending))
    assert generation.text is not None
    assert generation.text.finish_reason is core.FinishReason.EOS_TOKEN
    decision = steer_pb.KvDecision.FromString(b"\x20\x63")
    assert wire.update_from_pb(steer_pb.SteeringUpdate(kv=[decision])).kv[0].format is core.KvFormat.FULL
    assert wire.state_from_pb(pb.ShardState(kv_pages=[pb.KvPages(format="fp2")])).kv == ()
