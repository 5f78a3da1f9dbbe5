"""The engine's thread: updates, callbacks, failures, forked processes, and what it keeps between requests."""

import dataclasses
import gc
import math
import multiprocessing
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support.simple_path import request, simple_answer

from afnext import kernels
from afnext.kernels.dispatch import BACKENDS, forced_backend
from afnext.kernels.errors import AfnextError
from afnext.runtime.engine import decode_runner, decode_steps, steps
from afnext.runtime.engine.engine import Engine
from afnext.runtime.engine.executor import LocalExecutor
from afnext.runtime.engine.options import EngineOptions
from afnext.runtime.engine.rank import Op, decoded, encoded
from afnext.runtime.engine.request import Request, SequenceState
from afnext.runtime.errors import EngineDeadError, EngineError, InsufficientMemoryError, NonFiniteError, OutOfPagesError
from afnext.runtime.model.audio_flamingo import AudioFlamingo

OPTIONS = EngineOptions(page_size=16, chunk_size=64, prefix_cache_bytes=0, encoder_cache_bytes=0, draft_tokens=0)


def run(engine: Engine, *requests: Request) -> list[SequenceState]:
    sequences = [engine.submit(request) for request in requests]
    for _ in engine.follow(sequences):
        pass
    return sequences


def test_on_update_is_called_once_per_step_for_all_sequences(network: AudioFlamingo) -> None:
    engine = Engine(network, OPTIONS)
    updates: list[list[SequenceState]] = []
    ended = threading.Event()

    def on_update(sequences: list[SequenceState]) -> None:
        assert threading.current_thread().name == "afnext-engine"
        updates.append(sequences)
        if all(sequence.finish_reason for sequence in submitted):
            ended.set()

    submitted: list[SequenceState] = []
    asked = [dataclasses.replace(request(network, n, 0, n), on_update=on_update) for n in (5, 9, 7)]
    for one in asked:
        submitted.append(engine.submit(one))
    assert ended.wait(60)
    for one, sequence in zip(asked, submitted, strict=True):
        simple_answer(network, one).assert_equals(sequence.tokens)
    engine.stop()
    assert all(len(set(sequences)) == len(sequences) for sequences in updates)
    assert len(updates) <= engine.stats().steps
    assert any(len(sequences) == 3 for sequences in updates)


def test_cancel_soon_waits_for_nothing_and_takes_effect(network: AudioFlamingo) -> None:
    engine = Engine(network, OPTIONS)
    entered, leave = threading.Event(), threading.Event()

    def progress(done: int, total: int) -> None:
        entered.set()
        leave.wait(60)

    sequence = engine.submit(dataclasses.replace(request(network, 50), progress=progress))
    other = engine.submit(request(network, 3))
    engine.start()
    assert entered.wait(60)
    engine.cancel_soon(sequence)  # in the middle of a step
    assert engine.stats().prefilling
    leave.set()
    for _ in engine.follow([other]):
        pass
    engine.cancel(sequence)
    assert sequence.finish_reason == "cancelled"
    assert len(sequence.tokens) < 50


def test_an_on_update_that_fails_cancels_its_requests_alone(network: AudioFlamingo) -> None:
    def on_update(sequences: list[SequenceState]) -> None:
        raise RuntimeError("the event loop is closed")

    engine = Engine(network, OPTIONS)
    failing = engine.submit(dataclasses.replace(request(network, 200), on_update=on_update))
    (healthy,) = run(engine, request(network, 8))
    engine.cancel(failing)
    simple_answer(network, healthy.request).assert_equals(healthy.tokens)
    assert failing.finish_reason == "cancelled"
    assert len(failing.tokens) < 200


@pytest.mark.parametrize("call", ["follow", "listen", "release_memory", "stop"])
def test_a_callback_that_waits_for_the_engine_raises(network: AudioFlamingo, call: str) -> None:
    engine = Engine(network, OPTIONS)
    calls: dict[str, Callable[[], Any]] = {
        "follow": lambda: run(engine, request(network, 3)),
        "listen": lambda: engine.listen(dataclasses.replace(request(network, 1), sampling=None)),
        "release_memory": engine.release_memory,
        "stop": engine.stop,
    }
    nested = dataclasses.replace(request(network, 3), progress=lambda done, total: calls[call]())
    with pytest.raises(AfnextError, match="may not wait for the engine"):
        run(engine, nested)
    (after,) = run(engine, request(network, 5))
    simple_answer(network, after.request).assert_equals(after.tokens)


def test_a_backend_of_one_operation_holds_in_steps_too(network: AudioFlamingo, monkeypatch: pytest.MonkeyPatch) -> None:
    """AFNEXT_BACKEND may name a backend for all operations and another for one of them."""
    seen: set[tuple[str | None, str | None]] = set()

    class Noted(decode_steps.DecodeStep):
        def __call__(self, *args: Any) -> torch.Tensor:
            seen.add((forced_backend(), forced_backend("rms_norm")))
            return super().__call__(*args)

    monkeypatch.setattr(decode_steps, "DecodeStep", Noted)
    monkeypatch.setenv("AFNEXT_BACKEND", "torch,rms_norm=reference")
    run(Engine(network, OPTIONS), request(network, 3))
    assert seen == {("torch", "reference")}
    assert decoded(encoded(Op.EMBED, [[1]]))[1] == [-1, 0, 0]
    with kernels.backend("torch"):
        assert decoded(encoded(Op.EMBED, [[1]]))[1] == [BACKENDS.index("torch"), 0, 0]


def test_requests_keep_the_backend_of_their_submitter(network: AudioFlamingo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests under different backends run at the same time, each in steps of its own backend."""
    seen: list[tuple[str | None, int]] = []

    class Noted(decode_steps.DecodeStep):
        def __call__(self, tokens: list[list[int]], *args: Any) -> torch.Tensor:
            seen.append((forced_backend(), len(tokens)))
            return super().__call__(tokens, *args)

    monkeypatch.setattr(decode_steps, "DecodeStep", Noted)
    engine = Engine(network, OPTIONS)
    sequences = []
    for forced in (None, "torch", "reference", "torch"):
        with kernels.backend(forced) if forced else nullcontext():
            sequences.append(engine.submit(request(network, 6)))
    for _ in engine.follow(sequences):
        pass
    assert set(seen) == {(None, 1), ("torch", 2), ("reference", 1)}
    for sequence in sequences:
        simple_answer(network, sequence.request).assert_equals(sequence.tokens)


def test_the_submitters_number_of_threads_is_used(network: AudioFlamingo, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    choose = decode_runner.choose
    monkeypatch.setattr(decode_runner, "choose", lambda *a: (seen.append(torch.get_num_threads()), choose(*a))[1])
    before = torch.get_num_threads()
    engine = Engine(network, OPTIONS)
    try:
        for threads in (1, 3, 2):
            torch.set_num_threads(threads)
            run(engine, request(network, 2))
            assert seen.pop() == threads
    finally:
        torch.set_num_threads(before)


def test_requests_of_different_salts_share_nothing(network: AudioFlamingo, seed: int) -> None:
    engine = Engine(network, EngineOptions(page_size=16))
    encoded: list[int] = []
    encode = network.encode
    asked = request(network, 3, 1.0, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            network, "encode", lambda mel, samples, windows: encoded.append(1) or encode(mel, samples, windows)
        )
        for salt, cached in ((b"a", False), (b"b", False), (b"", False), (b"a", True), (b"", True)):
            (sequence,) = run(engine, dataclasses.replace(asked, salt=salt))
            assert bool(sequence.cached) == cached
            simple_answer(network, asked).assert_equals(sequence.tokens)
    assert len(encoded) - 5 == 3, "the simple path encodes once per answer"


def test_the_mean_logprob_is_that_of_the_scores(network: AudioFlamingo, monkeypatch: pytest.MonkeyPatch) -> None:
    scores: list[torch.Tensor] = []
    choose = decode_runner.choose
    monkeypatch.setattr(
        decode_runner, "choose", lambda logits, *a: (scores.append(logits.clone()), choose(logits, *a))[1]
    )
    asked = request(network, 7, temperature=0.9, seed=4, repetition_penalty=1.3)
    (sequence,) = run(Engine(network, OPTIONS), dataclasses.replace(asked, logprobs=True))
    logprobs = [math.log(row[0].double().softmax(0)[token]) for row, token in zip(scores, sequence.tokens, strict=True)]
    assert sequence.mean_logprob == pytest.approx(sum(logprobs) / 7, rel=1e-4)
    (without,) = run(Engine(network, OPTIONS), asked)
    assert without.mean_logprob is None
    assert without.tokens == sequence.tokens


def test_stats_count_what_there_is(network: AudioFlamingo) -> None:
    engine = Engine(network, dataclasses.replace(OPTIONS, max_batch=1, draft_tokens=4, prefix_cache_bytes=1 << 20))
    prefix = engine.listen(dataclasses.replace(request(network, 1, 1.0), sampling=None))
    engine.stop()
    first, second = engine.submit(request(network, 40, 0, 1)), engine.submit(request(network, 4, 0, 2))
    waiting = engine.stats()
    assert (waiting.waiting, waiting.queued_tokens) == (2, len(first.request.token_ids) + len(second.request.token_ids))
    engine.step()
    running = engine.stats()
    assert (running.waiting, running.decoding, running.private_pages) == (1, 1, len(first.private_pages))
    assert running.prefix_pages == len(prefix.pages)
    for _ in engine.follow([first, second]):
        pass
    engine.stop()
    done = engine.stats()
    assert done.alive
    assert done.waiting + done.prefilling + done.decoding + done.queued_tokens + done.private_pages == 0
    assert 0 <= done.accepted_tokens <= done.speculative_tokens
    assert done.free_pages + done.prefix_pages + done.cached_pages == engine.cache.pool.pages
    assert done.step_seconds >= done.last_step_seconds > 0


@pytest.mark.parametrize("when", ["prefill", "decode"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_scores_that_are_not_finite_end_their_request_alone(
    network: AudioFlamingo, monkeypatch: pytest.MonkeyPatch, when: str, temperature: float
) -> None:
    engine = Engine(network, OPTIONS)
    healthy = engine.submit(request(network, 9, 0, 5))
    engine.step()
    broken = engine.submit(request(network, 9, 0, 6, temperature=temperature))
    logits = network.decoder.logits
    calls = 0

    def spoiled(hidden: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        out = logits(hidden)
        if hidden.ndim == 2:  # a first token
            calls += 1
            if when == "prefill" and calls == 1:
                out[...] = math.nan
        elif when == "decode" and len(out) == 2:
            out[1, :, 3] = math.inf
        return out

    monkeypatch.setattr(network.decoder, "logits", spoiled)
    with pytest.raises(NonFiniteError, match=r"NaN or infinite.*weights"):
        for _ in engine.follow([broken]):
            pass
    for _ in engine.follow([healthy]):
        pass
    monkeypatch.undo()
    simple_answer(network, healthy.request).assert_equals(healthy.tokens)
    assert -1 not in broken.tokens


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_failed_allocations_become_an_error_with_advice(
    network: AudioFlamingo, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    engine = Engine(network, OPTIONS)

    def failing(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(LocalExecutor, "prefill", failing)
        with pytest.raises(InsufficientMemoryError, match=r"not enough memory .* smaller chunk_size"):
            run(engine, request(network, 3))
    (after,) = run(engine, request(network, 5))
    simple_answer(network, after.request).assert_equals(after.tokens)


def test_an_error_in_admission_reaches_the_request_that_caused_it(
    network: AudioFlamingo, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(steps.Sampler):
        def __init__(self, params: Any, *args: Any) -> None:
            if params.max_new_tokens == 3:
                raise RuntimeError("no sampler")
            super().__init__(params, *args)

    monkeypatch.setattr(steps, "Sampler", Failing)
    engine = Engine(network, OPTIONS)
    healthy, broken = engine.submit(request(network, 8)), engine.submit(request(network, 3))
    for _ in engine.follow([healthy]):
        pass
    simple_answer(network, healthy.request).assert_equals(healthy.tokens)
    with pytest.raises(RuntimeError, match="no sampler"):
        for _ in engine.follow([broken]):
            pass


def test_the_cache_grows_once_memory_returns(network: AudioFlamingo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the first allocation of all fails."""
    engine = Engine(network, OPTIONS)
    with monkeypatch.context() as patch:

        def failing(pages: int) -> None:
            raise torch.OutOfMemoryError("no more")

        patch.setattr(engine.cache, "_resize_tensors", failing)
        with pytest.raises(OutOfPagesError, match=r"memory for 0 now"):
            run(engine, request(network, 5))
    (after,) = run(engine, request(network, 5))
    simple_answer(network, after.request).assert_equals(after.tokens)


def test_an_engine_that_cannot_recover_fails_every_request(
    network: AudioFlamingo, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(network, dataclasses.replace(OPTIONS, max_batch=1))
    sequences = [engine.submit(request(network, 50)) for _ in range(3)]

    def failing(*_: Any) -> None:
        raise KeyboardInterrupt

    engine.step()
    monkeypatch.setattr(engine._steps.scheduler, "next_admissible", failing)
    monkeypatch.setattr(engine._steps.pages, "rebuild", lambda waiting: 1 // 0)
    with pytest.raises(EngineError):
        for _ in engine.follow(sequences[:1]):
            pass
    for sequence in sequences[1:]:
        with pytest.raises(EngineDeadError, match="cannot continue in this process"):
            for _ in engine.follow([sequence]):
                pass
    with pytest.raises(EngineDeadError):
        engine.submit(request(network, 3))
    with pytest.raises(EngineDeadError):
        engine.release_memory()
    assert not engine.stats().alive


def test_a_thread_that_dies_in_a_step_is_replaced(network: AudioFlamingo, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(network, OPTIONS)
    monkeypatch.setattr("afnext.runtime.engine.engine._POLL_SECONDS", 0.05)
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)

    def failing(*_: Any) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(engine._steps, "_recover", failing)
        patch.setattr(engine._steps, "_decode", failing)
        sequence = engine.submit(request(network, 5))
        engine.start()
        while engine._worker.alive:
            time.sleep(0.01)
    with pytest.raises(EngineError, match="ended unexpectedly"):
        for _ in engine.follow([sequence]):
            pass
    (after,) = run(engine, request(network, 5))
    simple_answer(network, after.request).assert_equals(after.tokens)


def test_a_dropped_engine_ends_its_thread(network: AudioFlamingo) -> None:
    engine = Engine(network, OPTIONS)
    run(engine, request(network, 3))
    thread, dropped = engine._worker._thread, weakref.ref(engine)
    assert thread is not None
    del engine
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
    assert dropped() is None


def _ask_in_child(engine: Engine, asked: Request, answers: Any) -> None:
    try:
        answers.put(run(engine, asked)[0].tokens)
    except AfnextError as error:
        answers.put(str(error))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_process_answers_or_raises(network: AudioFlamingo, threads: int) -> None:
    context = multiprocessing.get_context("fork")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        engine = Engine(network, OPTIONS)
        asked = request(network, 4)
        (parents,) = run(engine, asked)
        answers = context.Queue()
        child = context.Process(target=_ask_in_child, args=(engine, asked, answers))
        child.start()
        answer = answers.get(timeout=60)
        child.join(60)
    finally:
        torch.set_num_threads(before)
    assert child.exitcode == 0
    if threads == 1:
        assert answer == parents.tokens
    else:
        assert "forked after the model was loaded" in answer
        assert "spawn" in answer
    (after,) = run(engine, asked)
    assert after.tokens == parents.tokens


def test_the_cache_and_the_recorded_steps_survive_between_requests(network: AudioFlamingo) -> None:
    engine = Engine(network, OPTIONS)
    for content in range(20):
        run(engine, request(network, 6, 0, content))
    assert engine.stats().resizes == 1
    assert engine.stats().decode_steps == 1
    cached = Engine(network, dataclasses.replace(OPTIONS, prefix_cache_bytes=1 << 30))
    for content in range(20):
        run(cached, request(network, 16, 0, content))
    assert cached.stats().resizes <= 10, "it grows by half at least"


def test_idle_memory_is_given_back(network: AudioFlamingo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("afnext.runtime.engine.worker._IDLE_SECONDS", 0.05)
    engine = Engine(network, OPTIONS)
    run(engine, request(network, 6))
    patience = time.monotonic() + 60
    while engine.cache.nbytes and time.monotonic() < patience:
        time.sleep(0.01)
    assert engine.cache.nbytes == 0
    (after,) = run(engine, request(network, 5))
    simple_answer(network, after.request).assert_equals(after.tokens)
