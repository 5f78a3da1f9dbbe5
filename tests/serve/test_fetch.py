"""Recordings from allowed hosts, against a TLS server on the loopback interface that goes by a public name."""

import asyncio
import random
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="serving needs the extra `serve`")
from afnext.serve.errors import ApiError
from afnext.serve.fetch import Fetcher, is_public

from .conftest import HOST

DATA = random.Random(7).randbytes(200_000)


def ok(body: bytes, *headers: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", *(headers or (f"Content-Length: {len(body)}",)), "", ""]
    return "\r\n".join(lines).encode() + body


def fetched(
    certificate: Path,
    answer: bytes,
    url: str = f"https://{HOST}/a/b.flac?x=1",
    *,
    addresses: list[str] | None = None,
    allowed: Callable[[str], bool] = lambda address: True,
    trusted: bool = True,
    tmp_path: Path,
    seconds: float = 100.0,
    stall: bool = False,
) -> tuple[bytes, list[str], int]:
    """What a fetch writes, the requests that the server saw, and the bytes that were reserved."""
    requests: list[str] = []
    reserved = 0

    def reserve(count: int) -> None:
        nonlocal reserved
        reserved += count

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append((await reader.readuntil(b"\r\n\r\n")).decode())
        writer.write(answer)
        await writer.drain()
        if stall:
            await asyncio.Event().wait()
        writer.close()

    async def resolved(host: str) -> list[str]:
        assert host == HOST
        return addresses if addresses is not None else ["127.0.0.1"]

    async def run() -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
        port = server.sockets[0].getsockname()[1]
        trust = ssl.create_default_context(cafile=str(certificate) if trusted else None)
        fetcher = Fetcher([HOST], resolve=resolved, allowed=allowed, port=port, context=trust, seconds=seconds)
        try:
            await fetcher.fetch(url, tmp_path / "out", most=1 << 20, reserve=reserve, param="url")
        finally:
            server.close()

    asyncio.run(run())
    return (tmp_path / "out").read_bytes(), requests, reserved


def test_a_recording_is_fetched_whole(certificate: Path, tmp_path: Path) -> None:
    data, requests, reserved = fetched(certificate, ok(DATA), tmp_path=tmp_path)
    assert data == DATA
    assert reserved == len(DATA)
    assert requests[0].startswith(f"GET /a/b.flac?x=1 HTTP/1.1\r\nHost: {HOST}\r\n")


def test_chunks_and_bodies_without_a_length_are_read(certificate: Path, tmp_path: Path) -> None:
    halves = DATA[:100_000], DATA[100_000:]
    chunks = b"".join(b"%x;ext=1\r\n%s\r\n" % (len(half), half) for half in halves) + b"0\r\n\r\n"
    assert fetched(certificate, ok(chunks, "Transfer-Encoding: chunked"), tmp_path=tmp_path)[0] == DATA
    assert fetched(certificate, ok(DATA, "X: y"), tmp_path=tmp_path)[0] == DATA


@pytest.mark.parametrize(
    "url",
    [
        f"http://{HOST}/a",
        f"https://{HOST}:8443/a",
        f"https://user@{HOST}/a",
        f"https://user:pass@{HOST}/a",
        f"https://{HOST}@evil.example/a",
        f"https://evil.example\\@{HOST}/a",
        f"https://{HOST}\\.evil.example/a",
        f"https://{HOST}.evil.example/a",
        f"https://evil.example/{HOST}",
        f"https://evil.example#@{HOST}/",
        f"https://{HOST}./a",
        "https://127.0.0.1/a",
        "https://[::1]/a",
        "https://[/a",
        f"https://{HOST}/a\r\nX-Evil: 1",
        f"https://{HOST}/a b",
        f"https://{HOST}:99999/a",
        f"https://{HOST}/\N{SNOWMAN}",
        f"file://{HOST}/etc/passwd",
        f"//{HOST}/a",
        "",
    ],
)
def test_urls_of_anything_else_are_refused(url: str, tmp_path: Path) -> None:
    async def never(host: str) -> list[str]:
        raise AssertionError("it was resolved")

    fetch = Fetcher([HOST], resolve=never).fetch(url, tmp_path / "x", most=1, reserve=lambda n: None, param="url")
    with pytest.raises(ApiError) as error:
        asyncio.run(fetch)
    assert (error.value.status, error.value.code, error.value.param) == (400, "unsupported_value", "url")


def test_without_hosts_nothing_is_fetched(tmp_path: Path) -> None:
    with pytest.raises(ApiError, match="--audio-host"):
        asyncio.run(Fetcher([]).fetch("https://x/", tmp_path / "x", most=1, reserve=lambda n: None, param="url"))


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
        *("224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fc00::1", "ff02::1", "::ffff:127.0.0.1"),
        *("::ffff:8.8.8.8", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:7f00:1::", "fe80::1%eth0", "localhost", ""),
    ],
)
def test_private_addresses_are_refused(address: str, certificate: Path, tmp_path: Path) -> None:
    """Also when only one of several is private."""
    assert not is_public(address)
    for addresses in ([address], ["8.8.8.8", address]):
        with pytest.raises(ApiError, match="public address"):
            fetched(certificate, ok(DATA), addresses=addresses, allowed=is_public, tmp_path=tmp_path)


def test_public_addresses_are_public() -> None:
    assert all(map(is_public, ("8.8.8.8", "1.1.1.1", "2606:4700::1111")))


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"HTTP/1.1 302 Found\r\nLocation: https://127.0.0.1/\r\n\r\n", "redirects"),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "does not have"),
        (b"HTTP/1.1\r\n\r\n", "does not have"),
        (b"junk\r\n\r\n", "does not have"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", "too large"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", "failed"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort", "failed"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n", "compressed"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * (2 << 20), "too large"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "failed"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n", "failed"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000, "failed"),
        (b"", "failed"),
    ],
)
def test_answers_that_are_no_recording(answer: bytes, why: str, certificate: Path, tmp_path: Path) -> None:
    with pytest.raises(ApiError, match=why) as error:
        fetched(certificate, answer, tmp_path=tmp_path)
    assert error.value.status == 400
    assert "127.0.0.1" not in str(error.value)


def test_a_foreign_certificate_is_refused(certificate: Path, tmp_path: Path) -> None:
    with pytest.raises(ApiError, match="connection failed"):
        fetched(certificate, ok(DATA), trusted=False, tmp_path=tmp_path)


def test_a_host_that_stalls_is_given_up(certificate: Path, tmp_path: Path) -> None:
    with pytest.raises(ApiError, match="too long"):
        fetched(certificate, ok(b"", "Content-Length: 5"), seconds=0.5, stall=True, tmp_path=tmp_path)
