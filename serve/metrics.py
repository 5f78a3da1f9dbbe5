"""Prometheus metrics, all named `afnext_...`. Labels have few values and never hold keys or text."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ..runtime.app.answer import Answer
from ..runtime.app.transcribe import Transcript
from ..runtime.engine.stats import STEP_SECONDS

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
_LAG_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.3, 1.0, 3.0, 10.0)

_GAUGES = (  # name, text, and the values of a status that are added up
    ("requests_running", "Requests in the batch", "prefilling", "decoding"),
    ("requests_waiting", "Requests that wait for a place in the batch", "waiting"),
    ("queued_tokens", "Prompt tokens that are not computed yet", "queued_tokens"),
    ("engine_last_step_seconds", "Time of the last step", "last_step_seconds"),
)


class Metrics:
    """Counters and histograms of one server; gauges are read from the backend on each scrape."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"afnext_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, bounds: Sequence[float] = _SECONDS) -> Histogram:
            return Histogram(f"afnext_{name}_seconds", text, buckets=bounds, registry=self.registry)

        self.requests = counter("requests", "Answered requests", "route", "status", "finish")
        self.rejected = counter("rejected", "Requests refused for load", "reason")
        self.audio_seconds = counter("audio_seconds", "Seconds of audio heard")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts", "kind")
        self.cached_tokens = counter("cached_tokens", "Prompt tokens found in the cache")
        self.generated_tokens = counter("generated_tokens", "Tokens of answers", "kind")
        self.upload_seconds = histogram("upload", "From a request's first byte to the end of its body")
        self.decode_seconds = histogram("decode", "Decoding of a request's audio")
        self.queue_seconds = histogram("queue", "From a request's arrival at the engine to its place in the batch")
        self.encode_seconds = histogram("encode", "Log-mel and encoder of a request")
        self.prefill_seconds = histogram("prefill", "Prefill of a request")
        self.first_token_seconds = histogram("time_to_first_token", "From the request to its first token")
        self.inter_token_seconds = histogram("inter_token", "Mean time between the tokens of a request")
        self.request_seconds = histogram("request", "A request from its first byte to the last of its response")
        self.loop_lag_seconds = histogram("event_loop_lag", "How late the event loop runs a timer", _LAG_SECONDS)
        self.live_sessions = Gauge("afnext_live_sessions", "Realtime sessions", registry=self.registry)
        build = Gauge("afnext_build_info", "Version of the server", ["version"], registry=self.registry)
        build.labels(_version()).set(1)
        self._computed_tokens = 0
        self._computing_seconds = 0.0

    def watch(self, read: Callable[[], dict[str, Any]], contexts: Callable[[], dict[str, int]]) -> None:
        """Register metrics that are read on each scrape: a status (see `Backend.status`), and contexts by state."""
        self.registry.register(_Engine(read))
        states = Gauge("afnext_contexts", "Contexts", ["state"], registry=self.registry)
        for state in contexts():
            states.labels(state).set_function(partial(_state, contexts, state))

    def answered(self, answer: Answer) -> None:
        """Count an answer's tokens, audio and times."""
        usage, timings = answer.usage, answer.timings
        self.audio_seconds.inc(usage.audio_seconds)
        self.prompt_tokens.labels("audio").inc(usage.audio_tokens)
        self.prompt_tokens.labels("text").inc(usage.text_tokens)
        self.cached_tokens.inc(usage.cached_tokens)
        self.generated_tokens.labels("reasoning").inc(usage.thinking_tokens)
        self.generated_tokens.labels("answer").inc(usage.new_tokens - usage.thinking_tokens)
        self.queue_seconds.observe(timings.queue)
        self.encode_seconds.observe(timings.log_mel + timings.encode)
        self.prefill_seconds.observe(timings.prefill)
        self.first_token_seconds.observe(timings.first_token)
        if usage.new_tokens > 1:
            self.inter_token_seconds.observe((timings.total - timings.first_token) / (usage.new_tokens - 1))
        self._computed_tokens += usage.audio_tokens + usage.text_tokens - usage.cached_tokens
        self._computing_seconds += timings.log_mel + timings.encode + timings.prefill

    def transcribed(self, transcript: Transcript) -> None:
        """Count a transcript's tokens, audio and times."""
        usage = transcript.usage
        self.audio_seconds.inc(transcript.duration)
        self.prompt_tokens.labels("audio").inc(usage.audio_tokens)
        self.prompt_tokens.labels("text").inc(usage.text_tokens)
        self.cached_tokens.inc(usage.cached_tokens)
        self.generated_tokens.labels("answer").inc(usage.new_tokens)

    def prefill_rate(self) -> float:
        """Prompt tokens per second so far, 0 before the first answer."""
        return self._computed_tokens / self._computing_seconds if self._computing_seconds else 0.0

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _Engine(Collector):
    """Metrics that the engine itself counts."""

    def __init__(self, read: Callable[[], dict[str, Any]]):
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """The present values; none while the model loads."""
        status: Mapping[str, Any] = self._read()
        if not status:
            return
        for name, text, *keys in _GAUGES:
            yield GaugeMetricFamily(f"afnext_{name}", text, value=sum(status.get(key, 0) for key in keys))
        tokens = GaugeMetricFamily("afnext_kv_tokens", "Tokens that the KV cache's pages hold", labels=["state"])
        for state in ("free", "private", "prefix", "cached"):
            tokens.add_metric([state], status.get(f"{state}_pages", 0) * status.get("page_size", 0))
        yield tokens
        text = "Requests that gave their pages back to others"
        yield CounterMetricFamily("afnext_preemptions", text, value=status.get("preemptions", 0))
        drafts = CounterMetricFamily("afnext_draft_tokens", "Speculative tokens", labels=["result"])
        accepted = status.get("accepted_tokens", 0)
        drafts.add_metric(["accepted"], accepted)
        drafts.add_metric(["rejected"], status.get("speculative_tokens", 0) - accepted)
        yield drafts
        counts = itertools.accumulate(status.get("step_counts", [0] * (len(STEP_SECONDS) + 1)))
        steps = list(zip([*map(str, STEP_SECONDS), "+Inf"], counts, strict=True))
        yield HistogramMetricFamily("afnext_step_seconds", "Steps of the engine", steps, status.get("step_seconds", 0))


def _state(contexts: Callable[[], dict[str, int]], state: str) -> float:
    return float(contexts()[state])


def _version() -> str:
    try:
        return version("afnext")
    except PackageNotFoundError:
        return "unknown"
