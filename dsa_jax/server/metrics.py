"""Metrics of a server, in a registry of its own, as `/metrics` tells them."""

import time
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dsa_jax.inference.params import Stats, Token

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)

ENDPOINTS = frozenset(
    "/ /v1/models /v1/completions /v1/chat/completions /tokenize /detokenize /tokenizer_info /metrics /health "
    "/health/live /health/ready".split()
)

GAUGES = {
    "queued": "Continuations that wait.",
    "running": "Continuations that run.",
    "pages": "Pages of the cache.",
    "pages_used": "Pages that are not free.",
}
COUNTERS = {
    "prefix_hits": "Pages of prompts that were reused.",
    "prefix_asked": "Full pages of prompts that could have been reused at most.",
    "prefix_evicted": "Pages of prefixes that were forgotten because pages were wanted.",
    "preemptions": "Continuations that were preempted.",
    "prompt_tokens": "Tokens of prompts.",
    "generated_tokens": "Tokens that were generated.",
    "drafts_proposed": "Tokens that a drafter has proposed.",
    "drafts_accepted": "Tokens that were accepted of those.",
}


class _EngineCollector(Collector):
    """Reads an engine's counts when they are asked for."""

    def __init__(self, stats: Callable[[], Stats]):
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        """Yields every count."""
        stats = self._stats()
        for name, words in GAUGES.items():
            yield GaugeMetricFamily(f"dsa_jax_{name}", words, value=getattr(stats, name))
        for name, words in COUNTERS.items():
            yield CounterMetricFamily(f"dsa_jax_{name}", words, value=getattr(stats, name))
        rate = stats.prefix_hits / stats.prefix_asked if stats.prefix_asked else 0.0
        yield GaugeMetricFamily("dsa_jax_prefix_hit_rate", "Share of such pages that were reused.", value=rate)


class Metrics:
    """Counts requests and times tokens.

    Args:
      stats: gives the engine's counts.
    """

    def __init__(self, stats: Callable[[], Stats]):
        self.registry = registry = CollectorRegistry()
        registry.register(_EngineCollector(stats))
        self._answers = Counter(
            "dsa_jax_requests", "Requests that were answered, by status.", ["endpoint", "status"], registry=registry
        )
        self.first = Histogram(
            "dsa_jax_time_to_first_token_seconds", "From a request's start in the engine to its first token.",
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.between = Histogram(
            "dsa_jax_time_between_tokens_seconds", "Between two tokens of a continuation.",
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.failures = Counter("dsa_jax_step_failures", "Requests that a failed step has ended.", registry=registry)

    def count(self, path: str, status: int) -> None:
        """Counts an answer; other paths than the endpoints' go under one name."""
        endpoint = path if path in ENDPOINTS else "other"
        self._answers.labels(endpoint, str(status) if status else "left").inc()

    def page(self) -> bytes:
        """Writes everything in Prometheus' text format."""
        return generate_latest(self.registry)


class Timer:
    """Times the tokens of one request, as they come from the engine."""

    def __init__(self, metrics: Metrics):
        self._metrics, self._begin = metrics, time.perf_counter()
        self._last: dict[int, float] = {}

    def see(self, token: Token) -> None:
        """Takes a token's time."""
        if token.token is None:
            return
        now = time.perf_counter()
        if token.index in self._last:
            self._metrics.between.observe(now - self._last[token.index])
        elif not self._last:
            self._metrics.first.observe(now - self._begin)
        self._last[token.index] = now
