"""The ASGI application: routes, and the handling that all requests share.

A request passes the guard (Host, Origin, API key), then its route. Errors become OpenAI's error objects, every response
carries `x-request-id`, and one line of JSON per request is logged, without any text or file name.
"""

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.types import ASGIApp

from . import chat, contexts, files, health, models, page, responses, transcriptions
from .errors import ApiError, api_error, new_request_id
from .guard import check_host, check_origin, key_name
from .http import Exchange, Receive, Record, Scope, Send
from .realtime import RealtimeEndpoint, refuse
from .server import Server
from .settings import Settings

Handler = Callable[[Server, Exchange], Awaitable[None]]
_log = logging.getLogger("afnext.serve")
_requests = logging.getLogger("afnext.serve.requests")
_LAG_SECONDS = 0.05
_EXPIRE_SECONDS = 60.0


class Endpoint:
    """A route's ASGI app: one handler, with admission, errors and logging around it."""

    def __init__(self, server: Server, handler: Handler, name: str, *, model: bool, always: bool):
        """model: the handler needs the model, so the request is admitted or refused first. always: the handler also
        answers while the server shuts down."""
        self._server = server
        self._handler = handler
        self._name = name
        self._model = model
        self._always = always

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = time.monotonic()
        record = Record()
        scope["afnext.record"] = record
        scope.setdefault("afnext.id", new_request_id())
        scope["afnext.log_error"], scope["afnext.stop"] = self._log_error, self._server.stop
        exchange = Exchange(
            scope, receive, _with_id(send, scope["afnext.id"]), settings=self._server.settings,
            spool=self._server.spool, key=scope.get("afnext.key", ""),
        )  # fmt: skip
        try:
            await self._answer(exchange)
        except ClientDisconnect:
            record.code = "client_closed"
        except Exception as error:
            failure = api_error(error)
            self._log_error(error, failure)
            record.code = failure.code
            if failure.status in (429, 503):
                self._server.metrics.rejected.labels(failure.code).inc()
            if not record.status:
                await exchange.json(failure.body(), failure.status, failure.headers)
        finally:
            await exchange.close()
            self._finish(scope, record, time.monotonic() - start)

    async def _answer(self, exchange: Exchange) -> None:
        async with AsyncExitStack() as stack:
            if not self._always:
                await stack.enter_async_context(self._server.accepted())
            if self._model:
                await stack.enter_async_context(self._server.admitted())
            await self._handler(self._server, exchange)

    def _log_error(self, error: BaseException, failure: ApiError) -> None:
        if failure.unexpected:
            _log.error("a request failed", exc_info=error)

    def _finish(self, scope: Scope, record: Record, seconds: float) -> None:
        status = record.status or 499
        self._server.metrics.requests.labels(self._name, str(status), record.finish or "").inc()
        self._server.metrics.request_seconds.observe(seconds)
        if record.upload_seconds is not None:
            self._server.metrics.upload_seconds.observe(record.upload_seconds)
        line = {
            "id": scope["afnext.id"],
            "key": scope.get("afnext.key", ""),
            "route": self._name,
            "status": status,
            "seconds": round(seconds, 4),
            **record.values,
            "finish": record.finish,
            "error": record.code,
            "traceparent": _traceparent(scope),
        }
        _requests.info(json.dumps({name: value for name, value in line.items() if value is not None}))


class Guarded:
    """An application behind the guard."""

    def __init__(self, app: ASGIApp, settings: Settings, refused: Callable[[str], None] = lambda code: None):
        """refused: is called with the code of each error."""
        self._app = app
        self._settings = settings
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers, settings = Headers(scope=scope), self._settings
        identifier = new_request_id()
        identified = _with_id(send, identifier)
        try:
            check_host(headers, settings)
            check_origin(headers, settings)
            if scope["type"] == "http" and scope["method"] == "OPTIONS" and headers.get("origin"):
                await _preflight(headers, identified)
                return
            scope["afnext.key"] = key_name(headers, scope["path"], settings.keys)
        except ApiError as error:
            self._refused(error.code)
            if scope["type"] == "websocket":
                await refuse(send, error, identifier)
            else:
                await _refuse(identified, error)
            return
        origin = headers.get("origin")
        await self._app(scope, receive, _with_cors(send, origin) if origin in settings.cors_origins else send)


def create_app(server: Server) -> Guarded:
    """The application that serves `server`."""
    return Guarded(create_routes(server), server.settings, lambda code: server.metrics.rejected.labels(code).inc())


def create_routes(server: Server) -> Starlette:
    """The application without its guard; `scope["afnext.key"]` is the name of the API key that the guard found."""

    def route(path: str, handler: Handler, *methods: str, model: bool = False, always: bool = False) -> BaseRoute:
        return Route(path, Endpoint(server, handler, path, model=model, always=always), methods=list(methods))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(work(server)) for work in (_measure_lag, _expire)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await server.close()

    server.metrics.watch(lambda: {} if server.backend.loading else server.backend.status(), server.contexts.states)
    return Starlette(
        routes=[
            route("/", page.index, "GET"),
            route("/static/{name}", page.static, "GET"),
            route("/v1/chat/completions", chat.chat_completions, "POST", model=True),
            route("/v1/responses", responses.responses, "POST", model=True),
            route("/v1/audio/transcriptions", transcriptions.transcriptions, "POST", model=True),
            route("/v1/audio/translations", transcriptions.translations, "POST", model=True),
            route("/inference", transcriptions.transcriptions, "POST", model=True),
            WebSocketRoute("/v1/realtime", RealtimeEndpoint(server, "/v1/realtime")),
            route("/v1/files", files.upload, "POST"),
            route("/v1/files", files.list_files, "GET"),
            route("/v1/files/{id}", files.get_file, "GET"),
            route("/v1/files/{id}", files.delete_file, "DELETE"),
            route("/v1/files/{id}/content", files.content, "GET"),
            route("/v1/files/{id}/peaks", files.peaks, "GET"),
            route("/v1/contexts", contexts.create, "POST", model=True),
            route("/v1/contexts", contexts.list_contexts, "GET"),
            route("/v1/contexts/{id}", contexts.get_context, "GET"),
            route("/v1/contexts/{id}", contexts.delete_context, "DELETE"),
            route("/v1/models", models.list_models, "GET"),
            route("/v1/models/{model:path}", models.get_model, "GET"),
            route("/v1/status", health.status, "GET", always=True),
            route("/metrics", health.metrics, "GET", always=True),
            route("/health", health.ready, "GET", always=True),
            route("/health/ready", health.ready, "GET", always=True),
            route("/health/live", health.live, "GET", always=True),
        ],
        exception_handlers={404: _unknown_route, 405: _unknown_route},
        lifespan=lifespan,
    )


async def _unknown_route(request: Any, error: Any) -> Any:
    from starlette.responses import JSONResponse

    path = "".join(char for char in request.url.path if char.isprintable())[:100]
    if error.status_code == 405:
        code, message = "method_not_allowed", f"{path} does not take {request.method}"
    elif path == "/v1/realtime":
        code, message = "not_found", f"{path} is a WebSocket; connect to it with ws:// or wss://"
    else:
        code, message = "not_found", f"there is no {path}; the API is under /v1, such as /v1/chat/completions"
    failure = ApiError(error.status_code, code, message)
    return JSONResponse(failure.body(), error.status_code, {"x-request-id": new_request_id()})


async def _measure_lag(server: Server) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _LAG_SECONDS
        await asyncio.sleep(_LAG_SECONDS)
        server.metrics.loop_lag_seconds.observe(max(0.0, loop.time() - due))


async def _expire(server: Server) -> None:
    """Remove expired contexts and files once a minute, even if no request arrives."""
    while True:
        await asyncio.sleep(_EXPIRE_SECONDS)
        try:
            server.contexts.expire()
            server.files.expire()
        except OSError:
            _log.exception("the folder of files and contexts cannot be read")


def _traceparent(scope: Scope) -> str | None:
    given = Headers(scope=scope).get("traceparent", "")
    return given if re.fullmatch(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}", given) else None


def _with_id(send: Send, identifier: str) -> Send:
    async def sending(message: Any) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], (b"x-request-id", identifier.encode())]}
        await send(message)

    return sending


def _with_cors(send: Send, origin: str | None) -> Send:
    async def sending(message: Any) -> None:
        if message["type"] == "http.response.start":
            allowed = (b"access-control-allow-origin", (origin or "").encode())
            message = {**message, "headers": [*message["headers"], allowed, (b"vary", b"origin")]}
        await send(message)

    return sending


async def _preflight(headers: Headers, send: Send) -> None:
    allowed = [
        (b"access-control-allow-origin", headers["origin"].encode()),
        (b"access-control-allow-methods", b"GET, POST, DELETE"),
        (b"access-control-allow-headers", b"authorization, content-type"),
        (b"access-control-max-age", b"600"),
        (b"content-length", b"0"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": allowed})
    await send({"type": "http.response.body", "body": b""})


async def _refuse(send: Send, error: ApiError) -> None:
    body = json.dumps(error.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
