"""Server-sent events without a server: comments while nothing comes, errors, and the end of what they come from."""

import asyncio
import json
import math
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette", reason="serving needs the extra `serve`")
from afnext.runtime.app.answer import Piece
from afnext.serve import http
from afnext.serve.audio import AudioReader
from afnext.serve.decoding import Spool
from afnext.serve.errors import ApiError
from afnext.serve.http import ClientDisconnect, Event, Exchange, Record, to_json
from afnext.serve.settings import Settings


class Client:
    """What a client receives; it stays until it `leaves`."""

    def __init__(self) -> None:
        self.received = b""
        self.changed = asyncio.Event()
        self.leaves = asyncio.Event()
        self.logged: list[str] = []
        scope = {
            "headers": [],
            "query_string": b"",
            "afnext.id": "req_1",
            "afnext.record": Record(),
            "afnext.log_error": lambda error, failure: self.logged.append(failure.code),
        }
        self.exchange = Exchange(scope, self.receive, self.send, settings=Settings(), spool=Spool(1 << 20), key="")

    async def receive(self) -> dict[str, Any]:
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.received += message.get("body", b"")
        self.changed.set()

    async def until(self, text: bytes) -> None:
        while text not in self.received:
            self.changed.clear()
            await self.changed.wait()


def test_json_of_what_json_does_not_know() -> None:
    value = {"a": math.nan, "b": -math.inf, "c": np.float32(1.5), "d": np.int64(3), "e": Piece("é"), "f": (1, None)}
    assert to_json(value) == '{"a":null,"b":null,"c":1.5,"d":3,"e":"é","f":[1,null]}'.encode()
    assert json.loads(to_json({"a": "\ud800"})) == {"a": "\ud800"}


def test_a_file_that_a_thread_still_writes_is_removed_after_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go, write = threading.Event(), threading.Event(), Path.write_bytes

    def slowly(path: Path, data: bytes) -> int:
        begun.set()
        go.wait(60)
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", slowly)

    async def run() -> list[Path]:
        client = Client()
        exchange = client.exchange
        reader = AudioReader(exchange, None, max_seconds=1.0, truncate=False)  # type: ignore[arg-type]
        reading = asyncio.create_task(exchange.watched(reader.from_base64("UklGRg==", "audio")))
        await asyncio.to_thread(begun.wait, 60)
        client.leaves.set()
        asyncio.get_running_loop().call_later(0.2, go.set)
        with pytest.raises(ClientDisconnect):
            await reading
        await exchange.close()
        assert go.is_set()  # nothing is written any more
        return list(Path(exchange.spool._folder.name).iterdir())

    assert asyncio.run(run()) == []


def test_comments_fill_the_time_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_KEEP_ALIVE_SECONDS", 0.01)

    async def run() -> bytes:
        client = Client()

        async def source() -> AsyncIterator[Event]:
            yield Event(1)
            await client.until(b": waiting\n\n")
            yield Event(2)

        await asyncio.wait_for(client.exchange.events(source()), 60)
        return client.received

    received = asyncio.run(run())
    events = [part for part in received.split(b"\n\n") if part and part != b": waiting"]
    assert events == [b"data: 1", b"data: 2", b"data: [DONE]"]
    assert received.startswith(b"data: 1\n\n: waiting\n\n")


@pytest.mark.parametrize(
    ("error", "code"), [(ApiError(400, "invalid_audio", "no"), "invalid_audio"), (OSError("/tmp/x"), "internal_error")]
)
def test_an_error_after_the_start_is_an_event(error: Exception, code: str) -> None:
    async def run() -> Client:
        async def source() -> AsyncIterator[Event]:
            yield Event(1)
            raise error

        client = Client()
        await client.exchange.events(source())
        return client

    client = asyncio.run(run())
    assert f'"code":"{code}"'.encode() in client.received
    assert b"/tmp" not in client.received
    assert client.received.endswith(b"data: [DONE]\n\n")
    assert client.logged == [code]


def test_a_client_that_leaves_ends_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> bool:
        client, ended = Client(), asyncio.Event()

        async def source() -> AsyncIterator[Event]:
            try:
                yield Event(1)
                client.leaves.set()
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)  # giving things back may take time
                ended.set()

        with pytest.raises(ClientDisconnect):
            await asyncio.wait_for(client.exchange.events(source()), 60)
        return ended.is_set()

    assert asyncio.run(run())
