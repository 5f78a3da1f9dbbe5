"""The HTTP side of a fleet: checks who calls, finds the recording of a request, and passes it to a replica.

A replica that accepts no request (429, or 503 while it starts or stops) refuses before it reads a body, and the request
goes to the next replica of its route. If all refuse, the client gets the best refusal. If a replica is lost before its
response has begun, the request is retried once on the next one. Later, the response ends with the error `replica_lost`.
"""

import asyncio
import json
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from functools import partial
from pathlib import Path
from typing import Protocol

from starlette.requests import ClientDisconnect

from ..decoding import DecodePool, Spool
from ..errors import ApiError, api_error, new_request_id, unavailable
from ..http import Event, Exchange, Message, Receive, Record, Scope, Send
from ..realtime import refuse
from ..settings import Settings
from .metrics import merged
from .recordings import Finder, FormFinder, RawFinder, route_of_json
from .routing import Refusal, candidates, new_route, route_in

_JSON = {"/v1/chat/completions", "/v1/responses"}
_FORMS = {"/v1/audio/transcriptions", "/v1/audio/translations", "/inference", "/v1/files"}
_CONTEXTS = "/v1/contexts"
_PASSED_ON = (
    *("type", "asgi", "http_version", "method", "path", "query_string", "headers", "scheme", "subprotocols"),
    *("afnext.key", "afnext.id"),
)
_LOST = 1  # lost replicas after which a request is retried, before its response begins
_REFUSALS = (429, 503)
_RETRY_SECONDS = 5  # for a refusal without Retry-After
_log = logging.getLogger("afnext.serve")
_requests = logging.getLogger("afnext.serve.requests")


class ReplicaLostError(Exception):
    """A replica was lost before or during its response."""


class Replicas(Protocol):
    """The replicas, each of which runs the whole application."""

    def names(self) -> Sequence[str]:
        """Names of the present replicas."""

    def request(
        self, replica: str, scope: Scope, body: bytes | Path
    ) -> AbstractAsyncContextManager[AsyncIterator[list[Message]]]:
        """A replica's response to an HTTP request, cancelled when the block is left. Raises ReplicaLostError."""

    def connect(
        self, replica: str, session: str, scope: Scope
    ) -> AbstractAsyncContextManager[AsyncIterator[list[Message]]]:
        """Messages for a WebSocket's client; like `request`. session: its name for `send`."""

    async def send(self, replica: str, session: str, messages: Sequence[Message]) -> bool:
        """Forward messages from a session's client; False if the session has ended. Raises ReplicaLostError."""


class Front:
    """The ASGI application between the guard and the replicas."""

    def __init__(self, settings: Settings, replicas: Replicas):
        self._settings = settings
        self._replicas = replicas
        self._spool = Spool(settings.spool_bytes)
        self._pool = DecodePool(1, seconds=settings.decode_seconds, max_bytes=settings.decode_bytes)

    async def close(self) -> None:
        """Remove the files of requests and stop the worker."""
        await self._pool.close()
        self._spool.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        elif scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await self.close()
            await send({"type": "lifespan.shutdown.complete"})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = Record()
        scope["afnext.record"] = record
        scope.setdefault("afnext.id", new_request_id())
        exchange = Exchange(
            scope, receive, send, settings=self._settings, spool=self._spool, key=scope.get("afnext.key", "")
        )
        try:
            await self._answer(exchange)
        except ClientDisconnect:
            pass
        except Exception as error:
            if record.status:
                raise
            failure = _failure(error)
            _log_refusal(exchange.id, exchange.key, failure)
            await exchange.json(failure.body(), failure.status, {**failure.headers, "x-request-id": exchange.id})
        finally:
            await exchange.close()

    async def _answer(self, exchange: Exchange) -> None:
        path = exchange.scope["path"]
        if path == "/health/live":  # this process's health; Ray checks the replicas
            await exchange.json({"status": "alive"})
        elif path == "/metrics":
            texts = await exchange.watched(self._of_all(path, exchange.key))
            await exchange.reply(200, merged(texts), "text/plain; version=0.0.4; charset=utf-8")
        elif path == "/v1/status":
            texts = await exchange.watched(self._of_all(path, exchange.key))
            replicas = {name: json.loads(text) for name, text in texts.items()}
            await exchange.json({"object": "status", "replicas": replicas})
        else:
            route, body = await self._read(exchange)
            await exchange.watched(self._forward(exchange, route, body))

    async def _read(self, exchange: Exchange) -> tuple[str, bytes | Path]:
        """The request's route and its body."""
        path, kind = exchange.scope["path"], exchange.headers.get("content-type", "")
        if exchange.scope["method"] != "POST" or path not in {*_JSON, *_FORMS, _CONTEXTS}:
            return next(filter(None, map(route_in, path.split("/"))), None) or new_route(), b""
        if path in _JSON or kind.startswith("application/json"):
            body = await exchange.body()
            route = await exchange.watched(self._route_of_json(exchange, body))
        else:
            finder: Finder = FormFinder(kind) if kind.startswith("multipart/") else RawFinder()
            body = await exchange.upload(finder.feed)
            route = finder.route(self._sharing(exchange))
        return route or new_route(), body

    async def _route_of_json(self, exchange: Exchange, body: bytes | Path) -> str | None:
        if isinstance(body, bytes):
            return route_of_json(body, (), self._sharing(exchange))
        exchange.reserve(body.stat().st_size)
        try:
            slim, files = await self._pool.extract(body, exchange.folder())
        except ApiError as error:
            if error.status == 400:  # the replica reports the error
                return None
            raise
        return await asyncio.to_thread(route_of_json, slim, set(files), self._sharing(exchange))

    def _sharing(self, exchange: Exchange) -> str:
        """The name of the API key, or the same for all if they share cached prompts."""
        return "" if self._settings.share_cache else exchange.key

    async def _forward(self, exchange: Exchange, route: str, body: bytes | Path) -> None:
        scope = _passed_on(exchange.scope, route)
        streams = False

        async def relay(message: Message) -> None:
            nonlocal streams
            if message["type"] == "http.response.start":
                streams = dict(message["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")
            await exchange.relay(message)

        async def attempt(replica: str) -> Refusal | None:
            async with self._replicas.request(replica, scope, body) as batches:
                return await _relay(batches, relay, replica)

        try:
            refusal = await self._offer(route, attempt, lambda: bool(exchange.record.status))
        except ReplicaLostError:
            if not streams:
                raise
            await _break_off(exchange)
            return
        for message in refusal.messages if refusal else ():
            await exchange.relay(message)

    async def _offer(
        self, route: str, attempt: Callable[[str], Awaitable[Refusal | None]], begun: Callable[[], bool]
    ) -> Refusal | None:
        """Try the replicas in turn. Returns the best refusal, or None if one has answered.

        begun: whether the client has received a part of the response. Raises ReplicaLostError, and ApiError (503) if
        there is no replica.
        """
        refusals: list[Refusal] = []
        lost = 0
        for replica in candidates(route, self._replicas.names()):
            try:
                refusal = await attempt(replica)
            except ReplicaLostError:
                lost += 1
                if lost > _LOST or begun():
                    raise
                continue
            if refusal is None:
                return None
            refusals.append(refusal)
        if not refusals:
            raise _lost() if lost else unavailable("loading", "no replica is there yet; try again")
        return min(refusals)

    async def _of_all(self, path: str, key: str) -> dict[str, str]:
        """Each replica's response to GET."""
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": path,
            "query_string": b"",
            "headers": [],
            "afnext.key": key,
        }

        async def ask(name: str) -> tuple[str, str] | None:
            body, status = b"", 0
            with suppress(ReplicaLostError):
                async with self._replicas.request(name, dict(scope), b"") as batches:
                    async for batch in batches:
                        status = status or batch[0].get("status", 0)
                        body += b"".join(message.get("body", b"") for message in batch)
            return (name, body.decode()) if status == 200 else None

        found = await asyncio.gather(*(ask(name) for name in self._replicas.names()))
        return dict(filter(None, found))

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()  # websocket.connect
        route, accepted = new_route(), asyncio.Event()
        passed_on = _passed_on(scope, route)

        async def relay(message: Message) -> None:
            await send(message)
            accepted.set()

        async def attempt(replica: str) -> Refusal | None:
            session = secrets.token_hex(16)
            async with self._replicas.connect(replica, session, passed_on) as batches:
                pumping = asyncio.create_task(_pump(receive, accepted, partial(self._replicas.send, replica, session)))
                try:
                    return await _relay(batches, relay, replica)
                finally:
                    pumping.cancel()
                    await asyncio.gather(pumping, return_exceptions=True)

        try:
            refusal = await self._offer(route, attempt, lambda: accepted.is_set())
            for message in refusal.messages if refusal else ():
                await send(message)
        except Exception as error:
            failure = _failure(error)
            identifier = new_request_id()
            _log_refusal(identifier, scope.get("afnext.key", ""), failure)
            if not accepted.is_set():
                await refuse(send, failure, identifier)
                return
            event = {"type": "error", "event_id": f"event_{secrets.token_hex(12)}", **failure.body()}
            with suppress(OSError, RuntimeError):  # the client has left
                await send({"type": "websocket.send", "text": json.dumps(event)})
                await send({"type": "websocket.close", "code": 1011})


async def _relay(
    batches: AsyncIterator[list[Message]], relay: Callable[[Message], Awaitable[None]], replica: str
) -> Refusal | None:
    """Forward a replica's response as it arrives. Returns it instead if it is a refusal."""
    refusal: Refusal | None = None
    held: list[Message] = []
    async for batch in batches:
        for message in batch:
            if message["type"].endswith((".response.start", "websocket.accept")):
                headers = [*message.get("headers", ()), (b"x-afnext-replica", replica.encode())]
                message = {**message, "headers": headers}
                if message.get("status") in _REFUSALS:
                    seconds = dict(headers).get(b"retry-after", b"")
                    refusal = Refusal(message["status"], int(seconds) if seconds.isdigit() else _RETRY_SECONDS, held)
            if refusal is None:
                await relay(message)
            else:
                held.append(message)
    return refusal


async def _pump(
    receive: Receive, accepted: asyncio.Event, deliver: Callable[[Sequence[Message]], Awaitable[bool]]
) -> None:
    """Deliver the messages of a WebSocket's client, once the WebSocket is accepted."""
    await accepted.wait()
    message: Message = {"type": ""}
    while message["type"] != "websocket.disconnect":
        message = await receive()
        if not await deliver([message]):
            return


async def _break_off(exchange: Exchange) -> None:
    """End a stream of events with an error."""
    event = Event(_lost().body()).encode()
    await exchange.relay({"type": "http.response.body", "body": event + b"data: [DONE]\n\n"})


def _passed_on(scope: Scope, route: str) -> Scope:
    """The part of a request's scope that a replica gets, with the route for the ids that it creates."""
    return {**{name: scope[name] for name in _PASSED_ON if name in scope}, "afnext.route": route}


def _lost() -> ApiError:
    return unavailable("replica_lost", "the replica that answered has ended; send the request again")


def _log_refusal(identifier: str, key: str, failure: ApiError) -> None:
    """Log a request that no replica has answered or logged."""
    line = {"id": identifier, "key": key, "route": "front", "status": failure.status, "error": failure.code}
    _requests.info(json.dumps(line))


def _failure(error: Exception) -> ApiError:
    if isinstance(error, ReplicaLostError):
        return _lost()
    failure = api_error(error)
    if failure.unexpected:
        _log.error("a request failed", exc_info=error)
    return failure
