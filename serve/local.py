"""The backend that runs the model in this process."""

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..runtime.app.api import Model
from ..runtime.app.async_model import AsyncModel
from ..runtime.app.context import Context
from ..runtime.app.openai_format import transcript_prompt
from ..runtime.app.prompts import is_language_code
from ..runtime.app.responder import QuestionOptions
from ..runtime.app.transcribe import Transcript, TranscriptStream
from ..runtime.io.audio import Audio
from ..runtime.io.segments import Segment
from .backend import MakeRoom, TranscriptRequest
from .hearing import LocalHearing
from .local_answer import LocalAnswering

_STUCK_SECONDS = 120.0
_THREADS = 32  # concurrent transcripts and contexts, each with a thread that waits for the engine


class LocalTranscribing:
    """A transcript by the engine in this process: a thread requests one window after another."""

    def __init__(self, make: Callable[[Callable[[], bool]], TranscriptStream], pool: ThreadPoolExecutor):
        """make: starts the transcript, given a function that returns whether to stop."""
        self._stopped = threading.Event()
        self._make = make
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._coming: asyncio.Queue[Segment | Transcript | BaseException] = asyncio.Queue()
        self._whole: Transcript | None = None
        self._task: asyncio.Future[None] | None = None

    async def start(self) -> "LocalTranscribing":
        """Check the options and start."""
        stream = await asyncio.to_thread(self._make, self._stopped.is_set)
        self._task = asyncio.ensure_future(self._loop.run_in_executor(self._pool, self._run, stream))
        return self

    async def segments(self) -> AsyncIterator[Segment]:
        """See `Transcribing`."""
        while self._whole is None:
            item = await self._coming.get()
            if isinstance(item, BaseException):
                raise item
            if isinstance(item, Transcript):
                self._whole = item
            else:
                yield item

    async def finish(self) -> Transcript:
        """See `Transcribing`."""
        async for _ in self.segments():
            pass
        assert self._whole is not None
        return self._whole

    async def close(self) -> None:
        """See `Transcribing`."""
        self._stopped.set()

    def _run(self, stream: TranscriptStream) -> None:
        try:
            for segment in stream:
                self._put(segment)
            self._put(stream.finish())
        except BaseException as error:
            self._put(error)

    def _put(self, item: Segment | Transcript | BaseException) -> None:
        self._loop.call_soon_threadsafe(self._coming.put_nowait, item)


class LocalBackend:
    """One model in this process. It loads in a thread; until then `loading` is true."""

    def __init__(self, load: Callable[[], Model], *, share_cache: bool = False):
        self._load = load
        self._share_cache = share_cache
        self._model: AsyncModel | None = None
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="afnext-serve")
        self.failure: BaseException | None = None

    async def start(self) -> None:
        """Load the model. Raises the errors of `afnext.load`."""
        try:
            model = await asyncio.to_thread(self._load)
        except Exception as error:
            self.failure = error
            raise
        model.engine.start()
        self._model = AsyncModel(model)

    @property
    def model(self) -> AsyncModel:
        """The model, once it is loaded."""
        assert self._model is not None
        return self._model

    @property
    def loading(self) -> bool:
        """See `Backend`."""
        return self._model is None

    @property
    def dead(self) -> bool:
        """See `Backend`."""
        if self._model is None:
            return self.failure is not None
        return not self.model.model.engine.alive

    @property
    def stuck(self) -> bool:
        """See `Backend`."""
        if self._model is None:
            return False
        stats = self.model.model.engine.stats()
        working = stats.waiting + stats.prefilling + stats.decoding > 0
        return working and stats.idle_seconds > _STUCK_SECONDS

    @property
    def max_audio_seconds(self) -> float:
        """See `Backend`."""
        return self.model.model.network.config.max_audio_seconds

    @property
    def max_batch(self) -> int:
        """See `Backend`."""
        return self.model.model.engine.options.max_batch

    @property
    def queued_tokens(self) -> int:
        """See `Backend`."""
        return self.model.model.engine.queued_tokens

    def description(self) -> dict[str, Any]:
        """See `Backend`."""
        model = self.model.model
        stored = model.network.config.quantization
        return {
            "max_audio_seconds": self.max_audio_seconds,
            "context": model.network.config.decoder.max_positions,
            "dtype": str(model.network.dtype).removeprefix("torch."),
            "quant": stored.name if stored else None,
            "device": str(model.network.device),
            "tasks": [
                {"name": task.name, "description": task.description, "prompt": task.prompt}
                for task in model.prompts.tasks.values()
            ],
        }

    def status(self) -> dict[str, Any]:
        """See `Backend`."""
        engine = self.model.model.engine
        return {
            "max_batch": engine.options.max_batch,
            "page_size": engine.options.page_size,
            **asdict(engine.stats()),
            "in_progress": [vars(request) for request in engine.requests()],
        }

    @property
    def ears(self) -> "LocalBackend":
        """See `Backend`."""
        return self

    @property
    def room(self) -> int:
        """See `Ears`."""
        return self.model.model.engine.room

    @property
    def token_bytes(self) -> int:
        """See `Ears`."""
        engine = self.model.model.engine
        return engine.cache.page_nbytes // engine.options.page_size

    async def hear(
        self, audio: list[Audio], system: str | None, progress: Callable[[int, int], None], *, key: str
    ) -> Context:
        """See `Ears`."""
        stopped = threading.Event()

        def listen() -> Context:
            return self.model.model.listen(
                list(audio),
                system=system,
                salt=self._salt(key),
                cancelled=stopped.is_set,
                progress=lambda stage, done, total: progress(int(done), int(total)),
            )

        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, listen)
        finally:
            stopped.set()

    async def resume(self, path: Path) -> Context:
        """See `Ears`."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self.model.model.resume, path)

    async def answer(
        self,
        messages: list[dict[str, Any]],
        options: QuestionOptions,
        *,
        key: str,
        context: Context | None = None,
        make_room: MakeRoom | None = None,
    ) -> LocalAnswering:
        """See `Backend`."""
        salted: QuestionOptions = {**options, "salt": self._salt(key)}
        if context is None:
            stream = self.model.stream_chat(messages, **salted)
        else:
            stream = self.model.about(context).stream_chat(messages, **salted)
        await stream.ready()
        if make_room is not None:
            await make_room(stream.budget)
        return LocalAnswering(stream, {})

    def live(self, *, system: str | None, key: str, make_room: MakeRoom) -> LocalHearing:
        """See `Backend`."""
        live = self.model.model.listen(system=system, salt=self._salt(key))
        return LocalHearing(live, self.model.about(live), self._salt(key), self.room, make_room)

    async def transcribe(self, audio: Audio, wanted: TranscriptRequest, *, key: str) -> LocalTranscribing:
        """See `Backend`."""
        options = {name: value for name, value in asdict(wanted.options).items() if value is not None}

        def make(stopped: Callable[[], bool]) -> TranscriptStream:
            return self.model.model.stream_transcribe(
                audio, prompt=self._prompt(wanted), cancelled=stopped, salt=self._salt(key), **options
            )

        return await LocalTranscribing(make, self._threads).start()

    def _prompt(self, wanted: TranscriptRequest) -> str:
        """The instruction to the model. Raises PromptError if the checkpoint does not support the request."""
        if wanted.instruction:
            return wanted.instruction
        prompts, language = self.model.model.prompts, wanted.language
        if wanted.translate:
            named = language if language and not is_language_code(language) else None
            return prompts.get("ast", to="English", source=named)
        return transcript_prompt(
            prompts,
            timestamps=wanted.options.timestamps,
            speakers=wanted.options.speakers,
            language=language,
            hint=wanted.hint,
        )

    async def close(self) -> None:
        """See `Backend`."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._model is not None:
            await asyncio.to_thread(self._model.model.close)

    def _salt(self, key: str) -> bytes:
        """The cache salt of a key. Keys share no cached prompts: response times would reveal what others asked."""
        return b"" if self._share_cache else hashlib.blake2b(key.encode(), digest_size=16).digest()
