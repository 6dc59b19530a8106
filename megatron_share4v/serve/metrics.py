"""Counters and histograms in Prometheus' text format, under vLLM's suffixes so that its dashboards fit."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

NAMESPACE = "share4v"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5)
FINISHES = ("stop", "length", "abort", "error")
_FROM_ENGINE = (  # suffix, kind, field of the engine's statistics, what it is
    ("prompt_tokens_total", "counter", "prompt_tokens", "Prompt tokens of all requests, image positions included."),
    (
        "computed_prompt_tokens_total",
        "counter",
        "computed_prompt_tokens",
        "Prompt tokens that were not taken from the prefix cache.",
    ),
    ("generation_tokens_total", "counter", "generation_tokens", "Tokens generated."),
    ("engine_steps_total", "counter", "steps", "Forward passes of the language model."),
    ("encoder_calls_total", "counter", "encoder_calls", "Images that went through the tower."),
    ("image_cache_queries_total", "counter", "image_cache_queries", "Images looked up among the encoded ones."),
    ("image_cache_hits_total", "counter", "image_cache_hits", "Images found there."),
    ("prefix_cache_queries_total", "counter", "prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
    ("prefix_cache_hits_total", "counter", "prefix_cache_hits", "Prompt tokens found there."),
    ("kv_cache_usage_perc", "gauge", "cache_usage", "Share of the key-value cache in use, 0 to 1."),
)


class Histogram:
    """Cumulative buckets; `total` and `count` give the mean."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.buckets = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    @property
    def count(self) -> int:
        return sum(self.buckets)

    def observe(self, value: float) -> None:
        """Count one value."""
        self.buckets[bisect_left(self.bounds, value)] += 1
        self.total += value

    def lines(self, name: str, labels: str) -> Iterator[str]:
        """Its samples in text."""
        so_far = 0
        for bound, size in zip((*self.bounds, math.inf), self.buckets):
            so_far += size
            yield f'{name}_bucket{{{labels},le="{"+Inf" if bound == math.inf else f"{bound:g}"}"}} {so_far}'
        yield f"{name}_sum{{{labels}}} {self.total:.9g}"
        yield f"{name}_count{{{labels}}} {so_far}"


@dataclass
class Metrics:
    """What the server counts itself; used on the event loop only. finished: answers by reason; refused: responses by status, from 400 on."""

    finished: Counter[str] = field(default_factory=Counter)
    errors: Counter[int] = field(default_factory=Counter)
    time_to_first_token: Histogram = field(default_factory=lambda: Histogram(_SECONDS))
    inter_token_latency: Histogram = field(default_factory=lambda: Histogram(_SHORT))
    end_to_end: Histogram = field(default_factory=lambda: Histogram(_SECONDS))
    queue_time: Histogram = field(default_factory=lambda: Histogram(_SECONDS))

    def text(self, *, model: str, waiting: int, stats: Any | None) -> str:
        """The page for Prometheus. stats: the engine's EngineStats, None before there is one. waiting: requests that are not in the engine yet."""
        escaped = model.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return "\n".join(self._lines(f'model_name="{escaped}"', waiting, stats)) + "\n"

    def _lines(self, labels: str, waiting: int, stats: Any | None) -> Iterator[str]:
        yield from _one(
            "num_requests_running", "gauge", "Answers in the making.", f"{{{labels}}} {stats.running if stats else 0}"
        )
        queued = waiting + (stats.waiting if stats else 0)
        yield from _one("num_requests_waiting", "gauge", "Answers that wait for their turn.", f"{{{labels}}} {queued}")
        for suffix, kind, name, what in _FROM_ENGINE:
            yield from _one(suffix, kind, what, f"{{{labels}}} {getattr(stats, name) if stats else 0}")
        finishes = [f'{{{labels},finished_reason="{reason}"}} {self.finished[reason]}' for reason in FINISHES]
        yield from _one("request_success_total", "counter", "Answers that ended, by reason.", *finishes)
        refusals = [f'{{{labels},status="{status}"}} {count}' for status, count in sorted(self.errors.items())]
        yield from _one("http_refused_total", "counter", "Requests that were refused, by status.", *refusals)
        for suffix, histogram, what in (
            (
                "time_to_first_token_seconds",
                self.time_to_first_token,
                "From the request's arrival in the queue to its first token.",
            ),
            ("inter_token_latency_seconds", self.inter_token_latency, "Between two tokens of an answer."),
            ("e2e_request_latency_seconds", self.end_to_end, "From the queue to the last token."),
            ("request_queue_time_seconds", self.queue_time, "From the queue to the engine."),
        ):
            name = f"{NAMESPACE}_{suffix}"
            yield from (f"# HELP {name} {what}", f"# TYPE {name} histogram")
            yield from histogram.lines(name, labels)


def _one(suffix: str, kind: str, what: str, *samples: str) -> Iterator[str]:
    name = f"{NAMESPACE}_{suffix}"
    yield from (f"# HELP {name} {what}", f"# TYPE {name} {kind}")
    yield from (name + sample for sample in samples)
