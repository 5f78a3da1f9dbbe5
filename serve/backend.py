"""What the HTTP code asks of a model. It speaks to this protocol only, so that a fleet can stand behind it, too."""

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
        """What belongs into the `afnext` object of the response besides the answer's own values."""

    def events(self) -> AsyncIterator[Piece | str]:
        """The pieces as they come, and before them comments on the progress ("listening 12000/45000")."""

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
    """A recording that is still going on. Calls take effect in their order."""

    async def feed(self, pcm: np.ndarray, rate: int) -> None:
        """Append samples, int16 [n]. Returns when they have been heard. Raises what `Live.feed` raises."""

    async def answer(self, messages: Sequence[Message], options: QuestionOptions) -> Answering:
        """Start to answer a conversation about all that has been fed."""

    async def finish(self) -> Context:
        """End the recording. Raises AudioError if it is empty."""

    async def close(self) -> None:
        """Give the memory back; the last call."""


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
    """What a transcript should be.

    translate: into English. language, hint: what the client knows of the recording, "" for nothing. instruction: what
    the model is asked instead.
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
        """Longest recording that is heard at once."""

    @property
    def loading(self) -> bool:
        """Whether the model is not there yet."""

    @property
    def dead(self) -> bool:
        """Whether it has failed for good."""

    @property
    def stuck(self) -> bool:
        """Whether it has had work for two minutes without a step. A slow machine may need as long for one."""

    @property
    def max_batch(self) -> int:
        """Requests that it works on at once."""

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens that are not computed yet."""

    def description(self) -> dict[str, Any]:
        """The model's properties for `GET /v1/models`."""

    def status(self) -> dict[str, Any]:
        """Numbers about its work: waiting and running requests, pages, step times. `in_progress` lists the requests."""

    @property
    def ears(self) -> Ears:
        """What hears recordings for contexts."""

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

        key: of the client, whose caches are its own. make_room: awaited with the tokens that the request may take.
        """

    def live(self, *, system: str | None, key: str, make_room: MakeRoom) -> Hearing:
        """Begin a recording. make_room: awaited with the tokens that are needed when the KV cache is full."""

    async def transcribe(self, audio: Audio, wanted: TranscriptRequest, *, key: str) -> Transcribing:
        """Start to transcribe a recording."""

    async def close(self) -> None:
        """Stop the model."""
