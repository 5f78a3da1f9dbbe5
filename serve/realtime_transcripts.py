"""Transcribes the committed audio of a realtime session, one item after another."""

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..runtime.app.openai_format import transcript_usage
from ..runtime.io.audio import load_audio
from ..runtime.io.scripts import continued
from .backend import Transcribing, TranscriptOptions, TranscriptRequest
from .errors import api_error
from .realtime_config import Transcription
from .realtime_response import Emit
from .server import Server
from .transcriptions import speaker_letter

_log = logging.getLogger("afnext.serve")


@dataclass(frozen=True)
class Committed:
    """Audio to transcribe. samples: int16 [n]; start: seconds from the start of the session."""

    item_id: str
    samples: np.ndarray
    rate: int
    start: float
    wanted: Transcription


class Transcripts:
    """Transcribes committed audio in order, and sends the events."""

    def __init__(self, server: Server, key: str, emit: Emit):
        self._server = server
        self._key = key
        self._emit = emit
        self._waiting: asyncio.Queue[Committed] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    def add(self, committed: Committed) -> None:
        """Queue audio for transcription."""
        self._waiting.put_nowait(committed)
        self._task = self._task or asyncio.create_task(self._run())

    async def finish(self) -> None:
        """Wait until everything is transcribed."""
        await self._waiting.join()

    async def close(self) -> None:
        """Stop."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _run(self) -> None:
        while True:
            committed = await self._waiting.get()
            place = {"item_id": committed.item_id, "content_index": 0}
            try:
                async with self._server.accepted(), self._server.admitted():
                    await self._transcribe(committed, place)
            except Exception as error:
                failure = api_error(error)
                if failure.status == 500:
                    _log.error("a realtime transcript failed", exc_info=error)
                await self._send("failed", **place, error=failure.body()["error"])
            finally:
                self._waiting.task_done()

    async def _transcribe(self, committed: Committed, place: dict[str, Any]) -> None:
        audio = await asyncio.to_thread(load_audio, (committed.samples, committed.rate))
        wanted = committed.wanted
        request = TranscriptRequest(
            TranscriptOptions(speakers=wanted.speakers, timestamps=wanted.timestamps),
            language=wanted.language or "",
            hint=wanted.prompt or "",
        )
        transcribing = await self._server.backend.transcribe(audio, request, key=self._key)
        try:
            text = await self._segments(transcribing, committed, place)
            usage = transcript_usage(await transcribing.finish())
            await self._send("completed", **place, transcript=text, usage=usage)
        finally:
            await transcribing.close()

    async def _segments(self, transcribing: Transcribing, committed: Committed, place: dict[str, Any]) -> str:
        text, count = "", 0
        async for segment in transcribing.segments():
            delta = continued(text, segment.text)
            text += delta
            await self._send("delta", **place, delta=delta)
            if committed.wanted.speakers or committed.wanted.timestamps:
                await self._send(
                    "segment",
                    **place,
                    id=f"seg_{count}",
                    start=committed.start + segment.start,
                    end=committed.start + segment.end,
                    speaker=speaker_letter(segment.speaker),
                    text=segment.text,
                )
            count += 1
        return text

    async def _send(self, kind: str, **values: Any) -> None:
        await self._emit(f"conversation.item.input_audio_transcription.{kind}", **values)
