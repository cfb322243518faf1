"""The nouns that router and shards share. Plain values: this module knows nothing of protobuf, torch or sockets.

Error tree::

    ChunkwiseError
    ├── InvalidRequest          the client's mistake; ends that request alone
    │   └── UnknownAdapter
    ├── Overloaded              no capacity now; the client may try again
    ├── GenerationFailed        a request was lost while being served
    ├── SteeringViolation       a steering update broke the protocol
    └── UnsupportedModel        cannot be served; refused at start
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal


class ChunkwiseError(Exception):
    """Base of all errors that ChunkWise raises on purpose."""


class InvalidRequest(ChunkwiseError):
    """A request that cannot be served as asked. The message names the value, the limit and the remedy."""


class UnknownAdapter(InvalidRequest):
    """A request that names an adapter which is not resident."""


class Overloaded(ChunkwiseError):
    """Too many requests at once."""


class GenerationFailed(ChunkwiseError):
    """A request was lost while it was being served."""


class SteeringViolation(ChunkwiseError):
    """A steering update that breaks the protocol: out of order, for a computed position, or for an unknown rung."""


class UnsupportedModel(ChunkwiseError):
    """A checkpoint or a parallel layout that this server cannot run."""


class FinishReason(IntEnum):
    """Why a request ended; the numbers are generate.v3's."""

    LENGTH = 0
    EOS_TOKEN = 1
    STOP_SEQUENCE = 2


class KvFormat(IntEnum):
    """How the keys and values of a page are stored; the numbers are steering.v1's."""

    FULL = 0
    INT8 = 1
    INT4 = 2


class KvScorer(IntEnum):
    """How the tokens of a chunk are ranked when only some are kept; the numbers are steering.v1's.

    None needs attention weights. ``KEY_NORM`` keeps keys of small norm, which draw most attention (arXiv 2406.11430);
    ``KEY_DIVERSITY`` keeps keys least like the mean key (KeyDiff, arXiv 2504.15364).
    """

    KEY_NORM = 0
    KEY_DIVERSITY = 1


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must match from beginning to end: a regular expression, or a JSON schema as text."""

    kind: Literal["regex", "json"]
    value: str


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. Defaults are the neutral values of generate.v3."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    typical_p: float = 1.0
    do_sample: bool = False
    seed: int = 0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    watermark: bool = False
    grammar: Grammar | None = None

    @property
    def samples(self) -> bool:
        """Whether a token is drawn; as in TGI, any warper switches sampling on, even with ``do_sample`` false."""
        return self.do_sample or self.temperature != 1.0 or self.top_k != 0 or self.top_p < 1.0 or self.typical_p < 1.0


@dataclass(frozen=True, slots=True)
class StoppingParams:
    """When a request ends. ``max_new_tokens`` counts generated tokens, the last one included."""

    max_new_tokens: int
    stop_sequences: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request as a shard receives it.

    ``prompt_ids`` are the router's token ids; when None the shard tokenises ``inputs`` and keeps the last ``truncate``
    ids (0: all). ``chunk_len`` limits the first step to that many prompt tokens. ``forced_ids``, one per new token, are
    the answer whatever the model prefers (teacher forcing, for evaluation); generate.v3 cannot ask for it.
    ``resumed_ids`` are the tokens that the request got before it was pre-empted; it goes on behind them.
    """

    id: int
    inputs: str
    sampling: SamplingParams
    stopping: StoppingParams
    prompt_ids: tuple[int, ...] | None = None
    truncate: int = 0
    add_special_tokens: bool = True
    adapter_id: str | None = None
    top_n_tokens: int = 0
    chunk_len: int | None = None
    prefill_logprobs: bool = False
    forced_ids: tuple[int, ...] = ()
    resumed_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Token:
    """One token as a client sees it. ``logprob`` is the natural logarithm of its probability after all processors."""

    id: int
    logprob: float
    text: str
    special: bool


@dataclass(frozen=True, slots=True)
class GeneratedText:
    """The end of a request. ``seed`` is set only when the request sampled. ``kv_bytes`` is what the KV pages take that
    it held, on one shard, and ``kv_full_bytes`` what its tokens would have taken in full."""

    text: str
    generated_tokens: int
    finish_reason: FinishReason
    seed: int | None = None
    kv_bytes: int = 0
    kv_full_bytes: int = 0


@dataclass(frozen=True, slots=True)
class RequestError:
    """Why one request of a batch was ended. ``kind`` is "validation" (the client's mistake) or "generation"."""

    message: str
    kind: str


@dataclass(frozen=True, slots=True)
class Generation:
    """What one step produced for one request. ``text`` set, or ``error`` set, means that the request has ended.

    ``prefill_tokens`` is the whole prompt with its logprobs (the first is NaN), once, if the request asked for it.
    """

    request_id: int
    token: Token
    text: GeneratedText | None = None
    top_tokens: tuple[Token, ...] = ()
    error: RequestError | None = None
    prefill_tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class CachedBatch:
    """The live batch of a shard. ``max_tokens`` and ``current_tokens`` are token counts, as in generate.v3.

    ``free_pages`` is how many full pages the KV cache has room for beyond what all live requests need for the tokens
    they have, those of the next step included; below 0 the next steps lack pages. None: the shard does not tell.
    """

    id: int
    request_ids: tuple[int, ...]
    max_tokens: int
    current_tokens: int
    free_pages: int | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """Outcome of one Prefill or Decode. ``batch`` is None when no request is left. Times in nanoseconds."""

    generations: tuple[Generation, ...]
    batch: CachedBatch | None
    forward_ns: int = 0
    decode_ns: int = 0
    total_ns: int = 0


def rank_budget(value: float) -> float:
    """A rung as it is written everywhere: a whole one as an int, so that 4 prints as 4 and not as 4.0."""
    return int(value) if float(value).is_integer() else value


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run ``[start, end)`` of token positions of one request with its mean complexity in [0, 1]."""

    start: int
    end: int
    complexity: float


@dataclass(frozen=True, slots=True)
class RungTable:
    """Rungs of single tokens by token id. ``id`` is the table's number in a steering session, from 1 up."""

    id: int
    rungs: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class ChunkDecision:
    """Opens a chunk at ``start``; it lasts until the next decision of the same request.

    ``rung`` is a rank budget per module, one of the adapter's rungs, perhaps a fraction (None: full rank, 0: skip the
    adapter); ``scale`` multiplies the adapter's output; over the first ``crossfade`` tokens the previous chunk's gate
    is blended in. Tokens that the `RungTable` numbered ``table`` (0: none) holds take its rungs instead, without
    blending; a chunk with a table is the last of its request.
    """

    request_id: int
    start: int
    rung: float | None = None
    scale: float = 1.0
    crossfade: int = 0
    table: int = 0


@dataclass(frozen=True, slots=True)
class KvDecision:
    """The KV policy of the chunk ``[start, end)``: its whole pages are stored in ``format``, and ``drop_percent`` of
    them are given back, those tokens kept that ``scorer`` ranks highest (100: none). A page shared with other tokens
    waits for their decision.

    It takes effect exactly when the positions before ``effective`` are computed, and the step that computes
    ``effective`` sees the result, however the prompt is cut into steps; 0 means before the next step.
    """

    request_id: int
    start: int
    end: int
    format: KvFormat
    drop_percent: int = 0
    scorer: KvScorer = KvScorer.KEY_NORM
    effective: int = 0


@dataclass(frozen=True, slots=True)
class SteeringUpdate:
    """Everything decided since the previous update of a steering session; ``seq`` counts 1, 2, 3, …"""

    seq: int
    chunks: tuple[ChunkDecision, ...] = ()
    kv: tuple[KvDecision, ...] = ()
    released: tuple[int, ...] = ()
    tables: tuple[RungTable, ...] = ()


@dataclass(frozen=True, slots=True)
class SequenceSignals:
    """Model-based signals at ``position``, the last token computed.

    ``entropy`` is that of the raw next-token distribution over ln V, in [0, 1]; ``attention_spread`` is the entropy of
    the chosen heads' attention over ln(context), in [0, 1], or None where the kernel hides the weights.
    """

    request_id: int
    position: int
    entropy: float
    attention_spread: float | None = None


@dataclass(frozen=True, slots=True)
class StepSignals:
    """The signals of one step."""

    step: int
    signals: tuple[SequenceSignals, ...] = ()


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What a router must know of a resident adapter; the three tuples run parallel to ``rungs`` (ascending)."""

    adapter_id: str
    content_hash: str
    trained_rank: int
    rungs: tuple[float, ...]
    kept_energy: tuple[float, ...]
    mean_active_rank: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """Answer to Info. ``page_size`` is generate.v3's block_size, in token positions."""

    dtype: str
    device_type: str
    page_size: int
    max_position_embeddings: int
    model_sha: str = ""
    adapters: tuple[AdapterInfo, ...] = ()


@dataclass(frozen=True, slots=True)
class WarmupLimits:
    """The limits agreed in Warmup, all in tokens."""

    max_input_tokens: int
    max_total_tokens: int
    max_supported_total_tokens: int


@dataclass(frozen=True, slots=True)
class KvUsage:
    """Pages of one format that requests hold, their bytes on one shard, and pages kept for reuse alone."""

    format: KvFormat
    pages: int
    bytes: int
    idle: int = 0


@dataclass(frozen=True, slots=True)
class ShardState:
    """What a shard holds at this moment; ``kv_full_bytes`` is what the same tokens would take in full, and
    ``kv_free_pages`` full pages there is room for beside those kept for reuse. Since the start, ``reused_tokens``
    counts prompt tokens that were not computed because an earlier request had computed them, ``kv_rewritten_pages`` the
    pages that KV decisions turned into smaller ones, fewer or none, ``kv_dropped_tokens`` the tokens given up with
    them, and ``kv_evicted_pages`` the pages kept for reuse that gave way to requests."""

    sequences: int = 0
    steered_requests: int = 0
    kv: tuple[KvUsage, ...] = field(default=())
    kv_bytes_budget: int = 0
    resident_bytes: int = 0
    reused_tokens: int = 0
    kv_rewritten_pages: int = 0
    kv_dropped_tokens: int = 0
    kv_full_bytes: int = 0
    kv_free_pages: int = 0
    kv_evicted_pages: int = 0
