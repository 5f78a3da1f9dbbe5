"""Pages and encoder outputs that serve later requests: found if and only if all that they depend on is the same."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.simple_path import request, simple_answer

from afnext.runtime.engine.engine import Engine
from afnext.runtime.engine.kv_cache import PagePool
from afnext.runtime.engine.options import EngineOptions
from afnext.runtime.engine.prefill import AudioInput
from afnext.runtime.engine.prefix_cache import EncoderCache, PageKeys, PrefixCache
from afnext.runtime.engine.request import Request, SequenceState
from afnext.runtime.model.audio_flamingo import AudioFlamingo

OPTIONS = EngineOptions(page_size=16, chunk_size=64, encode_batch=2)
WINDOW = 480_000


def run(engine: Engine, requests: list[Request]) -> list[SequenceState]:
    sequences = [engine.submit(request) for request in requests]
    for _ in engine.follow(sequences):
        pass
    return sequences


@settings(max_examples=40)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(1, 9), st.data())
def test_keys_differ_from_the_first_difference_on(ids: list[int], page_size: int, data: st.DataObject) -> None:
    keys = PageKeys((), page_size).of(ids)
    assert len(keys) == len(set(keys)) == len(ids) // page_size
    at = data.draw(st.integers(0, len(ids) - 1))
    changed = PageKeys((), page_size).of([*ids[:at], ids[at] + 1, *ids[at + 1 :]])
    same = at // page_size
    assert changed[:same] == keys[:same]
    assert not set(changed[same:]) & set(keys)
    growing = PageKeys((), page_size)
    for end in range(len(ids) + 1):
        assert growing.of(ids[:end]) == keys[: end // page_size]


@pytest.mark.parametrize("change", ["sample", "order", "position"])
def test_keys_differ_where_the_audio_does(change: str, seed: int) -> None:
    first, second, third = torch.rand(WINDOW), torch.rand(WINDOW), torch.rand(800)
    ids = [0, 0, *[9] * 1502, 0, 0]
    keys = PageKeys((AudioInput(2, (first, second, third)),), 10).of(ids)
    assert PageKeys((AudioInput(2, (first.clone(), second, third)),), 10).of(ids) == keys
    if change == "sample":
        other = second.clone()
        other[-1] += 1e-3
        audio, same = AudioInput(2, (first, other, third)), 75
    elif change == "order":
        audio, same = AudioInput(2, (second, first, third)), 0
    else:
        audio, same = AudioInput(1, (first, second, third)), 0
    changed = PageKeys((audio,), 10).of(ids)
    assert changed[:same] == keys[:same]
    assert not set(changed[same:]) & set(keys)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=5), st.booleans()), max_size=25))
def test_the_cache_holds_whole_beginnings_and_the_latest_longest(uses: list[tuple[list[int], bool]]) -> None:
    """Prompts as paths in a tree: a page is never held without those before it, and the last one used is there."""
    pool = PagePool(200)
    cache = PrefixCache(pool, 6)
    for path, evict in uses:
        keys = [bytes(path[: depth + 1]) for depth in range(len(path))]
        found = cache.match(keys)
        own = pool.allocate(len(keys) - len(found))
        cache.insert(keys, found + own)
        pool.release(found + own)
        assert all(key in cache._pages for key in keys)
        assert len(cache.pages) <= 6
        assert all(len(key) == 1 or key[:-1] in cache._pages for key in cache._pages)
        assert pool.pages - pool.free == len(cache.pages)
        if evict:
            cache.evict(2)
            assert all(len(key) == 1 or key[:-1] in cache._pages for key in cache._pages)
    cache.evict(200)
    assert pool.free == 200


def test_the_encoder_cache_keeps_to_its_bytes(seed: int) -> None:
    cache = EncoderCache(3 * 40)
    outputs = {bytes([i]): torch.rand(5, 2) for i in range(5)}
    for key, output in outputs.items():
        cache.put(key, output)
        assert cache.get(b"\0", torch.device("cpu")) is not None, "what is used stays"
    held = [key for key in outputs if cache.get(key, torch.device("cpu")) is not None]
    assert held == [b"\0", b"\3", b"\4"]
    cache.put(b"large", torch.rand(50, 2))
    assert cache.get(b"large", torch.device("cpu")) is None


def encoded_windows(network: AudioFlamingo, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts: list[int] = []
    encode = network.encode

    def counting(mel: torch.Tensor, samples: list[int], windows: list[int]) -> list[torch.Tensor]:
        counts.append(len(samples))
        return encode(mel, samples, windows)

    monkeypatch.setattr(network, "encode", counting)
    return counts


def test_a_second_request_starts_where_the_first_was_the_same(
    network: AudioFlamingo, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    engine = Engine(network, OPTIONS)
    first = request(network, 5, 2.0, seed)
    counts = encoded_windows(network, monkeypatch)
    run(engine, [first])
    second = dataclasses.replace(first, token_ids=[*first.token_ids[:-3], 1, 2, 3])
    expected = simple_answer(network, second)
    counts.clear()
    (sequence,) = run(engine, [second])
    expected.assert_equals(sequence.tokens)
    assert sequence.cached == (len(first.token_ids) - 3) // 16 * 16
    assert counts == []
    other = dataclasses.replace(first, token_ids=[7, *first.token_ids[1:]])
    expected = simple_answer(network, other)
    counts.clear()
    (sequence,) = run(engine, [other])
    expected.assert_equals(sequence.tokens)
    assert sequence.cached == 0
    assert counts == [], "another beginning, the same audio: encoded once"


def test_requests_at_once_compute_what_they_share_once(
    network: AudioFlamingo, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    engine = Engine(network, OPTIONS)
    first = request(network, 4, 2.0, seed)
    requests = [dataclasses.replace(first, token_ids=[*first.token_ids, i, i + 1]) for i in range(4)]
    expected = [simple_answer(network, request) for request in requests]
    counts = encoded_windows(network, monkeypatch)
    sequences = run(engine, requests)
    for answer, sequence in zip(expected, sequences, strict=True):
        answer.assert_equals(sequence.tokens)
    shared = len(first.token_ids) // 16 * 16
    assert [sequence.cached for sequence in sequences] == [0, shared, shared, shared]
    assert counts == [1]


def test_a_conversation_goes_on_from_its_answers(network: AudioFlamingo, seed: int) -> None:
    engine = Engine(network, OPTIONS)
    first = request(network, 40, 1.0, seed)
    (answered,) = run(engine, [first])
    ids = [*first.token_ids, *answered.tokens, 4, 5, 6]
    second = dataclasses.replace(first, token_ids=ids)
    expected = simple_answer(network, second)
    (sequence,) = run(engine, [second])
    expected.assert_equals(sequence.tokens)
    assert sequence.cached == (len(ids) - 4) // 16 * 16


def test_the_cache_makes_room_and_keeps_to_its_bytes(network: AudioFlamingo, seed: int) -> None:
    page = Engine(network, OPTIONS).cache.page_nbytes
    engine = Engine(network, dataclasses.replace(OPTIONS, prefix_cache_bytes=5 * page, max_kv_tokens=128))
    for content in range(6):
        asked = request(network, 20, 1.5, seed + content)
        expected = simple_answer(network, asked)
        (sequence,) = run(engine, [asked])
        expected.assert_equals(sequence.tokens)
        pool = engine.cache.pool
        assert pool.pages - pool.free == len(engine._steps.pages.prefix_cache.pages) <= 5
    (sequence,) = run(engine, [request(network, 119)])
    assert len(sequence.tokens) == 119, "the whole cache is there for who needs it"


def test_none_of_it_where_it_is_switched_off(
    network: AudioFlamingo, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    engine = Engine(network, dataclasses.replace(OPTIONS, prefix_cache_bytes=0, encoder_cache_bytes=0))
    counts = encoded_windows(network, monkeypatch)
    sequences = [run(engine, [request(network, 3, 1.0, seed)])[0] for _ in range(2)]
    assert [sequence.cached for sequence in sequences] == [0, 0]
    assert counts == [1, 1]
    engine.release_memory()
    assert engine.cache.nbytes == 0
