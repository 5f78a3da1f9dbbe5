"""Splits the model's text into thinking and answer.

A Think checkpoint writes `<think> ... </think>` and then the answer. Three rules apply to a whole text and to a stream:

- Thinking starts the text (whitespace aside) or was opened by the prompt, and ends at the first `</think>`. A text
without one is all thinking, and its answer is empty.
- Tags anywhere else are part of the surrounding text and are kept.
- Whitespace at the start and end of each part is removed; inside a part it is kept.

The text has no special tokens such as `<|im_end|>`: decoding leaves them out.
"""

from typing import Literal

from .tokenizer import THINK_TAGS

Part = Literal["thinking", "answer"]

OPEN, CLOSE = THINK_TAGS


def split_thinking(text: str, *, opened: bool | None = None) -> tuple[str | None, str]:
    """Split a complete text into (thinking, answer); thinking is None if there is none.

    opened: whether the prompt ended with `<think>`, so that the text starts in the middle of thinking. None infers it:
    a `</think>` without a `<think>` before it closes one that the prompt opened.
    """
    if opened is None:
        before, close, _ = text.partition(CLOSE)
        opened = bool(close) and OPEN not in before
    splitter = ThinkingSplitter(opened=opened)
    pieces = [*splitter.push(text), *splitter.finish()]
    thinking, answer = ("".join(piece for part, piece in pieces if part == wanted) for wanted in ("thinking", "answer"))
    return (thinking if splitter.thought else None), answer


class ThinkingSplitter:
    """Splits a text that arrives in pieces; never returns a part of a tag.

    The joined pieces of a part equal the result of `split_thinking` for the whole text with the same `opened`. thought:
    whether there has been thinking so far, even if empty.
    """

    def __init__(self, *, opened: bool = False):
        """opened: whether the prompt ended with `<think>`, see `Prompt.opens_thinking`."""
        self._opened = opened
        self._part: Part | None = None
        self._held = ""  # may be a tag, or whitespace at the end of a part
        self._started = False  # whether any text of the current part has been returned
        self.thought = opened

    @property
    def answering(self) -> bool:
        """Whether the answer has begun."""
        return self._part == "answer"

    def push(self, piece: str) -> list[tuple[Part, str]]:
        """Add the next piece; return the text whose part is certain, as (part, text) in order, often nothing."""
        self._held += piece
        if self._part is None and not self._begin(final=False):
            return []
        if self._part == "answer":
            return self._give(len(self._held))
        thinking, close, answer = self._held.partition(CLOSE)
        if not close:
            return self._give(len(self._held) - _unfinished(self._held))
        self._held = thinking
        given = self._give(len(thinking))
        self._enter("answer", answer)
        return given + self._give(len(answer))

    def finish(self) -> list[tuple[Part, str]]:
        """Return the text held back; call once, after the last piece."""
        if self._part is None:
            self._begin(final=True)
        given = self._give(len(self._held))
        self._held = ""
        return given

    def _begin(self, *, final: bool) -> bool:
        """Determine the part in which the text starts; False if more text is needed."""
        text = self._held.lstrip()
        if text.startswith(OPEN):
            self.thought = True
            self._enter("thinking", text.removeprefix(OPEN))
        elif OPEN.startswith(text) and not final:
            return False
        else:
            self._enter("thinking" if self._opened else "answer", text)
        return True

    def _enter(self, part: Part, text: str) -> None:
        self._part, self._held, self._started = part, text, False

    def _give(self, end: int) -> list[tuple[Part, str]]:
        """Return the held text up to `end`, without whitespace that starts a part or may end it."""
        text = self._held[:end].rstrip()
        self._held = self._held[len(text) :]
        if not self._started:
            text = text.lstrip()
        if not text or self._part is None:
            return []
        self._started = True
        return [(self._part, text)]


def _unfinished(text: str) -> int:
    """Length of the longest suffix of `text` that may be the beginning of `</think>`."""
    return next((n for n in range(len(CLOSE) - 1, 0, -1) if text.endswith(CLOSE[:n])), 0)
