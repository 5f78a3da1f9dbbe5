"""The state that routes share: the backend, the decoding workers, stored files, and the admission of requests."""

import asyncio
import math
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from ..runtime.app.answer import Answer
from ..runtime.app.transcribe import Transcript
from ..runtime.io.audio import Audio
from .backend import Backend
from .context_store import ContextStore
from .decoding import DecodePool, Spool
from .errors import ApiError, overloaded, unavailable, unsupported
from .fetch import Fetcher
from .http import Exchange
from .metrics import Metrics
from .settings import Settings
from .speech import Speaker
from .store import FileStore

_LEAST_RETRY, _MOST_RETRY = 1, 120  # seconds; OpenAI's clients wait up to two minutes and ignore longer times


class Server:
    """One served model."""

    def __init__(self, backend: Backend, settings: Settings, speaker: Speaker | None = None):
        self.backend = backend
        self.settings = settings
        self.speaker = speaker
        self._temporary = None if settings.state_dir else tempfile.TemporaryDirectory(prefix="afnext-state-")
        state = settings.state_dir or Path(self._temporary.name if self._temporary else "")
        self.files = FileStore(state / "files", settings.store_bytes)
        self.contexts = ContextStore(state / "contexts", lambda: backend.ears, self._decode, settings.store_bytes)
        self.spool = Spool(settings.spool_bytes)
        self.fetcher = Fetcher(settings.audio_hosts)
        self.metrics = Metrics()
        self.pool = DecodePool(
            settings.decode_workers,
            seconds=settings.decode_seconds,
            max_bytes=settings.decode_bytes,
            observe=self.metrics.decode_seconds.observe,
        )
        self.draining = False
        self.stop = asyncio.Event()  # remaining requests end with an error
        self.started = time.time()
        self._admitted = 0
        self._open = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def requests(self) -> int:
        """Requests to the model that are not finished."""
        return self._admitted

    def served(self, name: str) -> str:
        """The name under which the model answers. Raises ApiError (404) for another model's."""
        if name and name not in self.settings.names:
            raise ApiError(
                404,
                "model_not_found",
                f"there is no model {name!r:.80} here; this server serves {', '.join(self.settings.names)}",
                param="model",
            )
        return name or self.settings.names[0]

    def speaks(self, wanted: bool, param: str) -> Speaker | None:
        """The speaker if a request wants audio. Raises ApiError if the server has none; `param` is the field."""
        if wanted and self.speaker is None:
            raise unsupported(param, "answers are text; this server has no voice (see --speaker)")
        return self.speaker if wanted else None

    def check_ready(self) -> None:
        """Raise ApiError (503) while the model loads, and after it has failed."""
        if self.backend.loading:
            raise unavailable("loading", "the model is still loading")
        if self.backend.dead:
            raise unavailable("engine_dead", "the engine has failed; the server has to be restarted")

    @asynccontextmanager
    async def accepted(self) -> AsyncIterator[None]:
        """Count a request, for which a shutdown waits. Raises ApiError (503) once the server shuts down."""
        if self.draining:
            raise unavailable("draining", "the server is shutting down; try another one")
        self._open += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:
                self._idle.set()

    @asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
        """Count a request to the model. Raises ApiError while the model loads or is overloaded."""
        self.check_ready()
        most = self.settings.max_requests or 4 * self.backend.max_batch
        queued = self.backend.queued_tokens
        if self._admitted >= most or queued > self.settings.max_queued_tokens:
            raise overloaded("the server has too much to do", self._retry_after(queued))
        self._admitted += 1
        try:
            yield
        finally:
            self._admitted -= 1

    def answered(self, exchange: Exchange, answer: Answer) -> None:
        """Record an answer in the metrics and in the request's log line."""
        self.metrics.answered(answer)
        usage, timings = answer.usage, answer.timings
        exchange.record.finish = answer.finish_reason
        exchange.record.values |= {
            "audio_seconds": usage.audio_seconds,
            "prompt_tokens": usage.audio_tokens + usage.text_tokens,
            "cached_tokens": usage.cached_tokens,
            "new_tokens": usage.new_tokens,
            "queue": round(timings.queue, 4),
            "encode": round(timings.log_mel + timings.encode, 4),
            "prefill": round(timings.prefill, 4),
            "first_token": round(timings.first_token, 4),
        }

    def transcribed(self, exchange: Exchange, transcript: Transcript) -> None:
        """Record a transcript in the metrics and in the request's log line."""
        self.metrics.transcribed(transcript)
        usage = transcript.usage
        exchange.record.values |= {
            "audio_seconds": transcript.duration,
            "prompt_tokens": usage.audio_tokens + usage.text_tokens,
            "new_tokens": usage.new_tokens,
        }

    async def drain(self, seconds: float) -> bool:
        """Refuse new requests and wait for the others. Returns whether all ended in time."""
        self.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except asyncio.TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Save the contexts, stop the workers and the model."""
        if self.settings.state_dir:
            await self.contexts.close()
        await self.pool.close()
        self.remove_temporary_files()
        await self.backend.close()

    def remove_temporary_files(self) -> None:
        """Remove files that do not outlive the server."""
        self.spool.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    async def _decode(self, path: Path, name: str) -> Audio:
        """Decode a recording that was accepted earlier."""
        return await self.pool.decode(
            path, name, spool=self.spool, max_seconds=self.backend.max_audio_seconds, truncate=True
        )

    def _retry_after(self, queued_tokens: int) -> int:
        """Seconds after which the queue should be shorter, from the prompt tokens that wait and the rate so far."""
        rate = self.metrics.prefill_rate()
        seconds = queued_tokens / rate if rate else 5.0
        return max(_LEAST_RETRY, min(_MOST_RETRY, math.ceil(seconds)))
