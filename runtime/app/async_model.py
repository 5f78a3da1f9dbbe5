"""A model for asyncio: callers await answers, and no thread blocks.

The engine's thread notifies the event loop once per step, for all requests that changed in it (`Bridge`). Decoding
audio and building prompts run in the loop's thread pool.
"""

import asyncio
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from ...kernels.errors import AfnextError
from ..engine.engine import Engine
from ..engine.request import OnUpdate, Request, SequenceState
from ..io.audio import AudioSource
from .answer import Answer, Piece
from .api import Model, load, question_messages
from .context import Listening, asked
from .conversation import Message
from .responder import AnswerOptions, Prepared, QuestionOptions

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

T = TypeVar("T")


@dataclass(frozen=True)
class Listened:
    """The number of a prompt's tokens that have been computed."""

    done: int
    total: int


class Bridge:
    """Runs the engine's requests for one event loop."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._changed: dict[SequenceState, asyncio.Event] = {}

    def on_update(self, sequences: list[SequenceState]) -> None:
        """Wake the tasks that wait for sequences. The engine's thread calls this after a step."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._wake, sequences)

    def _wake(self, sequences: list[SequenceState]) -> None:
        for sequence in sequences:
            if sequence in self._changed:
                self._changed[sequence].set()

    async def run(self, request: Request) -> AsyncGenerator[SequenceState, None]:
        """Submit a request made with `on_update`, and yield its sequence at once and after each change until it has
        ended.

        Closing the generator early cancels the request. Raises the errors of `Engine.submit`, and that of a failed
        sequence.
        """
        sequence = await self._submit(request)
        self._changed[sequence] = changed = asyncio.Event()
        try:
            while True:
                changed.clear()
                ended = sequence.ended  # read first: nothing changes after it
                yield sequence
                if ended:
                    break
                await changed.wait()
            if sequence.error is not None:
                raise sequence.error
        finally:
            del self._changed[sequence]
            self._engine.cancel_soon(sequence)

    async def _submit(self, request: Request) -> SequenceState:
        """Submit in a thread, because that hashes the audio. If the caller is cancelled meanwhile, so is the
        request."""
        submitted = self._loop.run_in_executor(None, self._engine.submit, request)
        try:
            return await asyncio.shield(submitted)
        except asyncio.CancelledError:
            submitted.add_done_callback(self._cancel_submitted)
            raise

    def _cancel_submitted(self, submitted: "asyncio.Future[SequenceState]") -> None:
        if not submitted.cancelled() and submitted.exception() is None:
            self._engine.cancel_soon(submitted.result())


class AsyncStream(AsyncIterator[Piece]):
    """The pieces of an answer as they are generated. After the last one, `answer` is the whole answer.

    Close it to stop early: `await stream.aclose()`, or leave an `async with` block.
    """

    def __init__(self, bridge: Bridge, prepare: Callable[[OnUpdate], Prepared]):
        """prepare: makes the request; called in a thread."""
        self._bridge = bridge
        self._prepare = prepare
        self._prepared: Prepared | None = None
        self._updates: AsyncGenerator[Piece | Listened, None] = self._run()
        self.answer: Answer | None = None

    async def ready(self, pool: Executor | None = None) -> "Self":
        """Check the question and load its audio. Raises their errors before anything is computed.

        pool: runs this, by default the event loop's thread pool.
        """
        if self._prepared is None:
            loop = asyncio.get_running_loop()
            self._prepared = await loop.run_in_executor(pool, self._prepare, self._bridge.on_update)
        return self

    async def __anext__(self) -> Piece:
        async for update in self._updates:
            if isinstance(update, Piece):
                return update
        raise StopAsyncIteration

    def updates(self) -> AsyncIterator[Piece | Listened]:
        """Yields `Listened` whenever more of the prompt has been computed, then the pieces."""
        return self._updates

    @property
    def budget(self) -> int:
        """Tokens of the prompt and of the longest answer, after `ready`."""
        assert self._prepared is not None
        return self._prepared.request.budget

    async def finish(self) -> Answer:
        """The whole answer, without the pieces."""
        async for _ in self:
            pass
        if self.answer is None:
            raise AfnextError("the answer was stopped before its end")
        return self.answer

    async def aclose(self) -> None:
        """Stop generating and free the memory."""
        await self._updates.aclose()

    async def __aenter__(self) -> "Self":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _run(self) -> AsyncGenerator[Piece | Listened, None]:
        await self.ready()
        assert self._prepared is not None
        request, reader = self._prepared.request, self._prepared.reader
        total, read, computed = len(request.token_ids), 0, -1
        sequences = self._bridge.run(request)
        try:
            async for sequence in sequences:
                if not sequence.tokens and sequence.computed != computed:
                    computed = sequence.computed
                    yield Listened(min(computed, total), total)
                for token in sequence.tokens[read:]:
                    read += 1
                    if not reader.ended:
                        for piece in reader.push(token):
                            yield piece
                if reader.ended:
                    break
            pieces, self.answer = reader.finish(sequence)
        finally:
            await sequences.aclose()
        for piece in pieces:
            yield piece


class AsyncListening:
    """A context or live recording that answers questions; see `Context` and `Live`."""

    def __init__(self, bridge: Bridge, listening: Listening):
        self._bridge = bridge
        self._listening = listening

    def stream(self, question: str, **options: "Unpack[QuestionOptions]") -> AsyncStream:
        """Stream the answer to a question; see `Listening.stream`."""
        return self.stream_chat(asked(question), **options)

    def stream_chat(self, messages: Sequence[Message], **options: "Unpack[QuestionOptions]") -> AsyncStream:
        """Stream the next turn of a conversation about the audio; see `Listening.stream_chat`."""
        return AsyncStream(self._bridge, lambda on_update: self._listening.prepare(messages, options, on_update))

    async def ask(self, question: str, **options: "Unpack[QuestionOptions]") -> Answer:
        """The answer to a question; see `Listening.ask`."""
        return await self.stream(question, **options).finish()

    async def close(self) -> None:
        """Release the memory."""
        await asyncio.to_thread(self._listening.close)

    async def __aenter__(self) -> "Self":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


class AsyncModel:
    """A model whose calls are awaited. Any number may run at once; their requests share the engine's steps."""

    def __init__(self, model: Model):
        self.model = model
        self._bridges: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Bridge] = weakref.WeakKeyDictionary()

    @classmethod
    async def load(cls, *args: Any, **options: Any) -> "Self":
        """Load a model in a thread; arguments and errors are those of `afnext.load`."""
        return cls(await asyncio.to_thread(load, *args, **options))

    def stream(
        self,
        audio: AudioSource | list[AudioSource] | None,
        question: str,
        *,
        system: str | None = None,
        **options: "Unpack[AnswerOptions]",
    ) -> AsyncStream:
        """The answer to a question piece by piece: `async for piece in model.stream(...)`; see `Model.stream`."""
        return self.stream_chat(question_messages(audio, question, system), **options)

    def stream_chat(self, messages: Sequence[Message], **options: "Unpack[AnswerOptions]") -> AsyncStream:
        """The next turn of a conversation piece by piece; see `Model.stream_chat`."""
        return AsyncStream(self._bridge(), lambda on_update: self.model.prepare_chat(messages, options, on_update))

    async def ask(
        self,
        audio: AudioSource | list[AudioSource] | None,
        question: str,
        *,
        system: str | None = None,
        **options: "Unpack[AnswerOptions]",
    ) -> Answer:
        """The answer to a question; see `Model.ask`."""
        return await self.stream(audio, question, system=system, **options).finish()

    async def chat(
        self, conversations: Sequence[Sequence[Message]], **options: "Unpack[AnswerOptions]"
    ) -> list[Answer]:
        """The answers to several conversations, in one batch; see `Model.chat`."""
        return await asyncio.gather(*(self.stream_chat(one, **options).finish() for one in conversations))

    async def listen(
        self, audio: AudioSource | list[AudioSource], *, system: str | None = None, truncate: bool = False
    ) -> AsyncListening:
        """Hear recordings once, to be asked any number of questions; see `Model.listen`.

        Listening ends when the caller is cancelled.
        """
        stopped = threading.Event()
        try:
            context = await asyncio.to_thread(
                self.model.listen, audio, system=system, truncate=truncate, cancelled=stopped.is_set
            )
        finally:
            stopped.set()
        return self.about(context)

    def about(self, listening: Listening) -> AsyncListening:
        """A context or live recording of this model, with calls that are awaited."""
        return AsyncListening(self._bridge(), listening)

    async def close(self) -> None:
        """Close the model."""
        await asyncio.to_thread(self.model.close)

    def _bridge(self) -> Bridge:
        """The bridge of the running event loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._bridges:
            self._bridges[loop] = Bridge(self.model.engine)
        return self._bridges[loop]
