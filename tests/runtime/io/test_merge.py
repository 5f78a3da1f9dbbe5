"""Joining what overlapping windows heard: each sentence once, in order, by the right speaker."""

import random
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from afnext.runtime.io.merge import Heard, merge
from afnext.runtime.io.segments import Segment

VOCABULARY = [a + b + c for a in "bdfgklm" for b in "aeiou" for c in ("n", "r", "st", "")]


def conversation(rng: random.Random, duration: float, longest: float, speakers: int) -> list[Segment]:
    """Sentences one after the other, the same few words again and again in places, each by one of the speakers."""
    segments, time = [], rng.uniform(0, 2)
    while time < duration - 1:
        end = min(time + rng.uniform(0.4, longest), duration)
        count = max(1, round((end - time) * 2))
        words = rng.choices(VOCABULARY if rng.random() < 0.8 else ["no", "yes"], k=count)
        segments.append(Segment(time, end, " ".join(words), f"Speaker {rng.randint(1, speakers)}"))
        time = end + rng.choice([0.0, 0.1, rng.uniform(0, 3)])
    return segments


def hear(segment: Segment, start: float, end: float) -> Segment:
    """The segment as a window from `start` to `end` hears it: without the words that are spoken outside."""
    words = segment.text.split()
    each = (segment.end - segment.start) / len(words)
    inside = [word for i, word in enumerate(words) if start <= segment.start + (i + 0.5) * each < end]
    return replace(segment, start=max(start, segment.start), end=min(end, segment.end), text=" ".join(inside))


def listen(truth: list[Segment], start: float, end: float, jitter: random.Random | None = None) -> Heard:
    heard = [hear(s, start, end) for s in truth if s.end > start and s.start < end]
    if jitter is not None:
        heard = [
            replace(s, start=s.start + jitter.uniform(-0.1, 0.1), end=s.end + jitter.uniform(-0.1, 0.1)) for s in heard
        ]
    return Heard(start, end, tuple(sorted((s for s in heard if s.text), key=lambda s: s.start)))


def test_windows_side_by_side_are_put_in_a_row() -> None:
    a, b = Segment(1, 2, "one"), Segment(3, 4, "two")
    assert merge([Heard(0, 2.5, (a,)), Heard(2.5, 5, (b,))]) == [a, b]
    assert merge([]) == []
    assert merge([Heard(0, 5, (a, b))]) == [a, b]


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([12.0, 20.0, 60.0]), st.booleans())
def test_perfect_hearing_of_overlapping_windows_is_the_truth(seed: int, window: float, jittered: bool) -> None:
    rng = random.Random(seed)
    overlap = window / rng.choice([2, 3])
    truth = conversation(rng, rng.uniform(5, 4 * window), overlap / 2, speakers=1)
    duration = truth[-1].end if truth else 1.0
    windows, start = [], 0.0
    while True:
        end = min(start + window, duration)
        windows.append(listen(truth, start, end, rng if jittered else None))
        if end >= duration:
            break
        start += window - overlap
    merged = merge(windows)
    assert [segment.text for segment in merged] == [segment.text for segment in truth]
    for found, true in zip(merged, truth, strict=True):
        assert abs(found.start - true.start) <= 0.11
        assert abs(found.end - true.end) <= 0.11


def test_equal_words_in_a_row_are_neither_lost_nor_doubled() -> None:
    truth = [Segment(i * 0.5, i * 0.5 + 0.5, "no") for i in range(40)]
    assert merge([listen(truth, 0, 12), listen(truth, 8, 20)]) == truth


def test_a_sentence_heard_in_one_window_only_stays() -> None:
    only_old, only_new = Segment(8.5, 9.5, "near the end"), Segment(6.0, 7.0, "near the start")
    assert merge([Heard(0, 10, (only_old,)), Heard(5, 15, (only_new,))]) == [only_new, only_old]


def test_where_two_windows_disagree_the_one_with_more_context_is_believed() -> None:
    old = Heard(0, 10, (Segment(5.2, 6.8, "quite right here"), Segment(8.0, 9.9, "garbled mumble")))
    new = Heard(5, 15, (Segment(5.0, 6.9, "all wrong"), Segment(8.0, 9.9, "clear as day")))
    assert [segment.text for segment in merge([old, new])] == ["quite right here", "clear as day"]


def test_speakers_keep_their_names_across_windows() -> None:
    old = Heard(0, 10, (Segment(1, 2, "hello", "Speaker 1"), Segment(6, 8, "the quick brown fox", "Speaker 2")))
    new = Heard(
        5,
        15,
        (
            Segment(6, 8, "the quick brown fox", "Speaker 1"),
            Segment(11, 12, "jumps", "Speaker 1"),
            Segment(12, 13, "who is this", "Speaker 2"),
        ),
    )
    speakers = [(segment.text, segment.speaker) for segment in merge([old, new])]
    assert speakers == [
        ("hello", "Speaker 1"),
        ("the quick brown fox", "Speaker 2"),
        ("jumps", "Speaker 2"),
        ("who is this", "Speaker 3"),
    ]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 30), st.floats(0, 10), st.sampled_from(["a", "a b", "b c", "", "?"]), st.integers(0, 3)),
        max_size=20,
    )
)
def test_whatever_was_heard(heard: list[tuple[float, float, str, int]]) -> None:
    windows = []
    for start in (0.0, 10.0, 20.0):
        segments = [
            Segment(s, min(s + length, start + 15), text or "-", f"Speaker {who}" if who else None)
            for s, length, text, who in sorted(heard)
            if start <= s < start + 15
        ]
        windows.append(Heard(start, start + 15, tuple(segments)))
    merged = merge(windows)
    assert [s.start for s in merged] == sorted(s.start for s in merged)
    known = {(s.start, s.end, s.text) for window in windows for s in window.segments}
    assert {(s.start, s.end, s.text) for s in merged} <= known
    assert len(merged) <= sum(len(window.segments) for window in windows)
