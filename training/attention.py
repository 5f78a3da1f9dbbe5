"""Where the decoder's heads should look: the way by which it finds its answers is known, so training shows it.

- First layer: from the token in which an item begins, to that of the item before it, of any kind, of the words, of
  the sounds (a head each). Second layer: to the one of the same label, and to all words before it, whose number is
  then known. Where there is none near, to <|sound_bos|>. The end of the audio looks for the last ones likewise.
  Answer tokens: in the first layer, to the label in the question; in the second, where words are listed without their
  times, to the words written so far and to the token before the answer, whose share tells their number; before a
  number of a numbered list, or of how many there are, to the number before it.
- Third layer: the answer token about to write an item, to where it begins: the item whose predecessor is the one that
  was written last. A head for each kind of list. At the end of a list, to the end of the audio.
- Fourth layer: the same token, to all tokens of the item, which tell its label.
"""

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .model import ROTE
from .scenes import Item, Question
from .vocabulary import PLURALS, SOUNDS

ANY, WORD, SOUND, SAME = range(4)
NEAR = 15.0  # seconds; what lies farther back than this is found from the answer alone
_MOST_COUNTED = 24
_LIST = {
    "describe": ANY,
    "first": ANY,
    "last": ANY,
    "transcribe": WORD,
    "transcribe_times": WORD,
    "count_words": WORD,
    "sounds_times": SOUND,
    "when_sound": SAME,
    "when_word": SAME,
    "count_sound": SAME,
    "pitch": SAME,
}
_LINES = ("transcribe_times", "sounds_times", "describe")  # answered by a line an item
_PREVIOUS = {ANY: (0, 0), WORD: (0, 1), SOUND: (0, 2), SAME: (1, 0)}
_EARLIER_WORDS = (1, 1)
_NUMBER_BEFORE = (1, 2)
_ASKED = (0, 3)
_ITEM = (3, 0)


class Looks:
    """Collects, for heads (layer, head), which keys a query's attention should be spread over evenly."""

    def __init__(self) -> None:
        self._entries: dict[tuple[int, int], list[tuple[int, int, int, float]]] = {}

    def add(self, head: tuple[int, int], row: int, query: int, keys: list[int]) -> None:
        """row: of the batch; query and keys: places in the row."""
        self._entries.setdefault(head, []).extend((row, query, key, 1 / len(keys)) for key in keys)

    def tensors(self) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
        """For each head the rows, queries and keys, [3, looks], and their shares of the attention, [looks]."""
        return {
            head: (torch.tensor([entry[:3] for entry in entries]).T, torch.tensor([entry[3] for entry in entries]))
            for head, entries in self._entries.items()
        }


def _alike(item: Item) -> dict[int, Callable[[Item], bool]]:
    return {
        ANY: lambda other: True,
        WORD: lambda other: other.is_word,
        SOUND: lambda other: not other.is_word,
        SAME: lambda other: other.label == item.label and other.is_word == item.is_word,
    }


def previous(items: list[Item], index: int, kind: int) -> int | None:
    """Which item is the last of a kind (ANY, WORD, SOUND, SAME) before number `index`, or the end."""
    alike = _alike(items[index])[kind] if index < len(items) else _alike(items[-1])[kind]
    return next((other for other in range(index - 1, -1, -1) if alike(items[other])), None)


def near_previous(items: list[Item], index: int, kind: int) -> int | None:
    """The same if it begins less than NEAR before."""
    last = previous(items, index, kind)
    return last if last is not None and items[index].onset - items[last].onset < NEAR else None


def audio_looks(looks: Looks, row: int, prefix: int, items: list[Item], begins: list[tuple[int, int]]) -> None:
    """What the audio tokens look at. prefix: tokens before the audio; begins: first and last token of every item."""
    for index, (item, (first, _)) in enumerate(zip(items, begins, strict=True)):
        for kind, head in _PREVIOUS.items():
            last = near_previous(items, index, kind)
            looks.add(head, row, prefix + first, [prefix - 1 if last is None else prefix + begins[last][0]])
        words = [prefix + begins[other][0] for other in range(index) if items[other].is_word]
        if item.is_word and len(words) <= _MOST_COUNTED:
            looks.add(_EARLIER_WORDS, row, prefix + first, [prefix - 1, *words])


def mentions(question: Question, offsets: list[tuple[int, int]]) -> list[int | None]:
    """For every token of an answer, which of the evidence it is about (the number of all of them: that there is no
    more), or None. offsets: of the tokens in the answer's characters, the end token last."""
    answer, count = question.answer, len(question.evidence)
    listed, _, rest = answer.rpartition("</think>\n")
    told: list[int | None] = []
    if listed or question.kind in _LINES:
        told += _in_pieces(listed or answer, count, "\n", len("<think>\n") if listed else 0)
    if not listed and question.kind in _LINES:
        spans = told
    else:
        skipped = len(answer) - len(rest)
        told += [None] * (skipped - len(told))
        if question.kind.startswith("when"):
            spans = told + _in_pieces(rest, count, ", ", 0)
        elif question.kind == "transcribe":
            spans = told + _in_pieces(rest, count, " ", 0)
        elif question.kind.startswith("count"):
            items, _, _ = rest.rpartition(": ")
            spans = told + (_in_pieces(items, count, ", ", 0) if items else [])
            spans += [None if listed else count] * (len(answer) - len(spans))
        else:
            spans = told + [0] * len(rest)
    ended = question.kind in ("transcribe", *_LINES) or question.kind.startswith("when")
    return [spans[start] if start < len(answer) else count if ended else None for start, _ in offsets]


def _in_pieces(text: str, count: int, separator: str, skipped: int) -> list[int | None]:
    """For every character which piece it belongs to, a separator to the piece that follows it."""
    if not count:
        return [None] * skipped + [0] * (len(text) - skipped)
    told: list[int | None] = [None] * skipped
    for index, piece in enumerate(text[skipped:].split(separator)[:count]):
        told += [index] * (len(piece) + (len(separator) if index else 0))
    return told + [count] * (len(text) - len(told))


_NUMBERS = re.compile(r"^\d+(?=\. \[|$)|\d+(?= at )|(?<=: )\d+$", re.MULTILINE)


def numbers(question: Question, offsets: list[tuple[int, int]]) -> list[int]:
    """Which tokens of an answer number what it lists, or tell how many there are, in order. offsets: see `mentions`."""
    starts = {found.start() for found in _NUMBERS.finditer(question.answer)}
    return [token for token, (start, after) in enumerate(offsets) if start in starts and start < after]


_LABELS = "|".join((*PLURALS.values(), *SOUNDS))


def asked_label(question: Question) -> tuple[int, int] | None:
    """Where in the prompt the label stands that a question is about, (first character, after the last), if any does."""
    if _LIST[question.kind] != SAME:
        return None
    found = re.search(r'(?<=")[^"]+(?=")' if question.kind == "when_word" else rf"\b(?:{_LABELS})\b", question.prompt)
    return found.span() if found else None


def question_looks(
    looks: Looks,
    row: int,
    question: Question,
    spoken: list[int | None],
    numbered: list[int],
    label: list[int],
    evidence: list[int],
    recording: dict[str, Any],
    shared: int,
    begin: int,
    answer: int,
) -> None:
    """What the tokens of a question and its answer look at.

    spoken: see `mentions`; numbered: see `numbers`; label: the question's tokens of `asked_label`, counted from its
    first; evidence: numbers of the items; shared: tokens of prefix and audio; begin, answer: where question and answer
    begin.
    """
    items, begins = recording["items"], recording["begins"]
    prefix = shared - len(recording["classes"])
    kind = _LIST[question.kind]
    end = recording["end"] * ROTE.frame_seconds
    for of in (ANY, WORD, SOUND):
        last = previous(items, len(items), of) if items else None
        near = last is not None and end - items[last].onset < NEAR
        looks.add(_PREVIOUS[of], row, begin, [prefix + begins[last][0] if near and last is not None else prefix - 1])
    pointer = (2, kind)
    written = [answer - 1]
    for place, mention in enumerate(spoken):
        query = answer + place - 1
        if label:
            looks.add(_ASKED, row, query, [begin + token for token in label])
        if question.kind == "transcribe" and mention is not None:
            if len(written) <= _MOST_COUNTED:
                looks.add(_EARLIER_WORDS, row, query, list(written))
            written.append(answer + place)
        if mention is None:
            continue
        if mention >= len(evidence):
            looks.add(pointer, row, query, [begin])
            continue
        first, last = begins[evidence[mention]]
        looks.add(pointer, row, query, [prefix + first])
        looks.add(_ITEM, row, query, list(range(prefix + first, prefix + last + 1)))
    for before, number in pairwise([-1, *numbered]):
        looks.add(_NUMBER_BEFORE, row, answer + number - 1, [answer + before])
