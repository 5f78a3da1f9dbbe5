"""Fetches recordings from the https hosts that `--audio-host` names, and from nowhere else.

A client chooses the URL, so it must not reach anything that the client could not reach itself: the host is one of those
named, its name is resolved once, all its addresses are public, and the connection goes to one of these addresses. There
are no redirects, proxies, credentials, cookies or other ports.
"""

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import suppress
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from .errors import ApiError, unsupported

_PORT = 443
_MOST_HEAD = 32 << 10
_PIECE = 1 << 16

Resolve = Callable[[str], Awaitable[list[str]]]


async def resolve(host: str) -> list[str]:
    """The addresses of a host. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, _PORT, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


def is_public(address: str) -> bool:
    """Whether an IP address, and any address embedded in it, belongs to the public internet."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None or ip.sixtofour is not None or ip.teredo is not None:
            return False
        if ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64: an IPv4 address in the last 32 bits
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


class Fetcher:
    """Fetches recordings from `hosts`."""

    def __init__(
        self,
        hosts: Collection[str],
        *,
        seconds: float = 120.0,
        resolve: Resolve = resolve,
        allowed: Callable[[str], bool] = is_public,
        port: int = _PORT,
        context: ssl.SSLContext | None = None,
    ):
        """hosts: exact names. seconds: for one recording. For tests, resolve replaces name resolution, allowed the
        check of addresses, port the port, and context the trusted certificates."""
        self._hosts = frozenset(host.lower() for host in hosts)
        self._seconds = seconds
        self._resolve = resolve
        self._allowed = allowed
        self._port = port
        self._context = context

    async def fetch(self, url: str, path: Path, *, most: int, reserve: Callable[[int], None], param: str) -> None:
        """Write a recording to a file. Raises ApiError naming `param`.

        most: bytes; reserve: is called with the number of bytes before they are written.
        """
        parts = self._checked(url, param)
        try:
            await asyncio.wait_for(self._fetch(parts, path, most, reserve, param), self._seconds)
        except asyncio.TimeoutError:
            raise _failed(param, "it took too long") from None
        except (OSError, ssl.SSLError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError):
            raise _failed(param, "the connection failed") from None

    def _checked(self, url: str, param: str) -> SplitResult:
        """The parts of an allowed URL. No other code parses the URL."""
        if not self._hosts:
            raise unsupported(param, "only data: URLs are read; send the audio itself, upload it, or see --audio-host")
        if len(url) > 4096 or not url.isascii() or not url.isprintable() or any(char in url for char in ' \\"<>^`{|}'):
            raise unsupported(param, "the URL holds characters that a URL cannot hold, or too many")
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise unsupported(param, "the URL cannot be read") from None
        if parts.scheme != "https" or "@" in parts.netloc or port not in (None, _PORT):
            raise unsupported(param, "only https URLs without user, password and port are fetched")
        if parts.hostname not in self._hosts:
            raise unsupported(param, "recordings are not fetched from this host; see --audio-host")
        return parts

    async def _fetch(
        self, parts: SplitResult, path: Path, most: int, reserve: Callable[[int], None], param: str
    ) -> None:
        host = parts.hostname or ""
        addresses = await self._resolve(host)
        if not addresses or not all(self._allowed(address) for address in addresses):
            raise unsupported(param, "the host has no public address")
        context = self._context or ssl.create_default_context()
        reader, writer = await asyncio.open_connection(
            addresses[0], self._port, ssl=context, server_hostname=host, limit=_MOST_HEAD
        )
        try:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            fields = f"Host: {host}\r\nAccept: */*\r\nAccept-Encoding: identity\r\nConnection: close"
            writer.write(f"GET {target} HTTP/1.1\r\n{fields}\r\n\r\n".encode("ascii"))
            await writer.drain()
            await self._read(reader, path, most, reserve, param)
        finally:
            writer.close()
            with suppress(OSError, ssl.SSLError, asyncio.CancelledError):
                await asyncio.wait_for(writer.wait_closed(), 1)

    async def _read(
        self, reader: asyncio.StreamReader, path: Path, most: int, reserve: Callable[[int], None], param: str
    ) -> None:
        status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        code = status.split(" ")[1:2]
        if code and code[0].startswith("3"):
            raise _failed(param, "the host redirects, which is not followed")
        if code != ["200"] or not status.startswith("HTTP/1."):
            raise _failed(param, "the host does not have it")
        pairs = (line.partition(":") for line in lines)
        headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        if headers.get("content-encoding", "identity") != "identity":
            raise _failed(param, "the host sends it compressed")
        stated = headers.get("content-length")
        size = None if stated is None else int(stated)
        if size is not None and size > most:
            raise _failed(param, "it is too large")
        chunked = "chunked" in headers.get("transfer-encoding", "").lower()
        written = 0
        with path.open("wb") as file:
            async for piece in _chunks(reader) if chunked else _plain(reader, size):
                written += len(piece)
                if written > most:
                    raise _failed(param, "it is too large")
                reserve(len(piece))
                await asyncio.to_thread(file.write, piece)


async def _plain(reader: asyncio.StreamReader, size: int | None) -> AsyncIterator[bytes]:
    left = size
    while left is None or left > 0:
        piece = await reader.read(_PIECE if left is None else min(_PIECE, left))
        if not piece:
            if left is None:
                return
            raise asyncio.IncompleteReadError(b"", left)
        left = None if left is None else left - len(piece)
        yield piece


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
        if size < 0:
            raise ValueError("a chunk of negative size")
        async for piece in _plain(reader, size):
            yield piece
        if await reader.readexactly(2) != b"\r\n":
            raise ValueError("a chunk without an end")


def _failed(param: str, why: str) -> ApiError:
    return ApiError(400, "invalid_audio", f"the recording could not be fetched: {why}", param=param)
