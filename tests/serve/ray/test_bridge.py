"""An application whose client is connected to another process."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest

from afnext.serve.ray.bridge import PIECE, Bridge, cut

Application = Callable[[Any, Any, Any], Awaitable[None]]
SCOPE = {"type": "http", "path": "/"}


def collected(application: Application, body: bytes = b"") -> list[dict[str, Any]]:
    """All messages of a response."""

    async def run() -> list[dict[str, Any]]:
        batches = Bridge(application).request(dict(SCOPE), cut(body))
        return [message for batch in [batch async for batch in batches] for message in batch]

    return asyncio.run(run())


@pytest.mark.parametrize("length", [0, 1, PIECE, 2 * PIECE + 1])
def test_a_body_arrives_in_pieces(length: int) -> None:
    body = bytes(length)

    async def echo(scope: Any, receive: Any, send: Any) -> None:
        size, more = 0, True
        while more:
            message = await receive()
            size, more = size + len(message["body"]), message["more_body"]
            assert len(message["body"]) <= PIECE
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(size).encode()})

    assert collected(echo, body)[-1]["body"] == str(length).encode()


def test_more_messages_than_may_wait_all_arrive() -> None:
    async def talk(scope: Any, receive: Any, send: Any) -> None:
        for number in range(1000):
            await send({"type": "http.response.body", "body": str(number).encode(), "more_body": True})

    assert [message["body"] for message in collected(talk)] == [str(number).encode() for number in range(1000)]


def test_an_error_of_the_application_is_raised() -> None:
    async def fail(scope: Any, receive: Any, send: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        collected(fail)


@pytest.mark.parametrize("flooding", [False, True])
def test_a_client_that_leaves_is_noticed(flooding: bool) -> None:
    noticed: list[str] = []

    async def wait(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            while flooding:
                await send({"type": "http.response.body", "body": b"x", "more_body": True})
            noticed.append((await receive())["type"])
        except OSError:
            noticed.append("http.disconnect")

    async def run() -> None:
        async with aclosing(Bridge(wait).request(dict(SCOPE), [])) as batches:
            await anext(batches)

    asyncio.run(run())
    assert noticed == ["http.disconnect"]


def test_a_cancelled_reader_is_a_client_that_leaves() -> None:
    noticed: list[str] = []

    async def wait(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        noticed.append((await receive())["type"])

    async def run() -> None:
        started = asyncio.Event()

        async def read() -> None:
            async for _ in Bridge(wait).request(dict(SCOPE), []):
                started.set()

        reader = asyncio.create_task(read())
        await started.wait()
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader

    asyncio.run(run())
    assert noticed == ["http.disconnect"]


def test_a_websocket_is_passed_both_ways() -> None:
    async def shout(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "websocket.connect"
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": message["text"].upper()})
        await send({"type": "websocket.close", "code": message["code"]})

    async def run() -> list[Any]:
        bridge = Bridge(shout)

        async def messages() -> AsyncIterator[Any]:
            async for batch in bridge.connect("a", {"type": "websocket"}):
                for message in batch:
                    yield message

        coming = messages()
        got = [await anext(coming)]
        for text in ("one", "two"):
            assert await bridge.receive("a", [{"type": "websocket.receive", "text": text}])
            got.append(await anext(coming))
        assert await bridge.receive("a", [{"type": "websocket.disconnect", "code": 1000}])
        got += [message async for message in coming]
        assert not await bridge.receive("a", [{"type": "websocket.receive", "text": "late"}])
        return got

    accepted, *texts, closed = asyncio.run(run())
    assert accepted["type"] == "websocket.accept"
    assert [message["text"] for message in texts] == ["ONE", "TWO"]
    assert closed == {"type": "websocket.close", "code": 1000}


def test_the_lifespan_begins_and_ends() -> None:
    happened: list[str] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        for step in ("startup", "shutdown"):
            assert await receive() == {"type": f"lifespan.{step}"}
            happened.append(step)
            await send({"type": f"lifespan.{step}.complete"})

    async def run() -> None:
        bridge = Bridge(application)
        await bridge.start()
        assert happened == ["startup"]
        await bridge.close()

    asyncio.run(run())
    assert happened == ["startup", "shutdown"]


def test_an_application_that_cannot_start_says_so() -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no model"})

    with pytest.raises(RuntimeError, match="no model"):
        asyncio.run(Bridge(application).start())
