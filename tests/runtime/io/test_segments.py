"""Reading segments from what a model writes: every spelling of times and speakers, and anything else it may write."""

import re
import timeit
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afnext.runtime.io.segments import Segment, clean, parse_segments

WORD = st.from_regex(r"[a-z]{2,6}", fullmatch=True).filter(lambda word: word not in ("to", "sec", "spk", "speaker"))


def seen(text: str, duration: float = 100.0) -> list[tuple[float, float, str | None, str]]:
    segments, problems = parse_segments(text, duration)
    assert problems == []
    return [(segment.start, segment.end, segment.speaker, segment.text) for segment in segments]


@pytest.mark.parametrize(
    "text",
    [
        "[00:01.5 - 00:03.0] [Speaker 1] hello there\n[00:03.0 - 00:04.25] [Speaker 2] hi",
        "[Speaker 1] [00:01.5 - 00:03.0] hello there\n[Speaker 2] [00:03.0 - 00:04.25] hi",
        "[Speaker 1, 00:01.5-00:03.0]: hello there\n[Speaker 2, 00:03.0-00:04.25]: hi",
        "[00:01.5 – 00:03.0, Speaker 1] hello there [00:03.0 – 00:04.25, speaker_02] hi",
        "[1.5s - 3s] Speaker 1: hello there\n[3s - 4.25s] Speaker 2: hi",
        "[1.5 to 3.0] [SPEAKER_1]\nhello\nthere\n\n[3.0 to 4.25] [SPEAKER_2] hi\n",
        "**[00:01.5 - 00:03.0]** **[Speaker 1]** hello there\n**[00:03.0 - 00:04.25]** **[Speaker 2]** hi",
        "- (00:01.5 - 00:03.0) [Speaker 1] hello there\n- (00:03.0 - 00:04.25) [Speaker 2] hi",
        "1\n00:00:01,500 --> 00:00:03,000\nSpeaker 1: hello there\n\n2\n00:00:03,000 --> 00:00:04,250\nSpeaker 2: hi",
        "0:01.5 - 0:03: [Speaker 1] hello there\n0:03 - 0:04.25: [Speaker 2] hi",
        "[00:01.5] [00:03.0] [Speaker 1] hello there [00:03.0] [00:04.25] [Speaker 2] hi",
        "[00:01.5] [Speaker 1] hello there\n[00:03.0] [Speaker 2] hi [00:04.25]",
        "00:01.5 - 00:03 Speaker 1: hello there\n00:03 - 00:04.25 Speaker 2: hi",
        "[Speaker 1]: [00:01.5 - 00:03]: hello there\n[Speaker 2]: [00:03 - 00:04.25]: hi",
        "Speaker 1 [00:01.5-00:03]: hello there\nSpeaker 2 [00:03-00:04.25]: hi",
        "Speaker 1 (00:01.5 - 00:03):\nhello there\nSpeaker 2 (00:03 - 00:04.25):\nhi",
        "**Speaker 1** [00:01.5 - 00:03]: hello there\n**Speaker 2** [00:03 - 00:04.25]: hi",
        "[00:01.5 - 00:03] **Speaker 1:** hello there\n[00:03 - 00:04.25] **Speaker 2:** hi",
        "**[00:01.5 - 00:03] Speaker 1:** hello there\n**[00:03 - 00:04.25] Speaker 2:** hi",
        "【00:01.5－00:03】【Speaker 1】hello there\n【00:03－00:04.25】【Speaker 2】hi",
        "［00：01.5～00：03］ Speaker 1：hello there\n［00：03～00：04.25］ Speaker 2：hi",
        "（00:01.5 → 00:03） Speaker 1： hello there\n（00:03 → 00:04.25） Speaker 2： hi",
        "Speaker 1: hello there [00:01.5-00:03]\nSpeaker 2: hi [00:03-00:04.25]",
        "[Speaker 1] hello there (00:01.5 - 00:03)\n[Speaker 2] hi (00:03 - 00:04.25)",
        "hello there [00:01.5-00:03] [Speaker 1]\nhi [00:03-00:04.25] [Speaker 2]",
        "hello there [00:01.5-00:03, Speaker 1] hi [00:03-00:04.25, Speaker 2]",
        "[00:01:500 - 00:03:000] Speaker 1: hello there\n[00:03:000 - 00:04:250] Speaker 2: hi",
        "[00:00:01:500 - 00:00:03:000] Speaker 1: hello there\n[00:00:03:000 - 00:00:04:250] Speaker 2: hi",
        "[1.5-3] [Speaker 1] hello there\n[3.0-4.25s] [Speaker 2] hi",
        "<|1.50|> <|speaker 1|> hello there <|3.00|><|3.00|> <|speaker 2|> hi <|4.25|>",
        "1. [00:01.5 - 00:03] Speaker #1: hello there\n2. [00:03 - 00:04.25] Speaker #2: hi",
        "Speaker 1 | 00:01.5 - 00:03 : hello there\nSpeaker 2 | 00:03 - 00:04.25 : hi",
        "00:01.5 - 00:03 - Speaker 1\nhello there\n\n00:03 - 00:04.25 - Speaker 2\nhi",
        "1\r\n00:00:01,500 --> 00:00:03,000\r\n[Speaker 1] hello there\r\n\r\n"
        "2\r\n00:00:03,000 --> 00:00:04,250\r\n[Speaker 2] hi\r\n",
    ],
)
def test_one_conversation_in_many_spellings(text: str) -> None:
    assert seen(text) == [(1.5, 3.0, "Speaker 1", "hello there"), (3.0, 4.25, "Speaker 2", "hi")]


@pytest.mark.parametrize(
    "text",
    [
        "Speaker 1 [00:01]: hello there\nSpeaker 2 [00:03]: hi",
        "Speaker 1  0:01\nhello there\n\nSpeaker 2  0:03\nhi",
        "0:01 - Speaker 1: hello there\n0:03 - Speaker 2: hi",
        "00:01 [Speaker 1] hello there\n00:03 [Speaker 2] hi",
        "**Speaker 1** (00:01): hello there\n**Speaker 2** (00:03): hi",
        "[00:01] Speaker 1: hello there [00:03] Speaker 2: hi",
        "hello there [Speaker 1, 00:01]\nhi [Speaker 2, 00:03]",
    ],
)
def test_one_conversation_with_starts_alone(text: str) -> None:
    found = [(start, speaker, words) for start, _, speaker, words in seen(text)]
    assert found == [(1.0, "Speaker 1", "hello there"), (3.0, "Speaker 2", "hi")]


def test_lines_that_all_start_with_a_clock() -> None:
    assert [(start, words) for start, _, _, words in seen("0:00 hello\n0:12 it was 3:30\n1:03 bye")] == [
        (0.0, "hello"),
        (12.0, "it was 3:30"),
        (63.0, "bye"),
    ]
    segments, problems = parse_segments("3:30 he came\nand left", 300.0)
    assert [segment.text for segment in segments] == ["3:30 he came", "and left"]
    assert problems


def test_speakers_on_one_line_are_apart() -> None:
    segments, _ = parse_segments("Speaker 1: hello there Speaker 2: hi", 10.0)
    assert [(s.speaker, s.text) for s in segments] == [("Speaker 1", "hello there"), ("Speaker 2", "hi")]


@pytest.mark.parametrize(("last", "rate"), [(24, 25), (29, 30), (59, 60)])
def test_frames_are_counted_at_the_rate_that_the_largest_number_needs(last: int, rate: int) -> None:
    (first, _, _, _), (second, _, _, _) = seen(f"[00:00:01:00] one [00:00:02:{last}] two")
    assert (first, second) == (1.0, pytest.approx(2 + last / rate))


def test_starts_alone_end_where_the_next_begins() -> None:
    assert seen("[00:01.0] one\n[00:02.5] two\n[00:02.5] three", 10.0) == [
        (1.0, 2.5, None, "one"),
        (2.5, 10.0, None, "two"),
        (2.5, 10.0, None, "three"),
    ]
    segments, _ = parse_segments("[00:01.0 - 00:02.0] one\n[00:02.5] two", 10.0)
    assert [(segment.start_stated, segment.end_stated) for segment in segments] == [(True, True), (True, False)]


def test_hours_and_talk_at_the_same_time() -> None:
    text = "[1:00:01 - 1:00:09] [Speaker 1] long\n[1:00:02 - 1:00:03] [Speaker 2] cut in\n[59:59] [Speaker 1] before"
    assert seen(text, 4000.0) == [
        (3599.0, 3601.0, "Speaker 1", "before"),
        (3601.0, 3609.0, "Speaker 1", "long"),
        (3602.0, 3603.0, "Speaker 2", "cut in"),
    ]


def test_a_transcript_without_times_is_spread_by_length_and_says_so() -> None:
    segments, problems = parse_segments("[Speaker 1] aaaa aaaaa\n[Speaker 2] bbbb bbbbb\n[Speaker 1] c\n", 21.0)
    assert [(s.start, s.end, s.speaker) for s in segments] == [
        (0.0, 10.0, "Speaker 1"),
        (10.0, 20.0, "Speaker 2"),
        (20.0, 21.0, "Speaker 1"),
    ]
    assert not any(segment.start_stated or segment.end_stated for segment in segments)
    assert problems == ["3 of 3 segments have no time; it is estimated"]


def test_lines_before_the_first_marker_stand_before_it() -> None:
    segments, problems = parse_segments("Here it is:\nready?\n[00:10 - 00:12] go", 20.0)
    assert [(s.text, s.start_stated) for s in segments] == [("Here it is:", False), ("ready?", False), ("go", True)]
    assert segments[0].start == 0.0
    assert 0.0 < segments[1].start < segments[1].end <= 10.0
    assert len(problems) == 1


@pytest.mark.parametrize("marker", ["[00:75]", "[99:00]", "[1:60:00]", "[123456.5]", "[00:01 - 88:00]"])
def test_an_impossible_time_stays_in_the_text_and_is_told(marker: str) -> None:
    segments, problems = parse_segments(f"[00:01] one {marker} two", 30.0)
    assert [(segment.start, segment.text) for segment in segments] == [(1.0, f"one {marker} two")]
    assert len(problems) == 1
    assert marker in problems[0]


def test_many_impossible_times_are_one_problem() -> None:
    _, problems = parse_segments("".join(f"[00:01] one [99:{i % 60:02}] two " for i in range(100)), 30.0)
    assert problems == [
        "no time in a recording of 30.0 s, left in the text: '[99:00]', '[99:01]', '[99:02]' and 97 more"
    ]


@pytest.mark.parametrize(
    "text",
    [
        "[00:01 Ann] one",
        "one {at 00:01} two",
        "(Speaker 1 00:01 loud) one",
        "[00:01] one 00:05-00:07 two",
        "[00:01] one 00:05 to 00:07 two",
        "[00:01] one 00:05.5",
        "see [Speaker 1",
    ],
)
def test_a_marker_in_an_unknown_layout_stays_in_the_text_and_is_told(text: str) -> None:
    segments, problems = parse_segments(text, 30.0)
    assert [segment.text for segment in segments] == [text.removeprefix("[00:01] ")]
    assert any("unknown layout" in problem for problem in problems)


def test_an_end_before_its_start_is_dropped_and_told() -> None:
    segments, problems = parse_segments("[00:09 - 00:02] one [00:12] two", 30.0)
    assert [(s.start, s.end, s.end_stated) for s in segments] == [(9.0, 12.0, False), (12.0, 30.0, False)]
    assert "ends before it starts" in problems[0]


def test_a_time_just_past_the_end_is_the_end() -> None:
    assert seen("[00:29 - 00:31] done", 30.4) == [(29.0, 30.4, None, "done")]


@pytest.mark.parametrize(
    "text",
    [
        "it was 12:30 when he came",
        "the odds are (3.5) to one",
        "[laughter] [music playing] [1] [12]",
        "Speakers: two of them",
        "10.5 to 12.5 percent",
        "see John 3:16 for that",
    ],
)
def test_what_only_looks_like_a_marker_is_text(text: str) -> None:
    segments, _ = parse_segments(f"[00:01] {text}", 1800.0)
    assert [segment.text for segment in segments] == [text]
    segments, _ = parse_segments(text, 1800.0)
    assert [segment.text for segment in segments] == [text]


def test_nothing_said_is_no_segment() -> None:
    assert parse_segments("", 5.0) == ([], [])
    assert parse_segments(" \n[00:01] \n\x00[Speaker 1]\n", 5.0) == ([], [])


PIECES = ("[", "]", "(", ")", "**", ":", ",", "-", "-->", "1\n", "\n", " ", "\u2028", "\x00", "٣:٣", "00:12", "12.5s")
MARKERISH = st.sampled_from([*PIECES, "1:02:03.5", "[00:05]", "[00:05-00:07]", "[Speaker_2]", "Speaker 1:", "[99:99]"])


@settings(max_examples=300)
@given(st.lists(MARKERISH | WORD | st.text(max_size=4), max_size=30).map("".join), st.floats(0.01, 90_000))
def test_whatever_the_model_writes(text: str, duration: float) -> None:
    segments, problems = parse_segments(text, duration)
    starts = [segment.start for segment in segments]
    assert starts == sorted(starts)
    for segment in segments:
        assert 0 <= segment.start <= segment.end <= duration
        assert segment.text
        assert len(segment.text.splitlines()) == 1
    assert all(isinstance(problem, str) for problem in problems)
    assert any(not segment.start_stated for segment in segments) == any("have no time" in p for p in problems)


@settings(max_examples=100)
@given(
    st.lists(st.lists(WORD, min_size=1, max_size=5), max_size=12),
    st.sampled_from(["[{}] {}", "[{}] [Speaker 1] {}", "({}) {}", "[Speaker 3] [{}] {}"]),
)
def test_no_word_is_lost_or_moved(sentences: list[list[str]], form: str) -> None:
    lines = [form.format(f"00:{i:02}.5", " ".join(words)) for i, words in enumerate(sentences)]
    segments, problems = parse_segments("\n".join(lines), 60.0)
    assert problems == []
    assert [segment.text.split() for segment in segments] == sentences
    assert [segment.start for segment in segments] == [i + 0.5 for i in range(len(sentences))]


TIMES = (
    "{m:02}:{s:04.1f}",
    "{m}:{s:04.1f}",
    "00:{m:02}:{s:06.3f}",
    "00:{m:02}:{s:04.1f}",
    "{t:.1f}",
    "{t:.1f}s",
    "{t:.1f} sec",
)
BRACKETS = (
    "[]",
    "()",
    "{}",
    "<>",
    "【】",
    "［］",
    "（）",
    ("**[", "]**"),
    ("<|", "|>"),
    ("", ""),
    ("", ":"),
    ("**", ":**"),
    ("", "："),
)
RANGES = ("-", " - ", " – ", " --> ", "->", " to ", "~", "～", " → ", "..", None)
NAMES = ("Speaker {}", "SPEAKER_0{}", "speaker {}", "Spk{}", "Speaker #{}", None)
SEPARATORS = ("", " ", ", ", ": ", " - ", " | ", "\n", "\t", "; ")


@st.composite
def rendered(draw: st.DrawFn) -> tuple[str, list[tuple[float, float | None, str | None, str]]]:
    """A conversation written in any combination of spellings, and what is said in it."""
    time, name, to = (draw(st.sampled_from(choices)) for choices in (TIMES, NAMES, RANGES))
    around_time, around_name, around_both = (draw(st.sampled_from(BRACKETS)) for _ in range(3))
    order = draw(st.permutations(["time", "name"] if draw(st.booleans()) else ["both"]))
    between, after = draw(st.sampled_from(SEPARATORS)), draw(st.sampled_from(SEPARATORS[1:]))
    behind = draw(st.booleans())
    lines, truth = [], []
    for i, words in enumerate(draw(st.lists(st.lists(WORD, min_size=1, max_size=4), min_size=1, max_size=4))):
        start, end = 12.5 * i + 1.5, 12.5 * i + 9.0
        spelled = [time.format(m=int(t // 60), s=t % 60, t=t) for t in (start, end)]
        times = spelled[0] if to is None else to.join(spelled)
        speaker = name and name.format(i % 2 + 1)
        parts = {
            "time": f"{around_time[0]}{times}{around_time[1]}",
            "name": f"{around_name[0]}{speaker}{around_name[1]}" if speaker else "",
            "both": f"{around_both[0]}{times}{between if speaker else ''}{speaker or ''}{around_both[1]}",
        }
        header = between.join(parts[part] for part in order if parts[part])
        text = " ".join(words)
        lines.append(f"{text}{after}{header}" if behind else f"{header}{after}{text}")
        truth.append((start, None if to is None else end, speaker and f"Speaker {i % 2 + 1}", text))
    return draw(st.sampled_from(["\n", "\n\n", " "])).join(lines), truth


@settings(max_examples=400)
@given(rendered())
def test_a_layout_is_read_back_or_all_words_are_kept_with_a_warning(
    conversation: tuple[str, list[tuple[float, float | None, str | None, str]]],
) -> None:
    text, truth = conversation
    segments, problems = parse_segments(text, 60.0)
    if problems:
        kept = " ".join(segment.text for segment in segments)
        assert [word for *_, words in truth for word in words.split() if word not in kept] == []
    else:
        found = [(s.start, s.end if s.end_stated else None, s.speaker, s.text.strip(" -|,;:")) for s in segments]
        assert found == truth


@settings(max_examples=100)
@given(st.lists(WORD | MARKERISH, max_size=20))
def test_words_of_broken_transcripts_all_come_back(pieces: list[str]) -> None:
    text = " ".join(pieces)
    segments, _ = parse_segments(text, 60.0)
    said = sorted(word for segment in segments for word in re.findall(r"[a-z]{2,}", segment.text))
    written = sorted(piece for piece in pieces if re.fullmatch(r"[a-z]{2,6}", piece))
    missing = [word for word in written if said.count(word) < written.count(word)]
    assert missing == []


@pytest.mark.parametrize(
    "flood",
    [
        "line\n",
        "[ 00:01 ",
        "[",
        " ",
        "00:01 - ",
        "<think>",
        "*",
        "Speaker 1: ",
        "[99:99] ",
        "[00:01] ",
        "(00:01\n",
        "1\n",
        "{ ",
        "x [00:01]\n",
    ],
)
def test_time_grows_with_the_text_and_not_with_its_square(flood: str) -> None:
    """Four times the text may take nine times as long; its square would take 16 times."""

    def seconds(count: int) -> float:
        text = flood * count
        return min(timeit.repeat(lambda: parse_segments(text, 60.0), number=1, repeat=2))

    assert seconds(6_000) < 9 * seconds(1_500) + 0.05


def test_a_flood_of_brackets_takes_no_time() -> None:
    text = "[ 00:01 " * 5000 + "[" * 5000 + " " * 5000 + "00:01 - " * 3000
    assert parse_segments(text, 60.0)[0]


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("a\x00b\x1b[0m", "ab[0m"),
        ("می\u200cخواهم \u200fx\u200d", "می\u200cخواهم \u200fx\u200d"),
        (
            "soft\u00adhyphen \U0001f3f4\U000e0067\U000e007f \U0001faea\u0378",
            "soft\u00adhyphen \U0001f3f4\U000e0067\U000e007f \U0001faea\u0378",
        ),
        (" a \t\n\u2028 b\x85c\x0b", "a b c"),
        ("今天\n天气 很好\nand", "今天天气 很好 and"),
        ("\u200b\u00ad \x07", ""),
    ],
)
def test_only_control_characters_are_removed(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned
    segments, _ = parse_segments(f"[00:01] {text}", 30.0)
    assert [segment.text for segment in segments] == [cleaned] * bool(cleaned)


@given(st.text())
def test_every_character_but_those_of_control_is_kept(text: str) -> None:
    kept = [char for char in text if unicodedata.category(char) != "Cc" and not char.isspace()]
    visible = any(unicodedata.category(char) != "Cf" for char in kept)
    assert [char for char in clean(text) if not char.isspace()] == (kept if visible else [])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hello </think> there", "hello there"),
        ("hello <think>so I think</think> there", "hello there"),
        ("hello<|im_end|><|endoftext|>", "hello"),
        ("<think> hello <sound>", "hello"),
        ("[BOS]hello[PAD][PAD]", "hello"),
    ],
)
def test_tags_never_reach_a_segment(text: str, said: str) -> None:
    segments, problems = parse_segments(f"[00:01] {text}", 30.0)
    assert [segment.text for segment in segments] == [said]
    assert len(problems) == 1
    assert problems[0].startswith("left out, not speech: '")


def test_segments_are_plain_values() -> None:
    assert Segment(0.0, 1.0, "x") == Segment(0.0, 1.0, "x", None, True, True)
