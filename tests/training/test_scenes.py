"""Recordings hold what their items say, and answers say what the items say."""

import random
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training import vocabulary
from training.scenes import (
    KINDS,
    Conditions,
    Item,
    ask,
    ask_moment,
    lines,
    make_scene,
    moments,
    random_conditions,
    timestamp,
)
from training.voices import RATE, VoiceBank

CLEAN = Conditions(None)


@given(st.integers(0, 17_999))
def test_a_timestamp_reads_back_as_its_tenth(tenths: int) -> None:
    minutes, whole, tenth = map(int, re.split("[:.]", timestamp(tenths / 10)))
    assert 600 * minutes + 10 * whole + tenth == tenths


def test_items_come_in_order_and_do_not_overlap(bank: VoiceBank, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(20):
        samples, items = make_scene(bank, rng, 6.0, random_conditions(rng))
        assert samples.dtype == np.float32
        assert len(samples) == 6 * RATE
        assert np.abs(samples).max() <= 1
        times = [time for item in items for time in (item.onset, item.end)]
        assert times == sorted(times)
        assert not times or times[-1] <= 6.0


def test_sound_is_where_the_items_are(bank: VoiceBank, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(10):
        samples, items = make_scene(bank, rng, 8.0, CLEAN)
        if not items:
            continue
        peak = np.abs(samples).max()
        inside = np.zeros(len(samples), bool)
        for item in items:
            inside[round(item.onset * RATE) : round(item.end * RATE) + 1] = True
            start = round(item.onset * RATE)
            assert np.abs(samples[start : start + RATE // 10]).max() > 0.02 * peak, item
        assert np.abs(samples[~inside]).max(initial=0) < 0.1 * peak


@pytest.mark.parametrize("noise", ["white", "pink", "brown"])
def test_noise_has_the_ratio_asked_for(bank: VoiceBank, seed: int, noise: str) -> None:
    rng = random.Random(seed)
    scenes = (make_scene(bank, rng, 90.0, Conditions(10.0, noise), density=1.0) for _ in range(100))
    # A scene may end early; the noise under a few words may be louder or softer than elsewhere.
    samples, items = next((samples, items) for samples, items in scenes if len(items) >= 20)
    inside = np.zeros(len(samples), bool)
    for item in items:
        inside[round(item.onset * RATE) : round(item.end * RATE)] = True
    quiet, loud = (float((samples[part] ** 2).mean()) for part in (~inside, inside))
    assert 10 * np.log10(loud / quiet - 1) == pytest.approx(10, abs=2)


ITEMS = [
    Item("beep", False, 0.52, 0.7),
    Item("seven", True, 1.0, 1.5),
    Item("tone", False, 61.25, 62.0, "high"),
    Item("seven", True, 63.0, 63.4),
]


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("transcribe", "seven seven"),
        ("transcribe_times", "[00:01.0] seven\n[01:03.0] seven"),
        ("sounds_times", "[00:00.5] beep\n[01:01.2] tone"),
        ("describe", '[00:00.5] beep\n[00:01.0] "seven"\n[01:01.2] tone\n[01:03.0] "seven"'),
        ("count_words", "1 at 00:01.0, 2 at 01:03.0: 2"),
        ("first", "A beep at 00:00.5."),
        ("last", 'The word "seven" at 01:03.0.'),
        ("pitch", "High."),
    ],
)
def test_answers(kind: str, answer: str, seed: int) -> None:
    assert ask(kind, ITEMS, random.Random(seed)).answer == answer


def test_questions_about_one_label_count_and_time_that_label(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(40):
        question = ask("count_sound", ITEMS, rng)
        asked = [sound for sound in vocabulary.SOUNDS if sound in question.prompt.replace("buzzes", "buzz")]
        times = [timestamp(item.onset) for item in ITEMS if item.label == asked[0]]
        told = ", ".join(f"{number} at {time}" for number, time in enumerate(times, start=1))
        assert question.answer == (f"{told}: {len(times)}" if times else "0")
        question = ask("when_word", ITEMS, rng)
        found = "00:01.0, 01:03.0" if '"seven"' in question.prompt else "It is not spoken."
        assert question.answer == found


def test_thinking_lists_the_evidence_before_the_answer(seed: int) -> None:
    question = ask("count_words", ITEMS, random.Random(seed), think=True)
    assert question.prompt.endswith(vocabulary.THINK)
    assert question.answer == '<think>\n1. [00:01.0] "seven"\n2. [01:03.0] "seven"\n</think>\n2'
    silent = ask("count_words", [], random.Random(seed), think=True)
    assert silent.answer == "<think>\nnothing\n</think>\n0"


def test_moments_are_those_of_labels_that_occur_once(seed: int) -> None:
    once = moments(ITEMS)
    labels = [item.label for item in ITEMS]
    assert [item.label for item in once] == [label for label in labels if labels.count(label) == 1]
    for item in once:
        for rng in (random.Random(seed), None):
            question = ask_moment(item, rng)
            assert item.label in question.prompt
            assert (question.answer, question.evidence) == (timestamp(item.onset), (item,))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_has_an_answer_for_silence(kind: str, seed: int) -> None:
    assert ask(kind, [], random.Random(seed)).answer
    assert lines([]) == ""
