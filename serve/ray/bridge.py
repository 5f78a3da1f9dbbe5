"""Runs an ASGI application for clients that are connected to another process.

ASGI messages are passed on in lists: each has all messages that the application has sent since the last list.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from typing import Any

from ..http import Message, Receive, Scope, Send

Application = Callable[[Scope, Receive, Send], Awaitable[None]]

_WAITING = 64  # queued messages for the other process, in either direction
_END_SECONDS = 60.0  # for an application whose client has disconnected
PIECE = 1 << 20  # bytes


class Bridge:
    """One application. `start` and `close` are its lifespan."""

    def __init__(self, application: Application):
        self._application = application
        self._sessions: dict[str, asyncio.Queue[Message]] = {}
        self._life: asyncio.Task[None] | None = None
        self._to_life: asyncio.Queue[Message] = asyncio.Queue()
        self._from_life: asyncio.Queue[Message] = asyncio.Queue()

    async def start(self) -> None:
        """Start the application. Raises its errors."""
        scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
        self._life = asyncio.create_task(self._application(scope, self._to_life.get, self._from_life.put))  # type: ignore[arg-type]
        await self._lifespan("startup")

    async def close(self) -> None:
        """Stop it."""
        if self._life is not None and not self._life.done():
            await self._lifespan("shutdown")
            await self._life

    async def request(self, scope: Scope, body: Sequence[Any]) -> AsyncGenerator[list[Message], None]:
        """The response to an HTTP request. body: its pieces. Closing the iterator disconnects the client."""
        pieces, gone = list(reversed(body)) or [b""], asyncio.Event()

        async def receive() -> Message:
            if pieces:
                piece = pieces.pop()
                return {"type": "http.request", "body": bytes(piece), "more_body": bool(pieces)}
            await gone.wait()
            return {"type": "http.disconnect"}

        async with aclosing(self._run(scope, receive, gone.set)) as batches:
            async for batch in batches:
                yield batch

    async def connect(self, session: str, scope: Scope) -> AsyncGenerator[list[Message], None]:
        """Messages for a WebSocket's client. session: its name for `receive`. Closing the iterator disconnects the
        client."""
        inbox: asyncio.Queue[Message] = asyncio.Queue(_WAITING)
        gone = asyncio.Event()

        async def receive() -> Message:
            coming, leaving = asyncio.ensure_future(inbox.get()), asyncio.ensure_future(gone.wait())
            try:
                await asyncio.wait((coming, leaving), return_when=asyncio.FIRST_COMPLETED)
                return coming.result() if coming.done() else {"type": "websocket.disconnect", "code": 1006}
            finally:
                coming.cancel()
                leaving.cancel()

        self._sessions[session] = inbox
        inbox.put_nowait({"type": "websocket.connect"})
        try:
            async with aclosing(self._run(scope, receive, gone.set)) as batches:
                async for batch in batches:
                    yield batch
        finally:
            del self._sessions[session]

    async def receive(self, session: str, messages: Sequence[Message]) -> bool:
        """Forward messages from a WebSocket's client, once there is room; False if the session has ended."""
        for message in messages:
            inbox = self._sessions.get(session)
            if inbox is None:
                return False
            await inbox.put(message)
        return True

    async def _run(
        self, scope: Scope, receive: Receive, leave: Callable[[], None]
    ) -> AsyncGenerator[list[Message], None]:
        outbox: asyncio.Queue[Message | None] = asyncio.Queue(_WAITING)
        left = False

        async def send(message: Message) -> None:
            if left:
                raise OSError("the client has left")
            await outbox.put(message)

        async def run() -> None:
            try:
                await self._application(scope, receive, send)
            finally:
                if not left:
                    await outbox.put(None)

        task = asyncio.create_task(run())
        try:
            ended = False
            while not ended:
                batch = [await outbox.get()]
                while not outbox.empty():
                    batch.append(outbox.get_nowait())
                messages = [message for message in batch if message is not None]
                ended = len(messages) < len(batch)
                if messages:
                    yield messages
            await task
        finally:
            left = True
            leave()
            while not outbox.empty():  # the application may be blocked on a full queue
                outbox.get_nowait()
            if not task.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.wait((task,), timeout=_END_SECONDS)
                task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _lifespan(self, step: str) -> None:
        assert self._life is not None
        self._to_life.put_nowait({"type": f"lifespan.{step}"})
        answer = asyncio.ensure_future(self._from_life.get())
        await asyncio.wait((answer, self._life), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            answer.cancel()
            self._life.result()
        elif answer.result()["type"] == f"lifespan.{step}.failed":
            raise RuntimeError(f"the application's {step} failed: {answer.result().get('message', '')}")


def cut(body: bytes | memoryview) -> list[memoryview]:
    """Split a body into the pieces that the application receives."""
    view = memoryview(body)
    return [view[start : start + PIECE] for start in range(0, len(view), PIECE)]
