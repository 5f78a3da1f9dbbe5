"""Audio containers and codecs to mono blocks at the file's own rate, with FFmpeg (PyAV) behind locked doors.

The file is hostile until proven otherwise. FFmpeg sees only the bytes the caller named: it gets a reader without a
name, may open no protocol (so no playlist, no reference to a second file), and knows only the containers and codecs
listed here. Nothing is allocated on a header's word: blocks are yielded as they are decoded, one frame is at most
`MAX_FRAME_SAMPLES` long, and FFmpeg may make no single allocation above `MAX_ALLOCATION` bytes.
"""

import ctypes
import io
import logging
import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer

from ..errors import AudioError

MIN_RATE, MAX_RATE = 1, 768_000  # Hz
MAX_CHANNELS = 32
MAX_FRAME_SAMPLES = 1 << 20
MAX_AMPLITUDE = 2.0**31  # raw 32-bit samples kept as floats; far below what overflows a power spectrum in float32
MAX_ALLOCATION = 128 << 20  # bytes; an index of four million packets, more than a day of AAC
MAX_STREAMS = 64
MAX_DAMAGED_IN_A_ROW = 1000  # packets without one frame between them
SHORTFALL = 0.1  # seconds that lossy codecs may pad or trim
LOSSLESS_SHORTFALL = 0.001  # seconds

FORMATS = (
    *("wav", "w64", "aiff", "au", "caf", "flac", "mp3", "aac", "amr", "ogg"),
    *("mov", "matroska", "asf", "avi", "mpegts"),
)
CODECS = (
    *("aac", "ac3", "adpcm_ima_wav", "adpcm_ms", "alac", "amrnb", "amrwb", "eac3", "flac", "mp2float", "mp3float"),
    *("opus", "vorbis", "wmapro", "wmav1", "wmav2"),
    *sorted(name for name in av.codecs_available if name.startswith("pcm_")),
)
_STATES_ITS_LENGTH = {"aiff", "caf", "flac", "mp3", "mov,mp4,m4a,3gp,3g2,mj2", "w64"}
_PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"[playlist]")
_STREAMED_WAV = 0x7FFFF000  # writers that cannot seek back leave this size or a larger one in the header
_SAFE_PLANES = 7  # PyAV's walk over the planes of a frame overruns from the eighth on

_log = logging.getLogger("afnext.io")


class Decoder:
    """Mono blocks from the first audio stream of a seekable binary file; use it in a `with` statement.

    `sample_rate` and `channels` are those of the first decoded frame (0 before it), `length_hint` the duration in
    seconds that the container claims or None.
    Raises AudioError when the file holds no audio that can be decoded.
    """

    def __init__(self, file: BinaryIO, name: str):
        self.name = name
        self.sample_rate = 0
        self.channels = 0
        self._notes: list[str] = []
        self._damaged, self._first_damage = 0, 0.0
        self._reader = _Reader(file)
        self._container = self._open()
        try:
            self._stream = self._first_audio_stream()
        except AudioError:
            self._container.close()
            raise
        claimed = self._container.duration
        self.length_hint = claimed / av.time_base if claimed and claimed > 0 else None

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._container.close()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was wrong with the part that was decoded so far."""
        if not self._damaged:
            return tuple(self._notes)
        skipped = (
            f"{self._damaged} damaged packet{'s' * (self._damaged > 1)} skipped, the first at "
            f"{self._first_damage:.2f} s; after each gap the audio is earlier than in the original"
        )
        return (skipped, *self._notes)

    def blocks(self) -> Iterator[tuple[np.ndarray, int]]:
        """The decoded frames in order, each as (mono float32 [n], rate in Hz); the rate may change within a file.

        Damaged packets are skipped and end up in `warnings`. Raises AudioError when nothing at all can be decoded, for
        a sample that is no sensible number, and for a rate or channel count out of bounds.
        """
        stated = self._stated_seconds()
        seconds, in_a_row = 0.0, 0
        for frames in self._frames():
            if frames is None:
                self._first_damage = self._first_damage if self._damaged else seconds
                self._damaged, in_a_row = self._damaged + 1, in_a_row + 1
                if in_a_row >= MAX_DAMAGED_IN_A_ROW:
                    self._notes.append(f"given up after {in_a_row} damaged packets in a row at {seconds:.2f} s")
                    break
                continue
            for frame in frames:
                in_a_row = 0
                block = self._mono(frame, seconds)
                seconds += len(block) / frame.sample_rate
                yield block, frame.sample_rate
        self._reader.raise_error(self.name)
        if not seconds:
            raise AudioError(self._nothing_decoded())
        lossless = self._stream.codec_context.name.startswith(("flac", "pcm_"))
        if stated and seconds < stated - (LOSSLESS_SHORTFALL if lossless else SHORTFALL):
            self._notes.append(f"the file is cut short or damaged: decoded {seconds:.3f} s of a stated {stated:.3f} s")

    def _frames(self) -> Iterator[list[AudioFrame] | None]:
        """The frames of each packet, or None for a damaged packet."""
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except av.FFmpegError as error:
                self._notes.append(f"reading stopped early: {_reason(error)}")
                return
            try:
                yield packet.decode()
            except EOFError:
                return
            except av.FFmpegError:
                yield None

    def _open(self) -> InputContainer:
        _limit_allocations()
        options = {
            "format_whitelist": ",".join(FORMATS),
            "codec_whitelist": ",".join(CODECS),
            "protocol_whitelist": "",
            "max_streams": str(MAX_STREAMS),
            "max_size": str(1 << 16),  # bytes a packet of WAV; the default of 4096 costs more calls than decoding
        }
        try:
            return av.open(self._reader, "r", container_options=options, metadata_errors="replace")
        except av.FFmpegError as error:
            self._reader.raise_error(self.name)
            if self._reader.start(16).startswith(_PLAYLISTS):
                raise AudioError(f"{self.name} is a playlist; open the audio files it lists one by one.") from None
            raise AudioError(
                f"{self.name} is not an audio file that can be read here, or its beginning is damaged "
                f"({_reason(error)}). Convert it to WAV, FLAC, MP3, M4A, Ogg or WebM; "
                "headerless PCM is passed as (array, sample_rate)."
            ) from None

    def _first_audio_stream(self) -> AudioStream:
        streams = self._container.streams.audio
        if not streams:
            raise AudioError(f"{self.name} has no audio stream; extract or record the sound and pass that file.")
        context = streams[0].codec_context
        if context is None or context.name not in CODECS:
            codec = "an unknown codec" if context is None else f"the codec {context.name}"
            raise AudioError(f"the audio in {self.name} uses {codec}; convert it to WAV, FLAC, MP3, M4A or Ogg.")
        if len(streams) > 1:
            self._notes.append(f"the file has {len(streams)} audio streams; only the first one is used")
        context.options = {"max_samples": str(MAX_FRAME_SAMPLES)}
        if context.name == "flac":  # its checksums tell noise from music, but FFmpeg heeds them only on request
            context.options |= {"err_detect": "crccheck+explode"}
        context.thread_count = 1
        return streams[0]

    def _mono(self, frame: AudioFrame, seconds: float) -> np.ndarray:
        rate, channels = frame.sample_rate, frame.layout.nb_channels
        check_rate(rate, self.name)
        if not 1 <= channels <= MAX_CHANNELS:
            raise AudioError(
                f"{self.name} has {channels} channels; at most {MAX_CHANNELS} are mixed down. Mix it to mono first."
            )
        if not self.sample_rate:
            self.sample_rate, self.channels = rate, channels
        block = mix(_samples(frame, channels))
        check_samples(block, self.name, rate, seconds)
        return block

    def _nothing_decoded(self) -> str:
        if self._damaged:
            return (
                f"none of the audio in {self.name} can be decoded: its {self._damaged} packets are damaged. "
                "Get an intact copy, or export it again."
            )
        return f"{self.name} has a header but contains no audio samples; record or export it again."

    def _stated_seconds(self) -> float | None:
        """The length that the header states, where it is a statement and not FFmpeg's estimate from the bit rate."""
        name, stream = self._container.format.name, self._stream
        if name == "wav":
            return _wav_seconds(self._reader.start(1 << 16))
        if name == "matroska,webm" and len(self._container.streams) == 1:
            return self.length_hint
        if name == "mp3" and not self._mp3_states_length():
            return None
        if name not in _STATES_ITS_LENGTH or not stream.duration or not stream.time_base:
            return None
        return float(stream.duration * stream.time_base)

    def _mp3_states_length(self) -> bool:
        head = self._reader.start(10)
        tag_size = 0
        if head.startswith(b"ID3") and len(head) == 10:
            tag_size = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
        first_frame = self._reader.start(4096, offset=tag_size)
        return any(tag in first_frame for tag in (b"Xing", b"Info", b"VBRI"))


def mix(channels: np.ndarray) -> np.ndarray:
    """Plain mean of `channels` [channels, n], any dtype of `SCALES` or floating -> float32 [n].

    Integers are scaled to [-1, 1); the mean is formed in float32, as librosa does. Overflow becomes infinity.
    """
    offset, scale = SCALES.get(channels.dtype.name, (0.0, 1.0))
    with np.errstate(over="ignore", invalid="ignore"):
        samples = channels.astype(np.float32, order="C")
        if offset:
            samples -= np.float32(offset)
        mono: np.ndarray = samples[0] if len(samples) == 1 else samples.mean(axis=0, dtype=np.float32)
        if scale != 1.0:
            mono *= np.float32(scale)
    return mono


SCALES = {
    "int8": (0.0, 2.0**-7),
    "uint8": (2.0**7, 2.0**-7),
    "int16": (0.0, 2.0**-15),
    "uint16": (2.0**15, 2.0**-15),
    "int32": (0.0, 2.0**-31),
}


def check_rate(rate: int, name: str) -> None:
    """Raises AudioError unless `rate` lies within `MIN_RATE`..`MAX_RATE` Hz."""
    if not MIN_RATE <= rate <= MAX_RATE:
        raise AudioError(
            f"{name} states a sample rate of {rate} Hz; it must lie between {MIN_RATE} and {MAX_RATE} Hz. "
            "Write the file again with its true rate."
        )


def check_samples(block: np.ndarray, name: str, rate: int, seconds: float) -> None:
    """Raises AudioError naming the first sample of mono `block` that is NaN, infinite or beyond `MAX_AMPLITUDE`.

    `seconds` is where the block starts in the audio.
    """
    good = np.abs(block) <= MAX_AMPLITUDE
    if not good.all():
        index = int(np.argmin(good))
        raise AudioError(
            f"{name} contains a sample that is {block[index]:g} at {seconds + index / rate:.6f} s "
            f"(sample {round(seconds * rate) + index}); get an intact copy, or replace such samples."
        )


def unreadable(name: str, error: Exception) -> AudioError:
    """The error for a source that fails while it is read."""
    return AudioError(f"{name} cannot be read ({error}); pass a file that is open, complete and readable.")


class _Reader:
    """What FFmpeg may see of the caller's file: bytes and positions, neither its name nor its exceptions.

    An exception must not travel through FFmpeg's callbacks; it is kept, FFmpeg sees the end of the file, and
    `raise_error` reports it afterwards.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._error: Exception | None = None
        file.seek(0)

    def read(self, size: int) -> bytes:
        if self._error is not None:
            return b""
        try:
            data = self._file.read(size)
        except Exception as error:
            self._error = error
            return b""
        if not isinstance(data, bytes) or len(data) > size:
            self._error = TypeError("its read(size) must return at most size bytes")
            return b""
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return self._file.seek(offset, whence)
        except (OSError, ValueError, OverflowError):
            return -1

    def tell(self) -> int:
        return self._file.tell()

    def start(self, size: int, offset: int = 0) -> bytes:
        """Up to `size` bytes from `offset`, leaving the position as it was."""
        position = self._file.tell()
        self._file.seek(offset)
        data = self.read(size)
        self._file.seek(position)
        return data

    def raise_error(self, name: str) -> None:
        if self._error is not None:
            raise unreadable(name, self._error)


def _samples(frame: AudioFrame, channels: int) -> np.ndarray:
    """The samples of `frame` as [channels, n] in the decoder's own dtype."""
    if frame.format.is_planar and channels > _SAFE_PLANES:
        frame = av.AudioResampler(format=frame.format.packed).resample(frame)[0]
    samples: np.ndarray = frame.to_ndarray()
    return samples if frame.format.is_planar else samples.reshape(-1, channels).T


def _wav_seconds(head: bytes) -> float | None:
    """The length that the chunks of a WAV file state, None where its writer left it open."""
    position, bytes_a_second = 12, 0
    while position + 20 <= len(head):
        chunk, size = struct.unpack_from("<4sI", head, position)
        if chunk == b"fmt ":
            (bytes_a_second,) = struct.unpack_from("<I", head, position + 16)
        elif chunk == b"data":
            return size / bytes_a_second if bytes_a_second and size < _STREAMED_WAV else None
        position += 8 + size + size % 2
    return None


def _reason(error: av.FFmpegError) -> str:
    return str(error.strerror or type(error).__name__)


@cache
def _limit_allocations() -> None:
    """Tells FFmpeg to refuse single allocations above `MAX_ALLOCATION` (its own knob, which PyAV does not pass on).

    Without it an MP4 of 1 KB that claims 5 * 10**7 packets makes FFmpeg write an index of 1.8 GB.
    """
    package = Path(av.__file__).parent
    folders: tuple[Path, ...] = (package.parent / "av.libs", package / ".dylibs")
    for path in (path for folder in folders for path in folder.glob("*avutil*")):
        library: Any = ctypes.CDLL(str(path))
        library.av_max_alloc.argtypes = [ctypes.c_size_t]
        library.av_max_alloc.restype = None
        library.av_max_alloc(MAX_ALLOCATION)
        return
    _log.warning("FFmpeg's libavutil was not found beside PyAV: forged files can make it allocate gigabytes")
