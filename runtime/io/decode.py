"""Decodes audio containers and codecs to mono blocks at the file's own rate, with FFmpeg (PyAV) under restrictions.

Files are untrusted. FFmpeg sees only the caller's bytes: it gets a reader without a name, may open no protocol (so no
playlist and no second file), and may use only the containers and codecs listed here. No allocation depends on a header:
blocks are yielded as they are decoded, a frame has at most `MAX_FRAME_SAMPLES`, and FFmpeg may make no single
allocation above `MAX_ALLOCATION` bytes.
"""

import ctypes
import logging
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.packet import Packet
from av.stream import Disposition

from ..errors import AudioError
from .byte_source import ByteSource
from .containers import Layout, are_tags, layout, starts_a_file
from .mixing import MAX_CHANNELS, Cancellation, check_rate, check_samples, mix
from .ogg import OggFile, stated_seconds
from .timeline import Timeline

MAX_FRAME_SAMPLES = 1 << 20
MAX_ALLOCATION = 128 << 20  # bytes; an index of four million packets, more than a day of AAC
MAX_STREAMS = 64
MAX_DAMAGED_IN_A_ROW = 1000  # damaged packets without a good frame between them
MAX_PACKETS_AT_ONCE, MAX_BYTES_AT_ONCE = 256, 1 << 20
_DTYPES = {"u8": np.uint8, "s16": np.int16, "s32": np.int32, "flt": np.float32, "dbl": np.float64}  # planar with a "p"
SAMPLES_AT_ONCE = 16_384  # per channel, mixed and resampled together
MAX_PARTS = 2000  # joined files, or runs of a damaged Ogg stream
SHORTFALL = 0.1  # seconds that lossy codecs may pad or trim
LOSSLESS_SHORTFALL = 0.001  # seconds
MIN_REST = 64  # bytes after the stated end that cause a warning

FORMATS = (
    *("wav", "w64", "aiff", "au", "caf", "flac", "mp3", "aac", "amr", "ogg"),
    *("mov", "matroska", "asf", "avi", "mpegts"),
)
CODECS = (
    *("aac", "ac3", "adpcm_ima_wav", "adpcm_ms", "alac", "amrnb", "amrwb", "eac3", "flac", "mp2", "mp2float"),
    *("mp3float", "opus", "vorbis", "wmapro", "wmav1", "wmav2"),
    *sorted(name for name in av.codecs_available if name.startswith("pcm_")),
)
_STATES_ITS_LENGTH = {"flac", "mov,mp4,m4a,3gp,3g2,mj2"}
_OPTIONS = {
    "format_whitelist": ",".join(FORMATS),
    "codec_whitelist": ",".join(CODECS),
    "protocol_whitelist": "",
    "max_streams": str(MAX_STREAMS),
    "max_size": str(1 << 16),  # bytes a packet of WAV; the default of 4096 costs more calls than decoding
}
_PCM_OPTIONS = {
    "max_probe_packets": "4"
}  # the range in which FFmpeg searches for DTS in PCM; its default is five megabytes
_PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"[playlist]")
_SAFE_PLANES = 7  # PyAV overruns when it iterates over a frame's planes from the eighth on

_log = logging.getLogger("afnext.io")


class Decoder:
    """Mono blocks from one audio stream of a binary file; use it in a `with` statement.

    Uses the first decodable stream among those marked as default, or else among all. Joined files, and the links of a
    chained Ogg stream, are decoded one after another.

    `sample_rate` and `channels` are those of the first decoded frame (0 before it), `length_hint` the duration in
    seconds that the container states, or None.
    Raises AudioError when the file holds no audio that can be decoded.
    """

    def __init__(self, file: BinaryIO, name: str, *, max_decode_seconds: float | None = None):
        """file: seekable, or a stream that can seek back over the bytes that FFmpeg probes; max_decode_seconds: time
        limit, not counting waits for the file, None for no limit; AudioError beyond it."""
        self.name = name
        self.sample_rate = 0
        self.channels = 0
        self._seconds = self._part_from = self._timeline_from = 0.0  # yielded: in all, before the part, the timeline
        self._notes: list[str] = []
        self._damaged, self._first_damage, self._unfilled = 0, 0.0, 0
        self._cancellation = Cancellation()
        self._source = ByteSource(file, name, max_decode_seconds)
        self._kind = _Kind("", 0, 0)
        self._parts = 0
        self._start = 0
        self._timeline: Timeline
        self._ogg: OggFile | None = None
        if self._source.exactly(0, 5) == b"OggS\0":
            self._ogg = OggFile(self._source, 0)
            self._ogg.next_run()
        try:
            self._open()
        except _UnreadableError as error:
            raise AudioError(str(error)) from None
        claimed = self._container.duration
        self.length_hint = claimed / av.time_base - self._timeline.begins_at if claimed and claimed > 0 else None
        if self._ogg:
            self.length_hint = stated_seconds(self._source, self._stream.codec_context.sample_rate)

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._container.close()

    @property
    def warnings(self) -> tuple[str, ...]:
        """Defects of the audio decoded so far, and other notices about it."""
        notes = [*self._damage(), *self._notes, *self._timeline.all_warnings()]
        if self._ogg:
            notes += self._ogg.warnings
        cancelled = self._cancellation.warning()
        return (*notes, cancelled) if cancelled else tuple(notes)

    def _damage(self) -> list[str]:
        if not self._damaged:
            return []
        effect = (
            "after each gap the audio is earlier than in the original" if self._unfilled else "silence in its place"
        )
        return [
            f"{self._damaged} damaged packet{'s' * (self._damaged > 1)} skipped, the first at "
            f"{self._first_damage:.2f} s; {effect}"
        ]

    def blocks(self) -> Iterator[tuple[np.ndarray, int]]:
        """The decoded samples in order, some frames at a time, as (mono float32 [n], rate in Hz); the rate may change
        within a file.

        Audio that is missing by the time stamps is replaced by silence, at most a second per block. Damaged packets are
        skipped. `warnings` reports both, and other defects. Raises AudioError when nothing can be decoded, for an
        invalid sample, and for a rate or channel count out of bounds.
        """
        yield from self._blocks_of_part()
        while self._next_part():
            yield from self._blocks_of_part()
        if not self.sample_rate:
            raise AudioError(self._nothing_decoded())

    def _blocks_of_part(self) -> Iterator[tuple[np.ndarray, int]]:
        self._part_from = self._seconds
        damaged, in_a_row = 0, 0
        # In a stream each frame is yielded at once: the next one may not have arrived yet.
        pending = _Frames(0 if self._source.size is None else SAMPLES_AT_ONCE)
        for packet in self._packets():
            try:
                frames: list[Any] = packet.decode()
            except EOFError:
                break
            except av.FFmpegError:
                self._first_damage = self._first_damage if self._damaged else self._seconds
                self._damaged, damaged, in_a_row = self._damaged + 1, damaged + 1, in_a_row + 1
                if in_a_row >= MAX_DAMAGED_IN_A_ROW:
                    self._notes.append(f"given up after {in_a_row} damaged packets in a row at {self._seconds:.2f} s")
                    break
                continue
            for frame in frames:
                kind = self._checked_kind(frame)
                rate, count = kind.rate, frame.samples
                silence = self._silence_before(frame, packet, damaged)
                if silence or not pending.takes(kind, count):
                    yield from self._mono(pending)
                for start in range(0, silence, rate):
                    piece = min(rate, silence - start)
                    self._seconds += piece / rate
                    yield np.zeros(piece, np.float32), rate
                damaged, in_a_row = 0, 0
                pending.add(frame, kind, self._seconds)
                self._seconds += count / rate
                if pending.samples >= pending.enough:
                    yield from self._mono(pending)
        yield from self._mono(pending)
        self._unfilled += damaged
        self._source.raise_error()
        self._check_length(self._seconds - self._part_from)

    def _packets(self) -> "Iterator[Packet[AudioStream]]":
        """The packets of the part, demuxed a few at a time, or one by one in a stream."""
        packets = self._container.demux(self._stream)
        most = 1 if self._source.size is None else MAX_PACKETS_AT_ONCE
        error: av.FFmpegError | None = None
        ended = False
        while not ended:
            self._source.check()
            some: list[Packet[AudioStream]] = []
            size = 0
            try:
                with self._source.interrupts:
                    for packet in packets:
                        some.append(packet)
                        size += packet.size
                        if len(some) == most or size >= MAX_BYTES_AT_ONCE:
                            break
                    else:
                        ended = True
            except av.FFmpegError as end:
                ended, error = True, end
            self._source.raise_error()
            yield from some
        if error is not None:
            self._notes.append(f"reading stopped early: {_reason(error)}")

    def _silence_before(self, frame: AudioFrame, packet: "Packet[AudioStream]", damaged: int) -> int:
        time, first = frame.time, self._seconds == self._part_from
        if not (first or damaged or self._ogg) and self._timeline.on_time(time, self._seconds - self._timeline_from):
            return 0
        if time is None and first and packet.pts is not None:
            time = float(packet.pts * packet.time_base)
        resumed = False
        if self._ogg:  # nothing is missing within a run
            time = time if first or damaged else None
            resumed = first and (self._ogg.same_link or self._ogg.start_lost)
            if resumed and not self._ogg.same_link:
                self._timeline.start_at_zero()
            if resumed and self._ogg.position is not None:
                time = self._ogg.position / frame.sample_rate
        silence = self._timeline.silence(
            time,
            self._seconds - self._timeline_from,
            frame.sample_rate,
            damaged=resumed or damaged > 0,
            said=self._seconds,
        )
        if damaged and not silence:
            self._unfilled += damaged
        return silence

    def _next_part(self) -> bool:
        """Open the next part: another run of an Ogg stream, or a file joined to the previous one."""
        if self._parts == MAX_PARTS:
            self._notes.append(f"given up at {self._seconds:.2f} s, after {MAX_PARTS} parts")
            return False
        if self._ogg:
            return self._ogg.next_run() and self._open_following(same_clock=self._ogg.same_link)
        end = self._layout.end
        if end is None:
            return False
        rest = self._source.exactly(end, 16)
        if starts_a_file(rest):
            self._start = end
            return self._open_following(same_clock=False)
        rest = self._source.exactly(end, 4096)
        if len(rest) >= MIN_REST and not are_tags(rest):
            size = self._source.size
            many = "bytes" if size is None else f"{size - end} bytes"
            self._notes.append(
                f"the file goes on for {many} after the end that its header states, which are ignored; "
                "if they are audio, correct the header"
            )
        self._source.raise_error()
        return False

    def _open_following(self, *, same_clock: bool) -> bool:
        """Open a part after the first; failure to read it is a warning."""
        self._container.close()
        clock = self._timeline, self._timeline_from
        try:
            self._open()
        except _UnreadableError as error:
            self._timeline, self._timeline_from = clock
            self._notes.append(f"what follows at {self._seconds:.2f} s cannot be decoded: {error}")
            return False
        if same_clock:
            self._timeline, self._timeline_from = clock
        else:
            self._notes += clock[0].all_warnings()
        return True

    def _open(self) -> None:
        """Open the file at `_start`, or the current run of the Ogg stream."""
        _limit_allocations()
        self._parts += 1
        self._layout = Layout() if self._ogg else layout(self._source, self._start)
        self._source.raise_error()
        view = self._ogg or self._layout.view(self._source, self._start)
        options = _OPTIONS | _PCM_OPTIONS if self._layout.samples else _OPTIONS
        self._source.begin_header()
        try:
            with self._source.interrupts:
                self._container = av.open(view, "r", container_options=options, metadata_errors="replace")
        except av.FFmpegError as error:
            self._source.raise_error()
            raise self._unreadable(error) from None
        try:
            self._source.raise_error()
            self._stream = self._chosen_stream()
        except BaseException:
            self._container.close()
            raise
        format, start = self._container.format.name, self._container.start_time
        self._timeline = Timeline(format, None if start is None else start / av.time_base, continues=self._parts > 1)
        self._timeline_from = self._seconds

    def _unreadable(self, error: av.FFmpegError) -> "_UnreadableError":
        if self._source.exactly(self._start, 16).startswith(_PLAYLISTS):
            return _UnreadableError(f"{self.name} is a playlist; open the audio files it lists one by one.")
        return _UnreadableError(
            f"{self.name} is not an audio file that can be read here, or its beginning is damaged "
            f"({_reason(error)}). Convert it to WAV, FLAC, MP3, M4A, Ogg or WebM; "
            "headerless PCM is passed as (array, sample_rate)."
        )

    def _chosen_stream(self) -> AudioStream:
        """The first decodable default stream, or else the first decodable one."""
        streams = self._container.streams.audio
        if not streams:
            raise _UnreadableError(f"{self.name} has no audio stream; extract or record the sound and pass that file.")
        names = [stream.codec_context.name if stream.codec_context else "" for stream in streams]
        decodable = [index for index, name in enumerate(names) if name in CODECS]
        if not decodable:
            codec = f"the codec {names[0]}" if names[0] else "an unknown codec"
            raise _UnreadableError(f"the audio in {self.name} uses {codec}; convert it to WAV, FLAC, MP3, M4A or Ogg.")
        default = [index for index in decodable if Disposition.default in streams[index].disposition]
        index = (default or decodable)[0]
        count = max(len(streams), self._ogg.streams if self._ogg else 0)
        if count > 1 and self._parts == 1:
            which = "the first one" if index == 0 else f"number {index + 1}, {names[index]},"
            self._notes.append(f"the file has {count} audio streams; only {which} is used")
        context = streams[index].codec_context
        context.options = {"max_samples": str(MAX_FRAME_SAMPLES)}
        if context.name == "flac":  # FFmpeg verifies FLAC's checksums, which detect damage, only on request
            context.options |= {"err_detect": "crccheck+explode"}
        context.thread_count = 1
        return streams[index]

    def _checked_kind(self, frame: AudioFrame) -> "_Kind":
        """The kind of a frame. Raises AudioError for a rate, a channel count or a format that is not supported."""
        found = frame.format.name, frame.layout.nb_channels, frame.sample_rate
        if found == self._kind:
            return self._kind
        kind = _Kind(*found)
        check_rate(kind.rate, self.name)
        if not 1 <= kind.channels <= MAX_CHANNELS:
            raise AudioError(
                f"{self.name} has {kind.channels} channels; at most {MAX_CHANNELS} are mixed down. "
                "Mix it to mono first."
            )
        if kind.format.removesuffix("p") not in _DTYPES:
            raise AudioError(
                f"{self.name} holds samples in the format {kind.format}, which is not supported; convert it to WAV "
                "with 16 or 24 bits, or to FLAC."
            )
        self._kind = kind
        if not self.sample_rate:
            self.sample_rate, self.channels = kind.rate, kind.channels
            self._source.end_header()
        return kind

    def _mono(self, pending: "_Frames") -> Iterator[tuple[np.ndarray, int]]:
        """The mix of the pending frames, if any."""
        if pending.samples:
            samples, rate, seconds = pending.taken()
            block = mix(samples)
            check_samples(block, self.name, rate, seconds)
            self._cancellation.add(samples, block)
            yield block, rate

    def _nothing_decoded(self) -> str:
        if self._damaged:
            return (
                f"none of the audio in {self.name} can be decoded: its {self._damaged} packets are damaged. "
                "Get an intact copy, or export it again."
            )
        return f"{self.name} has a header but contains no audio samples; record or export it again."

    def _check_length(self, seconds: float) -> None:
        """Warn if the part that yielded `seconds` states a greater length."""
        stated, allowed = self._stated_seconds(seconds)
        if stated and seconds and seconds < stated - allowed:
            self._notes.append(f"the file is cut short or damaged: decoded {seconds:.3f} s of a stated {stated:.3f} s")

    def _stated_seconds(self, seconds: float) -> tuple[float | None, float]:
        """The length that the header states (None if FFmpeg only estimates it from the bit rate), and by how much an
        intact file may be shorter."""
        lossless = self._stream.codec_context.name.startswith(("flac", "pcm_"))
        allowed = LOSSLESS_SHORTFALL if lossless else SHORTFALL
        if self._layout.samples:
            begin, end = self._layout.samples
            ends = [known for known in (self._source.size, self._source.end) if known is not None]
            there = min([end, *ends]) - begin
            return (seconds * (end - begin) / there if there > 0 else None), LOSSLESS_SHORTFALL
        name, stream = self._container.format.name, self._stream
        if name == "matroska,webm" and len(self._container.streams) == 1:
            return self.length_hint, allowed
        if name == "mp3":
            estimated = float((stream.duration or 0) * (stream.time_base or 0))
            return (self._layout.mp3_seconds and min(estimated, self._layout.mp3_seconds)), allowed
        if name not in _STATES_ITS_LENGTH or not stream.duration or not stream.time_base:
            return None, allowed
        return float(stream.duration * stream.time_base), allowed


class _Kind(NamedTuple):
    """Common properties of frames that are mixed together. format: FFmpeg's name of the sample format."""

    format: str
    channels: int
    rate: int


class _Frames:
    """Frames of one kind that are mixed together: a single small frame would take as long as a hundred times as many
    samples."""

    def __init__(self, enough: int):
        """enough: samples per channel that are enough to mix."""
        self._at_most = enough
        self.enough = 0  # samples at which it is full, half a second of them or fewer
        self._kind = _Kind("", 0, 0)
        self._seconds = 0.0
        self._buffer = np.empty((0, 0), np.uint8)  # [planes, bytes]
        self._planes: list[memoryview] = []  # the rows of the buffer
        self._width = 1  # bytes per sample in a plane, for all channels if there is one plane
        self.samples = 0

    def takes(self, kind: _Kind, count: int) -> bool:
        """Whether the frames are of this kind, and with `count` more samples at most a second long."""
        return not self.samples or (kind == self._kind and self.samples + count <= kind.rate)

    def add(self, frame: AudioFrame, kind: _Kind, seconds: float) -> None:
        """Add a frame that `takes` allows and that begins at `seconds`."""
        if kind.channels > _SAFE_PLANES and frame.format.is_planar:
            frame = av.AudioResampler(format=frame.format.packed).resample(frame)[0]
        planes: Any = frame.planes
        if not self.samples:
            self._begin(kind, len(planes))
            self._seconds = seconds
        count = frame.samples
        start, size = self.samples * self._width, count * self._width
        stop = start + size
        if stop > self._buffer.shape[1]:
            self._reserve(stop)
        for row, plane in zip(self._planes, planes, strict=True):
            row[start:stop] = memoryview(plane)[:size]
        self.samples += count

    def taken(self) -> tuple[np.ndarray, int, float]:
        """Remove and return all samples [channels, n], valid until the next `add`, their rate, and their start in
        seconds."""
        values, channels = self._buffer.view(_DTYPES[self._kind.format.removesuffix("p")]), self._kind.channels
        planar = values if len(values) == channels else values.reshape(-1, channels).T
        count, self.samples = self.samples, 0
        return planar[:, :count], self._kind.rate, self._seconds

    def _begin(self, kind: _Kind, planes: int) -> None:
        if kind == self._kind:
            return
        self._kind = kind
        self.enough = min(self._at_most, kind.rate // 2)
        self._width = np.dtype(_DTYPES[kind.format.removesuffix("p")]).itemsize * kind.channels // planes
        self._hold(np.empty((planes, 2 * self._at_most * self._width), np.uint8))

    def _reserve(self, size: int) -> None:
        """Make room for `size` bytes in each plane."""
        old = self._buffer
        self._hold(np.empty((len(old), size), np.uint8))
        self._buffer[:, : old.shape[1]] = old

    def _hold(self, buffer: np.ndarray) -> None:
        self._buffer, self._planes = buffer, [memoryview(row) for row in buffer]


class _UnreadableError(AudioError):
    """This part cannot be decoded; not fatal if earlier parts were decoded."""


def _reason(error: av.FFmpegError) -> str:
    return str(error.strerror or type(error).__name__)


@cache
def _limit_allocations() -> None:
    """Make FFmpeg refuse single allocations above `MAX_ALLOCATION`, by an option of FFmpeg that PyAV does not expose.

    Otherwise an MP4 of 1 KB that claims 5 * 10**7 packets makes FFmpeg allocate an index of 1.8 GB.
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
