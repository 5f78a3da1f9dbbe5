"""Transcription: sends windows of a recording to the model and merges its answers into one transcript."""

import json
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ...kernels.audio_format import SAMPLE_RATE
from ...kernels.errors import AfnextError
from ..engine.repetition import Repetition
from ..engine.request import FinishReason
from ..errors import AudioError
from ..io.audio import Audio
from ..io.merge import Heard, Merger
from ..io.segments import Segment, parse_segments
from ..io.subtitles import srt_pieces, text_pieces, to_srt, to_text, to_vtt, vtt_pieces
from ..io.transcript import CLOSE
from .answer import NOTHING, Answer, Usage

FORMATS = ("text", "json", "ndjson", "srt", "vtt")
MAX_SECONDS = 6 * 3600.0  # 1.4 GB of samples
DEFAULT_WINDOW, DEFAULT_OVERLAP = 300.0, 10.0
_TOKENS_PER_SECOND, _MORE_TOKENS = 12, 128  # fast speech has five tokens per second, and as many for times and labels
_SHORTEST = 0.1  # seconds; a rest after the last window is transcribed if it is at least this long
_SILENCE = 2.0**-15  # amplitude: one step of 16-bit audio

_UNFINISHED: dict[FinishReason, str] = {
    "length": "the transcript was cut at max_new_tokens",
    "cancelled": "the transcript was cancelled",
    "deadline": "the transcript was cut at the deadline",
    "repetition": "the transcript was ended because it repeated itself",
}


@dataclass(frozen=True)
class TranscribedWindow:
    """One window of a recording.

    start, end: seconds. raw: the model's answer, unchanged. segments: parsed from it, with times from the start of the
    recording. problems: warnings about them. thinking: the model's text before the answer. usage: of its request.
    """

    start: float
    end: float
    raw: str
    segments: tuple[Segment, ...]
    problems: tuple[str, ...]
    finish_reason: FinishReason
    thinking: str | None = None
    usage: Usage = NOTHING


@dataclass(frozen=True)
class Transcript:
    """The transcript of a recording.

    segments: ordered by start; windows: their sources, with the model's unchanged text; warnings: problems found.
    """

    source: str
    duration: float
    segments: tuple[Segment, ...]
    windows: tuple[TranscribedWindow, ...]
    warnings: tuple[str, ...]

    @property
    def usage(self) -> Usage:
        """The total usage of the requests of all windows."""
        return sum((window.usage for window in self.windows), NOTHING)

    @property
    def text(self) -> str:
        """Text without times: one line per turn, after `[Speaker n]` if speakers are known."""
        return to_text(self.segments)

    def to_dict(self) -> dict[str, Any]:
        """The transcript as plain values, ready for JSON."""
        return asdict(self)

    def to_srt(self) -> str:
        """SubRip subtitles."""
        return to_srt(self.segments)

    def to_vtt(self) -> str:
        """WebVTT subtitles, with speakers as voices."""
        return to_vtt(self.segments)


Hear = Callable[[Audio, float, float], TranscribedWindow]
"""A function that transcribes the window of a recording from a start to an end in seconds."""


class TranscriptStream(Iterator[Segment]):
    """The segments of a transcript in order, each as soon as no later window can change it.

    Close it (or drop it) to stop early.
    """

    def __init__(self, audio: Audio, spans: Sequence[tuple[float, float]], hear: Hear, done: Callable[[float], None]):
        """spans: start and end of each window in seconds. done: called with the seconds transcribed so far."""
        self._audio = audio
        self._windows: list[TranscribedWindow] = []
        self._transcript: Transcript | None = None
        self._segments = self._run(spans, hear, done)

    @property
    def transcript(self) -> Transcript | None:
        """The whole transcript, or None before the last segment."""
        return self._transcript

    def __next__(self) -> Segment:
        return next(self._segments)

    def finish(self) -> Transcript:
        """Transcribe the rest and return the whole transcript. Raises AfnextError after `close`."""
        for _ in self:
            pass
        if self._transcript is None:
            raise AfnextError("the transcript was stopped before its end; use the segments that have come")
        return self._transcript

    def close(self) -> None:
        """Stop transcribing, without a transcript."""
        self._segments.close()

    def _run(
        self, spans: Sequence[tuple[float, float]], hear: Hear, done: Callable[[float], None]
    ) -> Generator[Segment, None, None]:
        merger, given = Merger(), []
        for index, (start, end) in enumerate(spans):
            window = hear(self._piece(start, end), start, end)
            self._windows.append(window)
            done(end)
            last = index == len(spans) - 1 or window.finish_reason == "cancelled"
            heard = Heard(start, end, window.segments)
            for segment in merger.push(heard, None if last else spans[index + 1][0]):
                given.append(segment)
                yield segment
            if last:
                break
        self._transcript = Transcript(
            self._audio.source,
            self._audio.duration,
            tuple(given),
            tuple(self._windows),
            tuple(_warnings(self._audio, self._windows)),
        )

    def _piece(self, start: float, end: float) -> Audio:
        audio = self._audio
        samples = audio.samples[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)]
        return Audio(samples, audio.sample_rate_in, audio.channels_in, audio.source)


def render(transcript: Transcript, format: str) -> str:
    """The transcript in one of FORMATS, ending with a newline."""
    return "".join(_pieces(iter(transcript.segments), lambda: transcript, format))


def render_stream(stream: TranscriptStream, format: str) -> Iterator[str]:
    """The transcript in one of FORMATS, in pieces as segments arrive. The joined pieces equal `render` of the whole.

    "json" is one piece at the end. "ndjson" is one line per segment, {"type": "segment", ...}, and a last line for the
    whole transcript, {"type": "transcript", ...}.
    """
    return _pieces(stream, stream.finish, format)


def _pieces(segments: Iterator[Segment], whole: Callable[[], Transcript], format: str) -> Iterator[str]:
    if format == "json":
        for _ in segments:
            pass
        yield json.dumps(whole().to_dict(), ensure_ascii=False, indent=2) + "\n"
    elif format == "ndjson":
        for segment in segments:
            yield _line({"type": "segment", **asdict(segment)})
        yield _line({"type": "transcript", **whole().to_dict()})
    elif format in FORMATS:
        yield from {"text": text_pieces, "srt": srt_pieces, "vtt": vtt_pieces}[format](segments)
    else:
        raise ValueError(f"the format {format!r} is not one of {', '.join(FORMATS)}")


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False) + "\n"


def spans(duration: float, window: float, overlap: float) -> list[tuple[float, float]]:
    """Start and end of the windows of a recording, each `window` seconds long except the last, with `overlap` seconds
    in common.

    Raises AudioError unless 0 <= overlap <= window / 2 and the window is at least a second.
    """
    if not (1 <= window < float("inf") and 0 <= overlap <= window / 2):
        raise AudioError(
            f"windows of {window:g} s with an overlap of {overlap:g} s cannot be cut: a window takes at least 1 s, and "
            "at most half of it can overlap."
        )
    starts, step = [0.0], window - overlap
    while starts[-1] + window < duration - _SHORTEST:
        starts.append(len(starts) * step)
    return [(start, min(start + window, duration)) for start in starts]


@dataclass(frozen=True)
class Transcriber:
    """Requests the transcripts of windows one after another and parses the answers.

    ask: called with the window's audio and the token limit of its transcript, without thinking. decode: converts token
    ids to text. no_speech: answers that mean there is no speech.
    """

    ask: Callable[[Audio, int], Answer]
    decode: Callable[[Sequence[int]], str]
    no_speech: tuple[str, ...] = ()

    def hear(self, audio: Audio, start: float, end: float) -> TranscribedWindow:
        """Transcribe the window of a recording from `start` to `end` seconds, which `audio` holds."""
        if np.abs(audio.samples).max(initial=0.0) < _SILENCE:
            return TranscribedWindow(start, end, "", (), ("there is only digital silence",), "stop")
        answer = self.ask(audio, round(_TOKENS_PER_SECOND * (end - start)) + _MORE_TOKENS)
        segments, problems = self._read(answer, start, end)
        moved = tuple(replace(segment, start=segment.start + start, end=segment.end + start) for segment in segments)
        return TranscribedWindow(
            start, end, answer.text, moved, tuple(problems), answer.finish_reason, answer.thinking, answer.usage
        )

    def _read(self, answer: Answer, start: float, end: float) -> tuple[list[Segment], list[str]]:
        """The segments of an answer, with times from the start of the window, and the problems found."""
        silent = answer.text in self.no_speech
        segments, problems = ([], []) if silent else parse_segments(answer.text, end - start)
        if answer.finish_reason != "stop":
            problems.append(self._unfinished(answer))
        if answer.repetition is not None:
            problems.append(self._repeats(answer, answer.repetition, start, end))
        return segments, problems

    def _unfinished(self, answer: Answer) -> str:
        if answer.finish_reason == "length" and answer.thinking is not None and not answer.text:
            count = len(answer.token_ids)
            return f"thinking took all {count} tokens and nothing was transcribed; allow more by max_new_tokens"
        return _UNFINISHED.get(answer.finish_reason, answer.finish_reason)

    def _repeats(self, answer: Answer, repetition: Repetition, start: float, end: float) -> str:
        """A warning with the start of the repetition: the last time before it, else estimated from token counts."""
        first = repetition.start
        text = self.decode(answer.token_ids[:first])
        if answer.thinking is not None:
            _, close, text = text.partition(CLOSE)
            if not close:
                return "the model repeats itself while it thinks"
        stated = [segment.start for segment in parse_segments(text, end - start)[0] if segment.start_stated]
        time = stated[-1] if stated else (end - start) * first / len(answer.token_ids)
        return f"the model repeats itself from about {start + time:.1f} s on"


def _warnings(audio: Audio, windows: list[TranscribedWindow]) -> Iterator[str]:
    yield from audio.warnings
    if audio.truncated:
        yield f"only the first {audio.duration:g} s are transcribed"
    for window in windows:
        for problem in window.problems:
            yield f"{window.start:.1f} to {window.end:.1f} s: {problem}"
