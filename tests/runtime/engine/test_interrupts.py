"""Exceptions that arrive at any line of the engine: later answers are right, and every page is accounted for."""

import dataclasses
import gc
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from support.simple_path import SimpleAnswer, request, simple_answer

from afnext.kernels.errors import AfnextError
from afnext.runtime.engine import engine as engine_module
from afnext.runtime.engine.decode_runner import DecodeRunner
from afnext.runtime.engine.engine import Engine
from afnext.runtime.engine.options import EngineOptions
from afnext.runtime.engine.request import Request
from afnext.runtime.model.audio_flamingo import AudioFlamingo

OPTIONS = EngineOptions(page_size=16, chunk_size=64, encode_batch=2, draft_tokens=3)
FOLDER = Path(engine_module.__file__).parent
Line = tuple[str, int]


class Lines:
    """Traces the lines of the engine in one kind of thread, and raises at the `hit`-th time that `line` is reached."""

    def __init__(self, *, in_engine: bool, line: Line | None = None, hit: int = 1):
        self.seen: dict[Line, int] = {}
        self.raised = False
        self._in_engine, self._line, self._hit = in_engine, line, hit

    def __call__(self, frame: types.FrameType, event: str, argument: Any) -> Any:
        if (threading.current_thread().name == "afnext-engine") != self._in_engine:
            return None
        return self._in_frame if Path(frame.f_code.co_filename).parent == FOLDER else None

    def _in_frame(self, frame: types.FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            line = (Path(frame.f_code.co_filename).name, frame.f_lineno)
            self.seen[line] = self.seen.get(line, 0) + 1
            if line == self._line and self.seen[line] == self._hit and not self.raised:
                self.raised = True
                raise KeyboardInterrupt(f"at {line}")
        return self._in_frame


@contextmanager
def tracing(lines: Lines) -> Iterator[None]:
    threading.settrace(lines)
    sys.settrace(lines)
    try:
        yield
    finally:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]


def work(network: AudioFlamingo, engine: Engine) -> None:
    """Requests of all kinds: a prefix, a question about it, a prompt that begins like an earlier one, preemption."""
    prefix = engine.listen(dataclasses.replace(request(network, 1, 0.5, 3), sampling=None))
    question = request(network, 4)
    asked = [
        dataclasses.replace(question, token_ids=[*prefix.token_ids, *question.token_ids], prefix=prefix),
        *(request(network, 5, 0.4, content % 2) for content in range(3)),
        dataclasses.replace(request(network, 6, repetition_penalty=1.2), priority=1, logprobs=True),
    ]
    sequences = [engine.submit(one) for one in asked]
    for count, _ in enumerate(engine.follow(sequences[:3])):
        if count == 2:
            engine.cancel(sequences[3])
    engine.cancel_soon(sequences[4])
    prefix.close()
    engine.stats()


def assert_sound(network: AudioFlamingo, engine: Engine, expected: list[tuple[Request, SimpleAnswer]]) -> None:
    sequences = [engine.submit(dataclasses.replace(asked)) for asked, _ in expected]
    for _ in engine.follow(sequences):
        pass
    for (_, answer), sequence in zip(expected, sequences, strict=True):
        answer.assert_equals(sequence.tokens)
    while engine._steps.inbox.arrivals or engine._steps.scheduler.unfinished:
        engine.release_memory()  # what nobody waits for any more still runs to its end
    gc.collect()  # tracebacks of errors refer to the prefix
    engine.stop()
    steps = engine._steps
    steps.settle()
    assert not steps.scheduler.unfinished
    steps.pages.prefix_cache.evict(engine.cache.pool.pages)
    assert engine.cache.pool.free == engine.cache.pool.pages
    assert not engine.cache.pool._ref_counts


def expected_answers(network: AudioFlamingo) -> list[tuple[Request, SimpleAnswer]]:
    asked = [request(network, 5, 0.4, 0), request(network, 4), request(network, 6, 0.5, 3)]
    return [(one, simple_answer(network, one)) for one in asked]


def lines_of(network: AudioFlamingo, *, in_engine: bool) -> dict[Line, int]:
    lines = Lines(in_engine=in_engine)
    with tracing(lines):
        engine = Engine(network, dataclasses.replace(OPTIONS, max_kv_tokens=80))
        work(network, engine)
        engine.stop()
    return lines.seen


def interrupted(network: AudioFlamingo, lines: Lines, expected: list[tuple[Request, SimpleAnswer]]) -> None:
    engine = Engine(network, dataclasses.replace(OPTIONS, max_kv_tokens=80))
    with tracing(lines):
        try:
            work(network, engine)
            engine.stop()
        except (KeyboardInterrupt, AfnextError):
            pass
    lines.raised = True  # the engine's thread is still traced; what follows is the check
    assert_sound(network, engine, expected)


def every_line(network: AudioFlamingo, in_engine: bool, hit: int, keep: Callable[[int], bool]) -> None:
    expected = expected_answers(network)
    places = sorted(line for line, times in lines_of(network, in_engine=in_engine).items() if times >= hit)
    for index, line in enumerate(places):
        if keep(index):
            try:
                interrupted(network, Lines(in_engine=in_engine, line=line, hit=hit), expected)
            except BaseException as error:
                raise AssertionError(f"after an interrupt at {line}, hit {hit}") from error
    assert len(places) > 50


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
# Python reports, and does not raise, what is raised in the callback of a weak reference.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("hit", [1, 4])
@pytest.mark.parametrize("in_engine", [False, True], ids=["caller", "engine"])
def test_an_interrupt_at_any_line_breaks_nothing(
    network: AudioFlamingo, in_engine: bool, hit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "_POLL_SECONDS", 0.05)
    every_line(network, in_engine, hit, lambda index: True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_interrupt_at_some_lines_breaks_nothing(
    network: AudioFlamingo, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(engine_module, "_POLL_SECONDS", 0.05)
    for in_engine in (False, True):
        every_line(network, in_engine, 1, lambda index: (index + seed) % 90 == 0)


def test_an_interrupt_leaves_no_request_that_nobody_hears(
    network: AudioFlamingo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At no line between the making of a sequence and the first token does an interrupt let it run to its end."""
    monkeypatch.setattr(engine_module, "_POLL_SECONDS", 0.05)

    asked = request(network, 30)
    engine = Engine(network, OPTIONS)
    engine.start()
    lines = Lines(in_engine=False)
    with tracing(lines):
        answer = engine.follow([engine.sequence(asked)])
        next(answer)
    answer.close()
    places = [line for line in sorted(lines.seen) if line[0] in ("engine.py", "steps.py")]
    for line in places:
        lines = Lines(in_engine=False, line=line)
        with suppress(KeyboardInterrupt), tracing(lines):
            answer = engine.follow([engine.sequence(asked)])
            next(answer)
        answer.close()
        engine.release_memory()  # a step has gone by
        assert not engine._steps.scheduler.unfinished, f"after an interrupt at {line}"
    assert len(places) > 20
    engine.stop()


def test_an_error_that_is_kept_keeps_no_prefix(network: AudioFlamingo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log records and callers may keep what ended a step; the variables of its frames are gone."""
    engine = Engine(network, OPTIONS)
    prefix = engine.listen(dataclasses.replace(request(network, 1, 0.5, 3), sampling=None))
    question = request(network, 4)
    asked = dataclasses.replace(question, token_ids=[*prefix.token_ids, *question.token_ids], prefix=prefix)
    dropped = weakref.ref(prefix)

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(DecodeRunner, "first", interrupt)
    failing = engine.submit(asked)
    engine.stop()
    engine.step()
    cause = failing.error.__cause__ if failing.error else None
    assert isinstance(cause, KeyboardInterrupt)
    assert cause.__traceback__ is not None
    del prefix, asked, failing
    gc.collect()
    assert dropped() is None
