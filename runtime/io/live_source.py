"""Live audio: raw samples or an encoded stream from a pipe, or a microphone, in pieces for `Live.feed`.

Each function calls `warn` with all warnings about the audio so far, whenever they change.
"""

import io
import queue
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, BinaryIO, cast

import numpy as np

from ...kernels.audio_format import SAMPLE_RATE
from ..errors import AudioError
from .decode import Decoder
from .mixing import mix

RAW_FORMATS = {"s16le": "<i2", "s32le": "<i4", "f32le": "<f4", "u8": "u1"}
_PIECE_SECONDS = 0.1
_HEAD = 1 << 20  # bytes at the start of a stream within which a demuxer may seek

Pieces = Iterator[tuple[np.ndarray, int]]
Warn = Callable[[tuple[str, ...]], None]


def ignore(warnings: tuple[str, ...]) -> None:
    """A `Warn` for callers that do not want the warnings."""


def raw_pieces(file: BinaryIO, format: str, *, rate: int, channels: int, warn: Warn = ignore) -> Pieces:
    """Samples without a header, mixed to mono, as (float32 [n], rate), as soon as they arrive.

    format: one of RAW_FORMATS, FFmpeg's names; channels interleaved. An incomplete sample at the end is dropped with a
    warning. Raises AudioError for another format, for a rate or a number of channels below 1, and for a stream without
    a complete sample.
    """
    if format not in RAW_FORMATS or rate < 1 or channels < 1:
        raise AudioError(
            f"raw audio is one of {', '.join(RAW_FORMATS)} with a rate and channels of at least 1, "
            f"not {format!r} at {rate} Hz with {channels} channels."
        )
    dtype = np.dtype(RAW_FORMATS[format])
    frame = dtype.itemsize * channels
    rest, heard = b"", False
    while data := _read_some(file, max(frame, int(_PIECE_SECONDS * rate) * frame)):
        data = rest + data
        whole = len(data) // frame * frame
        rest = data[whole:]
        if whole:
            heard = True
            yield mix(np.frombuffer(data[:whole], dtype).reshape(-1, channels).T), rate
    if rest:
        problem = f"the audio ends within a frame of {frame} bytes: the last {len(rest)} bytes are dropped"
        if not heard:
            raise AudioError(f"{problem}, and nothing else is there; check its format and channels.")
        warn((f"{problem}; check its format and channels",))


def decoded_pieces(file: BinaryIO, name: str, warn: Warn = ignore) -> Pieces:
    """An encoded stream as (mono float32 [n], rate).

    A seekable file may have any container; other streams need one that can be read sequentially (WAV, MP3, FLAC, Ogg,
    Matroska, ...). Raises what `Decoder` raises.
    """
    known: tuple[str, ...] = ()
    with Decoder(file if file.seekable() else cast(BinaryIO, _Pipe(file)), name) as decoder:
        for block in chain(decoder.blocks(), [None]):
            if decoder.warnings != known:
                known = decoder.warnings
                warn(known)
            if block is not None:
                yield block


def check_microphone(device: str | None = None) -> None:
    """Raise AudioError if there is no microphone, or none called `device`, or no package to record with."""
    sounddevice = _sounddevice()
    try:
        sounddevice.check_input_settings(device=device, channels=1, dtype="float32", samplerate=SAMPLE_RATE)
    except (sounddevice.PortAudioError, ValueError) as error:
        raise AudioError(f"the microphone cannot be used ({error}); choose another with mic:NAME.") from None


def _sounddevice() -> Any:
    try:
        import sounddevice
    except (ImportError, OSError) as error:  # OSError: PortAudio itself is missing
        raise AudioError(
            f"the microphone needs sounddevice and PortAudio ({error}): pip install sounddevice. Or use a "
            "pipe: ffmpeg -f alsa -i default -f s16le -ac 1 -ar 16000 - | afnext listen - --raw s16le"
        ) from None
    return sounddevice


def microphone_pieces(stopped: Callable[[], bool], device: str | None = None, warn: Warn = ignore) -> Pieces:
    """The default microphone, or the one called `device`, as (float32 [n], 16 000), until `stopped()`.

    Raises AudioError without the package sounddevice, or without a microphone.
    """
    sounddevice = _sounddevice()
    pieces: queue.Queue[np.ndarray] = queue.Queue()
    gaps = 0

    def heard(samples: np.ndarray, frames: int, time: Any, status: Any) -> None:
        nonlocal gaps
        if status:  # the only status flag of an input stream is overflow
            gaps += 1
            warn((f"the computer was too busy for the microphone: audio is missing in {gaps} places",))
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
    """The bytes that are available, at least one and at most `size`; none at the end. Raises AudioError."""
    read = getattr(file, "read1", file.read)
    try:
        return bytes(read(size))
    except (OSError, ValueError) as error:
        raise AudioError(f"the audio stream cannot be read ({error}).") from None


class _Pipe(io.RawIOBase):
    """A stream as a file that can seek within its first `_HEAD` bytes, as demuxers do to recognize a format."""

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
        """Seek within the head, or to the end of the bytes read so far. Raises OSError for other positions."""
        target = offset + (self._position if whence == io.SEEK_CUR else 0)
        if whence == io.SEEK_END or not (0 <= target <= len(self._head) or target == self._read):
            raise OSError("a stream has no end to go to, and no way back")
        self._position = target
        return target

    def read(self, size: int = -1) -> bytes:
        """The bytes that are available, at most `size`."""
        if self._position < len(self._head):
            data = bytes(self._head[self._position : self._position + size])
        else:
            data = _read_some(self._file, size)
            self._read += len(data)
            if self._read <= _HEAD:
                self._head += data
        self._position += len(data)
        return data
