"""The answer to a question."""

from dataclasses import asdict, astuple, dataclass
from typing import Any

from ..engine.repetition import Repetition
from ..engine.request import FinishReason
from ..engine.timings import Timings


@dataclass(frozen=True)
class Usage:
    """The resources used by a request. audio_seconds: length of the audio; truncated: some audio was cut to the model's
    limit; windows: 30 s encoder windows; *_tokens: audio and text tokens of the prompt, how many of them were cached,
    tokens of the answer, and how many of those were thinking."""

    audio_seconds: float
    truncated: bool
    windows: int
    audio_tokens: int
    text_tokens: int
    cached_tokens: int
    new_tokens: int
    thinking_tokens: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))


NOTHING = Usage(0.0, False, 0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Answer:
    """The answer to one question.

    text: the model's answer; thinking: the text between <think> and </think>, or None; finish_reason: "stop" (at a stop
    token or stop string), "length" (max_new_tokens reached), "cancelled", "deadline" (passed) or "repetition" (with
    stop_repetition); token_ids: as generated, special tokens included; warnings: defects of the audio; repetition:
    where in token_ids the model last repeated itself, or None.
    """

    text: str
    thinking: str | None
    usage: Usage
    timings: Timings
    finish_reason: FinishReason
    token_ids: list[int]
    warnings: tuple[str, ...] = ()
    repetition: Repetition | None = None

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """The answer as plain values, ready for JSON."""
        return {**asdict(self), "timings": self.timings.to_dict(), "warnings": list(self.warnings)}


class Piece(str):
    """A piece of a streamed answer; `thinking`: whether it belongs to the model's thinking rather than its answer."""

    __slots__ = ("thinking",)
    thinking: bool

    def __new__(cls, text: str, *, thinking: bool = False) -> "Piece":
        piece = super().__new__(cls, text)
        piece.thinking = thinking
        return piece
