"""Prometheus metrics: vLLM's names under `draftkit:`, and what speculation costs and earns.

Counters and gauges are read from the engine's snapshot when somebody scrapes; histograms are fed as things
happen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from draftkit.schedule.gate import GateState

_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_GAP = (0.0002, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1, 2)
_TOKENS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_LENGTH = tuple(1 + i / 2 for i in range(15))

# name after "draftkit:", kind, attribute of EngineMetrics, help
_FROM_ENGINE = (
    ("num_requests_running", "gauge", "running", "Requests that are being decoded or prefilled"),
    ("num_requests_waiting", "gauge", "waiting", "Requests that wait for room"),
    ("num_preemptions", "counter", "preemptions", "Requests that were put back because memory ran out"),
    ("prefix_cache_queries", "counter", "prefix_queries", "Prompt tokens looked up in the prefix cache"),
    ("prefix_cache_hits", "counter", "prefix_hits", "Prompt tokens found in the prefix cache"),
    (
        "spec_decode_num_drafts",
        "counter",
        "rounds",
        "Rounds, counted per request, also those in which nothing was drafted",
    ),
    ("spec_decode_num_draft_tokens", "counter", "drafted", "Tokens that the drafter offered"),
    (
        "spec_decode_num_verified_tokens",
        "counter",
        "verified",
        "Drafted tokens that the target verified (the budget)",
    ),
    ("spec_decode_num_accepted_tokens", "counter", "accepted", "Drafted tokens that were accepted"),
    ("spec_decode_num_wasted_tokens", "counter", "wasted", "Verified tokens that were not accepted"),
    ("draft_seconds", "counter", "draft_seconds", "Time in the drafter's passes"),
    ("verify_seconds", "counter", "verify_seconds", "Time in the target's passes"),
    ("other_seconds", "counter", "other_seconds", "Time of steps outside both models' passes"),
)


class ServerMetrics:
    """All metrics of one server, in a registry of its own, labelled with the model's name once that is known
    (`watch`)."""

    def __init__(self) -> None:
        self.generated = 0  # tokens since the start
        self._begin("")

    def watch(self, engine: Any, name: str) -> None:
        """The model is loaded, and nothing was counted before: from now on the scrape has its name and the
        engine's numbers."""
        self._begin(name)
        self._registry.register(_EngineCollector(engine, name))

    def _begin(self, model: str) -> None:
        self._model, self._registry = model, CollectorRegistry()

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            family = Histogram(
                f"draftkit:{name}", text, ["model_name"], buckets=buckets, registry=self._registry
            )
            return family.labels(model)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"draftkit:{name}", text, ["model_name"], registry=self._registry).labels(model)

        def counters(name: str, text: str, label: str) -> Counter:
            return Counter(f"draftkit:{name}", text, ["model_name", label], registry=self._registry)

        self._first = histogram("time_to_first_token_seconds", "From arrival to the first token", _LATENCY)
        self._gap = histogram("inter_token_latency_seconds", "Time per token after the first", _GAP)
        self._whole = histogram("e2e_request_latency_seconds", "From arrival to the last token", _LATENCY)
        self._queue = histogram("request_queue_time_seconds", "Time before the first prefill step", _LATENCY)
        self._prefill = histogram("request_prefill_time_seconds", "Time in prefill", _LATENCY)
        self._decode = histogram("request_decode_time_seconds", "Time in decode", _LATENCY)
        self._length = histogram(
            "spec_decode_accepted_length", "Tokens per round of a request, bonus included", _LENGTH
        )
        self._verified = histogram(
            "step_verified_tokens", "Verification budget: drafted tokens verified in a step", _TOKENS
        )
        self._drafted = histogram("step_drafted_tokens", "Tokens drafted in a step", _TOKENS)
        self._prompt = counter(
            "prompt_tokens", "Prompt tokens of requests that finished, or were aborted while they answered"
        )
        self._cached = counter("prompt_tokens_cached", "Of these, found in the prefix cache")
        self._generated = counter("generation_tokens", "Tokens made")
        self._finished = counters(
            "request_success", "Finished requests; abort: the client left", "finished_reason"
        )
        self._rejections = counters("admission_rejections", "Requests that were turned away", "reason")

    def on_rejection(self, reason: str) -> None:
        """A request was turned away."""
        self._rejections.labels(self._model, reason).inc()

    def on_step(self, before: Any, after: Any) -> None:
        """One engine step: `before` and `after` are EngineMetrics. Called from the engine's thread."""
        if after.drafted != before.drafted or after.verified != before.verified:
            self._drafted.observe(after.drafted - before.drafted)
            self._verified.observe(after.verified - before.verified)

    def on_tokens(self, seconds: float, count: int, first: bool) -> None:
        """`count` tokens of one answer, `seconds` after its arrival (`first`) or after its last tokens.

        Tokens of one round arrive together; each gets an equal share of the gap.
        """
        self.generated += count
        self._generated.inc(count)
        if first:
            self._first.observe(seconds)
            return
        for _ in range(count):
            self._gap.observe(seconds / count)

    def on_finish(self, seconds: float, reason: str, stats: Any) -> None:
        """An answer is complete; `stats` is its RequestStats."""
        self._count(reason, stats)
        self._whole.observe(seconds)
        self._queue.observe(stats.queue_seconds)
        self._prefill.observe(stats.prefill_seconds)
        self._decode.observe(stats.decode_seconds)
        if stats.rounds:
            self._length.observe(1 + stats.accepted / stats.rounds)

    def on_abort(self, stats: Any) -> None:
        """Nobody waits for an answer any more; `stats` is its RequestStats, None when it had not begun. It is
        in no histogram of whole answers."""
        self._count("abort", stats)

    def _count(self, reason: str, stats: Any) -> None:
        self._finished.labels(self._model, reason).inc()
        if stats is not None:
            self._prompt.inc(stats.prompt_tokens)
            self._cached.inc(stats.cached_tokens)

    def render(self) -> bytes:
        """The text format that Prometheus scrapes."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Reads one snapshot per scrape."""

    def __init__(self, engine: Any, name: str) -> None:
        self._engine = engine
        self._name = name

    def describe(self) -> list[Metric]:
        """Nothing is known before the first scrape; this keeps registration from reading the engine."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All of the engine's numbers as Prometheus families."""
        now = self._engine.metrics
        for name, kind, attribute, text in _FROM_ENGINE:
            yield self._family(kind, name, text, float(getattr(now, attribute)))
        usage = now.kv_used / now.kv_total if now.kv_total else 0.0
        yield self._family("gauge", "kv_cache_usage_perc", "Used part of the KV blocks, 0 to 1", usage)
        yield self._family("gauge", "kv_blocks_used", "KV blocks in use", float(now.kv_used))
        yield self._family("gauge", "kv_blocks_total", "KV blocks there are", float(now.kv_total))
        mean = 1 + now.accepted / now.rounds if now.rounds else 1.0
        yield self._family(
            "gauge", "spec_decode_mean_accepted_length", "Tokens per round since the start", mean
        )
        positions = CounterMetricFamily(
            "draftkit:spec_decode_num_accepted_tokens_per_pos",
            "Accepted tokens by place in the proposal",
            labels=["model_name", "position"],
        )
        for position, count in enumerate(now.accepted_per_position):
            positions.add_metric([self._name, str(position)], float(count))
        yield positions
        if now.gate is not None:
            yield from self._gate(now.gate)
        error = now.calibration_error
        if error is not None:
            text = "Expected calibration error of the confidences, 0 to 1"
            yield self._family("gauge", "confidence_calibration_error", text, float(error))

    def _gate(self, gate: GateState) -> Iterator[Metric]:
        text = "1 while steps draft at the present load, 0 while the drafter rests"
        yield self._family("gauge", "spec_decode_drafting", text, float(gate.drafting))
        speeds = GaugeMetricFamily(
            "draftkit:spec_decode_tokens_per_second",
            "Of steps with and without drafts, as last measured at the present load; 0 before that",
            labels=["model_name", "drafts"],
        )
        for drafts, speed in (("on", gate.with_drafts), ("off", gate.without_drafts)):
            speeds.add_metric([self._name, drafts], speed)
        yield speeds

    def _family(self, kind: str, name: str, text: str, value: float) -> Metric:
        family = (CounterMetricFamily if kind == "counter" else GaugeMetricFamily)(
            f"draftkit:{name}", text, labels=["model_name"]
        )
        family.add_metric([self._name], value)
        return family
