"""Joining what overlapping windows heard: each sentence once, in order, by the right speaker."""

import random
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from afnext.runtime.io.merge import Heard, Merger, merge
from afnext.runtime.io.segments import Segment

VOCABULARY = [a + b + c for a in "bdfgklm" for b in "aeiou" for c in ("n", "r", "st", "")]


LETTERS = {
    "Latin": None,
    "Chinese": "的一是不了在人有我他这为之大来以个中上们到说国和地也子时道出而要于就下得可你年生",
    "Japanese": "のにはをたがでてとしれさあるいるもするからなこととしていやなどなっ日本語今天気人行見",
    "Thai": "กขคงจชซญดตถทนบปผพฟมยรลวสหอเแโใไ",
}


def conversation(rng: random.Random, duration: float, longest: float, speakers: int, script: str) -> list[Segment]:
    """Sentences one after the other, the same few words again and again in places, each by one of the speakers."""
    segments, time = [], rng.uniform(0, 2)
    while time < duration - 1:
        end = min(time + rng.uniform(0.4, longest), duration)
        text = sentence(rng, end - time, script)
        segments.append(Segment(time, end, text, f"Speaker {rng.randint(1, speakers)}"))
        time = end + rng.choice([0.0, 0.1, rng.uniform(0, 3)])
    return segments


def sentence(rng: random.Random, seconds: float, script: str) -> str:
    """Two words, or four letters of a script without spaces, a second."""
    if letters := LETTERS[script]:
        return "".join(rng.choices(letters if rng.random() < 0.8 else letters[:2], k=max(1, round(seconds * 4))))
    words = rng.choices(VOCABULARY if rng.random() < 0.8 else ["no", "yes"], k=max(1, round(seconds * 2)))
    return " ".join(words)


def hear(segment: Segment, start: float, end: float) -> Segment:
    """The segment as a window from `start` to `end` hears it: without the words that are spoken outside."""
    between = " " if " " in segment.text or segment.text.isascii() else ""
    words = segment.text.split() if between else list(segment.text)
    each = (segment.end - segment.start) / len(words)
    inside = [word for i, word in enumerate(words) if start <= segment.start + (i + 0.5) * each < end]
    text = between.join(inside)
    return replace(segment, start=max(start, segment.start), end=min(end, segment.end), text=text)


def listen(truth: list[Segment], start: float, end: float, jitter: random.Random | None = None) -> Heard:
    heard = [hear(s, start, end) for s in truth if s.end > start and s.start < end]
    if jitter is not None:
        heard = [
            replace(s, start=s.start + jitter.uniform(-0.1, 0.1), end=s.end + jitter.uniform(-0.1, 0.1)) for s in heard
        ]
    return Heard(start, end, tuple(sorted((s for s in heard if s.text), key=lambda s: s.start)))


def listen_in_windows(
    truth: list[Segment], window: float, overlap: float, jitter: random.Random | None = None
) -> list[Heard]:
    duration = truth[-1].end if truth else 1.0
    windows, start = [], 0.0
    while True:
        end = min(start + window, duration)
        windows.append(listen(truth, start, end, jitter))
        if end >= duration:
            return windows
        start += window - overlap


def test_windows_side_by_side_are_put_in_a_row() -> None:
    a, b = Segment(1, 2, "one"), Segment(3, 4, "two")
    assert merge([Heard(0, 2.5, (a,)), Heard(2.5, 5, (b,))]) == [a, b]
    assert merge([]) == []
    assert merge([Heard(0, 5, (a, b))]) == [a, b]


@settings(max_examples=150)
@given(st.integers(0, 2**32), st.sampled_from([12.0, 20.0, 60.0]), st.booleans(), st.sampled_from(list(LETTERS)))
def test_perfect_hearing_of_overlapping_windows_is_the_truth(
    seed: int, window: float, jittered: bool, script: str
) -> None:
    rng = random.Random(seed)
    overlap = window / rng.choice([2, 3])
    truth = conversation(rng, rng.uniform(5, 4 * window), overlap / 2, 1, script)
    merged = merge(listen_in_windows(truth, window, overlap, rng if jittered else None))
    assert [segment.text for segment in merged] == [segment.text for segment in truth]
    for found, true in zip(merged, truth, strict=True):
        assert abs(found.start - true.start) <= 0.11
        assert abs(found.end - true.end) <= 0.11


@settings(max_examples=150)
@given(st.integers(0, 2**32), st.sampled_from(["Latin", "Chinese"]), st.integers(1, 3))
def test_what_has_been_given_out_is_never_changed_by_later_windows(seed: int, script: str, speakers: int) -> None:
    """After each window, whatever follows it: here the true rest, silence, or another conversation."""
    rng = random.Random(seed)
    window, overlap = 12.0, rng.choice([0.0, 2.0, 4.0, 6.0])
    windows = listen_in_windows(conversation(rng, rng.uniform(5, 60), 5.0, speakers, script), window, overlap, rng)
    other = listen_in_windows(conversation(rng, 60, 5.0, speakers, script), window, overlap, rng)
    merger = Merger()
    given_out: list[Segment] = []
    for index, heard in enumerate(windows):
        last = index == len(windows) - 1
        given_out += merger.push(heard, None if last else windows[index + 1].start)
        for rest in (
            []
            if last
            else [windows[index + 1 :], [Heard(h.start, h.end, ()) for h in windows[index + 1 :]], other[index + 1 :]]
        ):
            assert merge([*windows[: index + 1], *rest])[: len(given_out)] == given_out
    assert given_out == merge(windows)


def test_segments_come_as_soon_as_they_are_final() -> None:
    truth = [Segment(i, i + 1, f"word{i}") for i in range(60)]
    merger = Merger()
    windows = listen_in_windows(truth, 20.0, 5.0)
    assert merger.push(windows[0], windows[1].start) == truth[:14]
    assert merger.push(windows[1], windows[2].start) == truth[14:29]


def test_speakers_are_recognized_across_a_cut_in_chinese() -> None:
    """A sentence that each window cuts off on one side is one sentence, and its speaker one speaker."""
    old = Heard(0, 10, (Segment(1, 4, "你好吗", "Speaker 1"), Segment(6, 10, "今天天气很好我们", "Speaker 2")))
    new = Heard(5, 15, (Segment(6, 11, "今天天气很好我们去公园", "Speaker 1"), Segment(12, 14, "好的", "Speaker 2")))
    assert [(s.text, s.speaker) for s in merge([old, new])] == [
        ("你好吗", "Speaker 1"),
        ("今天天气很好我们去公园", "Speaker 2"),
        ("好的", "Speaker 3"),
    ]


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


@settings(max_examples=100)
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
