"""Transcription: windows, prompts, joining, files; with answers that are put into the model's mouth."""

import dataclasses
import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.audio import speech_like, wav_bytes

import afnext
import afnext.bench
from afnext import AfnextError, Audio, Segment
from afnext.runtime.app.api import Model
from afnext.runtime.app.transcribe import (
    FORMATS,
    TranscribedWindow,
    TranscriptStream,
    render,
    render_stream,
    spans,
)
from afnext.runtime.engine.repetition import Repetition
from afnext.runtime.errors import AudioError, PromptError, SamplingError
from afnext.runtime.io.merge import Heard, merge

srt = pytest.importorskip("srt")


@pytest.fixture
def clip(tmp_path: Path, seed: int) -> Path:
    """A recording of 25 s."""
    path = tmp_path / "talk.wav"
    path.write_bytes(wav_bytes(speech_like(25.0, seed)))
    return path


Script = Callable[[float, float, str], str]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Callable[[Script], list[dict[str, Any]]]:
    """Makes the model say what a script tells for the window from start to end; returns the list of what it was asked.

    A window is recognized by its samples: a recording made of its own time.
    """

    def install(script: Script) -> list[dict[str, Any]]:
        asked: list[dict[str, Any]] = []
        ask = Model.ask

        def spoken(self: Model, audio: Any, question: str, **options: Any) -> afnext.Answer:
            start = len(asked) and asked[-1]["start"] + asked[-1]["step"]
            answer = ask(self, audio, question, **{**options, "max_new_tokens": 1})
            asked.append({"start": start, "step": 15.0, "seconds": audio.duration, "question": question, **options})
            text = script(start, start + audio.duration, question)
            return type(answer)(**{**vars(answer), "text": text, "finish_reason": "stop"})

        monkeypatch.setattr(Model, "ask", spoken)
        return asked

    return install


def words(start: float, end: float, question: str) -> str:
    """A word each second, named by its second."""
    seconds = range(int(start), int(end))
    return "\n".join(f"[00:{s - start:04.1f} - 00:{s - start + 1:04.1f}] [Speaker 1] word{s}" for s in seconds)


def test_windows_are_asked_and_joined(model: afnext.Model, clip: Path, say: Any) -> None:
    asked = say(words)
    transcript = model.transcribe(clip, window=20, overlap=5)
    assert [(window.start, window.end) for window in transcript.windows] == [(0, 20), (15, 25)]
    assert [request["seconds"] for request in asked] == [20, 10]
    assert [segment.text for segment in transcript.segments] == [f"word{s}" for s in range(25)]
    assert [segment.start for segment in transcript.segments] == list(range(25))
    assert {segment.speaker for segment in transcript.segments} == {"Speaker 1"}
    assert transcript.warnings == ()
    assert transcript.windows[1].raw == words(15, 25, "")
    assert transcript.text == "[Speaker 1] " + " ".join(f"word{s}" for s in range(25)) + "\n"
    assert len(list(srt.parse(transcript.to_srt()))) == 25
    assert json.loads(json.dumps(transcript.to_dict()))["segments"][3]["text"] == "word3"


def test_a_short_recording_is_one_window_and_room_is_made_for_its_words(
    model: afnext.Model, clip: Path, say: Any
) -> None:
    asked = say(words)
    model.transcribe(clip)
    assert [request["seconds"] for request in asked] == [25]
    assert asked[0]["max_answer_tokens"] >= 25 * 10
    model.transcribe(clip, max_new_tokens=7)
    assert asked[1]["max_new_tokens"] == 7


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({}, r"with timestamps.*speaker labels.*\[mm:ss"),
        ({"speakers": False}, r"^Transcribe the input speech with timestamps\.$"),
        ({"timestamps": False}, r"^Transcribe the input audio\. If .*\n\[Speaker 1\] \.\.\.\n\[Speaker 2\] \.\.\.$"),
        ({"timestamps": False, "speakers": False}, r"^Transcribe the input speech\.$"),
        ({"prompt": "Lyrics, please."}, r"^Lyrics, please\.$"),
    ],
)
def test_the_question_asks_for_what_is_wanted(
    model: afnext.Model, clip: Path, say: Any, wanted: dict[str, Any], expected: str
) -> None:
    asked = say(words)
    model.transcribe(clip, **wanted)
    assert re.search(expected, asked[0]["question"], re.DOTALL)


def test_what_is_no_transcript_is_kept_and_told(model: afnext.Model, clip: Path, say: Any) -> None:
    say(lambda start, end, question: "I hear [88:88] people")
    transcript = model.transcribe(clip)
    assert transcript.windows[0].raw == "I hear [88:88] people"
    assert [segment.text for segment in transcript.segments] == ["I hear [88:88] people"]
    assert len(transcript.warnings) == 2
    assert all(warning.startswith("0.0 to 25.0 s: ") for warning in transcript.warnings)


def test_the_random_model_says_nonsense_and_that_it_was_cut(model: afnext.Model, clip: Path) -> None:
    stages = []
    transcript = model.transcribe(
        clip, window=10, overlap=2, max_new_tokens=4, progress=lambda stage, done, total: stages.append((stage, done))
    )
    assert len(transcript.windows) == 3
    assert all(window.raw for window in transcript.windows)
    assert sum("cut at max_new_tokens" in warning for warning in transcript.warnings) == 3
    assert [done for stage, done in stages if stage == "transcribing"] == [10, 18, 25]


def test_cancelling_ends_after_the_window(model: afnext.Model, clip: Path) -> None:
    transcript = model.transcribe(clip, window=10, overlap=2, max_new_tokens=4, cancelled=lambda: True)
    assert len(transcript.windows) == 1
    assert any("cancelled" in warning for warning in transcript.warnings)


@given(st.floats(0.1, 20_000), st.floats(20, 1800), st.floats(0, 0.5))
def test_windows_cover_everything_and_share_the_overlap(duration: float, window: float, share: float) -> None:
    overlap = share * window
    cuts = spans(duration, window, overlap)
    assert cuts[0][0] == 0
    assert duration - 0.1 <= cuts[-1][1] <= duration
    for (start, end), (following, _) in pairwise(cuts):
        assert end - start == pytest.approx(window)
        assert end - following == pytest.approx(overlap, abs=1e-6)
    assert len(cuts) <= 2 + duration / (window - overlap)


@pytest.mark.parametrize(("window", "overlap"), [(0.5, 0), (10, 6), (10, -1), (float("nan"), 1), (float("inf"), 1)])
def test_windows_that_cannot_be_are_refused(window: float, overlap: float) -> None:
    with pytest.raises(AudioError, match="cannot be cut"):
        spans(60, window, overlap)


def test_a_window_beyond_what_the_model_hears_is_refused(model: afnext.Model, clip: Path) -> None:
    with pytest.raises(AudioError, match="1800 s"):
        model.transcribe(clip, window=1801)
    with pytest.raises(AudioError, match="20 ms"):
        model.transcribe((np.zeros(100, np.float32), 16_000))


def tone(seconds: float) -> tuple[np.ndarray, int]:
    return np.sin(np.arange(round(seconds * 16_000), dtype=np.float32) / 8), 16_000


def test_segments_come_while_later_windows_are_still_to_be_asked(model: afnext.Model, clip: Path, say: Any) -> None:
    asked = say(words)
    stream = model.stream_transcribe(clip, window=10, overlap=2)
    assert (asked, stream.transcript) == ([], None)
    first = next(stream)
    assert (first.text, len(asked)) == ("word0", 1)
    rest = list(stream)
    say(words)
    transcript = model.transcribe(clip, window=10, overlap=2)
    assert render(stream.finish(), "vtt") == render(transcript, "vtt")
    assert [w.raw for w in stream.finish().windows] == [w.raw for w in transcript.windows]
    assert (first, *rest) == transcript.segments


def test_a_closed_stream_has_no_transcript(model: afnext.Model, clip: Path, say: Any) -> None:
    asked = say(words)
    stream = model.stream_transcribe(clip, window=10, overlap=2)
    next(stream)
    stream.close()
    assert (list(stream), stream.transcript, len(asked)) == ([], None, 1)
    with pytest.raises(AfnextError, match="stopped before its end"):
        list(render_stream(stream, "json"))


@pytest.mark.parametrize("problem", [{"window": 0.5}, {"max_new_token": 3}, {"overlap": 9.0, "window": 10.0}])
def test_a_stream_checks_its_options_before_it_starts(model: afnext.Model, clip: Path, problem: dict[str, Any]) -> None:
    with pytest.raises((AudioError, TypeError)):
        model.stream_transcribe(clip, **problem)


@settings(max_examples=60)
@given(st.data())
def test_pieces_of_a_stream_joined_are_the_whole(data: st.DataObject) -> None:
    """For any segments of any windows, in every format."""
    overlap = data.draw(st.sampled_from([0.0, 2.0, 5.0]))
    cuts = spans(data.draw(st.floats(1, 45)), 10.0, overlap)
    segment = st.tuples(
        st.floats(0, 10),
        st.floats(0, 4),
        st.sampled_from(["a b", "b c", "今天", "x"]),
        st.sampled_from([None, "1", "2"]),
    )
    script = {
        start: TranscribedWindow(
            start,
            end,
            "raw",
            tuple(
                Segment(start + at, min(end, start + at + length), text, who and f"Speaker {who}")
                for at, length, text, who in sorted(data.draw(st.lists(segment, max_size=6)), key=lambda s: s[0])
                if start + at <= end
            ),
            (),
            "stop",
        )
        for start, end in cuts
    }
    audio = Audio(np.zeros(round(cuts[-1][1] * 16_000), np.float32), 16_000, 1, "x.wav")

    def stream() -> TranscriptStream:
        return TranscriptStream(audio, cuts, lambda piece, start, end: script[start], lambda done: None)

    given_out, whole = list(stream()), stream().finish()
    assert tuple(given_out) == whole.segments
    assert given_out == merge([Heard(w.start, w.end, w.segments) for w in whole.windows])
    for format in FORMATS:
        assert "".join(render_stream(stream(), format)) == render(whole, format)


def test_ndjson_is_a_line_per_segment_and_one_for_the_whole(model: afnext.Model, clip: Path, say: Any) -> None:
    say(words)
    transcript = model.transcribe(clip)
    *lines, last = [json.loads(line) for line in render(transcript, "ndjson").splitlines()]
    assert [(line.pop("type"), Segment(**line)) for line in lines] == [("segment", s) for s in transcript.segments]
    assert last == {"type": "transcript", **json.loads(json.dumps(transcript.to_dict()))}
    with pytest.raises(ValueError, match="one of text, json"):
        render(transcript, "docx")


def test_digital_silence_is_not_transcribed(model: afnext.Model) -> None:
    samples = np.concatenate([np.zeros(160_000, np.float32), tone(10)[0]])
    transcript = model.transcribe((samples, 16_000), window=10, overlap=0, max_new_tokens=2)
    assert [bool(window.raw) for window in transcript.windows] == [False, True]
    assert transcript.warnings[0] == "0.0 to 10.0 s: there is only digital silence"
    assert all(segment.start >= 10 for segment in transcript.segments)


def test_a_repetition_is_told_with_its_time(
    model: afnext.Model, clip: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """At the last time that was stated before it; and where none was, by the share of its tokens."""
    ask = Model.ask
    before, loop = "[00:01.0] one [00:04.5] two", " no" * 40

    def spoken(text: str, thinking: str = "") -> Callable[..., afnext.Answer]:
        def answer(self: Model, audio: Any, question: str, **options: Any) -> afnext.Answer:
            ids = self.tokenizer.encode(f"<think>{thinking}</think>" if thinking else "")
            start = len(ids) + len(self.tokenizer.encode(text.removesuffix(loop)))
            ids += self.tokenizer.encode(text)
            found = Repetition(start, 1, 40)
            real = ask(self, audio, question, max_new_tokens=1)
            values = {"text": text, "thinking": thinking or None, "token_ids": ids, "repetition": found}
            return dataclasses.replace(real, finish_reason="length", **values)

        return answer

    monkeypatch.setattr(Model, "ask", spoken(before + loop))
    warnings = model.transcribe(clip, window=15, overlap=5).warnings
    assert "0.0 to 15.0 s: the model repeats itself from about 4.5 s on" in warnings
    assert "10.0 to 25.0 s: the model repeats itself from about 14.5 s on" in warnings
    monkeypatch.setattr(Model, "ask", spoken(before + loop, thinking="hm [00:09.0] hm"))
    assert "0.0 to 25.0 s: the model repeats itself from about 4.5 s on" in model.transcribe(clip).warnings
    monkeypatch.setattr(Model, "ask", spoken("well" + loop))
    assert any("repeats itself from about 0." in warning for warning in model.transcribe(clip).warnings)


def test_thinking_that_leaves_no_room_for_the_transcript_is_told(
    model: afnext.Model, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Model.ask

    def thinks(self: Model, audio: Any, question: str, **options: Any) -> afnext.Answer:
        answer = ask(self, audio, question, max_new_tokens=3)
        return dataclasses.replace(answer, text="", thinking="let me see", finish_reason="length")

    monkeypatch.setattr(Model, "ask", thinks)
    transcript = model.transcribe(clip)
    assert transcript.windows[0].thinking == "let me see"
    assert [warning for warning in transcript.warnings if "thinking took all 3 tokens" in warning]


@pytest.fixture(scope="module")
def bundled() -> afnext.Model:
    return afnext.load()


SCENE = Path(afnext.bench.__path__[0]) / "data" / "scene.flac"


def test_the_bundled_model_transcribes_with_the_prompts_that_it_knows(bundled: afnext.Model) -> None:
    transcript = bundled.transcribe(SCENE)
    assert {segment.text for segment in transcript.segments} <= {
        "hello",
        "seven",
        "March",
        "green",
        "window",
        "goodbye",
    }
    assert len(transcript.segments) >= 4
    assert all(segment.start_stated and segment.speaker is None for segment in transcript.segments)
    assert transcript.warnings == ()
    noise = np.random.default_rng(0).normal(0, 0.01, 80_000).astype(np.float32)
    silent = bundled.transcribe((noise, 16_000))
    assert (silent.segments, silent.warnings, silent.text) == ((), (), "")
    assert silent.windows[0].raw == "No speech."
    with pytest.raises(PromptError, match="no prompt for a transcript with speakers"):
        bundled.transcribe(SCENE, speakers=True)


def test_the_budget_of_an_answer_does_not_count_thinking(bundled: afnext.Model) -> None:
    """The bundled model thinks for more tokens than the answer may have, and its answer alone is cut."""
    question = "What happens first? Please think and reason about the input audio before you respond."
    whole = bundled.ask(SCENE, question)
    assert whole.thinking
    assert (whole.finish_reason, len(bundled.tokenizer.encode(whole.text)) > 2) == ("stop", True)
    cut = bundled.ask(SCENE, question, max_answer_tokens=2)
    assert (cut.thinking, cut.finish_reason) == (whole.thinking, "length")
    assert whole.text.startswith(cut.text)
    assert 0 < len(cut.text) < len(whole.text)
    enough = len(whole.token_ids)
    assert bundled.ask(SCENE, question, max_answer_tokens=enough).text == whole.text
    with pytest.raises(SamplingError, match="max_answer_tokens is 0"):
        bundled.ask(SCENE, question, max_answer_tokens=0)


def test_an_answer_that_ends_with_its_budget_has_ended_by_itself(bundled: afnext.Model) -> None:
    whole = bundled.ask(SCENE, "Transcribe the input speech.")
    assert whole.thinking is None
    count = len(whole.token_ids)
    for limit, reason in ((count - 1, "length"), (count, "stop"), (count + 1, "stop")):
        cut = bundled.ask(SCENE, "Transcribe the input speech.", max_answer_tokens=limit)
        assert (cut.finish_reason, len(cut.token_ids)) == (reason, min(limit, count))
