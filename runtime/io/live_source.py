"""Audio as it comes: raw samples or an encoded stream from a pipe, or a microphone, in pieces for `Live.feed`."""

import io
import queue
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

import numpy as np

from ...kernels.log_mel import SAMPLE_RATE
from ..errors import AudioError
from .decode import Decoder, mix

RAW_FORMATS = {"s16le": "<i2", "s32le": "<i4", "f32le": "<f4", "u8": "u1"}
_PIECE_SECONDS = 0.1
_HEAD = 1 << 20  # bytes at the start of a stream to which a demuxer may go back

Pieces = Iterator[tuple[np.ndarray, int]]


def raw_pieces(file: BinaryIO, format: str, *, rate: int, channels: int) -> Pieces:
    """Samples without a header, mixed down, as (float32 [n], rate), as soon as they are there.

    format: one of RAW_FORMATS, as FFmpeg names them; channels interleaved. Raises AudioError for another format, for a
    rate or a number of channels below 1, and when the stream ends within a sample.
    """
    if format not in RAW_FORMATS or rate < 1 or channels < 1:
        raise AudioError(
            f"raw audio is one of {', '.join(RAW_FORMATS)} with a rate and channels of at least 1, "
            f"not {format!r} at {rate} Hz with {channels} channels."
        )
    dtype = np.dtype(RAW_FORMATS[format])
    frame = dtype.itemsize * channels
    rest = b""
    while data := _read_some(file, max(frame, int(_PIECE_SECONDS * rate) * frame)):
        data = rest + data
        whole = len(data) // frame * frame
        rest = data[whole:]
        if whole:
            yield mix(np.frombuffer(data[:whole], dtype).reshape(-1, channels).T), rate
    if rest:
        raise AudioError(f"the audio ends within a frame of {frame} bytes; check its format and channels.")


def decoded_pieces(file: BinaryIO, name: str) -> Pieces:
    """A container that can be read from its start on (WAV, MP3, FLAC, Ogg, Matroska, ...), as (mono float32 [n], rate).

    Raises what `Decoder` raises.
    """
    with Decoder(cast(BinaryIO, _Pipe(file)), name) as decoder:
        yield from decoder.blocks()


def microphone_pieces(stopped: Callable[[], bool], device: str | None = None) -> Pieces:
    """The default microphone, or the one called `device`, as (float32 [n], 16 000), until `stopped()`.

    Raises AudioError without the package sounddevice, or without a microphone.
    """
    try:
        import sounddevice
    except (ImportError, OSError) as error:  # OSError: PortAudio itself is missing
        raise AudioError(
            f"the microphone needs sounddevice and PortAudio ({error}): pip install 'afnext[microphone]'. Or use a "
            "pipe: ffmpeg -f alsa -i default -f s16le -ac 1 -ar 16000 - | afnext listen - --raw s16le"
        ) from None
    pieces: queue.Queue[np.ndarray] = queue.Queue()

    def heard(samples: np.ndarray, frames: int, time: Any, status: Any) -> None:
        pieces.put(samples[:, 0].copy())

    try:
        with sounddevice.InputStream(
            samplerate=SAMPLE_RATE, channels=1, dtype="float32", device=device, callback=heard
        ):
            while not stopped():
                try:
                    yield pieces.get(timeout=_PIECE_SECONDS), SAMPLE_RATE
                except queue.Empty:
                    continue
    except sounddevice.PortAudioError as error:
        raise AudioError(f"the microphone cannot be used ({error}); choose another with mic:NAME.") from None


def _read_some(file: BinaryIO, size: int) -> bytes:
    """At least one byte and at most `size`, as many as are there; empty at the end."""
    read = getattr(file, "read1", file.read)
    try:
        return bytes(read(size))
    except (OSError, ValueError) as error:
        raise AudioError(f"the audio stream cannot be read ({error}).") from None


class _Pipe(io.RawIOBase):
    """A stream as a file that can go back within its first `_HEAD` bytes, which recognizing a format takes."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._head = bytearray()
        self._read = 0  # bytes read from the stream
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Within the head, or to where the stream stands. Raises OSError elsewhere."""
        target = offset + (self._position if whence == io.SEEK_CUR else 0)
        if whence == io.SEEK_END or not (0 <= target <= len(self._head) or target == self._read):
            raise OSError("a stream has no end to go to, and no way back")
        self._position = target
        return target

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes, as many as are there."""
        if self._position < len(self._head):
            data = bytes(self._head[self._position : self._position + size])
        else:
            data = _read_some(self._file, size)
            self._read += len(data)
            if self._read <= _HEAD:
                self._head += data
        self._position += len(data)
        return data
