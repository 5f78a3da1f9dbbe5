"""Degenerate repetition is found where it is, and only there."""

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.simple_path import request

from afnext.runtime.engine.engine import Engine
from afnext.runtime.engine.options import EngineOptions
from afnext.runtime.engine.repetition import (
    COUNTING_REPEATS,
    LONGEST,
    NUMBER,
    OTHER,
    REPEATS,
    TOKENS,
    WORD,
    Repetition,
    RepetitionGuard,
)
from afnext.runtime.model.audio_flamingo import AudioFlamingo


def pushed(tokens: list[int]) -> RepetitionGuard:
    guard = RepetitionGuard()
    for token in tokens:
        guard.push(token)
    return guard


def by_definition(tokens: list[int]) -> Repetition | None:
    """The smallest period of the longest such end of the tokens, found by trying all."""
    for period in range(1, LONGEST + 1):
        length = period
        while length < len(tokens) and tokens[-length - 1] == tokens[-length - 1 + period]:
            length += 1
        if length >= max(REPEATS * period, TOKENS) and length <= len(tokens):
            return Repetition(len(tokens) - length, period, length // period)
    return None


@settings(max_examples=150)
@given(
    st.lists(st.integers(0, 3), max_size=20),
    st.lists(st.integers(0, 3), min_size=1, max_size=9),
    st.integers(0, 40),
)
def test_it_is_found_as_its_definition_says(before: list[int], stretch: list[int], repeats: int) -> None:
    guard, tokens, latest = RepetitionGuard(), [*before, *stretch * repeats], None
    for end, token in enumerate(tokens, 1):
        now = by_definition(tokens[:end])
        assert guard.push(token) == (now is not None)
        latest = now or latest
    assert guard.found == latest


KINDS = [NUMBER] * 10 + [OTHER] * 10 + [WORD] * 80  # token 10 is a colon, 20 to 99 are words


def spoken(text: str) -> list[int]:
    """Tokens of a text of one-letter words, digits and colons."""
    return [int(c) if c.isdigit() else 10 if c == ":" else 20 + ord(c) - ord("a") for c in text.replace(" ", "")]


def with_kinds(tokens: list[int]) -> RepetitionGuard:
    guard = RepetitionGuard(KINDS)
    for token in tokens:
        guard.push(token)
    return guard


def test_a_loop_whose_times_count_up_is_found() -> None:
    """From 7:5 to 12:50, so that numbers grow longer meanwhile."""
    before = spoken("once upon a time")
    said = [spoken(f"{second // 10}:{second % 60} so it is") for second in range(75, 129)]
    guard = with_kinds(before + [token for one in said for token in one])
    assert guard.found == Repetition(len(before), len(said[-1]), len(said))
    assert pushed(before + [token for one in said for token in one]).found is None, "without kinds, tokens differ"


def test_it_is_found_after_six_times_of_32_units() -> None:
    said = [spoken(f"{second}: abcd") for second in range(95, 110)]  # six units each
    ends = [end for end in range(len(said) + 1) if with_kinds([t for one in said[:end] for t in one]).found is not None]
    assert ends[0] == COUNTING_REPEATS


def test_counting_and_lists_of_different_things_are_no_repetition() -> None:
    assert with_kinds(spoken("".join(f"{number}:" for number in range(200)))).found is None
    draw = random.Random(4)
    items = [f"{number}: " + "".join(draw.choices("abcdefgh", k=4)) for number in range(100)]
    assert with_kinds(spoken(" ".join(items))).found is None


def test_long_stretches_are_found() -> None:
    for period in (65, 200, LONGEST):
        stretch = [1000 + i for i in range(period)]
        assert pushed(stretch * (REPEATS - 1)).found is None
        assert pushed(stretch * REPEATS).found == Repetition(0, period, REPEATS)


def test_kinds_do_not_change_what_is_found_token_by_token(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(20):
        stretch = [draw.randrange(100) for _ in range(draw.randint(1, 40))]
        tokens = stretch * draw.randint(1, 9)
        exact = pushed(tokens).found
        assert exact is None or with_kinds(tokens).found == exact


def test_what_varies_is_no_repetition() -> None:
    assert pushed(list(range(500))).found is None
    assert pushed([5] * (TOKENS - 1)).found is None
    assert pushed([5] * TOKENS).found == Repetition(0, 1, TOKENS)


@pytest.mark.parametrize("stop", [False, True])
def test_an_answer_reports_it_and_ends_there_if_asked(network: AudioFlamingo, stop: bool) -> None:
    engine = Engine(network, EngineOptions(page_size=16))
    asked = request(network, 120, 0, 0)
    assert asked.sampling is not None
    asked = dataclasses.replace(asked, sampling=dataclasses.replace(asked.sampling, stop_repetition=stop))
    network_head = network.decoder.lm_head
    assert network_head is not None
    weight = network_head.weight.clone()
    try:
        network_head.weight.zero_()  # every score equal: token 0 for ever
        sequence = engine.submit(asked)
        for _ in engine.follow([sequence]):
            pass
    finally:
        network_head.weight.copy_(weight)
    assert sequence.guard.found is not None
    assert sequence.guard.found.period == 1
    assert sequence.finish_reason == ("repetition" if stop else "length")
    assert len(sequence.tokens) == (TOKENS if stop else 120)
