"""A recording in progress, processed by the model in this process."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from ..runtime.app.async_model import AsyncListening
from ..runtime.app.context import Context
from ..runtime.app.conversation import Message
from ..runtime.app.live import Live
from ..runtime.app.responder import QuestionOptions
from ..runtime.errors import OutOfPagesError
from .backend import MakeRoom
from .local_answer import LocalAnswering

T = TypeVar("T")


class LocalHearing:
    """A `Live` with its own thread, which executes the calls in order.

    So a question is about everything that was fed before it, and a waiting question blocks no shared thread.
    """

    def __init__(self, live: Live, listening: AsyncListening, salt: bytes, room: int, make_room: MakeRoom):
        """listening: of `live`. room: tokens that the KV cache can hold; make_room: awaited with the number of tokens
        needed when it is full."""
        self._live = live
        self._listening = listening
        self._salt = salt
        self._room = room
        self._make_room = make_room
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="afnext-live")

    async def feed(self, pcm: np.ndarray, rate: int) -> None:
        """See `Hearing`."""
        try:
            await self._run(lambda: self._live.feed(pcm, rate))
        except OutOfPagesError:  # `live` keeps the window and processes it with the next piece
            await self._make_room(self._room)
            await self._run(lambda: self._live.feed(np.empty(0, np.int16), rate))

    async def answer(self, messages: Sequence[Message], options: QuestionOptions) -> LocalAnswering:
        """See `Hearing`."""
        salted: QuestionOptions = {**options, "salt": self._salt}
        stream = self._listening.stream_chat(messages, **salted)
        await stream.ready(self._thread)
        await self._make_room(stream.budget)
        return LocalAnswering(stream, {})

    async def finish(self) -> Context:
        """See `Hearing`."""
        try:
            return await self._run(self._live.finish)
        except OutOfPagesError:
            await self._make_room(self._room)
            return await self._run(self._live.finish)

    async def close(self) -> None:
        """See `Hearing`."""
        await self._run(self._live.close)
        self._thread.shutdown(wait=False)

    async def _run(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)
