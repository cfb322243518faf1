"""Everything the router counts, in a registry of its own, under TGI's names where TGI counts the same thing.

It is told what happened; it does not look for itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from chunkwise.core import KvFormat, ShardState, SteeringUpdate, StepResult
from chunkwise.steering import SteeringReport

_DURATIONS = tuple(0.00015 * 1.5**i for i in range(35))
_SIZES = tuple(float(2**i) for i in range(11))
_RANKS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)


class PlainCounter(Collector):
    """A counter exported under exactly its own name.

    prometheus_client appends ``_total`` to every Counter, and TGI's names have no suffix. The type is exported as
    untyped, which Prometheus treats as it treats a counter.
    """

    def __init__(self, name: str, documentation: str, registry: CollectorRegistry, label: str | None = None) -> None:
        self._name = name
        self._documentation = documentation
        self._label = label
        self._values: dict[str, float] = {} if label is not None else {"": 0.0}
        registry.register(self)

    def inc(self, value: str = "") -> None:
        """Adds one, for one value of the label if there is a label."""
        self._values[value] = self._values.get(value, 0.0) + 1.0

    def collect(self) -> Iterable[Metric]:
        """Called by the registry at every scrape."""
        metric = Metric(self._name, self._documentation, "unknown")
        for value, count in self._values.items():
            metric.add_sample(self._name, {self._label: value} if self._label is not None else {}, count)
        return [metric]


def _lengths(limit: int) -> tuple[float, ...]:
    return tuple(limit * i / 100 for i in range(1, 101))


class Metrics:
    """The router's metrics. ``max_total_tokens`` sets the buckets of the length histograms.

    The label ``adapter`` is the name of a resident adapter, or empty for the base model; nothing a client sends can add
    another value. Durations are in seconds.
    """

    def __init__(self, max_total_tokens: int) -> None:
        self.registry = CollectorRegistry()
        # By method. To look a label's value up takes longer than to observe.
        self._step_durations: dict[str, tuple[Histogram, ...]] = {}
        self._make_request_metrics(max_total_tokens)
        self._make_batch_metrics()
        self._make_steering_metrics()

    def _make_request_metrics(self, max_total_tokens: int) -> None:
        registry = self.registry
        self.request_count = PlainCounter("tgi_request_count", "Requests received", registry)
        self.request_success = PlainCounter("tgi_request_success", "Requests answered", registry)
        self.request_failure = PlainCounter("tgi_request_failure", "Requests not answered", registry, "err")

        def durations(name: str, documentation: str) -> Histogram:
            return Histogram(name, documentation, buckets=_DURATIONS, registry=registry)

        def lengths(name: str, documentation: str) -> Histogram:
            return Histogram(name, documentation, buckets=_lengths(max_total_tokens), registry=registry)

        self.request_duration = durations("tgi_request_duration", "From arrival to the last token")
        self.validation_duration = durations("tgi_request_validation_duration", "Validation and tokenisation")
        self.queue_duration = durations("tgi_request_queue_duration", "From validation to the first step")
        self.inference_duration = durations("tgi_request_inference_duration", "From the first step to the last token")
        self.time_per_token = durations("tgi_request_mean_time_per_token_duration", "Inference time per token")
        self.input_length = lengths("tgi_request_input_length", "Prompt tokens")
        self.max_new_tokens = lengths("tgi_request_max_new_tokens", "Generated tokens at most")
        self.generated_tokens = lengths("tgi_request_generated_tokens", "Generated tokens")

    def _make_batch_metrics(self) -> None:
        registry = self.registry
        self.queue_size = Gauge("tgi_queue_size", "Requests that wait", registry=registry)
        self.batch_size = Gauge("tgi_batch_current_size", "Requests in the batch", registry=registry)
        self.batch_tokens = Gauge("tgi_batch_current_max_tokens", "Tokens reserved by the batch", registry=registry)
        self.batch_total_tokens = Gauge("tgi_batch_max_total_tokens", "Tokens a batch may reserve", registry=registry)
        self.batch_count = PlainCounter("tgi_batch_inference_count", "Steps launched", registry, "method")
        self.batch_success = PlainCounter("tgi_batch_inference_success", "Steps done", registry, "method")
        self.batch_failure = PlainCounter("tgi_batch_inference_failure", "Steps failed", registry, "method")
        self.batch_concat = PlainCounter("tgi_batch_concat", "Merges into a running batch", registry, "reason")
        self.preemptions = Counter(
            "chunkwise_preemptions", "Running requests put back into the queue for want of memory", registry=registry
        )
        self.next_size = Histogram("tgi_batch_next_size", "Requests admitted", buckets=_SIZES, registry=registry)

        def by_method(name: str, documentation: str) -> Histogram:
            return Histogram(name, documentation, ["method"], buckets=_DURATIONS, registry=registry)

        self.batch_duration = by_method("tgi_batch_inference_duration", "One step, as the router sees it")
        self.forward_duration = by_method("tgi_batch_forward_duration", "The model's part of a step")
        self.decode_duration = by_method("tgi_batch_decode_duration", "Sampling and detokenisation of a step")
        self.filter_duration = by_method("tgi_batch_filter_duration", "Removing requests from the batch")

    def _make_steering_metrics(self) -> None:
        registry = self.registry
        self.adapter_requests = Counter("chunkwise_requests", "Answers completed", ["adapter"], registry=registry)
        self.adapter_tokens = Counter("chunkwise_tokens", "Generated tokens", ["adapter"], registry=registry)
        self.active_rank = Histogram(
            "chunkwise_active_rank", "Mean rank of an answer", ["adapter"], buckets=_RANKS, registry=registry
        )
        self.steering_updates = Counter("chunkwise_steering_updates", "Steering updates sent", registry=registry)
        self.steering_decisions = Counter(
            "chunkwise_steering_decisions", "Decisions in those updates", ["kind"], registry=registry
        )
        by_format = ["shard", "format"]
        self.kv_pages = Gauge("chunkwise_kv_pages", "KV pages in use", by_format, registry=registry)
        self.kv_idle = Gauge("chunkwise_kv_idle_pages", "KV pages kept for reuse alone", by_format, registry=registry)
        self.kv_bytes = Gauge("chunkwise_kv_bytes", "Bytes of those in use", by_format, registry=registry)
        self._make_kv_metrics()
        self.kv_budget = Gauge("chunkwise_kv_bytes_budget", "Bytes the KV cache may hold", ["shard"], registry=registry)
        self.sequences = Gauge("chunkwise_shard_sequences", "Live requests", ["shard"], registry=registry)
        self.steered = Gauge(
            "chunkwise_shard_steered_requests", "Requests with stored decisions", ["shard"], registry=registry
        )
        self.reused_tokens = Gauge(
            "chunkwise_prefix_reused_tokens", "Prompt tokens found in the prefix cache", ["shard"], registry=registry
        )
        self.resident_bytes = Gauge(
            "chunkwise_shard_resident_bytes", "Resident set size of the process", ["shard"], registry=registry
        )

    def _make_kv_metrics(self) -> None:
        def by_shard(name: str, documentation: str) -> Gauge:
            return Gauge(f"chunkwise_kv_{name}", documentation, ["shard"], registry=self.registry)

        self.kv_free = by_shard("free_pages", "Full pages there is room for beside those in use and those kept")
        self.kv_ratio = by_shard("compression_ratio", "Bytes in use over what the same tokens would take in full")
        self.kv_rewritten = by_shard("rewritten_pages", "Pages turned into smaller ones, fewer or none since the start")
        self.kv_dropped = by_shard("dropped_tokens", "Tokens whose keys and values were given up since the start")
        self.kv_evicted = by_shard("evicted_pages", "Kept pages that gave way to requests since the start")

    def step_done(self, method: str, seconds: float, result: StepResult) -> None:
        """One step went well."""
        self.batch_success.inc(method)
        durations = self._step_durations.get(method)
        if durations is None:
            of_step = (self.batch_duration, self.forward_duration, self.decode_duration)
            durations = self._step_durations[method] = tuple([duration.labels(method) for duration in of_step])
        for duration, value in zip(durations, (seconds, result.forward_ns / 1e9, result.decode_ns / 1e9), strict=True):
            duration.observe(value)

    def answer_done(self, adapter: str | None, generated_tokens: int, report: SteeringReport) -> None:
        """One request has got its whole answer."""
        label = adapter or ""
        self.adapter_requests.labels(label).inc()
        self.adapter_tokens.labels(label).inc(generated_tokens)
        if adapter is not None:
            self.active_rank.labels(label).observe(report.mean_rank)

    def steering_update(self, update: SteeringUpdate) -> None:
        """One update went to the shards."""
        self.steering_updates.inc()
        for kind, decisions in (("chunk", update.chunks), ("kv", update.kv), ("release", update.released)):
            self.steering_decisions.labels(kind).inc(len(decisions))

    def shard_states(self, states: Sequence[ShardState]) -> None:
        """What each shard holds now, by rank."""
        for rank, state in enumerate(states):
            shard = str(rank)
            usage = {kv.format: kv for kv in state.kv}
            for kind in KvFormat:
                held = usage.get(kind)
                self.kv_pages.labels(shard, kind.name.lower()).set(held.pages if held is not None else 0)
                self.kv_idle.labels(shard, kind.name.lower()).set(held.idle if held is not None else 0)
                self.kv_bytes.labels(shard, kind.name.lower()).set(held.bytes if held is not None else 0)
            self.kv_budget.labels(shard).set(state.kv_bytes_budget)
            stored = sum(kv.bytes for kv in state.kv)
            self.kv_ratio.labels(shard).set(stored / state.kv_full_bytes if state.kv_full_bytes else 1.0)
            self.kv_free.labels(shard).set(state.kv_free_pages)
            self.kv_rewritten.labels(shard).set(state.kv_rewritten_pages)
            self.kv_dropped.labels(shard).set(state.kv_dropped_tokens)
            self.kv_evicted.labels(shard).set(state.kv_evicted_pages)
            self.sequences.labels(shard).set(state.sequences)
            self.steered.labels(shard).set(state.steered_requests)
            self.reused_tokens.labels(shard).set(state.reused_tokens)
            self.resident_bytes.labels(shard).set(state.resident_bytes)

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)
