"""Decode steps of a few sizes, recorded once and padded, against steps of the batch's own size."""

import dataclasses
import logging
from itertools import pairwise

import pytest
import torch
from support.fake_graphs import FakeGraphs
from support.simple_path import request, simple_answer

from afnext.runtime.engine.decode_graph import DecodeStep
from afnext.runtime.engine.engine import Engine
from afnext.runtime.engine.kv_cache import KVCache, page_table
from afnext.runtime.engine.options import EngineOptions
from afnext.runtime.engine.request import Request
from afnext.runtime.model.audio_flamingo import AudioFlamingo

PAGE_SIZE = 4
OPTIONS = EngineOptions(
    page_size=16, chunk_size=64, max_batch=4, prefix_cache_bytes=0, encoder_cache_bytes=0, max_kv_tokens=500
)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> FakeGraphs:
    return FakeGraphs(monkeypatch)


def answers(engine: Engine, *requests: Request) -> list[list[int]]:
    sequences = [engine.submit(request) for request in requests]
    while engine.step():
        pass
    return [sequence.tokens for sequence in sequences]


@pytest.mark.parametrize("kv", [torch.float32, torch.int8], ids=str)
@torch.inference_mode()
def test_padding_touches_no_page_but_its_own(
    network: AudioFlamingo, graphs: FakeGraphs, kv: torch.dtype, seed: int
) -> None:
    """Sequences whose pages end with the newest token, or just after it, in a step for more of everything."""
    lengths, pages = [7, 2, 11], [[5, 1], [0], [4, 2, 6]]  # before the step; page 3 is of no sequence
    cache = KVCache(network.config.decoder, pages=7, page_size=PAGE_SIZE, device=network.device, dtype=kv, padded=True)
    for pool in cache.pools:
        pool.copy_(torch.randint(-127, 128, pool.shape) if kv == torch.int8 else torch.rand(pool.shape) / 64)
    before = [pool.clone() for pool in cache.pools]
    tokens = torch.randint(0, 256, (3, 1))
    positions = torch.tensor(lengths)[:, None]
    view = cache.view(page_table(pages, network.device), positions)
    expected = network.decoder.logits(network.decoder(network.decoder.embed(tokens), positions, view))
    written = [pool.clone() for pool in cache.pools]
    step = DecodeStep(network, cache, rows=4, width=4, time=4, cuda_graph=True)
    for _ in range(3):  # at once, recorded, and repeated
        for pool, earlier in zip(cache.pools, before, strict=True):
            pool.copy_(earlier)
        actual = step(tokens.tolist(), lengths, pages)
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        for pool, earlier, own in zip(cache.pools, before, written, strict=True):
            assert torch.equal(pool[3], earlier[3])
            for row, length in enumerate(lengths):
                ours, theirs, expected_ones = (x[pages[row]].flatten(0, 1) for x in (pool, earlier, own))
                assert torch.equal(ours[:length], theirs[:length])
                torch.testing.assert_close(ours[length].float(), expected_ones[length].float(), atol=1e-4, rtol=1e-3)
    assert graphs.replays == 2


def test_answers_of_padded_steps_are_those_of_the_simple_path(network: AudioFlamingo, graphs: FakeGraphs) -> None:
    engine = Engine(network, OPTIONS)
    asked = [request(network, 3 + 2 * content, content % 2, content) for content in range(3)]
    for one, tokens in zip(asked, answers(engine, *asked), strict=True):
        simple_answer(network, one).assert_equals(tokens)
    assert graphs.replays > 0


def test_a_batch_that_changes_is_recorded_for_a_few_sizes(network: AudioFlamingo, graphs: FakeGraphs) -> None:
    """Whatever number of sequences and speculative tokens: 1, 2, 4 or 8 of the one, 1, 2, 4 or 5 of the other."""
    engine = Engine(network, dataclasses.replace(OPTIONS, max_batch=8))
    answers(engine, *(request(network, 5, 0, content) for content in range(8)))
    resizes = engine.stats().resizes
    graphs.pools.clear()
    for batch in (1, 5, 3, 2):
        answers(engine, *(request(network, 5, 0, content) for content in range(batch)))
    assert engine.stats().resizes == resizes
    assert 3 <= len(graphs.pools) <= 4 * 4
    assert len(set(graphs.pools)) == 1, "all share one pool of memory"


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_nothing_is_recorded_after_warming_up(
    network: AudioFlamingo, graphs: FakeGraphs, batch_invariant: bool
) -> None:
    engine = Engine(network, dataclasses.replace(OPTIONS, batch_invariant=batch_invariant))
    progress: list[tuple[int, int]] = []
    engine.warm_up(lambda done, total: progress.append((done, total)))
    engine.stop()
    recorded, stats = len(graphs.pools), engine.stats()
    assert progress[0] == (0, recorded)
    assert progress[-1] == (recorded, recorded)
    assert all(later[0] == earlier[0] + 1 for earlier, later in pairwise(progress))
    for batch in (1, 4):
        asked = [request(network, 3 + 3 * content, content // 2, content) for content in range(batch)]
        for one, tokens in zip(asked, answers(engine, *asked), strict=True):
            simple_answer(network, one).assert_equals(tokens)
    engine.release_memory()
    engine.stop()
    after = engine.stats()
    assert (len(graphs.pools), after.decode_steps, after.resizes) == (recorded, stats.decode_steps, stats.resizes)
    assert after.resizes == 1


def test_steps_that_are_not_recorded_need_no_warming_up(
    network: AudioFlamingo, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(network, OPTIONS)
    with caplog.at_level(logging.INFO, "afnext.engine"):
        engine.warm_up()
    assert "not recorded ahead on cpu" in caplog.text
    assert engine.stats().decode_steps == engine.stats().resizes == 0
