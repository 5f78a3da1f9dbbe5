"""The protocol between the HTTP code and a model. The HTTP code uses nothing else, so any backend can implement it."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..runtime.app.answer import Answer, Piece
from ..runtime.app.context import Context
from ..runtime.app.conversation import Message
from ..runtime.app.responder import QuestionOptions
from ..runtime.app.transcribe import Transcript
from ..runtime.io.audio import Audio
from ..runtime.io.segments import Segment
from .context_store import Ears

MakeRoom = Callable[[int], Awaitable[None]]


class Answering(Protocol):
    """An answer in progress."""

    @property
    def details(self) -> dict[str, Any]:
        """Further values for the `afnext` object of the response, besides the answer's own."""

    def events(self) -> AsyncIterator[Piece | str]:
        """The pieces as they arrive, preceded by comments on the progress ("listening 12000/45000")."""

    async def finish(self) -> Answer:
        """The whole answer."""

    async def close(self) -> None:
        """Stop early; nothing once it has ended."""


class Transcribing(Protocol):
    """A transcript in progress."""

    def segments(self) -> AsyncIterator[Segment]:
        """The segments, each as soon as it is final."""

    async def finish(self) -> Transcript:
        """The whole transcript."""

    async def close(self) -> None:
        """Stop early; nothing once it has ended."""


class Hearing(Protocol):
    """A recording in progress. Calls take effect in order."""

    async def feed(self, pcm: np.ndarray, rate: int) -> None:
        """Append samples, int16 [n]. Returns once the model has processed them. Raises what `Live.feed` raises."""

    async def answer(self, messages: Sequence[Message], options: QuestionOptions) -> Answering:
        """Start to answer a conversation about all that has been fed."""

    async def finish(self) -> Context:
        """End the recording. Raises AudioError if it is empty."""

    async def close(self) -> None:
        """Free the memory; must be the last call."""


@dataclass(frozen=True)
class TranscriptOptions:
    """Options of `Model.transcribe`; None for its defaults."""

    window: float | None = None
    overlap: float | None = None
    timestamps: bool | None = None
    speakers: bool | None = None
    temperature: float | None = None
    seed: int | None = None


@dataclass(frozen=True)
class TranscriptRequest:
    """A request for a transcript.

    translate: into English. language, hint: what the client knows about the recording, "" for nothing. instruction:
    replaces the default instruction to the model.
    """

    options: TranscriptOptions
    translate: bool = False
    language: str = ""
    hint: str = ""
    instruction: str = ""


class Backend(Protocol):
    """A model that answers. Methods raise AfnextError or ApiError before anything is computed."""

    @property
    def max_audio_seconds(self) -> float:
        """Longest recording that the model accepts in one piece."""

    @property
    def loading(self) -> bool:
        """Whether the model is still loading."""

    @property
    def dead(self) -> bool:
        """Whether the model has failed permanently."""

    @property
    def stuck(self) -> bool:
        """Whether the engine has had work for two minutes without finishing a step. On a slow machine one step may take
        that long."""

    @property
    def max_batch(self) -> int:
        """Requests that the model processes at once."""

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens that are not computed yet."""

    def description(self) -> dict[str, Any]:
        """The model's properties for `GET /v1/models`."""

    def status(self) -> dict[str, Any]:
        """Statistics: waiting and running requests, pages, step times. `in_progress` lists the requests."""

    @property
    def ears(self) -> Ears:
        """The part of the model that processes recordings for contexts."""

    async def answer(
        self,
        messages: list[dict[str, Any]],
        options: QuestionOptions,
        *,
        key: str,
        context: Context | None = None,
        make_room: MakeRoom | None = None,
    ) -> Answering:
        """Start to answer a conversation whose recordings are decoded, or one about a context.

        key: of the client; keys share no caches. make_room: awaited with the tokens that the request may take.
        """

    def live(self, *, system: str | None, key: str, make_room: MakeRoom) -> Hearing:
        """Begin a recording. make_room: awaited with the number of tokens needed when the KV cache is full."""

    async def transcribe(self, audio: Audio, wanted: TranscriptRequest, *, key: str) -> Transcribing:
        """Start to transcribe a recording."""

    async def close(self) -> None:
        """Stop the model."""
