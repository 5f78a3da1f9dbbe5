"""Which items the tokens of an answer are about, and which item came before another."""

import random

import pytest

from training.attention import (
    ANY,
    NEAR,
    SAME,
    SOUND,
    WORD,
    Looks,
    asked_label,
    mentions,
    near_previous,
    numbers,
    previous,
    question_looks,
)
from training.scenes import Item, ask, timestamp
from training.tokenizer import build_tokenizer
from training.vocabulary import SOUNDS, WORDS

TOKENIZER = build_tokenizer()
ITEMS = [
    Item("beep", False, 0.52, 0.7),
    Item("seven", True, 1.0, 1.5),
    Item("tone", False, 2.25, 3.0, "high"),
    Item("seven", True, 63.0, 63.4),
]


def told(kind: str, think: bool = False) -> list[tuple[str, int | None]]:
    """Every token of an answer about ITEMS with what it is about."""
    question = ask(kind, ITEMS, random.Random(0), think)
    encoded = TOKENIZER.encode(question.answer + "<|im_end|>")
    return [
        ((question.answer + "$")[start:end], about)
        for (start, end), about in zip(encoded.offsets, mentions(question, encoded.offsets), strict=True)
    ]


@pytest.mark.parametrize("kind", ["transcribe", "transcribe_times", "sounds_times", "describe", "count_words"])
def test_a_list_goes_through_the_items_and_ends(kind: str) -> None:
    about = [number for _, number in told(kind)]
    if kind == "count_words":
        assert about.pop() is None
    count = max(number for number in about if number is not None)
    assert about == sorted(about, key=lambda number: number if number is not None else -1)
    assert set(about) == set(range(count + 1))
    assert about[-1] == count == len(ask(kind, ITEMS, random.Random(0)).evidence)


@pytest.mark.parametrize("think", [False, True])
def test_before_a_number_the_one_before_it_is_looked_for(think: bool) -> None:
    question = ask("count_words", ITEMS, random.Random(0), think)
    encoded = TOKENIZER.encode(question.answer + "<|im_end|>")
    numbered = numbers(question, encoded.offsets)
    assert [encoded.tokens[token] for token in numbered] == ["1", "2", "2"]
    looks, recording = Looks(), {"items": ITEMS, "begins": [(5, 6), (10, 12), (20, 22), (40, 42)], "classes": [0] * 60}
    spoken = mentions(question, encoded.offsets)
    question_looks(looks, 0, question, spoken, numbered, [], [1, 3], {**recording, "end": 60}, 70, 70, 80)
    places, _ = looks.tensors()[1, 2]
    assert (places[1] + 1 - 80).tolist() == numbered
    assert (places[2] - 80).tolist() == [-1, *numbered[:-1]]


@pytest.mark.parametrize("kind", ["when_sound", "first", "pitch", "transcribe_times"])
def test_times_are_no_numbers(kind: str) -> None:
    question = ask(kind, ITEMS, random.Random(0))
    assert numbers(question, TOKENIZER.encode(question.answer).offsets) == []


@pytest.mark.parametrize("kind", ["first", "last"])
def test_thinking_lists_and_then_names(kind: str) -> None:
    tokens = told(kind, think=True)
    final = [text for text, _ in tokens].index("</think>") if "</think>" in [t for t, _ in tokens] else 0
    item = ITEMS[0] if kind == "first" else ITEMS[-1]
    named = "".join(text for text, about in tokens[final:] if about == 0)
    assert timestamp(item.onset) in named


def test_the_item_before_is_the_last_of_its_kind() -> None:
    expected = {ANY: [None, 0, 1, 2, 3], WORD: [None, None, 1, 1, 3], SOUND: [None, 0, 0, 2, 2]}
    for kind, wanted in expected.items():
        assert [previous(ITEMS, index, kind) for index in range(5)] == wanted
    assert [previous(ITEMS, index, SAME) for index in range(4)] == [None, None, None, 1]


def test_the_item_before_counts_only_if_near() -> None:
    assert ITEMS[3].onset - ITEMS[2].onset > NEAR
    assert near_previous(ITEMS, 3, ANY) is None
    assert near_previous(ITEMS, 2, ANY) == 1


@pytest.mark.parametrize("kind", ["when_sound", "count_sound", "when_word", "pitch"])
def test_the_label_asked_about_is_found_in_the_question(kind: str) -> None:
    for number in range(20):
        question = ask(kind, ITEMS, random.Random(number))
        span = asked_label(question)
        assert span is not None
        label = question.prompt[slice(*span)].removesuffix("es" if "buzz" in question.prompt else "s")
        assert label in WORDS or label in SOUNDS or label + "s" in WORDS
        if question.evidence:
            assert question.evidence[0].label.startswith(label)


def test_other_questions_are_about_no_label() -> None:
    assert asked_label(ask("transcribe", ITEMS, random.Random(0))) is None


def test_the_number_of_words_written_is_looked_for() -> None:
    """Before word k the head spreads over the k words before and one token more."""
    question = ask("transcribe", ITEMS, random.Random(0))
    encoded = TOKENIZER.encode(question.answer + "<|im_end|>")
    looks, recording = Looks(), {"items": ITEMS, "begins": [(5, 6), (10, 12), (20, 22), (40, 42)], "classes": [0] * 60}
    spoken = mentions(question, encoded.offsets)
    question_looks(looks, 0, question, spoken, [], [], [1, 3], {**recording, "end": 60}, 70, 70, 80)
    places, shares = looks.tensors()[1, 1]
    assert places[1].tolist() == [79, 80, 80, 81, 81, 81]
    assert places[2].tolist() == [79, 79, 80, 79, 80, 81]
    assert shares.tolist() == pytest.approx([1, 1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3])
