"""/v1/files: upload a recording once and use it by its id."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
from starlette.datastructures import UploadFile

from ..runtime.app.transcribe import MAX_SECONDS
from .audio import AudioReader
from .errors import ApiError
from .http import Exchange
from .server import Server
from .store import KEPT_SECONDS

_MOST_PEAKS = 20_000


async def upload(server: Server, exchange: Exchange) -> None:
    """POST /v1/files."""
    form = await exchange.form()
    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise ApiError(400, "missing_value", "send the recording in the field file", param="file")
    seconds = form.get("expires_after[seconds]", str(KEPT_SECONDS))
    if not isinstance(seconds, str) or not seconds.isdecimal():
        raise ApiError(
            400,
            "invalid_value",
            "expires_after[seconds] has to be a whole number of seconds",
            param="expires_after[seconds]",
        )
    path = await exchange.saved(file)
    purpose = str(form.get("purpose", "user_data"))[:64]
    stored = await server.files.add(
        path,
        shown_name(file.filename),
        purpose=purpose,
        key=exchange.key,
        seconds=int(seconds[:12]),
        route=exchange.route,
    )
    await exchange.json(stored.public())


async def list_files(server: Server, exchange: Exchange) -> None:
    """GET /v1/files."""
    data = [stored.public() for stored in server.files.of(exchange.key)]
    await exchange.json({"object": "list", "data": data, "has_more": False})


async def get_file(server: Server, exchange: Exchange) -> None:
    """GET /v1/files/{id}."""
    await exchange.json(server.files.get(exchange.path["id"], exchange.key).public())


async def delete_file(server: Server, exchange: Exchange) -> None:
    """DELETE /v1/files/{id}."""
    server.files.delete(exchange.path["id"], exchange.key)
    await exchange.json({"id": exchange.path["id"], "object": "file", "deleted": True})


async def content(server: Server, exchange: Exchange) -> None:
    """GET /v1/files/{id}/content: the bytes as they were uploaded."""
    path, _ = server.files.path(exchange.path["id"], exchange.key)
    await exchange.send_file(path)


async def peaks(server: Server, exchange: Exchange) -> None:
    """GET /v1/files/{id}/peaks?n=1000: the smallest and largest sample of n parts of the recording, for a waveform."""
    number = exchange.query.get("n", "1000")
    if not number.isdecimal() or len(number) > 6 or not 1 <= int(number) <= _MOST_PEAKS:
        raise ApiError(400, "invalid_value", f"n has to be a number from 1 to {_MOST_PEAKS}", param="n")
    path, name = server.files.path(exchange.path["id"], exchange.key)
    await exchange.json(await exchange.watched(_peaks(server, exchange, path, name, int(number))))


async def _peaks(server: Server, exchange: Exchange, path: Path, name: str, number: int) -> dict[str, Any]:
    reader = AudioReader(exchange, server.pool, max_seconds=MAX_SECONDS, truncate=True)
    audio = await reader.from_file(path, name, "id")

    def extremes() -> list[list[float]]:
        parts = np.array_split(audio.samples, min(number, len(audio.samples)))
        return [[round(float(part.min()), 4), round(float(part.max()), 4)] for part in parts]

    return {"seconds": audio.duration, "peaks": await asyncio.to_thread(extremes)}


def shown_name(name: str | None) -> str:
    """The client's name of a file, for errors and warnings."""
    base = (name or "recording").replace("\\", "/").rsplit("/", 1)[-1]
    return "".join(char for char in base if char.isprintable())[:100] or "recording"
