"""Prompts that are begun while their audio is decoded: everything a user sees is as if it had been decoded first."""

import dataclasses
import io
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.audio import speech_like, wav_bytes
from support.simple_path import request

import afnext
from afnext.runtime.engine.engine import Engine
from afnext.runtime.engine.options import EngineOptions
from afnext.runtime.engine.request import Request, SequenceState
from afnext.runtime.errors import AudioError, AudioTooLongError, SamplingError
from afnext.runtime.io.decode import Decoder

GREEDY = {"max_new_tokens": 6, "ignore_eos": True}
SMALL = {"dtype": "float32", "page_size": 64, "chunk_size": 256, "encode_batch": 1}
SPEECH = wav_bytes(speech_like(65, 5))


class Slow(io.BytesIO):
    """A file whose reads wait until the engine has done what it can, so that every part is computed before the next
    window is decoded. before: called before each read with the number of bytes read so far."""

    def __init__(self, data: bytes, model: afnext.Model, before: Callable[[int], object] = lambda position: None):
        super().__init__(data)
        self.name = "<bytes>"
        self._model = model
        self._before = before
        self._given = 0

    def read(self, size: int | None = -1) -> bytes:
        self._before(self._given)
        idle(self._model.engine)
        data = super().read(size)
        self._given += len(data)
        return data


def idle(engine: Engine) -> None:
    """Wait until the engine has nothing to do."""
    deadline = time.monotonic() + 120
    while engine.requests():
        assert time.monotonic() < deadline, "the engine does not come to an end"
        time.sleep(0.002)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """A list that gets every request for a part of a prompt."""
    found: list[Request] = []
    submit = Engine.submit

    def noting(engine: Engine, asked: Request) -> SequenceState:
        found.append(asked)
        return submit(engine, asked)

    monkeypatch.setattr(Engine, "submit", noting)
    return found


def only_cached_pages(model: afnext.Model) -> bool:
    """Whether nothing but the prefix cache uses pages."""
    idle(model.engine)
    model.engine.release_memory()
    stats = model.engine.stats()
    return (stats.private_pages, stats.prefix_pages) == (0, 0)


def decoded(*recordings: bytes) -> list[Any]:
    return [afnext.load_audio(recording) for recording in recordings]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"encode_batch": 2, "chunk_size": 512},
        {"batch_invariant": True},
        {"prefix_cache_bytes": 0},
        {"kv": "int8"},
        {"prefix_cache_bytes": 500_000},
    ],
    ids=["plain", "two-windows", "batch-invariant", "no-prefix-cache", "int8", "small-prefix-cache"],
)
def test_answers_cached_pages_and_contexts_are_those_of_decoded_audio(
    folder: Path, tmp_path: Path, parts: list[Request], options: dict[str, Any]
) -> None:
    short = wav_bytes(speech_like(4, 6))
    with (
        afnext.load(folder, **(SMALL | options)) as whole,
        afnext.load(folder, **(SMALL | options)) as model,
    ):
        for question in ("What?", "Who?"):  # the second one finds what the first has left in the prefix cache
            parts.clear()
            expected = whole.ask(decoded(short, SPEECH), question, **GREEDY)
            assert not parts
            answer = model.ask([short, Slow(SPEECH, model)], question, **GREEDY)
            assert len(parts) >= (1 if "encode_batch" in options else 2)
            assert answer.token_ids == expected.token_ids
            assert answer.usage == expected.usage
            caches = [each.engine._steps.pages.prefix_cache for each in (model, whole)]
            assert set(caches[0]._pages) == set(caches[1]._pages)
            assert only_cached_pages(model)
        for each, audio in ((whole, decoded(SPEECH)), (model, [Slow(SPEECH, model)])):
            with each.listen(audio, system="Be brief.") as context:
                context.save(tmp_path / str(each is model))
        assert (tmp_path / "True").read_bytes() == (tmp_path / "False").read_bytes()
        assert only_cached_pages(model)


@pytest.mark.parametrize("short", [False, True])
def test_it_is_not_begun_where_that_saves_nothing(folder: Path, parts: list[Request], short: bool) -> None:
    """If a whole chunk cannot be computed yet, or if each part would encode windows again."""
    options = {"chunk_size": 1 << 14} if short else {"encoder_cache_bytes": 0}
    with afnext.load(folder, **(SMALL | options)) as model:
        answer = model.ask(SPEECH, "What?", **GREEDY)
        assert not parts
        assert answer.token_ids == model.ask(decoded(SPEECH), "What?", **GREEDY).token_ids


def test_it_is_cancelled_while_the_file_is_decoded(folder: Path, parts: list[Request]) -> None:
    with afnext.load(folder, **SMALL) as model:
        answer = model.ask(Slow(SPEECH, model), "What?", **GREEDY, cancelled=lambda: bool(parts))
        assert (answer.finish_reason, answer.token_ids, len(parts)) == ("cancelled", [], 1)
        assert only_cached_pages(model)
        with pytest.raises(afnext.AfnextError, match="cancelled"):
            model.listen(Slow(SPEECH, model), cancelled=lambda: len(parts) > 1)
        assert only_cached_pages(model)


def test_an_interrupt_or_a_defect_while_decoding_leaves_nothing(folder: Path, parts: list[Request]) -> None:
    def fail(error: BaseException) -> Callable[[int], None]:
        def before(position: int) -> None:
            if position > len(SPEECH) * 3 // 4:
                raise error

        return before

    with afnext.load(folder, **SMALL) as model:
        for error, raised in ((OSError("unplugged"), AudioError), (KeyboardInterrupt(), KeyboardInterrupt)):
            for call in (lambda file: model.ask(file, "What?"), model.listen):
                parts.clear()
                with pytest.raises(raised):
                    call(Slow(SPEECH, model, fail(error)))
                assert parts
                assert only_cached_pages(model)
        with pytest.raises(SamplingError):
            model.ask(Slow(SPEECH, model), "What?", temperature=-1.0)
        assert only_cached_pages(model)
        with pytest.raises(AudioError, match="nowhere"):
            model.chat(
                [[{"role": "user", "content": [{"type": "audio", "audio": audio}]}] for audio in (SPEECH, "nowhere")]
            )
        assert only_cached_pages(model)


def test_damage_in_the_middle_is_reported_as_before(folder: Path, parts: list[Request]) -> None:
    with afnext.load(folder, **SMALL) as model:
        cut = SPEECH[: len(SPEECH) * 3 // 4]
        expected = model.ask(decoded(cut), "What?", **GREEDY)
        assert not parts
        answer = model.ask(Slow(cut, model), "What?", **GREEDY)
        assert parts
        assert answer.token_ids == expected.token_ids
        assert [text.partition(": ")[2] for text in answer.warnings] == [
            text.partition(": ")[2] for text in expected.warnings
        ]
        assert any("cut short" in text for text in answer.warnings)


@pytest.mark.parametrize("stated", [True, False])
def test_a_file_that_is_too_long(
    folder: Path, parts: list[Request], monkeypatch: pytest.MonkeyPatch, stated: bool
) -> None:
    if not stated:
        monkeypatch.setattr(Decoder, "length_hint", property(lambda _: None, lambda _, hint: None), raising=False)
    with afnext.load(folder, **SMALL) as model:
        model.network.config = dataclasses.replace(model.network.config, max_audio_seconds=50)
        with pytest.raises(AudioTooLongError):
            model.ask(Slow(SPEECH, model), "What?", **GREEDY)
        assert bool(parts) != stated
        assert only_cached_pages(model)
        parts.clear()
        answer = model.ask(Slow(SPEECH, model), "What?", **GREEDY, truncate=True)
        expected = model.ask(afnext.load_audio(SPEECH, max_seconds=50, truncate=True), "What?", **GREEDY)
        assert parts
        assert (answer.token_ids, answer.usage.audio_seconds) == (expected.token_ids, 50.0)
        assert answer.usage.truncated


def test_no_thread_stays(folder: Path, parts: list[Request]) -> None:
    before = set(threading.enumerate())
    with afnext.load(folder, **SMALL) as model:
        model.ask(Slow(SPEECH, model), "What?", **GREEDY)
        assert parts
        assert {thread.name for thread in set(threading.enumerate()) - before} == {"afnext-engine"}
    assert set(threading.enumerate()) <= before


@pytest.fixture
def network(folder: Path) -> Any:
    return afnext.load(folder, dtype="float32").network


def test_others_get_the_pages_of_a_beginning(network: Any, seed: int) -> None:
    """The engine closes it rather than refuse a request, and the prompt that it begins is computed as a whole."""
    engine = Engine(network, EngineOptions(page_size=16, chunk_size=32, max_kv_tokens=96, prefix_cache_bytes=0))
    asked = request(network, 5, 1.0)  # 32 tokens or more of a prompt
    begun = dataclasses.replace(asked, token_ids=asked.token_ids[:16], sampling=None, expected=len(asked.token_ids))
    part = engine.submit(begun)
    last = engine.submit(dataclasses.replace(asked, beginning=part))
    assert run(engine, last) == run(Engine(network, engine.options), None, asked)
    assert last.cached == 0
    assert part.prefix is not None
    assert part.prefix.closed
    part = engine.submit(begun)
    engine.step()
    assert engine.stats().prefix_pages == 1
    large = dataclasses.replace(request(network, 96 - len(asked.token_ids), 1.0, 1))
    other = engine.submit(large)
    assert len(run(engine, other)) == large.sampling.max_new_tokens
    assert part.prefix is not None
    assert part.prefix.closed
    last = engine.submit(dataclasses.replace(asked, beginning=part))
    assert run(engine, last) == run(Engine(network, engine.options), None, asked)
    assert engine.stats().prefix_pages == engine.stats().private_pages == 0


def test_the_end_of_a_request_ends_its_beginning(network: Any) -> None:
    engine = Engine(network, EngineOptions(page_size=16, chunk_size=16, prefix_cache_bytes=0))
    asked = request(network, 5, 1.0)
    part = engine.submit(dataclasses.replace(asked, token_ids=asked.token_ids[:32], sampling=None, expected=90))
    last = engine.submit(dataclasses.replace(asked, beginning=part))
    engine.step()
    assert not part.ended
    engine.cancel(last)
    assert part.finish_reason == "cancelled"
    assert engine.cache.pool.free == engine.cache.pool.pages
    with pytest.raises(ValueError, match="continue its beginning"):
        engine.submit(dataclasses.replace(asked, token_ids=asked.token_ids[1:], beginning=part))
    with pytest.raises(ValueError, match="whole pages"):
        engine.submit(dataclasses.replace(asked, expected=90))


def run(engine: Engine, sequence: SequenceState | None, asked: Request | None = None) -> list[int]:
    """The tokens of a sequence, or of a request, by steps in this thread."""
    sequence = sequence or engine.submit(asked)
    while engine.step():
        pass
    assert sequence.error is None
    assert torch.is_grad_enabled()
    return sequence.tokens
