"""Measures contexts, live audio and batching on a random checkpoint of true width and few layers.

second question    time to first token of the first question about a long recording, and of a further one
listening          peak memory while a recording of growing length is fed as if live
throughput         tokens per second of eight mixed requests, one after another and together, rounds interleaved
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ...kernels.errors import AfnextError
from ...runtime.app.api import Model, load
from ...runtime.app.conversation import Conversation
from ...runtime.engine.request import Request
from ...runtime.engine.sampler import SamplingParams
from ..core.machine import machine, peak_rss
from ..core.random_checkpoint import write_random_checkpoint
from ..core.record import SCHEMES, Record, append, recipe_of

RATE = 16_000
PIECE = 10  # seconds that are fed at once
_NEW_TOKENS = (48, 40, 56, 48, 40, 56, 48, 48)  # of the mixed requests, every other one with audio


def run_serving(
    out: Path, *, shape: str, seconds: float, lengths: Iterable[float], repeats: int, scheme: str = "bf16"
) -> list[Record]:
    """Measure all three on a checkpoint of `shape`; append to the file `out` and return the records.

    seconds: of the recording for two questions; lengths: of the recording that is fed; repeats: rounds of throughput;
    scheme: one of `record.SCHEMES`.
    """
    where = machine()
    records = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_random_checkpoint(Path(folder), shape)
        model = load(
            checkpoint,
            dtype=SCHEMES[scheme],
            quant=recipe_of(scheme),
            prefix_cache_bytes=0,
            encoder_cache_bytes=0,
            draft_tokens=0,
        )
        model.ask((_noise(31), RATE), "What?", max_new_tokens=2)
        case = {"shape": shape, "scheme": scheme}
        stages: list[tuple[str, Callable[[], Iterable[tuple[dict[str, Any], dict[str, Any]]]]]] = [
            ("throughput", lambda: [({"requests": len(_NEW_TOKENS)}, _throughput(model, repeats))]),
            ("listening", lambda: _listening(model, sorted(lengths))),
            ("second question", lambda: [({"audio_s": seconds}, _second_question(model, seconds))]),
        ]
        for name, measure in stages:
            for more, values in measure():
                record = Record("serving", name, f"afnext {scheme}", {**case, **more}, values, machine=where)
                append(out, record)
                records.append(record)
    return records


def _second_question(model: Model, seconds: float) -> dict[str, Any]:
    audio = (_noise(seconds), RATE)
    start = time.perf_counter()
    with model.listen(audio) as context:
        first = context.ask("What?", max_new_tokens=1)
        first_s = time.perf_counter() - start
        further = [context.ask(f"Who is it, number {i}?", max_new_tokens=1).timings.first_token for i in range(5)]
        return {
            "first_s": first_s,
            "median_s": statistics.median(further),
            "ratio": statistics.median(further) / first_s,
            "cached_tokens": first.usage.cached_tokens,
        }


def _listening(model: Model, lengths: list[float]) -> Iterable[tuple[dict[str, Any], dict[str, Any]]]:
    page_size, page_bytes = model.options.page_size, model.engine.cache.page_nbytes
    before = _peak_bytes()
    with model.listen() as live:
        for length in lengths:
            while live.seconds < length:
                live.feed(_noise(min(PIECE, length - live.seconds), round(live.seconds)), RATE)
            answer = live.ask("What?", max_new_tokens=1)
            tokens = answer.usage.audio_tokens + answer.usage.text_tokens
            kv_bytes = -(-tokens // page_size) * page_bytes
            peak = _peak_bytes() - before
            yield {"audio_s": length}, {"grown_bytes": peak, "kv_bytes": kv_bytes, "more_bytes": peak - kv_bytes}


def _throughput(model: Model, repeats: int) -> dict[str, Any]:
    conversations = []
    for index in range(len(_NEW_TOKENS)):
        parts: list[dict[str, Any]] = [{"type": "text", "text": f"Tell number {index}, in some words."}]
        if index % 2:
            parts.insert(0, {"type": "audio", "audio": (_noise(2 + index, index), RATE)})
        conversations.append([{"role": "user", "content": parts}])
    tokens = sum(_NEW_TOKENS)
    apart, together = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        for conversation, new_tokens in zip(conversations, _NEW_TOKENS, strict=True):
            model.chat([conversation], max_new_tokens=new_tokens, ignore_eos=True)
        apart.append(tokens / (time.perf_counter() - start))
        start = time.perf_counter()
        requests = [_request(model, *pair) for pair in zip(conversations, _NEW_TOKENS, strict=True)]
        for _ in model.engine.follow([model.engine.submit(request) for request in requests]):
            pass
        together.append(tokens / (time.perf_counter() - start))
    ratios = [more / less for more, less in zip(together, apart, strict=True)]
    return {
        "apart_tokens_per_s": statistics.median(apart),
        "together_tokens_per_s": statistics.median(together),
        "ratio": statistics.median(ratios),
    }


def _request(model: Model, conversation: list[dict[str, Any]], new_tokens: int) -> Request:
    loaded = Conversation.load(conversation, model.tokenizer, model.template, max_audio_seconds=1800, truncate=False)
    return loaded.request(SamplingParams(new_tokens))


def _peak_bytes() -> int:
    peak = peak_rss()
    if peak is None:
        raise AfnextError("this system does not tell how much memory a process has had; measure listening on another")
    return peak


def _noise(seconds: float, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(round(seconds * RATE)) * 0.05).astype(np.float32)
