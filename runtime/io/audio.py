"""Converts audio of any source to the model's input: mono float32 at 16 kHz, cut into 30 s windows.

Channels are averaged and resampled with soxr HQ, as in librosa.load, but as a stream: memory holds the result, at most
`max_seconds` of it, and one block. Audio that is too long is an error unless the caller asks to truncate; the readable
part of a damaged file is returned with warnings. Only the named file is opened, and nothing is downloaded.
"""

import io
import math
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, cast

import numpy as np

from ...kernels.audio_format import SAMPLE_RATE, WINDOW_SAMPLES
from ..errors import AudioError, AudioTooLongError
from .byte_source import unreadable
from .decode import Decoder
from .mixing import MAX_CHANNELS, MAX_RATE, MIN_RATE, SCALES, Cancellation, check_samples, mix
from .resample import Resampler

if TYPE_CHECKING:
    import torch

MAX_SECONDS = 1800.0
MAX_DECODE_SECONDS = 300.0
MAX_STREAM_BYTES = 4 << 30  # of a file object that cannot seek, which is spooled
_SPOOLED_AT_ONCE = 1 << 20  # bytes
_BLOCK = 1 << 18  # samples of an array that are converted at a time
_RESERVED = round(MAX_SECONDS * SAMPLE_RATE) + 1  # samples for which address space is reserved at first
_HEADERLESS = {".pcm", ".raw"}


@dataclass(frozen=True, eq=False)
class Audio:
    """One decoded audio: `samples` float32 mono [n] at 16 kHz, and their source.

    `source` is a short name for display; `truncated`: the audio was longer than the limit and was cut on request;
    `warnings` describe the defects of a file that could only be read in part.
    """

    samples: np.ndarray
    sample_rate_in: int
    channels_in: int
    source: str
    truncated: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def duration(self) -> float:
        """Seconds."""
        return len(self.samples) / SAMPLE_RATE


Array: TypeAlias = "np.ndarray | torch.Tensor"
OnWindow: TypeAlias = Callable[[np.ndarray, float | None], None]
AudioSource: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | tuple[Array, int | float] | Audio
)


def load_audio(
    source: AudioSource,
    *,
    max_seconds: float = MAX_SECONDS,
    truncate: bool = False,
    progress: Callable[[float], None] | None = None,
    max_decode_seconds: float = MAX_DECODE_SECONDS,
    on_window: OnWindow | None = None,
) -> Audio:
    """Decode, mix and resample `source` to mono float32 at 16 kHz.

    `source` is a local path (a str is never a URL), the bytes of a file, an open binary file (read from its start if it
    can seek), `(array, rate)` or an Audio. An array is numpy or torch, [n], [channels, n] or [n, channels]: the smaller
    dimension, at most 32, is the channels. Floats are used unchanged, int8/16/32 and uint8/16 are scaled to [-1, 1).
    `progress` is called with the seconds decoded so far, about once per second of audio. Decoding a file may take
    `max_decode_seconds` of wall-clock time, not counting reads; half an hour of audio takes a few seconds.
    `on_window` is called, while a file is decoded, with each window of 30 s as soon as it is complete (float32
    [480 000], not to be modified), and with the seconds that the file states, or None. It is not called
    for a file that states to be too long, nor for samples after the first half hour.

    Audio that is missing by the file's time stamps, or damaged, is replaced by silence; `Audio.warnings` reports this
    and all other defects.

    Raises AudioTooLongError beyond `max_seconds` unless `truncate` (then exactly max_seconds * 16000 samples are kept),
    and AudioError when the source cannot be read, has no samples or an invalid sample (NaN, infinite or too large), and
    when decoding takes too long.
    """
    if not (math.isfinite(max_seconds) and max_seconds * SAMPLE_RATE >= 1):
        raise AudioError(f"max_seconds is {max_seconds}; it must be a positive number of seconds.")
    if not max_decode_seconds > 0:
        raise AudioError(f"max_decode_seconds is {max_decode_seconds}; it must be a positive number of seconds.")
    if isinstance(source, np.ndarray) or _is_tensor(source):
        raise AudioError("an array does not state its sample rate; pass (array, sample_rate).")
    if isinstance(source, Audio):
        return _fit(source, max_seconds, truncate)
    collector = _Collector(round(max_seconds * SAMPLE_RATE), progress)
    if isinstance(source, tuple):
        return _load_array(source, collector, max_seconds, truncate)
    return _load_file(source, collector, max_seconds, truncate, max_decode_seconds, on_window)


def windows(samples: np.ndarray, window_samples: int = WINDOW_SAMPLES) -> list[np.ndarray]:
    """Cut `samples` [n] into consecutive views of `window_samples`; the last one is shorter, not padded."""
    if samples.ndim != 1 or window_samples < 1:
        raise AudioError(
            f"windows need samples of shape [n] and a positive length, not {list(samples.shape)} and {window_samples}."
        )
    return [samples[start : start + window_samples] for start in range(0, len(samples), window_samples)]


class _Collector:
    """Collects mono blocks of any rate as 16 kHz samples, up to one sample past `limit`, which shows that there are
    more."""

    def __init__(self, limit: int, progress: Callable[[float], None] | None):
        self.limit = limit
        self._progress = progress
        self._reported = 0.0
        self.collected = 0
        self._buffer = np.empty(min(limit + 1, _RESERVED), np.float32)  # memory is used as it is written
        self._lent = False
        self._resampler = Resampler(SAMPLE_RATE)

    @property
    def full(self) -> bool:
        return self.collected > self.limit

    def add(self, block: np.ndarray, rate: int) -> None:
        """Resample `block` [n] and keep it; a new `rate` ends the stream at the old one."""
        if rate != self._resampler.rate:
            self.finish()
            self._resampler = Resampler(rate)
        for start in range(0, len(block), rate):
            if self.full:
                break
            self._keep(self._resampler.push(block[start : start + rate]))
        if self._progress and self.collected / SAMPLE_RATE >= self._reported + 1:
            self._report()

    def finish(self) -> None:
        """Add the samples that the resampler still holds."""
        if not self.full:
            self._keep(self._resampler.finish())
        self._resampler = Resampler(SAMPLE_RATE)

    def samples(self) -> np.ndarray:
        """The collected samples, at most `limit`: float32 [n], writable."""
        if self._progress:
            self._report()
        return self._buffer[: min(self.collected, self.limit)]

    def complete_windows(self, first: int) -> Iterator[np.ndarray]:
        """The windows from number `first` on that are complete and within the limit and the first half hour."""
        self._lent = True
        stop = min(self.collected, self.limit, _RESERVED) // WINDOW_SAMPLES * WINDOW_SAMPLES
        for start in range(first * WINDOW_SAMPLES, stop, WINDOW_SAMPLES):
            yield self._buffer[start : start + WINDOW_SAMPLES]

    def _keep(self, samples: np.ndarray) -> None:
        kept = samples[: self.limit + 1 - self.collected]
        stop = self.collected + len(kept)
        if stop > len(self._buffer):
            self._grow(stop)
        self._buffer[self.collected : stop] = kept
        self.collected = stop

    def _grow(self, needed: int) -> None:
        length = min(self.limit + 1, max(needed, len(self._buffer) * 5 // 4))
        if self._lent:  # others read the old memory
            longer = np.empty(length, np.float32)
            longer[: self.collected] = self._buffer[: self.collected]
            self._buffer = longer
        else:
            self._buffer.resize(length, refcheck=False)

    def _report(self) -> None:
        self._reported = min(self.collected, self.limit) / SAMPLE_RATE
        cast(Callable[[float], None], self._progress)(self._reported)


def _load_file(
    source: Any,
    collector: _Collector,
    max_seconds: float,
    truncate: bool,
    max_decode_seconds: float,
    on_window: OnWindow | None,
) -> Audio:
    with (
        _opened(source) as (file, name),
        Decoder(file, name, max_decode_seconds=max_decode_seconds) as decoder,
    ):
        stated, given = decoder.length_hint, 0
        if stated is not None and stated > max_seconds and not truncate:
            on_window = None
        for block, rate in decoder.blocks():
            collector.add(block, rate)
            if collector.full:
                break
            if on_window is not None:
                for window in collector.complete_windows(given):
                    on_window(window, stated)
                    given += 1
        collector.finish()
        if collector.full and not truncate:
            raise _too_long(name, decoder.length_hint, max_seconds)
        return Audio(
            samples=collector.samples(),
            sample_rate_in=decoder.sample_rate,
            channels_in=decoder.channels,
            source=name,
            truncated=collector.full,
            warnings=decoder.warnings,
        )


def _load_array(source: tuple[Array, int | float], collector: _Collector, max_seconds: float, truncate: bool) -> Audio:
    if len(source) != 2:
        raise AudioError(f"a tuple must be (array, sample_rate), not {len(source)} elements.")
    rate, channels = array_channels(*source)
    n = channels.shape[1]
    if n > max_seconds * rate and not truncate:
        raise _too_long("<array>", n / rate, max_seconds)
    cancellation = Cancellation()
    for index, block in enumerate(mono_blocks(channels, rate)):
        cancellation.add(channels[:, index * _BLOCK :][:, : len(block)], block)
        collector.add(block, rate)
        if collector.full:
            break
    collector.finish()
    if collector.full and not truncate:
        raise _too_long("<array>", n / rate, max_seconds)
    warning = cancellation.warning()
    return Audio(
        samples=collector.samples(),
        sample_rate_in=rate,
        channels_in=len(channels),
        source="<array>",
        truncated=collector.full,
        warnings=(warning,) if warning else (),
    )


def array_channels(array: Array, rate: int | float) -> tuple[int, np.ndarray]:
    """An array and its rate, as `load_audio` takes them, as an integer and [channels, n]. Raises AudioError."""
    return _array_rate(rate), _channels_first(_as_numpy(array))


def mono_blocks(channels: np.ndarray, rate: int) -> Iterator[np.ndarray]:
    """The mix of [channels, n], a block [m] float32 at a time. Raises AudioError for invalid samples."""
    for start in range(0, channels.shape[1], _BLOCK):
        block = mix(channels[:, start : start + _BLOCK])
        check_samples(block, "<array>", rate, start / rate)
        yield block


def _fit(audio: Audio, max_seconds: float, truncate: bool) -> Audio:
    limit = round(max_seconds * SAMPLE_RATE)
    if len(audio.samples) <= limit:
        return audio
    if not truncate:
        raise _too_long(audio.source, audio.duration, max_seconds)
    return replace(audio, samples=audio.samples[:limit], truncated=True)


def _too_long(name: str, seconds: float | None, max_seconds: float) -> AudioTooLongError:
    known = f"lasts {seconds:.2f} s, more" if seconds and seconds > max_seconds else "is longer"
    return AudioTooLongError(
        f"{name} {known} than the {max_seconds:g} s that are heard at once; "
        f"split it, or pass truncate=True to use the first {max_seconds:g} s."
    )


def _is_tensor(value: object) -> bool:
    torch = sys.modules.get("torch")  # a caller with a tensor has imported torch; decoding does not need it
    return torch is not None and isinstance(value, torch.Tensor)


def _as_numpy(array: Any) -> np.ndarray:
    if _is_tensor(array):
        import torch

        array = array.detach().cpu()
        array = (array.float() if array.dtype == torch.bfloat16 else array).numpy()
    if isinstance(array, np.ma.MaskedArray):
        if np.ma.is_masked(array):
            raise AudioError("samples of the array are masked; replace them, for example by array.filled(0).")
        array = array.data
    if not isinstance(array, np.ndarray):
        raise AudioError(
            f"(array, sample_rate) needs a numpy array or a torch tensor, not {type(array).__name__}; "
            "use numpy.asarray."
        )
    if not (np.issubdtype(array.dtype, np.floating) or array.dtype.name in SCALES):
        raise AudioError(
            f"an array of {array.dtype} has no agreed full scale; pass float samples in [-1, 1], or int16, int32, "
            "int8, uint8 or uint16."
        )
    return array


def _channels_first(array: np.ndarray) -> np.ndarray:
    """[n], [channels, n] or [n, channels] as [channels, n]; the smaller dimension is the channels."""
    if array.size == 0:
        raise AudioError(f"the array of shape {list(array.shape)} contains no samples.")
    if array.ndim == 1:
        return array[None]
    if array.ndim != 2:
        raise AudioError(f"the array has shape {list(array.shape)}; pass [n], [channels, n] or [n, channels].")
    rows, columns = array.shape
    if min(rows, columns) > MAX_CHANNELS or rows == columns > 1:
        raise AudioError(
            f"in the array of shape {[rows, columns]} channels and samples cannot be told apart (the smaller "
            f"dimension, at most {MAX_CHANNELS}, is the channels); mix it to mono and pass [n]."
        )
    return array if rows <= columns else array.T


def _array_rate(rate: Any) -> int:
    number = isinstance(rate, int | float | np.integer | np.floating) and not isinstance(rate, bool)
    if not (number and MIN_RATE <= rate <= MAX_RATE and rate == int(rate)):
        raise AudioError(
            f"the sample rate is {rate!r:.40}; it must be a whole number of Hz between {MIN_RATE} and {MAX_RATE}."
        )
    return int(rate)


@contextmanager
def _opened(source: Any) -> Iterator[tuple[BinaryIO, str]]:
    """A seekable binary file for `source` and its display name; closes only what it opened itself."""
    with ExitStack() as stack:
        if isinstance(source, bytes | bytearray | memoryview):
            file, name = cast(BinaryIO, io.BytesIO(source)), "<bytes>"
        elif isinstance(source, str | os.PathLike):
            path = os.fspath(source)
            name = path if isinstance(path, str) else os.fsdecode(path)
            file = stack.enter_context(_open_path(name))
        elif hasattr(source, "read") and not isinstance(source, io.TextIOBase):
            given = getattr(source, "name", None)
            name = given if isinstance(given, str) else "<file>"
            file = stack.enter_context(_seekable(source, name))
        else:
            raise AudioError(
                f"audio cannot be loaded from {type(source).__name__}; pass a path, bytes, a file opened with mode "
                "'rb', or (array, sample_rate)."
            )
        try:
            empty = file.seek(0, io.SEEK_END) == 0
        except (OSError, ValueError) as error:
            raise unreadable(name, error) from error
        if empty:
            raise AudioError(f"{name} is empty; record or export it again.")
        yield file, name


def _open_path(path: str) -> BinaryIO:
    if PurePath(path).suffix.lower() in _HEADERLESS and os.path.isfile(path):
        raise AudioError(
            f"{path} is headerless PCM by its name, which states neither rate nor format; read it with "
            "numpy.fromfile and pass (array, sample_rate)."
        )
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            kind = "a folder" if os.path.isdir(path) else "not a regular file"
            raise AudioError(f"{path} is {kind}; pass the path of an audio file.")
        return open(path, "rb")
    except FileNotFoundError:
        hint = "download it first, only local files are opened" if "://" in path else "check the path"
        raise AudioError(f"there is no file {path!r}; {hint}.") from None
    except PermissionError:
        raise AudioError(f"{path} may not be read by this user; change its permissions.") from None
    except (OSError, ValueError) as error:
        raise AudioError(f"{path!r} cannot be opened ({error}); check the path.") from None


@contextmanager
def _seekable(file: Any, name: str) -> Iterator[BinaryIO]:
    """`file` itself or, for a pipe or socket, a copy: in memory while small, then in a temporary file."""
    with tempfile.SpooledTemporaryFile(max_size=16 << 20) as copy:
        try:
            if file.seekable():
                yield file
                return
            while chunk := file.read(_SPOOLED_AT_ONCE):
                if len(chunk) > _SPOOLED_AT_ONCE:
                    raise TypeError("its read(size) must return at most size bytes")
                copy.write(chunk)
                if copy.tell() > MAX_STREAM_BYTES:
                    raise AudioError(
                        f"{name} gave more than {MAX_STREAM_BYTES >> 30} GiB without an end; save it first."
                    )
            if chunk is None:
                raise ValueError("it does not wait for its bytes; make it blocking")
        except (OSError, ValueError, TypeError) as error:
            raise unreadable(name, error) from error
        yield cast(BinaryIO, copy)
