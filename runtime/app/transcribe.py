"""Transcription: windows of a recording to the model, and its answers to one transcript with times and speakers."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ...kernels.errors import AfnextError
from ...kernels.log_mel import SAMPLE_RATE
from ..errors import AudioError
from ..io.audio import Audio
from ..io.merge import Heard, merge
from ..io.segments import Segment, parse_segments
from ..io.subtitles import to_srt, to_text, to_vtt
from .answer import Answer

FORMATS = ("text", "json", "srt", "vtt")
MAX_SECONDS = 6 * 3600.0  # 1.4 GB of samples
DEFAULT_WINDOW, DEFAULT_OVERLAP = 300.0, 10.0
_TOKENS_PER_SECOND, _MORE_TOKENS = 12, 128  # fast speech has five tokens a second, and its times and labels as many
_SHORTEST = 0.1  # seconds; what is left of a recording beyond its last window is heard from this length on

_UNFINISHED = {"length": "the transcript was cut at max_new_tokens", "cancelled": "the transcript was cancelled"}

# The prompts without times are the model card's; it says to ask for timestamps directly and states no format for them.
_PROMPTS = {
    (True, True): "Transcribe the input audio with timestamps. If multiple speakers are present, provide diarized "
    "transcripts with speaker labels.\n[mm:ss.s - mm:ss.s] [Speaker 1] ...\n[mm:ss.s - mm:ss.s] [Speaker 2] ...",
    (True, False): "Transcribe the input speech with timestamps.",
    (False, True): "Transcribe the input audio. If multiple speakers are present, provide diarized transcripts with "
    "speaker labels.\n[Speaker 1] ...\n[Speaker 2] ...",
    (False, False): "Transcribe the input speech.",
}


def prompt_for(*, timestamps: bool, speakers: bool) -> str:
    """What the model is asked to get a transcript of that kind."""
    return _PROMPTS[timestamps, speakers]


@dataclass(frozen=True)
class TranscribedWindow:
    """One window: its start and end in seconds, what the model wrote, its segments' times counted from the start of the
    recording, and what was wrong with it."""

    start: float
    end: float
    raw: str
    segments: tuple[Segment, ...]
    problems: tuple[str, ...]
    finish_reason: str


@dataclass(frozen=True)
class Transcript:
    """What is said in a recording.

    segments: in the order of their starts; windows: what each was made of, the model's own words included; warnings:
    what to know before trusting it.
    """

    source: str
    duration: float
    segments: tuple[Segment, ...]
    windows: tuple[TranscribedWindow, ...]
    warnings: tuple[str, ...]

    @property
    def text(self) -> str:
        """The words, a line for each turn, `[Speaker n]` before it where speakers are known."""
        return to_text(self.segments)

    def to_dict(self) -> dict[str, Any]:
        """The transcript as plain values, ready for JSON."""
        return asdict(self)

    def to_srt(self) -> str:
        """SubRip subtitles."""
        return to_srt(self.segments)

    def to_vtt(self) -> str:
        """WebVTT subtitles, speakers as voices."""
        return to_vtt(self.segments)


def render(transcript: Transcript, format: str) -> str:
    """The transcript in one of FORMATS, its last line ended."""
    if format == "json":
        return json.dumps(transcript.to_dict(), ensure_ascii=False, indent=2) + "\n"
    return {"text": to_text, "srt": to_srt, "vtt": to_vtt}[format](transcript.segments)


def spans(duration: float, window: float, overlap: float) -> list[tuple[float, float]]:
    """Start and end of the windows of a recording, each `window` seconds long except the last, `overlap` shared.

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


def transcribe(
    audio: Audio, spans: list[tuple[float, float]], ask: Callable[[Audio, int], Answer], done: Callable[[float], None]
) -> Transcript:
    """Ask for the transcript of each window and join them.

    ask: called with the window's audio and the tokens that its transcript may take; done: called with the seconds of
    the recording that are transcribed.
    """
    windows = []
    for start, end in spans:
        samples = audio.samples[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)]
        piece = Audio(samples, audio.sample_rate_in, audio.channels_in, audio.source)
        answer = ask(piece, round(_TOKENS_PER_SECOND * (end - start)) + _MORE_TOKENS)
        windows.append(_window(start, end, answer))
        done(end)
        if answer.finish_reason == "cancelled":
            break
    heard = [Heard(window.start, window.end, window.segments) for window in windows]
    return Transcript(
        audio.source, audio.duration, tuple(merge(heard)), tuple(windows), tuple(_warnings(audio, windows))
    )


def _window(start: float, end: float, answer: Answer) -> TranscribedWindow:
    segments, problems = parse_segments(answer.text, end - start)
    if answer.finish_reason != "stop":
        problems.append(_UNFINISHED.get(answer.finish_reason, answer.finish_reason))
    moved = tuple(replace(segment, start=segment.start + start, end=segment.end + start) for segment in segments)
    return TranscribedWindow(start, end, answer.text, moved, tuple(problems), answer.finish_reason)


def _warnings(audio: Audio, windows: list[TranscribedWindow]) -> Iterator[str]:
    yield from audio.warnings
    if audio.truncated:
        yield f"only the first {audio.duration:g} s are transcribed"
    for window in windows:
        for problem in window.problems:
            yield f"{window.start:.1f} to {window.end:.1f} s: {problem}"


def output_paths(sources: Sequence[str], output: Path | None, format: str) -> list[Path | None]:
    """Where the transcript of each source goes: None for stdout; with several sources, `output` is a folder.

    Raises AfnextError where two would go to one file.
    """
    if output is None:
        return [None] * len(sources)
    if len(sources) == 1 and not output.is_dir():
        return [output]
    suffix = "txt" if format == "text" else format
    names = [f"{'stdin' if source == '-' else Path(source).stem}.{suffix}" for source in sources]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise AfnextError(f"several transcripts would be written to {twice[0]}; transcribe these recordings one by one")
    return [output / name for name in names]


def write_transcript(transcript: Transcript, format: str, target: Path | None) -> None:
    """Write the transcript in one of FORMATS to `target`, or to stdout. Raises AfnextError where that fails."""
    text = render(transcript, format)
    if target is None:
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    except OSError as problem:
        raise AfnextError(f"{target} cannot be written: {problem.strerror or problem}") from None
