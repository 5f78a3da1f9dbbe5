"""The life of requests: any interleaving gives the tokens of the simple path, ends, cancellation, errors, memory."""

import dataclasses
import functools
import threading
import time
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.simple_path import SimpleAnswer, request, simple_answer

from afnext import kernels
from afnext.kernels.dispatch import forced_backend
from afnext.runtime.engine import decode_runner, decode_steps
from afnext.runtime.engine.engine import Engine
from afnext.runtime.engine.kv_cache import KV_STORAGE, QUANTIZED
from afnext.runtime.engine.options import EngineOptions
from afnext.runtime.engine.request import Request, SequenceState
from afnext.runtime.engine.scheduler import OVERTAKEN
from afnext.runtime.engine.stats import STEP_SECONDS
from afnext.runtime.errors import ContextLengthError, OutOfPagesError
from afnext.runtime.model.audio_flamingo import AudioFlamingo

OPTIONS = EngineOptions(
    page_size=16, chunk_size=64, encode_batch=2, prefix_cache_bytes=0, encoder_cache_bytes=0, draft_tokens=0
)
KINDS: dict[str, dict[str, Any]] = {
    "text": {"new_tokens": 12},
    "one": {"new_tokens": 1, "content": 7},
    "penalty": {"new_tokens": 10, "content": 1, "repetition_penalty": 1.4},
    "drawn": {"new_tokens": 9, "content": 2, "temperature": 1.2, "seed": 11},
    "filtered": {"new_tokens": 7, "seconds": 0.7, "content": 3, "temperature": 0.8, "top_p": 0.9, "seed": 5},
    "heard": {"new_tokens": 6, "seconds": 1.9, "content": 4},
    "long": {"new_tokens": 3, "seconds": 31.0, "content": 5},
}


@functools.cache
def simple(network: AudioFlamingo, kind: str) -> SimpleAnswer:
    return simple_answer(network, request(network, **KINDS[kind]))


def run(engine: Engine, requests: list[Request]) -> list[SequenceState]:
    sequences = [engine.submit(request) for request in requests]
    for _ in engine.follow(sequences):
        pass
    return sequences


def assert_nothing_is_held(engine: Engine) -> None:
    """No page is in use once the engine has taken in what was closed."""
    engine.stop()
    engine._steps.settle()
    assert engine.cache.pool.free == engine.cache.pool.pages
    assert engine.cache.pool.end == 0


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    arrivals=st.lists(
        st.tuples(st.integers(0, 12), st.sampled_from(sorted(KINDS)), st.integers(-1, 1)), min_size=1, max_size=6
    ),
    leaving=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 5)), max_size=3),
    page_size=st.integers(1, 40),
    chunk_size=st.integers(4, 200),
    encode_batch=st.integers(1, 3),
    max_batch=st.integers(1, 5),
    room=st.sampled_from([None, 850, 1000]),
    cached=st.sampled_from([0, 50_000, 1 << 30]),
    draft_tokens=st.integers(0, 7),
)
def test_any_interleaving_gives_the_tokens_of_the_simple_path(
    network: AudioFlamingo,
    arrivals: list[tuple[int, str, int]],
    leaving: list[tuple[int, int]],
    page_size: int,
    chunk_size: int,
    encode_batch: int,
    max_batch: int,
    room: int | None,
    cached: int,
    draft_tokens: int,
) -> None:
    """Whoever comes when, in pages, chunks and batches of whatever size, interrupted or not, finding some of it in the
    cache or nothing, and others being cancelled."""
    options = EngineOptions(
        page_size,
        chunk_size,
        encode_batch,
        max_batch=max_batch,
        max_kv_tokens=room,
        prefix_cache_bytes=cached,
        encoder_cache_bytes=cached,
        draft_tokens=draft_tokens,
    )
    engine = Engine(network, options)
    sequences: dict[int, SequenceState] = {}
    step, more = 0, True
    while more or len(sequences) < len(arrivals):
        for index, (when, kind, priority) in enumerate(arrivals):
            if when == step:
                asked = dataclasses.replace(request(network, **KINDS[kind]), priority=priority)
                sequences[index] = engine.submit(asked)
        engine.cancel(*(sequences[index] for when, index in leaving if when == step and index in sequences))
        more = engine.step()
        step += 1
    for index, sequence in sequences.items():
        whole = sequence.finish_reason == "length"
        assert whole or sequence.finish_reason == "cancelled"
        simple(network, arrivals[index][1]).assert_equals(sequence.tokens, whole=whole)
    engine._steps.pages.prefix_cache.evict(engine.cache.pool.pages)
    assert_nothing_is_held(engine)


@pytest.mark.parametrize("page_size", [1, 16, 1000])
def test_prompts_that_share_a_prefix_do_not_disturb_each_other(
    network: AudioFlamingo, page_size: int, seed: int
) -> None:
    """A prefix that ends within a page is copied there, so that each question writes into its own copy."""
    engine = Engine(network, dataclasses.replace(OPTIONS, page_size=page_size))
    whole = request(network, 8, 2.0, seed)
    prefix = engine.listen(Request(whole.token_ids[:-3], whole.audio, None))
    asked = []
    for question in ([5, 6, 7], [8], [9, 10, 11, 12]):
        ids = prefix.token_ids + question
        expected = simple_answer(network, dataclasses.replace(whole, token_ids=ids))
        asked.append((expected, engine.submit(dataclasses.replace(whole, token_ids=ids, audio=(), prefix=prefix))))
    prefix.close()
    for _ in engine.follow([sequence for _, sequence in asked]):
        pass
    for expected, sequence in asked:
        expected.assert_equals(sequence.tokens)
        assert sequence.cached == len(prefix.token_ids)
    assert_nothing_is_held(engine)


def test_a_prefix_is_freed_with_the_last_who_knows_it(network: AudioFlamingo, seed: int) -> None:
    engine = Engine(network, OPTIONS)
    whole = request(network, 4, 1.0, seed)
    prefix = engine.listen(dataclasses.replace(whole, sampling=None))
    assert engine.cache.pool.pages > engine.cache.pool.free
    del prefix
    assert_nothing_is_held(engine)


def test_a_prompt_must_go_on_where_its_prefix_ends(network: AudioFlamingo, seed: int) -> None:
    engine = Engine(network, OPTIONS)
    whole = request(network, 4, 0, seed)
    prefix = engine.listen(dataclasses.replace(whole, sampling=None))
    for ids in (whole.token_ids, [999, *whole.token_ids], whole.token_ids[:4]):
        with pytest.raises(ValueError, match="begin with its prefix and be longer"):
            engine.submit(Request(ids, (), whole.sampling, prefix=prefix))


def test_all_pages_are_free_at_the_end_and_the_memory_is_given_back(network: AudioFlamingo, seed: int) -> None:
    engine = Engine(network, OPTIONS)
    first, second = engine.submit(request(network, 5, 1.0, seed)), engine.submit(request(network, 20, 0, seed))
    engine.step()
    assert engine.cache.pool.free == 0, "a cache without a limit has as many pages as are asked for"
    for _ in engine.follow([first, second]):
        pass
    assert_nothing_is_held(engine)
    engine.release_memory()
    assert engine.cache.nbytes == 0
    assert [len(sequence.tokens) for sequence in (first, second)] == [5, 20]
    assert {sequence.finish_reason for sequence in (first, second)} == {"length"}


def test_a_stop_token_ends_a_request_and_is_kept(network: AudioFlamingo, seed: int) -> None:
    sampling = {"temperature": 2.0, "seed": seed}
    engine = Engine(network, OPTIONS)
    (free,) = run(engine, [request(network, 30, 0, seed, **sampling)])
    stop = free.tokens[10]
    (stopped,) = run(engine, [request(network, 30, 0, seed, **sampling, stop_token_ids=(stop,))])
    assert stopped.tokens == free.tokens[: free.tokens.index(stop) + 1]
    assert stopped.finish_reason == "stop"


@pytest.mark.parametrize("when", ["prefill", "decode"])
def test_cancellation_keeps_what_there_is_and_frees_the_rest(network: AudioFlamingo, when: str, seed: int) -> None:
    engine = Engine(network, OPTIONS)
    state = {"cancelled": False}

    def progress(done: int, total: int) -> None:
        state["cancelled"] |= when == "prefill" and done >= 128

    wanted = dataclasses.replace(
        request(network, 50, 20.0, seed), progress=progress, cancelled=lambda: state["cancelled"]
    )
    other = engine.submit(request(network, 30, 0, seed))
    sequence = engine.submit(wanted)
    for count, _ in enumerate(engine.follow([sequence])):
        state["cancelled"] |= when == "decode" and count == 10
    if when == "prefill":
        assert not sequence.tokens
    else:
        assert 11 <= len(sequence.tokens) < 50
    assert sequence.finish_reason == "cancelled"
    engine.stop()
    assert set(engine.cache.pool._ref_counts) == set(other.private_pages)
    for _ in engine.follow([other]):
        pass
    assert len(other.tokens) == 30


def test_leaving_the_loop_frees_the_pages(network: AudioFlamingo, seed: int) -> None:
    engine = Engine(network, OPTIONS)
    tokens = engine.follow([engine.submit(request(network, 50, 0, seed))])
    next(tokens)
    del tokens
    assert_nothing_is_held(engine)


def test_a_deadline_ends_an_answer_where_it_is(network: AudioFlamingo, seed: int) -> None:
    engine = Engine(network, OPTIONS)
    late = dataclasses.replace(request(network, 5000, 0, seed), deadline=0.1)
    never = dataclasses.replace(request(network, 5, 0, seed), deadline=0.0)
    sequences = run(engine, [late, never])
    assert [sequence.finish_reason for sequence in sequences] == ["deadline"] * 2
    assert len(sequences[0].tokens) < 5000
    assert sequences[1].tokens == []
    assert_nothing_is_held(engine)


def test_an_error_ends_its_own_request_alone(network: AudioFlamingo, seed: int) -> None:
    def broken(*_: int) -> None:
        raise RuntimeError("a callback that fails")

    engine = Engine(network, OPTIONS)
    healthy = engine.submit(request(network, 6, 1.0, seed))
    expected = simple_answer(network, healthy.request)
    for bad in ({"progress": broken}, {"cancelled": broken}):
        with pytest.raises(RuntimeError, match="a callback that fails"):
            run(engine, [dataclasses.replace(request(network, 5, 1.0, seed), **bad)])
    for _ in engine.follow([healthy]):
        pass
    expected.assert_equals(healthy.tokens)
    assert_nothing_is_held(engine)


def test_who_finds_no_room_waits_and_gets_the_same_answer(network: AudioFlamingo) -> None:
    engine = Engine(network, dataclasses.replace(OPTIONS, max_kv_tokens=64))
    kinds = ["text", "drawn", "penalty", "heard", "text"]
    sequences = run(engine, [request(network, **KINDS[kind]) for kind in kinds])
    for kind, sequence in zip(kinds, sequences, strict=True):
        simple(network, kind).assert_equals(sequence.tokens)


def test_a_higher_priority_interrupts_and_nothing_is_lost(network: AudioFlamingo) -> None:
    engine = Engine(network, dataclasses.replace(OPTIONS, max_kv_tokens=64))
    kinds = ["heard", "drawn"]
    slow = engine.submit(request(network, **KINDS["heard"]))
    for _ in range(4):
        engine.step()
    assert 0 < len(slow.tokens) < 6
    urgent = engine.submit(dataclasses.replace(request(network, **KINDS["drawn"]), priority=1))
    engine.step()
    assert urgent.tokens
    assert slow.private_pages == []
    for _ in engine.follow([slow, urgent]):
        pass
    for kind, sequence in zip(kinds, (slow, urgent), strict=True):
        simple(network, kind).assert_equals(sequence.tokens)


def test_nobody_waits_for_ever_behind_higher_priorities(network: AudioFlamingo) -> None:
    """One unit of priority overtakes a limited number of others, however many come."""
    engine = Engine(network, dataclasses.replace(OPTIONS, max_batch=1))
    patient = engine.submit(request(network, 1))
    hurried = [engine.submit(dataclasses.replace(request(network, 1), priority=1)) for _ in range(OVERTAKEN + 10)]
    while patient.finish_reason is None:
        engine.step()
    assert sum(sequence.finish_reason is not None for sequence in hurried) <= OVERTAKEN


def test_a_short_prompt_is_not_held_up_by_a_long_one(network: AudioFlamingo) -> None:
    """Prompts take turns, chunk by chunk, and so do answers and prompts."""
    engine = Engine(network, OPTIONS)
    long = engine.submit(request(network, 3, 60.0))
    short = engine.submit(request(network, 5, 0.5))
    steps = 0
    while short.finish_reason is None:
        engine.step()
        steps += 1
    assert steps <= 8
    assert long.tokens == []
    engine.cancel(long)


def test_what_can_never_fit_is_refused_at_once(network: AudioFlamingo) -> None:
    limit = network.config.decoder.max_positions
    with pytest.raises(ContextLengthError, match=rf"9 tokens and up to {limit - 8} .* ends at {limit}"):
        Engine(network, OPTIONS).submit(request(network, limit - 8))
    with pytest.raises(OutOfPagesError, match=r"take 99 tokens .* room for 64\. Give less audio"):
        Engine(network, dataclasses.replace(OPTIONS, max_kv_tokens=64)).submit(request(network, 90))


def test_what_contexts_leave_no_room_for_is_an_error_and_no_hang(network: AudioFlamingo, seed: int) -> None:
    engine = Engine(network, dataclasses.replace(OPTIONS, max_kv_tokens=64))
    prefix = engine.listen(dataclasses.replace(request(network, 1, 1.5, seed), sampling=None))
    with pytest.raises(OutOfPagesError, match=r"2 KV pages are needed, and contexts leave 1 of 4"):
        run(engine, [request(network, 20)])
    prefix.close()
    assert len(run(engine, [request(network, 20)])[0].tokens) == 20


def test_without_memory_to_grow_requests_wait(
    network: AudioFlamingo, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(network, OPTIONS)
    resize = engine.cache.resize

    def limited(pages: int) -> None:
        if pages > 4:
            raise torch.OutOfMemoryError("no more")
        resize(pages)

    monkeypatch.setattr(engine.cache, "resize", limited)
    sequences = [engine.submit(request(network, **KINDS["text"]))]
    engine.step()
    sequences += [engine.submit(request(network, **KINDS["heard"])), engine.submit(request(network, **KINDS["text"]))]
    with pytest.raises(
        OutOfPagesError, match="5 KV pages of 16 tokens are needed, and the device has memory for 4 now"
    ):
        for _ in engine.follow([engine.submit(request(network, 60))]):
            pass
    for _ in engine.follow(sequences[::2]):
        pass
    for sequence in sequences[::2]:
        simple(network, "text").assert_equals(sequence.tokens)
    assert "no memory for 13 KV pages" in caplog.text


def test_threads_share_their_steps(network: AudioFlamingo) -> None:
    """Each thread waits for its own answers; all are right, and they are decoded together."""
    engine = Engine(network, OPTIONS)
    kinds = ["text", "drawn", "penalty", "filtered"]
    answers: dict[int, list[int]] = {}
    start = threading.Barrier(len(kinds))

    def ask(index: int) -> None:
        start.wait()
        (sequence,) = run(engine, [request(network, **KINDS[kinds[index]])])
        answers[index] = sequence.tokens

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(kinds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for index, kind in enumerate(kinds):
        simple(network, kind).assert_equals(answers[index])
    assert_nothing_is_held(engine)


def test_a_thread_of_its_own_serves_who_does_not_wait(network: AudioFlamingo) -> None:
    engine = Engine(network, OPTIONS)
    engine.start()
    engine.start()
    for _ in range(2):  # the second time it has been idle
        sequences = [engine.submit(request(network, **KINDS[kind])) for kind in ("text", "heard")]
        patience = time.monotonic() + 60
        while any(sequence.finish_reason is None for sequence in sequences) and time.monotonic() < patience:
            time.sleep(0.005)
        for kind, sequence in zip(("text", "heard"), sequences, strict=True):
            simple(network, kind).assert_equals(sequence.tokens)
    engine.stop()
    engine.stop()
    left = engine.submit(request(network, **KINDS["text"]))
    time.sleep(0.05)
    assert not left.tokens
    for _ in engine.follow([left]):
        pass
    simple(network, "text").assert_equals(left.tokens)


def test_windows_are_encoded_just_ahead_of_their_chunk(
    network: AudioFlamingo, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Never more than one batch of windows waits for the decoder, however long the audio."""
    encoded, seen = 0, []
    encode = network.encode

    def counting(mel: torch.Tensor, samples: list[int], windows: list[int]) -> list[torch.Tensor]:
        nonlocal encoded
        encoded += len(samples)
        assert len(samples) <= OPTIONS.encode_batch
        return encode(mel, samples, windows)

    monkeypatch.setattr(network, "encode", counting)
    asked = dataclasses.replace(
        request(network, 1, 120.0, seed), progress=lambda done, total: seen.append((done, total, encoded))
    )
    run(Engine(network, OPTIONS), [asked])
    assert encoded == 4
    for done, _, windows in seen:
        assert windows <= done // 750 + OPTIONS.encode_batch + 1, f"{windows} windows encoded for {done} tokens"
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1][:2] == (len(asked.token_ids), len(asked.token_ids))


def test_quantized_kv_follows_the_dense_scores(
    network: AudioFlamingo, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Teacher-forced: the same 24 tokens decoded over all caches, after a prompt with audio in several chunks."""
    steps = torch.randint(0, 256, (24,)).tolist()
    rows: list[torch.Tensor] = []

    def forced(logits: torch.Tensor, _: object, indices: list[int], __: object = None) -> list[int]:
        rows.append(logits[0].clone())
        return [steps[indices[0]]]

    monkeypatch.setattr(decode_runner, "choose", forced)
    scores = {}
    for kv in KV_STORAGE:
        engine = Engine(network, dataclasses.replace(OPTIONS, kv=kv))
        assert engine.cache.keys[0].dtype == QUANTIZED.get(kv, torch.float32)
        run(engine, [request(network, 24, 4.0, seed)])
        scores[kv] = torch.stack(rows)
        rows.clear()
    dense = scores.pop("auto")
    bounds = {"int8": 0.02, "fp8": 0.1, "int4": 0.3}
    assert scores.keys() == bounds.keys()
    for kv, found in scores.items():
        bound = bounds[kv]
        assert not torch.equal(dense, found)
        errors = (found - dense).square().mean(-1).sqrt() / dense.std(-1)
        assert errors.max() < bound, f"relative errors of the scores {errors.tolist()}"


def test_timings_add_up(network: AudioFlamingo, seed: int) -> None:
    (sequence,) = run(Engine(network, OPTIONS), [request(network, 8, 40.0, seed)])
    timings = sequence.request.timings
    assert 0 < timings.log_mel + timings.encode + timings.prefill <= timings.first_token < timings.total
    assert timings.total == pytest.approx(timings.first_token + timings.generate)
    assert timings.tokens_per_second == pytest.approx(7 / timings.generate)


def test_the_queue_time_is_the_wait_for_a_place_in_the_batch(network: AudioFlamingo, seed: int) -> None:
    engine = Engine(network, dataclasses.replace(OPTIONS, max_batch=1))
    requests = [request(network, 8, 1.0, seed) for _ in range(2)]
    first, second = (sequence.request.timings for sequence in run(engine, requests))
    assert 0 < first.queue < second.queue
    assert second.queue > first.generate
    stats = engine.stats()
    assert len(stats.step_counts) == len(STEP_SECONDS) + 1
    assert sum(stats.step_counts) == stats.steps > 8


def test_requests_are_listed_by_phase(network: AudioFlamingo) -> None:
    engine = Engine(network, dataclasses.replace(OPTIONS, max_batch=2, chunk_size=16))
    requests = [request(network, 8), request(network, 8, 1.9), request(network, 8)]
    for one in requests:
        engine.submit(one)
    assert [listed.phase for listed in engine.requests()] == ["waiting"] * 3
    seen = set()
    while engine._steps.step():
        for listed in engine.requests():
            seen.add(listed.phase)
            assert 0 <= listed.computed_tokens <= listed.prompt_tokens
            assert (listed.new_tokens > 0) == (listed.phase == "decoding")
    assert seen == {"waiting", "prefilling", "decoding"}
    assert engine.requests() == []


def test_a_forced_backend_meets_no_recorded_step(network: AudioFlamingo, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode step is called under the backend alone that it was made under, so what it recorded is that backend's."""
    calls: list[tuple[str | None, str | None]] = []

    class Noted(decode_steps.DecodeStep):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.made_under = forced_backend()

        def __call__(self, *args: Any) -> torch.Tensor:
            calls.append((self.made_under, forced_backend()))
            return super().__call__(*args)

    monkeypatch.setattr(decode_steps, "DecodeStep", Noted)
    engine = Engine(network, OPTIONS)
    for forced in (None, "torch", None):
        with kernels.backend(forced) if forced else nullcontext():
            (sequence,) = run(engine, [request(network, **KINDS["text"])])
            assert sequence.tokens == simple(network, "text").tokens
    assert set(calls) == {(None, None), ("torch", "torch")}
