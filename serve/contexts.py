"""/v1/contexts: the model processes a recording once and answers any number of questions about it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
from starlette.datastructures import UploadFile

from ..runtime.io.audio import Audio
from .audio import MAX_RECORDINGS, AudioReader
from .context_store import IDLE_SECONDS, Entry
from .errors import ApiError, api_error
from .fields import json_body, parse
from .files import shown_name
from .http import Event, Exchange
from .server import Server

_MOST_TTL = 7 * 24 * 3600


class ContextRequest(msgspec.Struct, kw_only=True):
    file_ids: list[str] = []
    system: str | None = None
    ttl: Annotated[int, msgspec.Meta(ge=1)] = IDLE_SECONDS
    stream: bool = False
    background: bool = False
    truncate: bool = False


async def create(server: Server, exchange: Exchange) -> None:
    """POST /v1/contexts: JSON with file_ids, a form with files, or the bytes of one recording."""
    kind = exchange.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        request = parse(exchange, await json_body(exchange, server.pool), ContextRequest)
        named = [server.files.path(identifier, exchange.key, "file_ids") for identifier in request.file_ids]
    elif kind == "multipart/form-data":
        request, named = await _from_form(exchange)
    else:
        request = parse(exchange, _query(exchange), ContextRequest)
        named = [(await exchange.upload(), shown_name(exchange.query.get("filename")))]
    if not named:
        raise ApiError(
            400, "missing_value", "name at least one recording: file_ids, or files of a form", param="file_ids"
        )
    if len(named) > MAX_RECORDINGS:
        raise ApiError(400, "invalid_value", f"a context may hold {MAX_RECORDINGS} recordings", param="file_ids")
    reader = AudioReader(exchange, server.pool, max_seconds=server.backend.max_audio_seconds, truncate=request.truncate)
    if request.background and request.stream:
        raise ApiError(400, "invalid_value", "ask for stream or for background, not for both", param="background")
    files = await exchange.watched(_decoded(reader, named))
    if request.background:
        listening = await server.contexts.listen(
            exchange.key, files, request.system, _ttl(request), _in_background(server), exchange.route
        )
        await exchange.json(listening.public(), 202)
        return
    if request.stream:
        await exchange.events(_progress(server, exchange, request, files))
        return
    entry = await exchange.watched(_create(server, exchange, request, files, lambda done, total: None))
    await exchange.json(entry.public())


async def list_contexts(server: Server, exchange: Exchange) -> None:
    """GET /v1/contexts."""
    await exchange.json({"object": "list", "data": server.contexts.of(exchange.key), "has_more": False})


async def get_context(server: Server, exchange: Exchange) -> None:
    """GET /v1/contexts/{id}."""
    await exchange.json(server.contexts.public(exchange.path["id"], exchange.key))


async def delete_context(server: Server, exchange: Exchange) -> None:
    """DELETE /v1/contexts/{id}."""
    server.contexts.delete(exchange.path["id"], exchange.key)
    await exchange.json({"id": exchange.path["id"], "object": "context", "deleted": True})


async def _from_form(exchange: Exchange) -> tuple[ContextRequest, list[tuple[Path, str]]]:
    form = await exchange.form()
    uploads = [file for name in ("file", "file[]") for file in form.getlist(name) if isinstance(file, UploadFile)]
    fields = {name: value for name, value in form.items() if isinstance(value, str)}
    named = [(await exchange.saved(upload), shown_name(upload.filename)) for upload in uploads]
    return parse(exchange, _as_json(fields), ContextRequest), named


def _query(exchange: Exchange) -> bytes:
    return _as_json({name: value for name, value in exchange.query.items() if name != "filename"})


def _as_json(fields: dict[str, str]) -> bytes:
    """Fields of a form or a query as JSON."""
    values: dict[str, Any] = dict(fields)
    for name in ("stream", "background", "truncate"):
        if name in fields:
            values[name] = fields[name].lower() in ("true", "1")
    if "ttl" in fields:
        if not fields["ttl"].isdecimal():
            raise ApiError(400, "invalid_value", "ttl has to be a whole number of seconds", param="ttl")
        values["ttl"] = int(fields["ttl"][:12])
    return msgspec.json.encode(values)


async def _decoded(reader: AudioReader, named: list[tuple[Path, str]]) -> list[tuple[Path, Audio]]:
    return [(path, await reader.from_file(path, name, "file")) for path, name in named]


async def _create(
    server: Server, exchange: Exchange, request: ContextRequest, files: list[tuple[Path, Audio]], progress: Any
) -> Entry:
    return await server.contexts.create(exchange.key, files, request.system, _ttl(request), progress, exchange.route)


def _ttl(request: ContextRequest) -> int:
    return min(request.ttl, _MOST_TTL)


@asynccontextmanager
async def _in_background(server: Server) -> AsyncIterator[None]:
    """Count work that continues after the response as a request: refused under load, awaited by a shutdown."""
    async with server.accepted(), server.admitted():
        yield


async def _progress(
    server: Server, exchange: Exchange, request: ContextRequest, files: list[tuple[Path, Audio]]
) -> AsyncIterator[Event]:
    """Events: context.progress while the model processes the recording, then context.ready or an error."""
    loop, coming = asyncio.get_running_loop(), asyncio.Queue[tuple[int, int] | None]()

    def progress(done: int, total: int) -> None:
        loop.call_soon_threadsafe(coming.put_nowait, (done, total))

    task = asyncio.create_task(_create(server, exchange, request, files, progress))
    task.add_done_callback(lambda _: coming.put_nowait(None))
    try:
        while (step := await coming.get()) is not None:
            yield Event({"type": "context.progress", "done": step[0], "total": step[1]})
        try:
            yield Event({"type": "context.ready", "context": (await task).public()})
        except Exception as error:
            yield Event({"type": "context.failed", **api_error(error).body()})
    finally:
        task.cancel()
