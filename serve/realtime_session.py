"""A realtime session: the client's events, its audio, and its questions about the audio."""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import msgspec
import numpy as np

from ..runtime.errors import AudioError
from .backend import Answering, Hearing
from .context_store import IDLE_SECONDS, new_id
from .errors import ApiError, api_error, unsupported
from .realtime_audio import Buffer, Detector, Recording, Turn, decoded
from .realtime_config import ResponseOptions, converted, first_session, updated
from .realtime_response import Emit, RealtimeResponse
from .realtime_transcripts import Committed, Transcripts
from .server import Server

MAX_MESSAGE = 15 << 20  # characters
_MOST_UNHEARD = 30.0  # seconds of audio; beyond it the socket is not read
_LEAST_COMMIT = 0.1  # seconds
_INLINE = 1 << 16  # characters of base64; longer audio is decoded in a thread
_VOICE_QUESTION = "Answer what was said last in the recording."
_log = logging.getLogger("afnext.serve")


class RealtimeSession:
    """One client's session. `handle` takes its events in order."""

    def __init__(
        self,
        server: Server,
        key: str,
        emit: Emit,
        kind: Literal["realtime", "transcription"],
        model: str,
        route: str = "",
    ):
        """route: ends the id of the context."""
        self.id = f"sess_{secrets.token_hex(12)}"
        self.context_id = new_id(route)
        self.finished = False
        self.seconds = 0.0  # of audio received
        self._server = server
        self._key = key
        self._emit = emit
        self._model = model
        self._session = first_session(kind)
        self._buffer = Buffer()
        self._detector: Detector | None = None
        self._item_id = _item_id()
        self._last_item: str | None = None
        self._conversation: list[dict[str, str]] = []
        self._response: RealtimeResponse | None = None
        self._transcripts = Transcripts(server, key, emit)
        self._hearing: Hearing | None = None
        self._recording: Recording | None = None
        self._reserved = 0
        self._deaf = False  # no further audio is processed, after an error that the client has been sent
        self._unheard = 0.0
        self._progress = asyncio.Event()
        self._jobs: asyncio.Queue[Callable[[], Awaitable[None]] | None] = asyncio.Queue()
        self._worker = asyncio.create_task(self._work())
        self._handlers: dict[str, Callable[[dict[str, Any]], Awaitable[None]]] = {
            "session.update": self._update,
            "input_audio_buffer.append": self._append,
            "input_audio_buffer.commit": self._commit_all,
            "input_audio_buffer.clear": self._clear,
            "conversation.item.create": self._create_item,
            "conversation.item.truncate": self._truncate_item,
            "response.create": self._create_response,
            "response.cancel": self._cancel_response,
            "afnext.finish": self._finish,
        }

    async def begin(self) -> None:
        """Send session.created."""
        await self._emit("session.created", session=self._public())

    async def handle(self, text: str | None) -> None:
        """Handle a client's event. The reply to an invalid event is an error event. text: None for a binary message."""
        event: Any = None
        try:
            event = _parsed(text)
            handler = self._handlers.get(event["type"])
            if handler is None:
                known = ", ".join(self._handlers)
                raise ApiError(400, "invalid_value", f"the events are {known}", param="type")
            await handler(event)
        except Exception as error:
            await self._error(error, event)

    async def close(self) -> None:
        """End the session. Its audio stays as a context; everything else is freed."""
        if self._response is not None:
            self._response.cancel("client_cancelled")
        self._jobs.put_nowait(None)
        await self._worker
        if self._response is not None:
            await self._response.wait()
        await self._transcripts.close()
        if not self.finished:
            try:
                await self._keep()
            except Exception as error:
                _log.warning("a realtime session's context is not kept (%s)", api_error(error))

    async def _update(self, event: dict[str, Any]) -> None:
        old, new = self._session, updated(self._session, event.get("session"))
        if self._buffer.end:
            for name, before, now in (
                ("type", old.type, new.type),
                ("instructions", old.instructions, new.instructions),
                ("audio.input.format", old.audio.input.format, new.audio.input.format),
            ):
                if before != now and not (name == "instructions" and self._hearing is None):
                    raise unsupported(f"session.{name}", f"{name} cannot change once audio has come")
        if new.model is not None:
            self._model = self._server.served(new.model)
        wanted = new.audio.input.transcription
        if wanted is not None and wanted.model not in (None, "", "whisper-1"):
            self._server.served(wanted.model)
        self._server.speaks("audio" in new.output_modalities, "session.output_modalities")
        if new.audio.output.speed != 1:
            raise unsupported("session.audio.output.speed", "answers are spoken at one speed, 1")
        self._session = new
        if old.audio.input.turn_detection != new.audio.input.turn_detection:
            self._detector = None
        await self._emit("session.updated", session=self._public())

    async def _append(self, event: dict[str, Any]) -> None:
        sound, detection = self._session.audio.input, self._session.audio.input.turn_detection
        data = event.get("audio")
        inline = not isinstance(data, str) or len(data) < _INLINE
        decode = decoded if inline else lambda *given: asyncio.to_thread(decoded, *given)
        result: Any = decode(data, sound.format.type)
        samples: np.ndarray = result if inline else await result
        if self._deaf or not len(samples):
            return
        rate = sound.format.hertz
        self.seconds += len(samples) / rate
        if self._session.type == "realtime":
            self._unheard += len(samples) / rate
            self._jobs.put_nowait(lambda: self._hear(samples, rate))
        elif (self._buffer.end - self._buffer.start) / rate > self._server.backend.max_audio_seconds:
            self._deaf = True
            raise ApiError(400, "audio_too_long", "the audio that is not committed is too long; nothing more is heard")
        kept = samples if sound.transcription is not None else np.broadcast_to(np.int16(0), samples.shape)
        if detection is not None and self._detector is None:
            self._detector = Detector(
                rate,
                threshold=detection.threshold,
                silence_ms=detection.silence_duration_ms,
                position=self._buffer.end,
            )
        self._buffer.append(kept)
        if detection is not None and self._detector is not None:
            for turn in self._detector.push(samples):
                await self._turn(turn, rate)
            if not self._detector.speaking:
                self._buffer.drop(self._buffer.end - rate * detection.prefix_padding_ms // 1000)
        while self._unheard > _MOST_UNHEARD:
            self._progress.clear()
            await self._progress.wait()

    async def _turn(self, turn: Turn, rate: int) -> None:
        detection = self._session.audio.input.turn_detection
        assert detection is not None
        if turn.kind == "started":
            start = max(self._buffer.start, turn.position - rate * detection.prefix_padding_ms // 1000)
            self._buffer.drop(start)
            await self._emit(
                "input_audio_buffer.speech_started", audio_start_ms=1000 * start // rate, item_id=self._item_id
            )
            if detection.interrupt_response and self._response is not None and self._response.automatic:
                self._response.cancel("turn_detected")
            return
        await self._emit(
            "input_audio_buffer.speech_stopped", audio_end_ms=1000 * turn.position // rate, item_id=self._item_id
        )
        await self._commit(turn.position)
        if detection.create_response and self._session.type == "realtime" and not self._busy:
            question = [] if self._asks() else [{"role": "user", "content": _VOICE_QUESTION}]
            await self._respond(ResponseOptions(), [*self._conversation, *question], automatic=True)

    async def _commit_all(self, event: dict[str, Any]) -> None:
        if self._buffer.end - self._buffer.start < _LEAST_COMMIT * self._session.audio.input.format.hertz:
            raise ApiError(400, "input_audio_buffer_commit_empty", "less than 100 ms of audio is in the buffer")
        self._detector = None
        await self._commit(self._buffer.end)

    async def _commit(self, position: int) -> None:
        item_id, self._item_id = self._item_id, _item_id()
        sound = self._session.audio.input
        start, rate = self._buffer.start, sound.format.hertz
        item = _message(item_id, "user", {"type": "input_audio", "transcript": None})
        previous = self._last_item
        await self._emit("input_audio_buffer.committed", item_id=item_id, previous_item_id=previous)
        await self._added(item)
        if sound.transcription is None:
            self._buffer.drop(position)
            return
        samples = self._buffer.take(position)
        self._transcripts.add(Committed(item_id, samples, rate, start / rate, sound.transcription))

    async def _clear(self, event: dict[str, Any]) -> None:
        self._buffer.drop(self._buffer.end)
        self._detector = None
        await self._emit("input_audio_buffer.cleared")

    async def _create_item(self, event: dict[str, Any]) -> None:
        item = event.get("item")
        turn = _text_turn(item, "item")
        if event.get("previous_item_id") not in (None, self._last_item):
            raise unsupported("previous_item_id", "items are added at the end only")
        assert isinstance(item, dict)
        given = item.get("id")
        if given is not None and not (isinstance(given, str) and 0 < len(given) <= 64):
            raise ApiError(400, "invalid_value", "an id has 1 to 64 characters", param="item.id")
        kind = "input_text" if turn["role"] == "user" else "output_text"
        self._conversation.append(turn)
        await self._added(_message(given or _item_id(), turn["role"], {"type": kind, "text": turn["content"]}))

    async def _truncate_item(self, event: dict[str, Any]) -> None:
        """The client has stopped playing a spoken answer: keep only the played part in the conversation."""
        item_id, end = event.get("item_id"), event.get("audio_end_ms")
        if not isinstance(end, int) or end < 0:
            raise ApiError(400, "invalid_value", "audio_end_ms is a number of milliseconds", param="audio_end_ms")
        if self._response is None or not self._response.ended or not self._response.truncated(item_id, end / 1000):
            problem = "only the last answer can be truncated, once it has ended, if it was spoken"
            raise ApiError(400, "invalid_value", problem, param="item_id")
        await self._emit("conversation.item.truncated", item_id=item_id, content_index=0, audio_end_ms=end)

    async def _create_response(self, event: dict[str, Any]) -> None:
        if self._session.type == "transcription":
            raise unsupported("type", "transcription sessions have no responses")
        if self._busy:
            problem = "a response is in progress; wait for response.done, or send response.cancel"
            raise ApiError(400, "conversation_already_has_active_response", problem)
        given = event.get("response")
        options = converted({} if given is None else given, ResponseOptions, "response")
        self._server.speaks("audio" in (options.output_modalities or []), "response.output_modalities")
        messages = list(self._conversation)
        if options.input is not None:
            messages = [_text_turn(item, f"response.input[{i}]") for i, item in enumerate(options.input)]
        if options.instructions:
            messages.append({"role": "user", "content": options.instructions})
            if options.conversation == "auto" and options.input is None:
                self._conversation.append(messages[-1])
        if not messages or messages[-1]["role"] != "user":
            problem = "there is no question; create a user item with text first, or give instructions"
            raise ApiError(400, "missing_value", problem, param="response")
        await self._respond(options, messages, automatic=False)

    async def _cancel_response(self, event: dict[str, Any]) -> None:
        if not self._busy or event.get("response_id") not in (None, self._response and self._response.id):
            raise ApiError(400, "response_cancel_not_active", "no such response is in progress")
        assert self._response is not None
        self._response.cancel("client_cancelled")

    async def _finish(self, event: dict[str, Any]) -> None:
        """No more audio follows: complete the work in progress, send the context, and end."""
        if self._detector is not None and self._detector.speaking:
            await self._commit(self._buffer.end)
        self._deaf = True
        self._jobs.put_nowait(None)
        await self._worker
        if self._response is not None:
            await self._response.wait()
        await self._transcripts.finish()
        self.finished = True
        await self._emit("afnext.context", context=await self._keep())

    @property
    def _busy(self) -> bool:
        return self._response is not None and not self._response.ended

    def _asks(self) -> bool:
        return bool(self._conversation) and self._conversation[-1]["role"] == "user"

    async def _respond(self, options: ResponseOptions, messages: list[dict[str, str]], *, automatic: bool) -> None:
        limit = options.max_output_tokens
        if limit is None:
            limit = self._session.max_output_tokens
        chosen = options.options(limit if isinstance(limit, int) else None, "max_output_tokens")
        modalities = options.output_modalities or self._session.output_modalities
        response = self._response = RealtimeResponse(
            self._server,
            self._emit,
            options,
            self._answered,
            automatic=automatic,
            speaker=self._server.speaks("audio" in modalities, "response.output_modalities"),
            format=self._session.audio.output.format,
        )
        await response.created()

        async def make() -> Answering:
            if self._hearing is not None:
                return await self._hearing.answer(messages, chosen)
            system = self._session.instructions
            turns = [{"role": "system", "content": system}, *messages] if system else messages
            return await self._server.backend.answer(
                turns, chosen, key=self._key, make_room=self._server.contexts.make_room
            )

        async def begin() -> None:
            response.start(make)
            await response.accepted.wait()

        self._jobs.put_nowait(begin)

    def _answered(self, text: str) -> dict[str, str]:
        turn = {"role": "assistant", "content": text}
        self._conversation.append(turn)
        return turn

    async def _work(self) -> None:
        while (job := await self._jobs.get()) is not None:
            try:
                await job()
            except Exception as error:
                await self._error(error, None)

    async def _hear(self, samples: np.ndarray, rate: int) -> None:
        try:
            if self._deaf:
                return
            if self._hearing is None:
                self._hearing = self._server.backend.live(
                    system=self._session.instructions or None,
                    key=self._key,
                    make_room=self._server.contexts.make_room,
                )
                self._recording = await asyncio.to_thread(Recording, self._server.spool.path(), rate)
            assert self._recording is not None
            self._server.spool.reserve(2 * len(samples))
            self._reserved += 2 * len(samples)
            try:
                await self._hearing.feed(samples, rate)
            except AudioError:  # invalid samples are not appended
                raise
            except Exception:
                self._recording.append(samples)
                raise
            await asyncio.to_thread(self._recording.append, samples)
        except Exception:
            self._deaf = True
            raise
        finally:
            self._unheard -= len(samples) / rate
            self._progress.set()

    async def _keep(self) -> dict[str, Any] | None:
        """Make a context of the session's audio, and free everything else. Returns it, or None without audio."""
        hearing, recording = self._hearing, self._recording
        self._hearing = self._recording = None
        if hearing is None or recording is None:
            return None
        try:
            await asyncio.to_thread(recording.close)
            heard = await hearing.finish()
            entry = await self._server.contexts.add(
                self.context_id, self._key, heard, [recording.path], self._session.instructions or None, IDLE_SECONDS
            )
            return entry.public()
        except AudioError:
            return None
        finally:
            await hearing.close()
            recording.path.unlink(missing_ok=True)
            self._server.spool.release(self._reserved)
            self._reserved = 0

    async def _added(self, item: dict[str, Any]) -> None:
        previous, self._last_item = self._last_item, item["id"]
        await self._emit("conversation.item.added", item=item, previous_item_id=previous)
        await self._emit("conversation.item.done", item=item, previous_item_id=previous)

    async def _error(self, error: Exception, event: Any) -> None:
        failure = api_error(error)
        if failure.status == 500:
            _log.error("a realtime event failed", exc_info=error)
        given = event.get("event_id") if isinstance(event, dict) else None
        described = {**failure.body()["error"], "event_id": given if isinstance(given, str) else None}
        await self._emit("error", error=described)

    def _public(self) -> dict[str, Any]:
        values: dict[str, Any] = msgspec.to_builtins(self._session)
        sound = self._session.audio.input.format
        values["audio"]["input"]["format"]["rate"] = sound.hertz
        values["audio"]["output"]["voice"] = self._server.speaker.name if self._server.speaker else None
        if self._session.type == "transcription":
            values = {"type": values["type"], "audio": {"input": values["audio"]["input"]}}
        return {
            **values,
            "id": self.id,
            "object": f"realtime.{'session' if self._session.type == 'realtime' else 'transcription_session'}",
            "model": self._model,
            "afnext": {"context": self.context_id if self._session.type == "realtime" else None},
        }


def _parsed(text: str | None) -> dict[str, Any]:
    """Parse an event. Raises ApiError unless it is an object with a type."""
    if text is None:
        raise ApiError(400, "invalid_json", "events are text messages with JSON")
    if len(text) > MAX_MESSAGE:
        raise ApiError(400, "payload_too_large", f"an event has at most {MAX_MESSAGE >> 20} MiB")
    try:
        event = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ApiError(400, "invalid_json", f"the event is not valid JSON ({error})") from None
    if not isinstance(event, dict) or not isinstance(event.get("type"), str):
        raise ApiError(400, "invalid_value", "an event is an object with a type", param="type")
    return event


def _text_turn(item: Any, where: str) -> dict[str, str]:
    """The turn of a message item with text. Raises ApiError for other items."""
    if not isinstance(item, dict) or item.get("type", "message") != "message":
        raise unsupported(f"{where}.type", "items are messages with text; append audio to the buffer")
    role, content = item.get("role"), item.get("content")
    if role not in ("user", "assistant"):
        problem = "items are of the user or the assistant; system messages are the session's instructions"
        raise unsupported(f"{where}.role", problem)
    if not isinstance(content, list) or not content:
        raise ApiError(400, "invalid_value", f"{where}.content has to be a list of parts", param=f"{where}.content")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("input_text", "output_text", "text") or not isinstance(part.get("text"), str):
            raise unsupported(f"{where}.content[{index}]", "parts are input_text; append audio to the buffer")
        texts.append(part["text"])
    return {"role": role, "content": "\n".join(texts)}


def _message(identifier: str, role: str, part: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": identifier,
        "object": "realtime.item",
        "type": "message",
        "status": "completed",
        "role": role,
        "content": [part],
    }


def _item_id() -> str:
    return f"item_{secrets.token_hex(12)}"
