"""One HTTP request: reads its body within limits, cancels its work when the client disconnects, sends the answer."""

import asyncio
import json
import shutil
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterable, MutableMapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from starlette.datastructures import FormData, Headers, QueryParams, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from .decoding import Spool
from .errors import ApiError, api_error, unavailable
from .settings import SLOWEST, Settings
from .threads import to_its_end

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
T = TypeVar("T")

_MOST_IGNORED = 32
IN_MEMORY = 1 << 20  # bytes; longer bodies go to a file
_KEEP_ALIVE_SECONDS = 8.0


@dataclass
class Record:
    """Data of a request for its log line and the metrics, complete once it is answered."""

    status: int = 0
    code: str | None = None
    finish: str | None = None
    upload_seconds: float | None = None
    values: dict[str, Any] = field(default_factory=dict)


class Exchange:
    """A request and the way to answer it. `key` is the name of the client's API key, "" without keys."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, settings: Settings, spool: Spool, key: str):
        self.scope = scope
        self.headers = Headers(scope=scope)
        self.query = QueryParams(scope["query_string"])
        self.path: dict[str, str] = scope.get("path_params", {})
        self.key = key
        self.route: str = scope.get("afnext.route", "")  # the end of the ids that the request makes; see serve/ray
        self.id: str = scope["afnext.id"]
        self.record: Record = scope["afnext.record"]
        self.ignored: set[str] = set()
        self.files: set[Path] = set()
        self.spool = spool
        self.settings = settings
        self._receive = receive
        self._send = send
        self._stop: asyncio.Event | None = scope.get("afnext.stop")
        self._reserved = 0
        self._sent = time.monotonic()
        self._stack = AsyncExitStack()

    async def close(self) -> None:
        """Remove the files of the request."""
        try:
            await self._stack.aclose()
        finally:
            self.spool.release(self._reserved)

    def temporary(self) -> Path:
        """A path for a file that is removed when the request ends."""
        path = self.spool.path()
        self.own(path)
        return path

    def folder(self) -> Path:
        """A new folder that is removed when the request ends."""
        path = self.spool.path()
        path.mkdir(mode=0o700)
        self._stack.callback(shutil.rmtree, path, ignore_errors=True)
        return path

    def ignore(self, names: Iterable[str]) -> None:
        """Record ignored fields; the response lists them in a header."""
        for name in names:
            if len(self.ignored) < _MOST_IGNORED:
                self.ignored.add(name if name.isascii() and name.isprintable() and len(name) < 64 else "?")

    def own(self, path: Path) -> None:
        """Remove a file when the request ends."""
        self.files.add(path)
        self._stack.callback(_remove, path)

    async def keep(self, manager: AbstractAsyncContextManager[T]) -> T:
        """Enter a context manager and exit it when the request ends."""
        return await self._stack.enter_async_context(manager)

    async def body(self) -> bytes | Path:
        """The body: bytes if it is short, otherwise the path of a file. Raises ApiError beyond the limits."""
        pieces, size, path = [], 0, None
        async for piece in self._pieces(self.settings.max_json_bytes):
            size += len(piece)
            if path is None and size <= IN_MEMORY:
                pieces.append(piece)
                continue
            self.reserve(len(piece) if path is not None else size)
            if path is None:
                path = self.temporary()
                piece, pieces = b"".join([*pieces, piece]), []
            await to_its_end(_append, path, piece)
        return b"".join(pieces) if path is None else path

    async def upload(self, feed: Callable[[bytes], None] = lambda piece: None) -> Path:
        """The whole body in a file; `feed` is called with each piece. Raises ApiError beyond the limits."""
        path = self.temporary()
        path.touch()
        async for piece in self._pieces(self.settings.max_upload_bytes):
            self.reserve(len(piece))
            feed(piece)
            await to_its_end(_append, path, piece)
        return path

    async def form(self) -> FormData:
        """The fields of a multipart form; its files are on disk. Raises ApiError beyond the limits."""
        if not self.headers.get("content-type", "").startswith("multipart/form-data"):
            raise ApiError(415, "unsupported_media_type", "send the fields as multipart/form-data")

        async def pieces() -> AsyncGenerator[bytes, None]:
            async for piece in self._pieces(self.settings.max_upload_bytes):
                self.reserve(len(piece))
                yield piece

        try:
            parser = MultiPartParser(self.headers, pieces(), max_files=17, max_fields=64, max_part_size=1 << 20)
            form = await parser.parse()
        except (MultiPartException, KeyError, UnicodeError) as error:
            detail = error.message if isinstance(error, MultiPartException) else "it is malformed"
            raise ApiError(400, "invalid_form", f"the multipart body cannot be read: {detail}") from None
        self._stack.push_async_callback(form.close)
        return form

    async def saved(self, upload: UploadFile) -> Path:
        """The path of an uploaded file of a form."""
        path = self.temporary()
        path.touch()
        self.reserve(upload.size or 0)
        await upload.seek(0)
        while piece := await upload.read(IN_MEMORY):
            await to_its_end(_append, path, piece)
        return path

    async def watched(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which is cancelled when the client disconnects or the server stops.

        Raises ClientDisconnect, or ApiError (503). The body has to be read first.
        """
        task = asyncio.ensure_future(work)
        left = asyncio.ensure_future(self._disconnected())
        stop = asyncio.ensure_future(self._stop.wait()) if self._stop is not None else left
        try:
            await asyncio.wait((task, left, stop), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if left.done():
                raise ClientDisconnect
            raise unavailable("draining", "the server stopped before the answer was complete")
        finally:
            for one in (task, left, stop):
                one.cancel()
            with suppress(BaseException):
                await asyncio.gather(task, left, stop, return_exceptions=True)

    async def reply(self, status: int, content: bytes, media_type: str, headers: dict[str, str] | None = None) -> None:
        """Send a whole response."""
        length = {"content-length": str(len(content))}
        await self._start(status, {"content-type": media_type, **length, **(headers or {})})
        await self._send({"type": "http.response.body", "body": content})

    async def json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Send a JSON response."""
        await self.reply(status, to_json(value), "application/json", headers)

    async def relay(self, message: Message) -> None:
        """Send a message of a response that another application makes."""
        if message["type"] == "http.response.start":
            self.record.status = message["status"]
        await self._send(message)

    async def send_file(self, path: Path) -> None:
        """Send the bytes of a file."""
        headers = {"content-type": "application/octet-stream", "content-length": str(path.stat().st_size)}
        await self._start(200, headers)
        await self.watched(self._send_pieces(path))
        await self._send({"type": "http.response.body", "body": b""})

    async def _send_pieces(self, path: Path) -> None:
        with path.open("rb") as file:
            while piece := await asyncio.to_thread(file.read, IN_MEMORY):
                await self._more(piece)

    async def events(self, source: AsyncIterator["Event"], done: bool = True) -> None:
        """Send server-sent events as they arrive, and a comment after eight seconds without one.

        done: end with `data: [DONE]`. An error after the start becomes an event. If the client disconnects, the source
        is closed.
        """
        await self._start(200, {"content-type": "text/event-stream; charset=utf-8", **_STREAMING})
        try:
            await self.watched(self._send_events(source, done))
        except ApiError as error:  # the server stops
            self.record.code = error.code
            await self._more(Event(error.body(), name="error" if not done else None).encode())
            if done:
                await self._more(b"data: [DONE]\n\n")
        await self._send({"type": "http.response.body", "body": b""})

    async def _send_events(self, source: AsyncIterator["Event"], done: bool) -> None:
        keeping_alive = asyncio.create_task(self._keep_alive())
        try:
            async for event in source:
                await self._more(event.encode())
        except Exception as error:
            failure = api_error(error)
            self.record.code = failure.code
            self.scope["afnext.log_error"](error, failure)
            await self._more(Event(failure.body(), name="error" if not done else None).encode())
        finally:
            keeping_alive.cancel()
            await source.aclose()  # type: ignore[attr-defined]
        if done:
            await self._more(b"data: [DONE]\n\n")

    async def _keep_alive(self) -> None:
        """Send a comment after some seconds without data, so that proxies keep the connection open."""
        while True:
            silent = time.monotonic() - self._sent
            if silent >= _KEEP_ALIVE_SECONDS:
                await self._more(b": waiting\n\n")
            else:
                await asyncio.sleep(_KEEP_ALIVE_SECONDS - silent)

    async def _start(self, status: int, headers: dict[str, str]) -> None:
        self.record.status = status
        if self.ignored:
            headers = {**headers, "x-afnext-ignored": ", ".join(sorted(self.ignored))}
        raw = [(name.lower().encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def _more(self, piece: bytes) -> None:
        self._sent = time.monotonic()
        await self._send({"type": "http.response.body", "body": piece, "more_body": True})

    def reserve(self, count: int) -> None:
        """Account for bytes on disk until the request ends. Raises ApiError (429) if all requests hold too many."""
        self.spool.reserve(count)
        self._reserved += count

    async def _pieces(self, limit: int) -> AsyncIterator[bytes]:
        """The body piece by piece. Raises ApiError if it is too large or arrives too slowly."""
        stated = self.headers.get("content-length")
        if stated is not None and (not stated.isdecimal() or int(stated) > limit):
            raise _too_large(limit)
        size, recent, patience = 0, 0, self.settings.slow_seconds
        start = time.monotonic()
        deadline = start + patience
        while True:
            try:
                message = await asyncio.wait_for(self._receive(), max(0.0, deadline - time.monotonic()))
            except asyncio.TimeoutError:
                raise ApiError(408, "upload_timeout", "the body came too slowly", headers=_CLOSE) from None
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            piece = message.get("body", b"")
            size, recent = size + len(piece), recent + len(piece)
            if size > limit:
                raise _too_large(limit)
            if recent >= SLOWEST * patience:  # fast enough so far: start the next interval
                recent, deadline = 0, time.monotonic() + patience
            if piece:
                yield piece
            if not message.get("more_body", False):
                self.record.upload_seconds = time.monotonic() - start
                return

    async def _disconnected(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass


@dataclass(frozen=True)
class Event:
    """A server-sent event. data: a JSON value, or None for a comment; name: its type, if the stream names them."""

    data: Any
    name: str | None = None
    comment: str | None = None

    def encode(self) -> bytes:
        """The event as bytes of the stream."""
        if self.comment is not None:
            return f": {self.comment}\n\n".encode()
        name = f"event: {self.name}\n" if self.name else ""
        return name.encode() + b"data: " + to_json(self.data) + b"\n\n"


_CLOSE = {"connection": "close"}  # the rest of the body is not read
_STREAMING = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def _too_large(limit: int) -> ApiError:
    return ApiError(413, "payload_too_large", f"the body is longer than {limit >> 20} MiB", headers=_CLOSE)


def to_json(value: Any) -> bytes:
    """JSON of plain values and numpy's numbers. NaN and infinity become null."""
    try:
        return _ENCODER.encode(value)
    except UnicodeEncodeError:  # half a surrogate pair
        return json.dumps(value).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no JSON")


_ENCODER = msgspec.json.Encoder(enc_hook=_plain)


def _append(path: Path, piece: bytes) -> None:
    with path.open("ab") as file:
        file.write(piece)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
