"""What a question comes back with."""

from dataclasses import asdict, astuple, dataclass
from typing import Any

from ..engine.repetition import Repetition
from ..engine.request import FinishReason
from ..engine.timings import Timings


@dataclass(frozen=True)
class Usage:
    """What a request consumed. audio_seconds: audio heard; truncated: some audio was cut to what the model can hear;
    windows: 30 s encoder windows; *_tokens: audio and text of the prompt, how many of these two had been computed
    before, the answer's own, and how many of those the model thought with."""

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

    text: what the model says; thinking: what it wrote between <think> and </think>, or None; finish_reason: "stop" (by
    itself or at a stop string), "length" (max_new_tokens reached), "cancelled", "deadline" (passed) or "repetition"
    (with stop_repetition); token_ids: as generated, special tokens included; warnings: what was wrong with the audio,
    if anything; repetition: where in token_ids the model last said the same over and over, if anywhere.
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
    """A piece of a streamed answer; `thinking` tells whether it belongs to the model's thoughts or to its answer."""

    __slots__ = ("thinking",)
    thinking: bool

    def __new__(cls, text: str, *, thinking: bool = False) -> "Piece":
        piece = super().__new__(cls, text)
        piece.thinking = thinking
        return piece
