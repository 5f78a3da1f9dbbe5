"""Segments as text, SRT and WebVTT, whole or in pieces.

Source: W3C, "WebVTT: The Web Video Text Tracks Format". SRT has no standard and follows SubRip: a number,
`hh:mm:ss,mmm --> hh:mm:ss,mmm`, the text, an empty line.
"""

from collections.abc import Iterable, Iterator

from .scripts import separator
from .segments import Segment


def to_text(segments: Iterable[Segment]) -> str:
    """Text without times: one line per turn, after `[Speaker n]` if speakers are known."""
    return "".join(text_pieces(segments))


def to_srt(segments: Iterable[Segment]) -> str:
    """SubRip subtitles, with `[Speaker n]` before the text if the speaker is known."""
    return "".join(srt_pieces(segments))


def to_vtt(segments: Iterable[Segment]) -> str:
    """WebVTT subtitles, with the speaker as a voice span."""
    return "".join(vtt_pieces(segments))


def text_pieces(segments: Iterable[Segment]) -> Iterator[str]:
    """`to_text` in pieces: one for each segment as soon as it is known, and the end of the last line."""
    before: Segment | None = None
    for segment in segments:
        if before is None:
            yield labelled(segment)
        elif segment.speaker == before.speaker:
            yield separator(before.text, segment.text) + segment.text
        else:
            yield f"\n{labelled(segment)}"
        before = segment
    if before is not None:
        yield "\n"


def srt_pieces(segments: Iterable[Segment]) -> Iterator[str]:
    """`to_srt` in pieces, one for each segment."""
    for number, segment in enumerate(segments, start=1):
        gap = "\n" if number > 1 else ""
        yield f"{gap}{number}\n{_line_of_times(segment, ',')}\n{labelled(segment)}\n"


def vtt_pieces(segments: Iterable[Segment]) -> Iterator[str]:
    """`to_vtt` in pieces: the header, and one for each segment."""
    yield "WEBVTT\n"
    for segment in segments:
        yield f"\n{_line_of_times(segment, '.')}\n{_voice(segment)}{_escaped(segment.text)}\n"


def labelled(segment: Segment) -> str:
    """The text, after `[Speaker n]` if the speaker is known."""
    return segment.text if segment.speaker is None else f"[{segment.speaker}] {segment.text}"


def _line_of_times(segment: Segment, point: str) -> str:
    """`start --> end`. The end is at least one millisecond later, because players drop cues without duration."""
    start = round(segment.start * 1000)
    end = max(start + 1, round(segment.end * 1000))
    return f"{_clock(start, point)} --> {_clock(end, point)}"


def _clock(milliseconds: int, point: str) -> str:
    seconds, rest = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{point}{rest:03}"


def _voice(segment: Segment) -> str:
    return "" if segment.speaker is None else f"<v {_escaped(segment.speaker)}>"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
