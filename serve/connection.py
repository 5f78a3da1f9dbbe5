"""Limits on connections that protect against hostile clients and that uvicorn's protocols do not have.

A request's head is limited in size and fields, and must be complete within `slow_seconds`. A client that reads less
than 1 KiB per second of the response over that time is disconnected, also after the response has ended, because a
closed transport still waits for its client.
"""

import asyncio
import json
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from .errors import ApiError, new_request_id
from .settings import SLOWEST

MAX_HEAD = 64 << 10  # bytes of a request line and its fields
MAX_FIELDS = 100
Patience = Callable[[], float]
"""Gives `Settings.slow_seconds`."""


class _Read:
    """Disconnects clients that do not read. A mixin for protocols, which define `loop` and `transport`."""

    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport

    def __init__(self, *given: Any, patience: Patience, **options: Any):
        super().__init__(*given, **options)
        self._patience = patience
        self._check: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Report unsent bytes from the second one on: with a limit of 0, TLS would pause forever."""
        transport.set_write_buffer_limits(high=1)
        super().connection_made(transport)  # type: ignore[misc]

    def connection_lost(self, error: Exception | None) -> None:
        """Forget the transport."""
        self._forget_unread()
        super().connection_lost(error)  # type: ignore[misc]

    def pause_writing(self) -> None:
        """The client does not read as fast as the server writes."""
        super().pause_writing()  # type: ignore[misc]
        self._expect(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """The client has read everything."""
        self._forget_unread()
        super().resume_writing()  # type: ignore[misc]

    def _expect(self, unread: int) -> None:
        patience = self._patience()
        self._check = self.loop.call_later(patience, self._judge, unread - round(SLOWEST * patience))

    def _judge(self, most: int) -> None:
        unread = self.transport.get_write_buffer_size()
        if unread > most:
            self.transport.abort()
        else:
            self._expect(unread)

    def _forget_unread(self) -> None:
        if self._check is not None:
            self._check.cancel()
            self._check = None


class HttpConnection(_Read, HttpToolsProtocol):
    """A connection with HTTP requests."""

    def __init__(self, *given: Any, **options: Any):
        super().__init__(*given, **options)
        self._head_bytes = 0
        self._unfinished = 0  # bytes since the parser last reported a part of the message
        self._reported = False
        self._asked = False
        self._waiting: asyncio.TimerHandle | None = None
        self._refusal: ApiError | None = None

    def connection_made(self, transport: Any) -> None:
        """Expect a request."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, error: Exception | None) -> None:
        """Cancel the timers."""
        self._stop_waiting()
        super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        """Parse received bytes."""
        self._reported = False
        super().data_received(data)
        self._unfinished = 0 if self._reported else self._unfinished + len(data)
        if self._unfinished > MAX_HEAD:
            self._refuse(_too_large())
        elif not self._reported and self._idle:
            self._await_head()  # line breaks between requests are not reported

    def on_message_begin(self) -> None:
        """A request begins."""
        self._reported, self._asked, self._head_bytes = True, True, 0
        self._await_head()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A part of the request line."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A field of the head, or one after a chunked body."""
        self._count(len(name) + len(value))
        if len(self.headers) == MAX_FIELDS:
            self._refusal = _too_large()
            raise self._refusal
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is complete."""
        self._reported = True
        self._stop_waiting()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._reported = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is complete."""
        self._reported = True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse a message that the parser rejected, or that exceeded one of this class's limits during parsing."""
        self._refuse(self._refusal or ApiError(400, "invalid_request", "this is not an HTTP request"))

    @property
    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _count(self, size: int) -> None:
        self._reported = True
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD:
            self._refusal = _too_large()
            raise self._refusal

    def _await_head(self) -> None:
        if self._waiting is None:
            self._waiting = self.loop.call_later(self._patience(), self._give_up)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _give_up(self) -> None:
        self._waiting = None
        if not self._asked:  # browsers open connections ahead of requests
            self.transport.close()
        else:
            self._refuse(ApiError(408, "upload_timeout", "the head of the request came too slowly"))

    def _refuse(self, error: ApiError) -> None:
        """Answer with an error and close, unless another answer is being written."""
        self._stop_waiting()
        if self.transport.is_closing():
            return
        if self._idle or not self.cycle.response_started:
            body = json.dumps(error.body()).encode()
            fields = {
                "content-type": "application/json",
                "content-length": str(len(body)),
                "x-request-id": new_request_id(),
                "connection": "close",
            }
            lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
            self.transport.write(STATUS_LINE[error.status] + lines.encode() + b"\r\n" + body)
        self.transport.close()


class WebSocketConnection(_Read, WebSocketsSansIOProtocol):
    """A connection with a WebSocket."""

    def pause_writing(self) -> None:
        """Stop reading: each ping would add a reply that the client does not read."""
        super().pause_writing()
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        """Resume reading, unless a message still waits for the application."""
        super().resume_writing()
        if not self.read_paused:
            self.transport.resume_reading()


def _too_large() -> ApiError:
    most = f"{MAX_HEAD >> 10} KiB and {MAX_FIELDS} fields"
    return ApiError(431, "head_too_large", f"the head of a request may have {most}", headers={"Connection": "close"})
