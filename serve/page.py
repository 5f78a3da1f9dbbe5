"""GET / and /static/{name}: the web page, whose files are in the package and are read once."""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .errors import ApiError
from .http import Exchange
from .server import Server

_FOLDER = Path(__file__).with_name("static")
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": "default-src 'self'; media-src blob:; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


@dataclass(frozen=True)
class Page:
    """A file of the page: its bytes, content type, and the entity tag that changes with the bytes."""

    content: bytes
    media_type: str
    tag: str


@cache
def pages() -> dict[str, Page]:
    """Every file of the page by name. No other file is served."""
    found = {}
    for path in sorted(_FOLDER.iterdir()):
        if path.suffix in _TYPES:
            content = path.read_bytes()
            found[path.name] = Page(content, _TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return found


async def index(server: Server, exchange: Exchange) -> None:
    """GET /."""
    await _send(exchange, pages()["index.html"])


async def static(server: Server, exchange: Exchange) -> None:
    """GET /static/{name}."""
    page = pages().get(exchange.path["name"])
    if page is None:
        raise ApiError(404, "not_found", "the page has no such file")
    await _send(exchange, page)


async def _send(exchange: Exchange, page: Page) -> None:
    headers = {**_HEADERS, "etag": page.tag}
    if page.tag in exchange.headers.get("if-none-match", ""):
        await exchange.reply(304, b"", page.media_type, headers)
    else:
        await exchange.reply(200, page.content, page.media_type, headers)
