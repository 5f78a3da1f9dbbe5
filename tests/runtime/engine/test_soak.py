"""Hundreds of random requests with random cancellations: no page and no memory is lost."""

import dataclasses
import gc
import random
import resource

import pytest
from support.simple_path import request, simple_answer

from afnext.runtime.engine.engine import Engine
from afnext.runtime.engine.options import EngineOptions
from afnext.runtime.engine.request import SequenceState
from afnext.runtime.model.audio_flamingo import AudioFlamingo

KINDS = [
    {"new_tokens": 9},
    {"new_tokens": 14, "content": 1, "temperature": 0.9, "seed": 2},
    {"new_tokens": 5, "seconds": 0.8, "content": 2},
    {"new_tokens": 7, "seconds": 1.6, "content": 3, "repetition_penalty": 1.2},
]


def serve(engine: Engine, network: AudioFlamingo, count: int, choice: random.Random) -> list[tuple[int, SequenceState]]:
    """Submit `count` requests, a few steps apart, cancelling every sixth or so, to the end."""
    going: list[tuple[int, SequenceState]] = []
    for _ in range(count):
        kind = choice.randrange(len(KINDS))
        asked = dataclasses.replace(request(network, **KINDS[kind]), priority=choice.choice([0, 0, 0, 1]))
        going.append((kind, engine.submit(asked)))
        for _ in range(choice.randrange(4)):
            engine.step()
        if choice.random() < 1 / 6:
            engine.cancel(choice.choice(going)[1])
    while engine.step():
        pass
    return going


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_five_hundred_requests_leave_nothing_behind(network: AudioFlamingo, seed: int) -> None:
    options = EngineOptions(
        page_size=8,
        chunk_size=32,
        max_batch=6,
        max_kv_tokens=400,
        prefix_cache_bytes=100_000,
        encoder_cache_bytes=50_000,
    )
    engine, choice = Engine(network, options), random.Random(seed)
    expected = [simple_answer(network, request(network, **kind)) for kind in KINDS]
    serve(engine, network, 100, choice)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    served = serve(engine, network, 400, choice)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    for kind, sequence in served:
        whole = sequence.finish_reason == "length"
        assert whole or sequence.finish_reason == "cancelled"
        expected[kind].assert_equals(sequence.tokens, whole=whole)
    assert sum(sequence.finish_reason == "length" for _, sequence in served) > 250
    pool = engine.cache.pool
    assert pool.pages - pool.free == len(engine._steps.pages.prefix_cache.pages)
    engine._steps.pages.prefix_cache.evict(pool.pages)
    assert pool.free == pool.pages
    assert grown < 30_000, f"peak memory grew by {grown} KiB over 400 requests"
