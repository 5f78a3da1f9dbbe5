"""Transcription: windows, prompts, joining, files; with answers that are put into the model's mouth."""

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
from support.command_line import CommandLine

import afnext
from afnext.runtime.app.api import Model
from afnext.runtime.app.transcribe import spans
from afnext.runtime.errors import AudioError

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
    assert asked[0]["max_new_tokens"] >= 25 * 10
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


@settings(deadline=None)
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


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


def test_the_command_writes_each_format(run: CommandLine, folder: Path, clip: Path, say: Any, tmp_path: Path) -> None:
    say(words)
    common = (clip, "-m", folder, "--dtype", "float32", "-q")
    assert run("transcribe", *common).stdout.startswith("[Speaker 1] word0 word1")
    say(words)
    assert len(json.loads(run("transcribe", *common, "-f", "json").stdout)["segments"]) == 25
    say(words)
    target = tmp_path / "new" / "talk.vtt"
    done = run("transcribe", *common, "-f", "vtt", "-o", target)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert target.read_text().startswith("WEBVTT\n\n00:00:00.000 --> 00:00:01.000\n<v Speaker 1>word0\n")


def test_several_recordings_go_to_a_folder(run: CommandLine, folder: Path, clip: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.wav"
    other.write_bytes(clip.read_bytes())
    options = ("-m", folder, "--dtype", "float32", "--max-new-tokens", 3, "-f", "srt", "-o", tmp_path / "out")
    done = run("transcribe", clip, other, *options)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"talk.srt", "other.srt"}
    assert "25.00 s in 1 windows" in " ".join(done.stderr.split())
    assert "cut at max_new_tokens" in " ".join(done.stderr.split())
    twice = run("transcribe", clip, clip, *options)
    assert (twice.returncode, "talk.srt" in twice.stderr) == (1, True)


def test_standard_input_is_transcribed(run: CommandLine, folder: Path, clip: Path) -> None:
    options = ("-m", folder, "--dtype", "float32", "--max-new-tokens", 3, "-f", "json", "-q")
    piped = json.loads(run("transcribe", "-", *options, stdin=clip.read_bytes()).stdout)
    assert piped["duration"] == 25.0
    assert piped["windows"] == json.loads(run("transcribe", clip, *options).stdout)["windows"]
