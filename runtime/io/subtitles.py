"""Segments as text, SRT and WebVTT.

Source: W3C, "WebVTT: The Web Video Text Tracks Format". SRT has no standard and follows SubRip: a number,
`hh:mm:ss,mmm --> hh:mm:ss,mmm`, the text, an empty line.
"""

from collections.abc import Sequence

from .segments import Segment


def to_text(segments: Sequence[Segment]) -> str:
    """The words alone, a new line for each turn, which `[Speaker n]` precedes where speakers are known."""
    lines: list[str] = []
    speaker: str | None = None
    for index, segment in enumerate(segments):
        if index and segment.speaker == speaker:
            lines[-1] += f" {segment.text}"
        else:
            lines.append(labelled(segment))
        speaker = segment.speaker
    return "".join(f"{line}\n" for line in lines)


def to_srt(segments: Sequence[Segment]) -> str:
    """SubRip subtitles, `[Speaker n]` before the text where the speaker is known."""
    cues = (
        f"{number}\n{_clock(start, ',')} --> {_clock(end, ',')}\n{labelled(segment)}\n"
        for number, (segment, (start, end)) in enumerate(zip(segments, _times(segments), strict=True), start=1)
    )
    return "\n".join(cues)


def to_vtt(segments: Sequence[Segment]) -> str:
    """WebVTT, the speaker as a voice span."""
    cues = (
        f"{_clock(start, '.')} --> {_clock(end, '.')}\n{_voice(segment)}{_escaped(segment.text)}\n"
        for segment, (start, end) in zip(segments, _times(segments), strict=True)
    )
    return "\n".join(["WEBVTT\n", *cues])


def labelled(segment: Segment) -> str:
    """The text, after `[Speaker n]` where the speaker is known."""
    return segment.text if segment.speaker is None else f"[{segment.speaker}] {segment.text}"


def _times(segments: Sequence[Segment]) -> list[tuple[int, int]]:
    """Start and end of each in milliseconds; players drop a cue that lasts no time."""
    starts = [round(segment.start * 1000) for segment in segments]
    return [(start, max(start + 1, round(s.end * 1000))) for start, s in zip(starts, segments, strict=True)]


def _clock(milliseconds: int, point: str) -> str:
    seconds, rest = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{point}{rest:03}"


def _voice(segment: Segment) -> str:
    return "" if segment.speaker is None else f"<v {_escaped(segment.speaker)}>"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
