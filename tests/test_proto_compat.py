"""generate.v3 is law: every message and field number of TGI's protocol, in the contract's own notation, and nothing of
ours below 100."""

from __future__ import annotations

import re

import pytest

from chunkwise.pb import generate_pb2 as pb
from chunkwise.pb import steering_pb2 as steer_pb

# Names, numbers, [] for repeated and ? for explicit presence: TGI's proto/v3/generate.proto (contract, section 2.4).
CONTRACT = {
    "Batch": "id1 requests2[] size3 max_tokens4 max_blocks5",
    "Request": "id1 inputs2 truncate3 parameters4 stopping_parameters5 prefill_logprobs6 top_n_tokens7 input_chunks8 "
    "blocks9[] slots10[] adapter_id11? cache_len12 add_special_tokens13 chunk_len14?",
    "NextTokenChooserParameters": "temperature1 top_k2 top_p3 typical_p4 do_sample5 seed6 repetition_penalty7 "
    "watermark8 frequency_penalty9 grammar10 grammar_type11",
    "StoppingCriteriaParameters": "max_new_tokens1 stop_sequences2[] ignore_eos_token3",
    "CachedBatch": "id1 request_ids2[] size3 max_tokens4 current_tokens5",
    "Generation": "request_id1 prefill_tokens2 tokens3 generated_text4? top_tokens5[]",
    "Tokens": "ids1[] logprobs2[] texts3[] is_special4[]",
    "GeneratedText": "text1 generated_tokens2 finish_reason3 seed4?",
    "PrefillRequest": "batch1 cached_batch2",
    "DecodeRequest": "batches1[]",
    "PrefillResponse": "generations1[] batch2? forward_ns3 decode_ns4 total_ns5 concat_ns6?",
    "DecodeResponse": "generations1[] batch2? forward_ns3 decode_ns4 total_ns5 concat_ns6?",
    "FilterBatchRequest": "batch_id1 request_ids2[]",
    "FilterBatchResponse": "batch1",
    "ClearCacheRequest": "id1?",
    "ClearCacheResponse": "",
    "InputChunk": "text1 image2",
    "Image": "data1 mimetype2",
    "Input": "chunks1[]",
    "ServiceDiscoveryRequest": "",
    "ServiceDiscoveryResponse": "urls1[]",
    "InfoRequest": "",
    "InfoResponse": "requires_padding1 dtype2 device_type3 window_size4? speculate5 support_chunking6 "
    "use_prefix_caching7 attention_impl8 block_size9",
    "WarmupRequest": "batch1 max_input_tokens2? max_prefill_tokens3 max_total_tokens4?",
    "WarmupResponse": "max_supported_total_tokens1? max_input_tokens2 max_total_tokens3",
    "HealthRequest": "",
    "HealthResponse": "",
}
UINT64 = {"id", "request_id", "request_ids", "batch_id", "seed", "forward_ns", "decode_ns", "total_ns", "concat_ns"}
OURS = {"ShardState", "KvPages", "AdapterInfo", "RequestError"}


@pytest.mark.parametrize("message", CONTRACT)
def test_fields_and_numbers(message: str) -> None:
    fields = pb.DESCRIPTOR.message_types_by_name[message].fields
    found = {}
    for field in fields:
        if field.number >= 100:
            continue
        # Message fields always have presence; the contract marks only those declared optional.
        optional = "?" if field.has_presence and (field.message_type is None or _optional(field)) else ""
        optional = "" if field.containing_oneof is not None and not _optional(field) else optional
        found[f"{field.name}{field.number}{'[]' if field.is_repeated else ''}{optional}"] = field
        if field.name in UINT64:
            assert field.cpp_type == field.CPPTYPE_UINT64, f"{field.full_name} must hold u64 ids"
    assert sorted(found) == sorted(CONTRACT[message].split())


def _optional(field: object) -> bool:
    oneof = field.containing_oneof  # type: ignore[attr-defined]
    return oneof is not None and oneof.name == f"_{field.name}"  # type: ignore[attr-defined]


def test_no_other_messages_but_ours() -> None:
    assert set(pb.DESCRIPTOR.message_types_by_name) == set(CONTRACT) | OURS


def test_service_and_enums() -> None:
    service = pb.DESCRIPTOR.services_by_name["TextGenerationService"]
    assert service.full_name == "generate.v3.TextGenerationService"
    methods = {"Info", "ServiceDiscovery", "ClearCache", "FilterBatch", "Warmup", "Prefill", "Decode", "Health"}
    assert {m.name for m in service.methods} == methods
    assert not any(m.client_streaming or m.server_streaming for m in service.methods)
    enums = {name: [v.number for v in e.values] for name, e in pb.DESCRIPTOR.enum_types_by_name.items()}
    assert enums == {"GrammarType": [0, 1, 2], "FinishReason": [0, 1, 2]}


def test_steering_is_documented_and_starts_its_enums_with_unspecified() -> None:
    for enum in steer_pb.DESCRIPTOR.enum_types_by_name.values():
        assert enum.values_by_number[0].name.endswith("_UNSPECIFIED")
    (service,) = steer_pb.DESCRIPTOR.services_by_name.values()
    assert [method.name for method in service.methods] == ["Steer", "Decode"]
    assert all(method.client_streaming and method.server_streaming for method in service.methods)


def test_every_field_of_ours_has_a_sentence(request: pytest.FixtureRequest) -> None:
    """Comments are not in the descriptor, so the files are read: a field of ours follows a comment naming it."""
    root = request.config.rootpath / "proto"
    for file, ours in (("steering.proto", lambda n: True), ("generate.proto", lambda n: n >= 100)):
        lines = (root / file).read_text(encoding="utf-8").splitlines()
        inside_ours = file == "steering.proto"
        for i, line in enumerate(lines):
            opened = re.match(r"message (\w+)", line)
            if opened:
                inside_ours = file == "steering.proto" or opened.group(1) in OURS
            field = re.match(r"  (?:optional |repeated )?[\w.]+ (\w+) = (\d+);", line)
            if field and (inside_ours or ours(int(field.group(2)))):
                block = i - 1
                while lines[block - 1].strip().startswith("//"):
                    block -= 1
                assert lines[block].strip().startswith(f"// {field.group(1)}"), f"{file}:{i + 1} {line.strip()}"
