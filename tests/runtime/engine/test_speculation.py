"""Drafts change when tokens come, never which."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.simple_path import request, simple_answer

from afnext.runtime.engine.engine import Engine
from afnext.runtime.engine.options import EngineOptions
from afnext.runtime.engine.request import Request, SequenceState
from afnext.runtime.engine.speculation import Drafter
from afnext.runtime.model.audio_flamingo import AudioFlamingo

OPTIONS = EngineOptions(page_size=16, chunk_size=64, draft_tokens=5)
MODES = [
    {},
    {"temperature": 0.3, "seed": 6},
    {"repetition_penalty": 1.05},
    {"temperature": 0.2, "top_p": 0.8, "seed": 1},
]


def run(engine: Engine, requests: list[Request]) -> tuple[list[SequenceState], int]:
    sequences = [engine.submit(request) for request in requests]
    steps = 0
    while engine.step():
        steps += 1
    return sequences, steps + 1


@pytest.mark.parametrize("mode", MODES)
def test_answers_are_those_without_drafts(network: AudioFlamingo, mode: dict, seed: int) -> None:
    asked = request(network, 60, 0.5, seed, **mode)
    expected = simple_answer(network, asked)
    (sequence,), _ = run(Engine(network, OPTIONS), [asked])
    expected.assert_equals(sequence.tokens)


def test_right_drafts_save_steps_and_several_sequences_draft_together(network: AudioFlamingo, seed: int) -> None:
    """The answers so far, put before the question, are what will be said: most drafts are right."""
    plain = [request(network, 40, 0, seed + i) for i in range(3)]
    told = []
    for asked in plain:
        answer = simple_answer(network, dataclasses.replace(asked, token_ids=[*asked.token_ids, 1, 2]))
        told.append(dataclasses.replace(asked, token_ids=[*asked.token_ids, *answer.tokens, *asked.token_ids, 1, 2]))
    expected = [simple_answer(network, asked) for asked in told]
    sequences, steps = run(Engine(network, OPTIONS), told)
    for answer, sequence in zip(expected, sequences, strict=True):
        answer.assert_equals(sequence.tokens)
    _, without = run(Engine(network, dataclasses.replace(OPTIONS, draft_tokens=0)), told)
    assert steps < without


def test_stop_tokens_within_a_draft_end_the_answer(network: AudioFlamingo, seed: int) -> None:
    asked = request(network, 60, 0, seed)
    tokens = simple_answer(network, asked).tokens
    stop = tokens[-1]
    stopped = request(network, 60, 0, seed, stop_token_ids=(stop,))
    (sequence,), _ = run(Engine(network, OPTIONS), [stopped])
    simple_answer(network, stopped).assert_equals(sequence.tokens)
    assert sequence.finish_reason == "stop"


@settings(max_examples=100)
@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 7))
def test_a_draft_is_what_followed_the_same_end_before(tokens: list[int], count: int) -> None:
    draft = Drafter(tokens).draft(count)
    if not draft:
        ends = [tuple(tokens[i - 2 : i]) for i in range(2, len(tokens))]
        assert tuple(tokens[-2:]) not in ends
        return
    length = 3 if any(tokens[i - 3 : i] == tokens[-3:] for i in range(3, len(tokens))) else 2
    last = max(i for i in range(length, len(tokens)) if tokens[i - length : i] == tokens[-length:])
    assert draft == tokens[last : last + count]


def test_wrong_drafts_pause_and_come_back() -> None:
    drafter = Drafter([1, 2, 3, 4, 1, 2, 3])
    while drafter.draft(4):
        drafter.record(4, 0)
    for token in [1, 2, 3, 4] * 7:
        drafter.push(token)
    assert drafter.draft(4) == [1, 2, 3, 4]
    for _ in range(50):
        drafter.record(4, 3)
    assert drafter.draft(4)


@pytest.mark.parametrize("draft_tokens", [-1, 8])
def test_more_drafts_than_the_kernel_takes_are_refused(draft_tokens: int) -> None:
    with pytest.raises(ValueError, match="draft_tokens must be 0 to 7"):
        EngineOptions(draft_tokens=draft_tokens)
