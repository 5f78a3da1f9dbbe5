"""WS /v1/realtime: live audio in, transcripts and answers out, as events of OpenAI's realtime API."""

import json
import logging
import secrets
import time
from contextlib import suppress
from typing import Any, Literal

from starlette.datastructures import QueryParams

from .errors import ApiError, new_request_id, overloaded, unsupported
from .http import Message, Receive, Scope, Send, to_json
from .realtime_session import RealtimeSession
from .server import Server

_SUBPROTOCOL = "realtime"
_requests = logging.getLogger("afnext.serve.requests")


class RealtimeEndpoint:
    """The route's ASGI app. The number of sessions is limited: each has a thread, and keys and values in the cache."""

    def __init__(self, server: Server, path: str):
        self._server = server
        self._path = path
        self._sessions = 0
        server.metrics.live_sessions.set_function(lambda: float(self._sessions))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        identifier, start = new_request_id(), time.monotonic()
        await receive()
        query = QueryParams(scope["query_string"])
        try:
            async with self._server.accepted():
                model, kind = self._checked(query)
        except ApiError as error:
            self._server.metrics.rejected.labels(error.code).inc()
            await refuse(send, error, identifier)
            self._log(scope, identifier, start, error.status, error.code)
            return
        offered = scope.get("subprotocols", [])
        subprotocol = _SUBPROTOCOL if _SUBPROTOCOL in offered else None
        headers = [(b"x-request-id", identifier.encode())]
        await send({"type": "websocket.accept", "subprotocol": subprotocol, "headers": headers})
        key, route = scope.get("afnext.key", ""), scope.get("afnext.route", "")
        session = RealtimeSession(self._server, key, _emitter(send), kind, model, route)
        self._sessions += 1
        try:
            await self._converse(session, receive, send)
        finally:
            try:
                await session.close()
            finally:
                self._sessions -= 1
                self._log(scope, identifier, start, 101, None, session.seconds)

    async def _converse(self, session: RealtimeSession, receive: Receive, send: Send) -> None:
        await session.begin()
        while not session.finished:
            message = await receive()
            if message["type"] == "websocket.disconnect":
                return
            await session.handle(message.get("text"))
        with suppress(OSError, RuntimeError):  # the client has left
            await send({"type": "websocket.close", "code": 1000})

    def _checked(self, query: QueryParams) -> tuple[str, Literal["realtime", "transcription"]]:
        """The model's name and the session's type. Raises ApiError if there can be no session."""
        server = self._server
        server.check_ready()
        if self._sessions >= server.settings.max_live:
            raise overloaded("there are too many realtime sessions")
        model, intent = server.served(query.get("model", "")), query.get("intent", "realtime")
        if intent == "realtime":
            return model, "realtime"
        if intent == "transcription":
            return model, "transcription"
        raise unsupported("intent", f"intent can be realtime or transcription, not {intent!r:.40}")

    def _log(
        self, scope: Scope, identifier: str, start: float, status: int, code: str | None, seconds: float = 0.0
    ) -> None:
        self._server.metrics.requests.labels(self._path, str(status), "").inc()
        line = {
            "id": identifier,
            "key": scope.get("afnext.key", ""),
            "route": self._path,
            "status": status,
            "seconds": round(time.monotonic() - start, 4),
            "audio_seconds": round(seconds, 3),
            "error": code,
        }
        _requests.info(json.dumps({name: value for name, value in line.items() if value is not None}))


async def refuse(send: Send, error: ApiError, identifier: str) -> None:
    """Answer a WebSocket's handshake with an error response."""
    body = json.dumps(error.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), "x-request-id": identifier}
    raw = [(name.lower().encode(), value.encode()) for name, value in {**headers, **error.headers}.items()]
    await send({"type": "websocket.http.response.start", "status": error.status, "headers": raw})
    await send({"type": "websocket.http.response.body", "body": body})


def _emitter(send: Send) -> Any:
    """Sends events until the client has left."""

    async def emit(kind: str, **values: Any) -> None:
        event = {"type": kind, "event_id": f"event_{secrets.token_hex(12)}", **values}
        message: Message = {"type": "websocket.send", "text": to_json(event).decode()}
        with suppress(OSError, RuntimeError):  # the client has left
            await send(message)

    return emit
