"""Degenerate repetition is found where it is, and only there."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.simple_path import request

from afnext.runtime.engine.options import EngineOptions
from afnext.runtime.engine.repetition import LONGEST, REPEATS, TOKENS, Repetition, RepetitionGuard
from afnext.runtime.engine.scheduler import Engine
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


@settings(deadline=None, max_examples=150)
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
