"""Listening while it is being recorded: answers are those about the same audio given at once."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.audio import speech_like

import afnext
from afnext.runtime.errors import AudioError, AudioTooLongError, OutOfPagesError

GREEDY = {"max_new_tokens": 6, "ignore_eos": True}
SPEECH = speech_like(64, 3)


@pytest.fixture(scope="module")
def model(folder: Path) -> afnext.Model:
    return afnext.load(folder, dtype="float32", page_size=64, prefix_cache_bytes=0)


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=st.lists(st.floats(0.001, 1), min_size=1, max_size=8),
    rate=st.sampled_from([16_000, 12_000]),
    drawn=st.booleans(),
)
def test_any_pieces_give_the_answers_of_the_whole(
    model: afnext.Model, cuts: list[float], rate: int, drawn: bool
) -> None:
    options = {**GREEDY, "temperature": 1.0, "seed": 4} if drawn else GREEDY
    ends = sorted(round(cut * len(SPEECH)) for cut in cuts)
    with model.listen(system="Be brief.") as live:
        start = 0
        for end in ends:
            live.feed(SPEECH[start:end], rate)
            start = end
        heard = (SPEECH[:end], rate)
        assert live.seconds == pytest.approx(end / rate, abs=1e-4)
        expected = model.ask(heard, "What?", system="Be brief.", **options)
        answer = live.ask("What?", **options)
        assert answer.token_ids == expected.token_ids
        assert answer.usage.audio_tokens == expected.usage.audio_tokens
        context = live.finish()
    with context:
        assert context.ask("What?", **options).token_ids == expected.token_ids
        assert model.engine.cache.nbytes > 0
    model.engine.release_memory()
    assert model.engine.cache.nbytes == 0


def test_a_window_is_heard_once_and_a_question_waits_for_the_open_one(
    model: afnext.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[int] = []
    encode = model.network.encode

    def counting(mel: torch.Tensor, samples: list[int], windows: list[int]) -> list[torch.Tensor]:
        heard.extend(windows)
        return encode(mel, samples, windows)

    monkeypatch.setattr(model.network, "encode", counting)
    with model.listen() as live:
        for start in range(0, len(SPEECH), 16_000):
            live.feed(SPEECH[start : start + 16_000] * 0.9, 16_000)
        assert heard == [0, 1]
        answer = live.ask("What?", **GREEDY)
        assert heard == [0, 1, 2]
        assert answer.usage.cached_tokens > 1500
        assert answer.usage.windows == 3


def test_one_thread_feeds_and_others_ask(model: afnext.Model) -> None:
    """Whatever has been heard at a question's time, its answer is that about so much audio."""
    answers: list[afnext.Answer] = []
    with model.listen() as live:
        live.feed(SPEECH[:16_000], 16_000)
        feeder = threading.Thread(
            target=lambda: [live.feed(SPEECH[at : at + 80_000], 16_000) for at in range(16_000, len(SPEECH), 80_000)]
        )
        feeder.start()
        going = True
        while going:
            going = feeder.is_alive()
            answers.append(live.ask("What?", **GREEDY))
    assert answers[-1].usage.audio_seconds == 64.0
    for answer in answers[:: max(1, len(answers) // 3)]:
        length = round(answer.usage.audio_seconds * 16_000)
        assert answer.token_ids == model.ask((SPEECH[:length], 16_000), "What?", **GREEDY).token_ids


def test_nothing_heard_and_too_much_are_said(model: afnext.Model) -> None:
    live = model.listen()
    with pytest.raises(AudioError, match="nothing has been heard yet"):
        live.ask("What?")
    live.feed(np.zeros(100, np.float32), 16_000)
    with pytest.raises(AudioError, match="nothing has been heard yet"):
        live.finish()
    with pytest.raises(AudioTooLongError, match="finish it"):
        live.feed(np.zeros(1800 * 16_000, np.int16), 16_000)
    live.feed(SPEECH[:16_000], 16_000)
    assert live.ask("What?", **GREEDY).usage.audio_seconds == 1.00625


def test_windows_that_found_no_room_are_heard_later(model: afnext.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with model.listen() as live:
        listen = model.engine.listen

        def full(request: object) -> None:
            raise OutOfPagesError("no room")

        monkeypatch.setattr(model.engine, "listen", full)
        with pytest.raises(OutOfPagesError):
            live.feed(SPEECH[: 35 * 16_000], 16_000)
        expected = model.ask((SPEECH[: 35 * 16_000], 16_000), "What?", **GREEDY).token_ids
        assert live.ask("What?", **GREEDY).token_ids == expected
        monkeypatch.setattr(model.engine, "listen", listen)
        live.feed(SPEECH[35 * 16_000 : 36 * 16_000], 16_000)
        answer = live.ask("What?", **GREEDY)
        assert answer.token_ids == model.ask((SPEECH[: 36 * 16_000], 16_000), "What?", **GREEDY).token_ids
        assert answer.usage.cached_tokens > 750


@pytest.mark.parametrize("end", ["finish", "close"])
def test_nothing_can_be_done_after_the_end(model: afnext.Model, end: str, tmp_path: Path) -> None:
    """Windows that were in the KV cache are gone: an answer would be about the rest alone."""
    live = model.listen()
    live.feed(SPEECH[: 35 * 16_000], 16_000)
    expected = live.ask("What?", **GREEDY).token_ids
    context = getattr(live, end)()
    said = "has been finished" if end == "finish" else "has been closed"
    for call in (
        lambda: live.ask("What?", **GREEDY),
        lambda: live.stream("What?", **GREEDY),
        lambda: live.feed(SPEECH[:16_000], 16_000),
        live.finish,
    ):
        with pytest.raises(afnext.AfnextError, match=said):
            call()
    live.close()
    assert live.seconds == 35.0
    if context is not None:
        with context:
            assert context.ask("What?", **GREEDY).token_ids == expected
            with pytest.raises(afnext.AfnextError, match="has been finished"):
                live.finish()
    model.engine.release_memory()
    assert model.engine.cache.nbytes == 0


def test_an_end_without_room_can_be_tried_again(model: afnext.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(request: object) -> None:
        raise OutOfPagesError("no room")

    live = model.listen()
    live.feed(SPEECH[: 35 * 16_000], 16_000)
    with monkeypatch.context() as patch:
        patch.setattr(model.engine, "listen", full)
        with pytest.raises(OutOfPagesError):
            live.finish()
    with live.finish() as context:
        expected = model.ask((SPEECH[: 35 * 16_000], 16_000), "What?", **GREEDY).token_ids
        assert context.ask("What?", **GREEDY).token_ids == expected


def test_warnings_reach_answers_and_the_context(model: afnext.Model, tmp_path: Path) -> None:
    with model.listen() as live:
        live.feed(SPEECH[:16_000], 16_000)
        assert live.ask("What?", **GREEDY).warnings == ()
        live.source, live.warnings = "street.mp3", ("one packet is damaged",)
        assert live.ask("What?", **GREEDY).warnings == ("street.mp3: one packet is damaged",)
        context = live.finish()
    with context:
        assert [each.warnings for each in context.recordings] == [("one packet is damaged",)]
        assert context.ask("What?", **GREEDY).warnings == ("street.mp3: one packet is damaged",)
        context.save(tmp_path / "saved")
    with model.resume(tmp_path / "saved") as resumed:
        assert resumed.ask("What?", **GREEDY).warnings == ("street.mp3: one packet is damaged",)


def test_a_conversation_about_what_has_been_heard(model: afnext.Model) -> None:
    heard = (SPEECH[: 32 * 16_000], 16_000)
    later = [{"role": "assistant", "content": "A dog."}, {"role": "user", "content": "And then?"}]
    first = [{"type": "audio", "audio": heard}, {"type": "text", "text": "What?"}]
    expected = model.chat([[{"role": "user", "content": first}, *later]], **GREEDY)[0].token_ids
    with model.listen() as live:
        live.feed(*heard)
        assert live.chat([{"role": "user", "content": "What?"}, *later], **GREEDY).token_ids == expected
        assert live.ask("What?", **GREEDY).token_ids == model.ask(heard, "What?", **GREEDY).token_ids


@pytest.mark.parametrize("where", ["append", "engine"])
def test_an_interrupt_loses_no_audio_silently(model: afnext.Model, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    expected = model.ask((SPEECH[: 31 * 16_000], 16_000), "What?", **GREEDY).token_ids
    live = model.listen()
    live.feed(SPEECH[:16_000], 16_000)
    with monkeypatch.context() as patch:
        if where == "append":
            patch.setattr("afnext.runtime.io.audio_stream.AudioStream._append", interrupted)
        else:
            patch.setattr(model.engine, "listen", interrupted)
        with pytest.raises(KeyboardInterrupt):
            live.feed(SPEECH[16_000 : 31 * 16_000], 16_000)
    if where == "engine":
        assert live.ask("What?", **GREEDY).token_ids == expected
        live.close()
    else:
        with pytest.raises(afnext.AfnextError, match="interrupted while a piece was appended"):
            live.ask("What?", **GREEDY)
