"""One answer of a realtime session: its events from response.created to response.done."""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any, Protocol

from ..runtime.app.answer import Answer, Piece
from ..runtime.app.openai_format import completion_usage
from .backend import Answering
from .chat import details
from .errors import ApiError, api_error
from .realtime_audio import encoded
from .realtime_config import Format, ResponseOptions
from .server import Server
from .speech import Sound, Speaker, Unspoken, spoken

_log = logging.getLogger("afnext.serve")


class Emit(Protocol):
    """Sends an event to the client."""

    async def __call__(self, kind: str, **values: Any) -> None:
        """kind: the event's type."""


class RealtimeResponse:
    """An answer that is requested, in progress, or ended.

    `accepted` is set once the model has the question, so that later audio is not part of the question. `turn` is the
    answer's message in the conversation, once it exists.
    """

    def __init__(
        self,
        server: Server,
        emit: Emit,
        options: ResponseOptions,
        answered: Callable[[str], dict[str, str]],
        *,
        automatic: bool = False,
        speaker: Speaker | None = None,
        format: Format | None = None,
    ):
        """answered: called with the text of the answer before response.done; returns its message in the conversation.
        automatic: requested by the end of speech. speaker: speaks the answer, in `format`."""
        self.id = f"resp_{secrets.token_hex(12)}"
        self.in_conversation = options.conversation == "auto"
        self.automatic = automatic
        self.text = ""
        self.accepted = asyncio.Event()
        self.ended = False
        self.turn: dict[str, str] | None = None
        self._speaker = speaker
        self._format = format or Format()
        self._said: list[tuple[float, str]] = []  # sentences, and the seconds of sound before each
        self._seconds = 0.0  # of sound
        self._server = server
        self._emit = emit
        self._options = options
        self._answered = answered
        self._item: dict[str, Any] | None = None
        self._thinking = ""
        self._cancelled: str | None = None
        self._begun = False
        self._task: asyncio.Task[None] | None = None

    def start(self, make: Callable[[], Awaitable[Answering]]) -> None:
        """Begin to answer. make: passes the question to the model."""
        self._task = asyncio.create_task(self._run(make))

    def cancel(self, reason: str) -> None:
        """End the answer early; response.done is still sent. reason: "client_cancelled" or "turn_detected"."""
        if not self.ended and self._cancelled is None:
            self._cancelled = reason
            if self._task is not None and self._begun:  # a task cancelled before it begins would not send response.done
                self._task.cancel()

    async def wait(self) -> None:
        """Wait until the answer ends, if it has begun."""
        if self._task is not None:
            await asyncio.wait({self._task})

    async def created(self) -> None:
        """Send response.created."""
        await self._emit("response.created", response=self._public("in_progress"))

    async def _run(self, make: Callable[[], Awaitable[Answering]]) -> None:
        answering: Answering | None = None
        self._begun = True
        try:
            if self._cancelled is not None:
                raise asyncio.CancelledError
            async with self._server.accepted(), self._server.admitted():
                answering = await make()
                self.accepted.set()
                await self._follow(answering)
                answer = await answering.finish()
        except asyncio.CancelledError:
            await self._end("cancelled", {"type": "cancelled", "reason": self._cancelled or "client_cancelled"})
        except Exception as error:
            failure = api_error(error)
            if failure.status == 500:
                _log.error("a realtime response failed", exc_info=error)
            described = {**failure.body()["error"], "event_id": None}
            await self._end("failed", {"type": "failed", "error": described})
        else:
            self._server.metrics.answered(answer)
            extra = {"usage": _usage(answer), "afnext": {**details(answer, answering), "reasoning": answer.thinking}}
            if answer.finish_reason == "stop":
                await self._end("completed", None, **extra)
            else:
                await self._end("incomplete", {"type": "incomplete", "reason": "max_output_tokens"}, **extra)
        finally:
            self.accepted.set()
            if answering is not None:
                await answering.close()

    async def _follow(self, answering: Answering) -> None:
        """Send the answer's pieces as they arrive, and their sound."""
        async with aclosing(spoken(answering.events(), self._speaker, self._format.hertz)) as events:
            async for event in events:
                if isinstance(event, Piece) and event:
                    await self._push(event)
                elif isinstance(event, Sound):
                    await self._sound(event)
                elif isinstance(event, Unspoken):
                    failure = ApiError(500, "speech_failed", event.message)
                    await self._emit("error", error={**failure.body()["error"], "event_id": None})

    async def _sound(self, sound: Sound) -> None:
        self._said.append((self._seconds, sound.text))
        self._seconds += len(sound.samples) / self._format.hertz
        if len(sound.samples):
            data = encoded(sound.samples, self._format.type)
            await self._emit("response.output_audio.delta", delta=data, **self._place())

    def truncated(self, item_id: Any, seconds: float) -> bool:
        """Drop the sentences that the client has not played: those that begin after `seconds`. False if this answer is
        not that item, or was not spoken."""
        if self._item is None or self._speaker is None or item_id != self._item["id"]:
            return False
        self.text = "".join(text for start, text in self._said if start < seconds)
        if self.turn is not None:
            self.turn["content"] = self.text
        return True

    async def _push(self, piece: Piece) -> None:
        if piece.thinking:
            self._thinking += piece
            place = {"response_id": self.id, "output_index": 0, "content_index": 0}
            await self._emit("response.reasoning_text.delta", delta=str(piece), **place)
            return
        if self._item is None:
            await self._open()
        self.text += piece
        kind = "output_text" if self._speaker is None else "output_audio_transcript"
        await self._emit(f"response.{kind}.delta", delta=str(piece), **self._place())

    async def _open(self) -> None:
        self._item = {
            "id": f"item_{secrets.token_hex(12)}",
            "object": "realtime.item",
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        await self._emit("response.output_item.added", response_id=self.id, output_index=0, item=dict(self._item))
        if self.in_conversation:
            await self._emit("conversation.item.added", item=dict(self._item), previous_item_id=None)
        await self._emit("response.content_part.added", part=self._part(""), **self._place())

    async def _end(self, status: str, status_details: dict[str, Any] | None, **values: Any) -> None:
        if self._item is None and status == "completed":
            await self._open()
        item = self._item
        if item is not None:
            item["status"] = "completed" if status == "completed" else "incomplete"
            if self._speaker is None:
                item["content"] = [{"type": "output_text", "text": self.text}]
                await self._emit("response.output_text.done", text=self.text, **self._place())
            else:
                item["content"] = [{"type": "output_audio", "transcript": self.text}]
                await self._emit("response.output_audio.done", **self._place())
                await self._emit("response.output_audio_transcript.done", transcript=self.text, **self._place())
            await self._emit("response.content_part.done", part=self._part(self.text), **self._place())
            await self._emit("response.output_item.done", response_id=self.id, output_index=0, item=item)
            if self.in_conversation:
                await self._emit("conversation.item.done", item=item, previous_item_id=None)
        self.ended = True
        if self.in_conversation and self.text:
            self.turn = self._answered(self.text)
        output = [] if item is None else [item]
        response = {**self._public(status), "output": output, "status_details": status_details, **values}
        await self._emit("response.done", response=response)

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "text", "text": text} if self._speaker is None else {"type": "audio", "transcript": text}

    def _place(self) -> dict[str, Any]:
        assert self._item is not None
        return {"response_id": self.id, "item_id": self._item["id"], "output_index": 0, "content_index": 0}

    def _public(self, status: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "realtime.response",
            "status": status,
            "status_details": None,
            "output": [],
            "output_modalities": ["text" if self._speaker is None else "audio"],
            "max_output_tokens": self._options.max_output_tokens or "inf",
            "metadata": self._options.metadata,
            "usage": None,
        }


def _usage(answer: Answer) -> dict[str, Any]:
    usage = completion_usage(answer.usage)
    return {
        "input_tokens": usage["prompt_tokens"],
        "output_tokens": usage["completion_tokens"],
        "total_tokens": usage["total_tokens"],
        "input_token_details": usage["prompt_tokens_details"],
        "output_token_details": {"text_tokens": usage["completion_tokens"], "audio_tokens": 0},
        "audio_seconds": usage["audio_seconds"],
    }
