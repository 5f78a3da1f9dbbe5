"""FFmpeg's view of a caller's file: bytes and positions within limits, without its name and exceptions."""

import io
import signal
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType, TracebackType
from typing import Any, BinaryIO

from ..errors import AudioError

MAX_HEADER_BYTES = 64 << 20  # limit of bytes before the first sample; the index of a day of AAC has 16 MB
MAX_HEADER_SECONDS = 20.0
_BLOCK = 1 << 18  # bytes read at a time from a file that has an end
_MAX_KEPT = 1 << 17  # bytes of a stream that may be peeked at; an Ogg page has half as many


class ByteSource:
    """Reads `file`, a block at a time if it can seek to its end, and measures time.

    An exception must not propagate through FFmpeg's callbacks: it is stored, FFmpeg sees the end of the file, and
    `raise_error` raises it afterwards. The same applies to exceeded limits and Ctrl-C.
    """

    def __init__(self, file: BinaryIO, name: str, max_seconds: float | None):
        """max_seconds: time limit, not counting waits for `file`; None for no limit."""
        self.name = name
        self.interrupts = Interrupts()
        self._file = file
        self._error: BaseException | None = None
        self._max_seconds = max_seconds
        self._started = time.monotonic()
        self._waited = 0.0
        self._header: tuple[float, int] | None = None  # `used` and `_served` when the header began
        self._served = 0
        self._block, self._block_start = b"", 0
        self.end: int | None = None  # offset of the file's end, if known
        self._size = self._seek_to_end()
        file.seek(0)
        self._position = 0

    def _seek_to_end(self) -> int | None:
        try:
            return self._file.seek(0, io.SEEK_END)
        except (OSError, ValueError):
            return None

    @property
    def size(self) -> int | None:
        """Bytes, None for a stream."""
        return self._size

    @property
    def used(self) -> float:
        """Seconds elapsed, not counting waits for the file."""
        return time.monotonic() - self._started - self._waited

    def begin_header(self) -> None:
        """Apply tighter limits to reads until `end_header`."""
        self._header = self.used, self._served

    def end_header(self) -> None:
        """End the tighter limits: the first sample has been decoded."""
        self._header = None

    def check(self) -> None:
        """Raise AudioError when the time limit is exceeded."""
        if self._max_seconds is not None and self.used > self._max_seconds:
            raise AudioError(
                f"decoding {self.name} took longer than the {self._max_seconds:g} s that it may take; convert it to "
                "WAV, or pass a larger max_decode_seconds."
            )
        if self._header is None:
            return
        seconds, served = self.used - self._header[0], self._served - self._header[1]
        if seconds > MAX_HEADER_SECONDS or served > MAX_HEADER_BYTES:
            raise AudioError(
                f"the header of {self.name} is too large: {served >> 20} MB in {seconds:.0f} s were read without "
                "finding audio. Remove its tags and pictures, or convert it to WAV."
            )

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset`, as many as are available; none at the end or after an error."""
        if self._error is not None or self.interrupts.pending:
            return b""
        try:
            self.check()
            data = self._read(offset, size)
        except BaseException as error:
            self._error = error
            return b""
        self._served += len(data)
        return data

    def exactly(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`, fewer at the end of the file or after an error. In a stream these bytes are
        buffered for reading, and bytes that are neither buffered nor next count as past the end."""
        data = bytearray()
        if self._size is None and not self._keep(offset, size):
            return b""
        while len(data) < size and (more := self.read(offset + len(data), size - len(data))):
            data += more
        return bytes(data)

    def can_reach(self, offset: int) -> bool:
        """Whether `offset` can be read from next; in a stream the bytes before it are read and dropped."""
        in_block = 0 <= offset - self._block_start <= len(self._block)
        if self._size is not None or offset == self._position or in_block:
            return True
        while self._position < offset and self.read(self._position, min(offset - self._position, _BLOCK)):
            pass
        if self._position < offset:
            return False
        try:
            self._position = self._file.seek(offset)
        except (OSError, ValueError, OverflowError):
            return False
        return True

    def forget(self, offset: int) -> None:
        """Drop the bytes before `offset`, which will not be read again."""
        start = offset - self._block_start
        if self._size is None and 0 < start <= len(self._block):
            self._block, self._block_start = self._block[start:], offset

    def raise_error(self) -> None:
        """Raise the error since the last call, if any; AudioError for an exception of the file."""
        error, self._error = self._error, None
        if isinstance(error, AudioError) or (error is not None and not isinstance(error, Exception)):
            raise error
        if error is not None:
            self._error = error  # do not read a failed file again
            raise unreadable(self.name, error)

    def _keep(self, offset: int, size: int) -> bool:
        """Read a stream until its block covers `size` bytes from `offset`."""
        if not 0 <= offset - self._block_start <= _MAX_KEPT - size:
            if offset != self._position:
                return False
            self._block, self._block_start = b"", offset
        while (missing := offset + size - self._block_start - len(self._block)) > 0:
            kept, start = self._block, self._block_start
            data = self.read(start + len(kept), missing)
            self._block, self._block_start = kept + data, start
            if not data:
                break
        return True

    def _read(self, offset: int, size: int) -> bytes:
        start = offset - self._block_start
        if 0 <= start < len(self._block):
            return self._block[start : start + size]
        if self.end is not None and offset >= self.end:
            return b""
        if offset != self._position:
            self._position = self._file.seek(offset)
        wanted = size if self._size is None else max(size, _BLOCK)
        began = time.monotonic()
        try:
            data = self.interrupts.let_in(self._file.read, wanted)
        finally:
            self._waited += time.monotonic() - began
        if not isinstance(data, bytes) or len(data) > wanted:
            raise TypeError("its read(size) must return at most size bytes")
        if not data:
            self.end = offset
        self._position += len(data)
        self._block, self._block_start = data, offset
        return data[:size]


class View:
    """Part of a source as a separate file: `patches` replace bytes, by their offsets in the source."""

    def __init__(self, source: ByteSource, start: int, end: int | None, patches: Mapping[int, bytes]):
        self._source, self._start, self._end = source, start, end
        self._patches = sorted(patches.items())
        self._position = 0

    def patch(self, patches: Mapping[int, bytes]) -> None:
        """Replace further bytes, by their offsets in the source."""
        self._patches = sorted([*self._patches, *patches.items()])

    def read(self, size: int) -> bytes:
        start = self._start + self._position
        if self._end is not None:
            size = max(0, min(size, self._end - start))
        data = self._source.read(start, size) if size else b""
        self._position += len(data)
        for offset, new in self._patches:
            if offset < start + len(data) and start < offset + len(new):
                data = _patched(data, offset - start, new)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """The new position, -1 if it cannot be reached."""
        if whence == io.SEEK_END:
            size = self._source.size
            if size is None:
                return -1
            offset += (size if self._end is None else min(size, self._end)) - self._start
        elif whence == io.SEEK_CUR:
            offset += self._position
        if offset < 0 or not self._source.can_reach(self._start + offset):
            return -1
        self._position = offset
        return offset

    def tell(self) -> int:
        return self._position


class Interrupts:
    """Ctrl-C around a call into FFmpeg: `with interrupts: call()`.

    Python may run a signal handler in a callback of FFmpeg, where an exception is lost. So an interrupt is deferred to
    the end of the call, except while waiting for a file.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.pending = False
        self._waiting = False
        self._received: tuple[int, FrameType | None] = (0, None)
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in self._SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler) and handler != self._receive:
                self._handlers[number] = handler
                signal.signal(number, self._receive)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        handlers, self._handlers = self._handlers, {}
        if self.pending:
            self.pending = False
            number, frame = self._received
            handlers[number](number, frame)

    def let_in(self, read: Callable[[int], Any], size: int) -> Any:
        """`read(size)`, which a signal may interrupt with an exception."""
        try:
            self._waiting = True
            return read(size)
        finally:
            self._waiting = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._waiting:
            self._waiting = False
            self._handlers[number](number, frame)
        else:
            self._received, self.pending = (number, frame), True


def unreadable(name: str, error: Exception) -> AudioError:
    """The error for a source that fails while it is read."""
    return AudioError(f"{name} cannot be read ({error}); pass a file that is open, complete and readable.")


def _patched(data: bytes, offset: int, new: bytes) -> bytes:
    """`data` with `new` at `offset`, which may be negative or reach beyond its end."""
    begin, end = max(0, offset), min(len(data), offset + len(new))
    return data[:begin] + new[begin - offset : end - offset] + data[end:]
