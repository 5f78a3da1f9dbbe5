"""Heads of requests that are too large or too slow, and clients that do not read what they are sent."""

import base64
import json
import os
import socket
import time
from contextlib import suppress
from typing import Any

import pytest

from afnext.serve.connection import MAX_FIELDS, MAX_HEAD, _Read
from afnext.serve.settings import SLOWEST

from .conftest import Running, eventually, patience, stalled

FIELD = b"X-Filler: " + b"x" * 1000 + b"\r\n"


def opened(service: Running, **options: Any) -> socket.socket:
    host, port = service.url.removeprefix("http://").split(":")
    connection = socket.socket()
    for name, value in options.items():
        connection.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    connection.settimeout(100)
    connection.connect((host, int(port)))
    return connection


def answer(service: Running, *pieces: bytes) -> bytes:
    """What the server sends until it closes the connection, to which `pieces` were sent."""
    received = b""
    with opened(service) as connection:
        with suppress(ConnectionError):  # closed before all was sent
            for piece in pieces:
                connection.sendall(piece)
        with suppress(ConnectionError):
            while piece := connection.recv(1 << 16):
                received += piece
    return received


def is_error(response: bytes, status: int, code: str) -> bool:
    head, _, body = response.partition(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")
    assert "connection: close" in lines
    assert any(line.startswith("x-request-id: req_") for line in lines)
    return head.startswith(b"HTTP/1.1 %d" % status) and json.loads(body)["error"]["code"] == code


REQUEST = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n"


@pytest.mark.parametrize(
    "pieces",
    [
        [REQUEST + FIELD * (MAX_HEAD // 1000 + 1) + b"\r\n"],
        [REQUEST + b"".join(b"X-%d: y\r\n" % n for n in range(MAX_FIELDS + 1)) + b"\r\n"],
        [b"GET /?" + b"x" * MAX_HEAD + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"],
        [REQUEST + b"X-Endless: ", *[b"x" * 100_000] * 10],
        [b"G" * 100_000 for _ in range(10)],
        [b"GET /?", *[b"x" * 100_000] * 10],
    ],
    ids=["large", "fields", "url", "endless field", "endless method", "endless url"],
)
def test_a_head_that_is_too_large_is_refused(service: Running, pieces: list[bytes]) -> None:
    response = answer(service, *pieces)
    refused = is_error(response, 431, "head_too_large") or is_error(response, 400, "invalid_request")
    assert refused, response[:300]
    assert b" 400 " not in response[:16] or pieces[0].startswith(b"GG")


def test_a_large_head_within_the_limits_is_read(service: Running) -> None:
    head = REQUEST + FIELD * (MAX_HEAD // 1000 - 4) + b"Connection: close\r\n\r\n"
    assert answer(service, head[:20_000], head[20_000:]).startswith(b"HTTP/1.1 200")


def test_what_follows_a_body_is_limited_too(service: Running) -> None:
    head = b"POST /v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    body = b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n"
    for endless in ([FIELD * 100] * 10, [b"X-Endless: ", *[b"x" * 100_000] * 10]):
        response = answer(service, head + body, *endless)
        assert response.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431")), response[:300]


def test_bytes_that_are_no_request_are_answered_with_an_error_of_the_usual_shape(service: Running) -> None:
    assert is_error(answer(service, b"what is this?\r\n\r\n"), 400, "invalid_request")


def test_a_head_that_stalls_times_out(service: Running) -> None:
    assert is_error(stalled(service, lambda: answer(service, REQUEST)), 408, "upload_timeout")
    with patience(service, 0.5):
        assert answer(service) == b""  # nothing was asked


def test_line_breaks_keep_no_connection_open(service: Running) -> None:
    """The parser skips them before a request, however many there are."""
    with patience(service, 0.5), opened(service) as connection:
        deadline = time.monotonic() + 100
        try:
            while time.monotonic() < deadline:
                connection.sendall(b"\r\n")
                time.sleep(0.05)
        except ConnectionError:
            return
    raise AssertionError("the connection is still open")


def served(service: Running, route: str) -> float:
    """Requests of a route that the server has done with."""
    labels = {"route": route, "status": "200", "finish": ""}
    return service.server.metrics.registry.get_sample_value("afnext_requests_total", labels) or 0.0


def test_a_client_that_does_not_read_is_cut_off(service: Running) -> None:
    content, route = os.urandom(12 << 20), "/v1/files/{id}/content"
    with service.http() as client:
        stored = client.post("/v1/files", files={"file": content}).json()
    request = f"GET /v1/files/{stored['id']}/content HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
    before = served(service, route), len(os.listdir("/proc/self/fd"))
    with opened(service, SO_RCVBUF=4096) as connection:
        connection.sendall(request[:-2])
        with patience(service, 0.5):
            connection.sendall(request[-2:])
            assert eventually(lambda: served(service, route) > before[0])
        received = 0
        with suppress(ConnectionError):
            while piece := connection.recv(1 << 20):
                received += len(piece)
    assert received < len(content)
    assert eventually(lambda: len(os.listdir("/proc/self/fd")) <= before[1])
    with service.http() as client:
        client.delete(f"/v1/files/{stored['id']}")


def frame(text: str) -> bytes:
    """A text message of a WebSocket client, masked with zeros."""
    data = text.encode()
    assert len(data) > 0xFFFF
    return b"\x81\xff" + len(data).to_bytes(8, "big") + bytes(4) + data


def live_sessions(service: Running) -> float | None:
    return service.server.metrics.registry.get_sample_value("afnext_live_sessions")


def test_a_session_whose_client_does_not_read_ends(service: Running) -> None:
    assert eventually(lambda: live_sessions(service) == 0)
    handshake = b"GET /v1/realtime HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    key = b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + base64.b64encode(bytes(16)) + b"\r\n\r\n"
    update = frame(json.dumps({"type": "session.update", "session": {"instructions": "x" * 200_000}}))
    with opened(service, SO_RCVBUF=4096) as connection:
        connection.sendall(handshake + key)
        assert connection.recv(12) == b"HTTP/1.1 101"
        with patience(service, 0.5):
            with suppress(ConnectionError):
                for _ in range(200):  # each is answered with 200 kB
                    connection.sendall(update)
            assert eventually(lambda: live_sessions(service) == 0)


class Transport:
    """A transport with so many unsent bytes."""

    def __init__(self, unsent: int):
        self.unsent = unsent
        self.aborted = False

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def abort(self) -> None:
        self.aborted = True


class Timers:
    """An event loop whose timers the test calls."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def call_later(self, seconds: float, call: Any, *given: Any) -> "Timers":
        self.calls.append(lambda: call(*given))
        return self

    def cancel(self) -> None:
        self.calls.clear()


class Protocol:
    def pause_writing(self) -> None: ...

    def resume_writing(self) -> None: ...


class Connection(_Read, Protocol):
    """A connection without a network."""


def test_a_slow_reader_is_served_as_long_as_it_keeps_to_the_least_rate() -> None:
    enough = 30 * SLOWEST
    connection = Connection(patience=lambda: 30.0)
    connection.loop, connection.transport = timers, transport = Timers(), Transport(10 * enough)  # type: ignore[assignment]
    connection.pause_writing()
    for _ in range(5):
        transport.unsent -= enough
        timers.calls.pop()()
        assert not transport.aborted
    connection.resume_writing()
    assert timers.calls == []
    connection.pause_writing()
    transport.unsent -= enough - 1
    timers.calls.pop()()
    assert transport.aborted
