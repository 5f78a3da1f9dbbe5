"""Subtitles as independent readers see them: the packages srt and webvtt-py."""

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afnext.runtime.io.segments import Segment, clean
from afnext.runtime.io.subtitles import to_srt, to_text, to_vtt

srt = pytest.importorskip("srt")
webvtt = pytest.importorskip("webvtt")

NASTY = [
    "-->",
    "<b>",
    "&amp;",
    "WEBVTT",
    "NOTE x",
    "STYLE",
    "1",
    "00:00:01,000 --> 00:00:02,000",
    "{\\an8}",
    "<v Bob>",
    "é",
]
TEXTS = st.lists(st.sampled_from(NASTY) | st.text(max_size=6), min_size=1).map(" ".join).map(clean).filter(bool)


@st.composite
def segment_lists(draw: st.DrawFn) -> list[Segment]:
    count = draw(st.integers(0, 6))
    starts = sorted(draw(st.lists(st.floats(0, 90_000), min_size=count, max_size=count)))
    speakers = st.sampled_from([None, "Speaker 1", "Speaker 2", "Speaker <A> & co"])
    return [Segment(start, start + draw(st.floats(0, 3)), draw(TEXTS), draw(speakers)) for start in starts]


def milliseconds(segment: Segment) -> tuple[int, int]:
    start = round(segment.start * 1000)
    return start, max(start + 1, round(segment.end * 1000))


@settings(max_examples=150)
@given(segment_lists())
def test_srt_reads_back(segments: list[Segment]) -> None:
    cues = list(srt.parse(to_srt(segments)))
    assert [cue.index for cue in cues] == list(range(1, len(segments) + 1))
    for cue, segment in zip(cues, segments, strict=True):
        times = round(cue.start.total_seconds() * 1000), round(cue.end.total_seconds() * 1000)
        assert times == milliseconds(segment)
        label = "" if segment.speaker is None else f"[{segment.speaker}] "
        assert cue.content == label + segment.text


@settings(max_examples=150)
@given(segment_lists())
def test_vtt_reads_back(segments: list[Segment]) -> None:
    cues = webvtt.from_buffer(io.StringIO(to_vtt(segments))).captions
    assert len(cues) == len(segments)
    for cue, segment in zip(cues, segments, strict=True):
        start, end = (
            1000 * (3600 * t.hours + 60 * t.minutes + t.seconds) + t.milliseconds
            for t in (cue.start_time, cue.end_time)
        )
        assert (start, end) == milliseconds(segment)
        unescaped = cue.text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        assert unescaped == segment.text
        voice = None if cue.voice is None else cue.voice.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        assert voice == segment.speaker


def test_text_is_a_line_a_turn() -> None:
    turns = [
        Segment(0, 1, "Hello.", "Speaker 1"),
        Segment(1, 2, "How are you?", "Speaker 1"),
        Segment(2, 3, "Fine.", "Speaker 2"),
    ]
    assert to_text(turns) == "[Speaker 1] Hello. How are you?\n[Speaker 2] Fine.\n"
    assert to_text([Segment(0, 1, "a"), Segment(1, 2, "b")]) == "a b\n"
    assert to_text([]) == to_srt([]) == ""
    assert to_vtt([]).startswith("WEBVTT")
