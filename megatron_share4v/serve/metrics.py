"""Prometheus metrics of the server, under vLLM's metric suffixes so that its dashboards fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from megatron_share4v.infer.engine import EngineStats

NAMESPACE = "share4v"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FINISH_REASONS = ("stop", "length", "abort", "error")
_LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5)
_ENGINE_COUNTERS = (  # metric name without _total, field of EngineStats, help text
    ("prompt_tokens", "prompt_tokens", "Prompt tokens of all requests, image positions included."),
    ("computed_prompt_tokens", "computed_prompt_tokens", "Prompt tokens not taken from the prefix cache."),
    ("generation_tokens", "generation_tokens", "Tokens generated."),
    ("engine_steps", "steps", "Forward passes of the language model."),
    ("encoder_calls", "encoder_calls", "Images encoded by the vision tower."),
    ("image_cache_queries", "image_cache_queries", "Lookups in the image feature cache."),
    ("image_cache_hits", "image_cache_hits", "Hits in the image feature cache."),
    ("prefix_cache_queries", "prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
    ("prefix_cache_hits", "prefix_cache_hits", "Prompt tokens found in the prefix cache."),
)
disable_created_metrics()  # the _created series would double the number of lines


class EngineCollector(Collector):
    """Engine statistics, read at scrape time.

    read: the number of requests not yet in the engine, and the engine's statistics (None before it is loaded).
    """

    def __init__(self, model_name: str, read: Callable[[], tuple[int, EngineStats | None]]) -> None:
        self._model_name, self._read = model_name, read

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Yield one metric family per statistic."""
        waiting, stats = self._read()
        queued = waiting + (stats.waiting if stats else 0)
        yield self._gauge("num_requests_running", "Requests being generated.", stats.running if stats else 0)
        yield self._gauge("num_requests_waiting", "Requests in the waiting queues.", queued)
        usage = stats.cache_usage if stats else 0.0
        yield self._gauge("kv_cache_usage_perc", "Fraction of the KV cache in use, 0 to 1.", usage)
        for name, field, help_text in _ENGINE_COUNTERS:
            family = CounterMetricFamily(f"{NAMESPACE}_{name}", help_text, labels=["model_name"])
            family.add_metric([self._model_name], getattr(stats, field) if stats else 0)
            yield family

    def _gauge(self, name: str, help_text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(f"{NAMESPACE}_{name}", help_text, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family


class Metrics:
    """Counters and latency histograms of one server, in a registry of its own."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self._finished = self._counter("request_success", "Finished requests, by reason.", "finished_reason")
        self._errors = self._counter("http_refused", "Responses with an error status, by status.", "status")
        for reason in FINISH_REASONS:
            self._finished.labels(model_name, reason)
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From submission to the first token.", _LATENCY_BUCKETS
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a request.", _TOKEN_BUCKETS
        )
        self.end_to_end = self._histogram(
            "e2e_request_latency_seconds", "From submission to the last token.", _LATENCY_BUCKETS
        )
        self.queue_time = self._histogram(
            "request_queue_time_seconds", "From submission to the engine.", _LATENCY_BUCKETS
        )

    def count_finished(self, reason: str, amount: int = 1) -> None:
        """Count finished requests. reason: one of FINISH_REASONS."""
        self._finished.labels(self._model_name, reason).inc(amount)

    def count_error(self, status: int) -> None:
        """Count a response with an error status."""
        self._errors.labels(self._model_name, str(status)).inc()

    def mean_latency_s(self) -> float:
        """Mean end-to-end latency of the finished requests, 0 before the first."""
        total, count = (self.value(f"e2e_request_latency_seconds_{part}") for part in ("sum", "count"))
        return total / max(1.0, count)

    def value(self, name: str, **labels: str) -> float:
        """Current value of the sample `name` (without the namespace), 0 when there is none."""
        return self.registry.get_sample_value(f"{NAMESPACE}_{name}", {"model_name": self._model_name, **labels}) or 0.0

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, help_text: str, label: str) -> Counter:
        return Counter(f"{NAMESPACE}_{name}", help_text, ["model_name", label], registry=self.registry)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        name = f"{NAMESPACE}_{name}"
        family = Histogram(name, help_text, ["model_name"], buckets=buckets, registry=self.registry)
        return family.labels(self._model_name)
