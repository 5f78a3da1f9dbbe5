"""Attention targets for the decoder's heads: the way to find an answer is known, so training supervises attention.

- First layer: the token in which an item begins attends to the token of the previous item, of the previous word and of
  the previous sound (one head each). Second layer: it attends to the previous item with the same label, and to all
  previous words, which encodes their number. If there is none near, it attends to <|sound_bos|>. The end of the audio
  attends to the last items in the same way. Answer tokens: in the first layer, they attend to the question's label. In
  the second layer, in lists of words without times, they attend to the words written so far and to the token before
  the answer, whose share encodes their number; before a number in a numbered list, or a count, to the previous number.
- Third layer: the answer token before an item attends to the beginning of this item in the audio, which is the item
  whose predecessor was written last. One head for each kind of list. At the end of a list: to the end of the audio.
- Fourth layer: the same token attends to all tokens of the item, which encode its label.
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
NEAR = 15.0  # seconds; items farther back than this are found from the answer alone
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
_LINES = ("transcribe_times", "sounds_times", "describe")  # answered with one line per item
_PREVIOUS = {ANY: (0, 0), WORD: (0, 1), SOUND: (0, 2), SAME: (1, 0)}
_EARLIER_WORDS = (1, 1)
_NUMBER_BEFORE = (1, 2)
_ASKED = (0, 3)
_ITEM = (3, 0)


class Looks:
    """Collects attention targets for heads (layer, head): keys over which a query's attention should be uniform."""

    def __init__(self) -> None:
        self._entries: dict[tuple[int, int], list[tuple[int, int, int, float]]] = {}

    def add(self, head: tuple[int, int], row: int, query: int, keys: list[int]) -> None:
        """row: of the batch; query and keys: positions in the row."""
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
    """The index of the last item of a kind (ANY, WORD, SOUND, SAME) before item `index`, or before the end."""
    alike = _alike(items[index])[kind] if index < len(items) else _alike(items[-1])[kind]
    return next((other for other in range(index - 1, -1, -1) if alike(items[other])), None)


def near_previous(items: list[Item], index: int, kind: int) -> int | None:
    """The same, if that item begins less than NEAR earlier."""
    last = previous(items, index, kind)
    return last if last is not None and items[index].onset - items[last].onset < NEAR else None


def audio_looks(looks: Looks, row: int, prefix: int, items: list[Item], begins: list[tuple[int, int]]) -> None:
    """Add the targets of audio tokens. prefix: tokens before the audio; begins: first and last token of every item."""
    for index, (item, (first, _)) in enumerate(zip(items, begins, strict=True)):
        for kind, head in _PREVIOUS.items():
            last = near_previous(items, index, kind)
            looks.add(head, row, prefix + first, [prefix - 1 if last is None else prefix + begins[last][0]])
        words = [prefix + begins[other][0] for other in range(index) if items[other].is_word]
        if item.is_word and len(words) <= _MOST_COUNTED:
            looks.add(_EARLIER_WORDS, row, prefix + first, [prefix - 1, *words])


def mentions(question: Question, offsets: list[tuple[int, int]]) -> list[int | None]:
    """For every token of an answer, the index of the evidence that it is about, or None; an index past the last one
    means that there is no more. offsets: of the tokens in the answer's characters, the end token last."""
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
    """For every character the piece that it belongs to; a separator belongs to the next piece."""
    if not count:
        return [None] * skipped + [0] * (len(text) - skipped)
    told: list[int | None] = [None] * skipped
    for index, piece in enumerate(text[skipped:].split(separator)[:count]):
        told += [index] * (len(piece) + (len(separator) if index else 0))
    return told + [count] * (len(text) - len(told))


_NUMBERS = re.compile(r"^\d+(?=\. \[|$)|\d+(?= at )|(?<=: )\d+$", re.MULTILINE)


def numbers(question: Question, offsets: list[tuple[int, int]]) -> list[int]:
    """The tokens of an answer that are numbers of list entries or counts, in order. offsets: see `mentions`."""
    starts = {found.start() for found in _NUMBERS.finditer(question.answer)}
    return [token for token, (start, after) in enumerate(offsets) if start in starts and start < after]


_LABELS = "|".join((*PLURALS.values(), *SOUNDS))


def asked_label(question: Question) -> tuple[int, int] | None:
    """The span in the prompt of the label that a question is about, (first character, after the last), if any."""
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
    """Add the targets of the tokens of a question and its answer.

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
