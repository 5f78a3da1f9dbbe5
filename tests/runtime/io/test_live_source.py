"""Audio from pipes, in whatever portions it comes, against the same bytes read as a file."""

import io
import os
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from support.audio import speech_like
from support.mp3 import with_cover

from afnext.runtime.errors import AudioError
from afnext.runtime.io.audio import load_audio
from afnext.runtime.io.live_source import decoded_pieces, microphone_pieces, raw_pieces


class Portions(io.RawIOBase):
    """A stream that cannot seek and gives between one byte and what is asked for at a time."""

    def __init__(self, data: bytes, seed: int):
        self._data, self._rng = data, random.Random(seed)

    def read(self, size: int = -1) -> bytes:
        count = self._rng.randint(1, max(1, size))
        data, self._data = self._data[:count], self._data[count:]
        return data


def whole(pieces: Iterator[tuple[np.ndarray, int]]) -> tuple[np.ndarray, set[int]]:
    parts = list(pieces)
    return np.concatenate([part for part, _ in parts]), {rate for _, rate in parts}


@settings(max_examples=40)
@given(
    st.integers(0, 2**32),
    st.sampled_from([("s16le", "int16"), ("s32le", "int32"), ("f32le", "float32"), ("u8", "uint8")]),
    st.integers(1, 3),
    st.integers(1, 9000),
)
def test_raw_samples_in_any_portions(seed: int, kind: tuple[str, str], channels: int, frames: int) -> None:
    rng = np.random.default_rng(seed)
    format, dtype = kind
    if dtype == "float32":
        samples = rng.uniform(-1, 1, (frames, channels)).astype(dtype)
    else:
        limits = np.iinfo(dtype)
        samples = rng.integers(limits.min, limits.max, (frames, channels), dtype, endpoint=True)
    heard, rates = whole(raw_pieces(Portions(samples.tobytes(), seed), format, rate=8000, channels=channels))
    middle, scale = {"u8": (128, 128), "s16le": (0, 2**15), "s32le": (0, 2**31), "f32le": (0, 1)}[format]
    expected = ((samples.astype(np.float64) - middle) / scale).mean(axis=1)
    assert rates == {8000}
    np.testing.assert_allclose(heard, expected, atol=1e-6)


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG", "MP3"])
def test_encoded_streams_in_any_portions(format: str, seed: int) -> None:
    file = io.BytesIO()
    soundfile.write(file, speech_like(3.0, seed), 16_000, format=format)
    heard, rates = whole(decoded_pieces(Portions(file.getvalue(), seed), "pipe"))
    assert rates == {16_000}
    expected = load_audio(file.getvalue()).samples
    if format == "MP3":  # that the end of the last frame is padding, only a file that can be measured tells
        heard = heard[: len(expected)]
    np.testing.assert_array_equal(heard, expected)


def test_pieces_come_while_the_stream_goes_on(seed: int) -> None:
    reader, writer = os.pipe()
    samples = (speech_like(1.0, seed) * 2**15).astype("<i2")
    with os.fdopen(reader, "rb", buffering=0) as incoming:
        pieces = raw_pieces(incoming, "s16le", rate=16_000, channels=1)
        for start in range(0, 16_000, 1600):
            os.write(writer, samples[start : start + 1600].tobytes())
            piece, _ = next(pieces)  # would wait for ever if it wanted more than there is
            np.testing.assert_allclose(piece, samples[start : start + 1600] / 2**15)
        os.close(writer)
        assert list(pieces) == []


def test_a_wav_header_of_a_stream_without_an_end(seed: int) -> None:
    file = io.BytesIO()
    soundfile.write(file, speech_like(1.0, seed), 16_000, format="WAV", subtype="PCM_16")
    data = bytearray(file.getvalue())
    data[4:8] = data[40:44] = b"\xff" * 4
    heard, _ = whole(decoded_pieces(Portions(bytes(data), seed), "pipe"))
    assert len(heard) == 16_000


def test_a_real_pipe_of_an_encoded_stream(seed: int) -> None:
    file = io.BytesIO()
    soundfile.write(file, speech_like(5.0, seed), 22_050, format="FLAC")
    reader, writer = os.pipe()

    def feed() -> None:
        with os.fdopen(writer, "wb") as outgoing:
            outgoing.write(file.getvalue())

    thread = threading.Thread(target=feed)
    thread.start()
    with os.fdopen(reader, "rb", buffering=0) as incoming:
        heard, rates = whole(decoded_pieces(incoming, "pipe"))
    thread.join()
    assert (len(heard), rates) == (80_000, {22_050})


@pytest.mark.parametrize("size", [1 << 10, 3 << 20])
def test_a_cover_before_the_audio(size: int, seed: int) -> None:
    file = io.BytesIO()
    soundfile.write(file, speech_like(3.0, seed), 16_000, format="MP3")
    plain, _ = whole(decoded_pieces(Portions(file.getvalue(), seed), "pipe"))
    heard, _ = whole(decoded_pieces(Portions(with_cover(file.getvalue(), size), seed), "pipe"))
    np.testing.assert_array_equal(heard, plain)


@pytest.mark.parametrize("surplus", [1, 2, 3])
def test_surplus_bytes_of_raw_samples_are_a_warning(surplus: int, seed: int) -> None:
    samples = (speech_like(0.5, seed) * 2**15).astype("<i2").repeat(2)
    data = samples.tobytes() + b"\1" * surplus
    warnings: list[tuple[str, ...]] = []
    heard, _ = whole(raw_pieces(Portions(data, seed), "s16le", rate=16_000, channels=2, warn=warnings.append))
    np.testing.assert_allclose(heard, samples[::2] / 2**15)
    ((warning,),) = warnings
    assert f"within a frame of 4 bytes: the last {surplus} bytes are dropped" in warning


@pytest.mark.parametrize("damage", ["overwritten", "cut"])
def test_a_file_gives_the_samples_and_warnings_of_loading_it(damage: str, seed: int, tmp_path: Path) -> None:
    path = tmp_path / "damaged.mp3"
    soundfile.write(path, speech_like(8.0, seed), 16_000)
    data = bytearray(path.read_bytes())
    if damage == "cut":
        del data[len(data) * 2 // 3 :]
    else:
        data[len(data) // 2 : len(data) // 2 + 3000] = random.Random(seed).randbytes(3000)
    path.write_bytes(data)
    loaded = load_audio(path)
    warnings: list[tuple[str, ...]] = []
    with path.open("rb", buffering=0) as file:
        heard, _ = whole(decoded_pieces(file, str(path), warnings.append))
    np.testing.assert_array_equal(heard, loaded.samples)
    assert loaded.warnings
    assert warnings[-1] == loaded.warnings


def test_shared_damaged_file(shared_data: Path) -> None:
    path = shared_data / "faults" / "damaged.mp3"
    loaded, warnings = load_audio(path), []
    with path.open("rb", buffering=0) as file:
        for _ in decoded_pieces(file, str(path), lambda found: warnings.append(found)):
            pass
    assert len(loaded.warnings) == 2
    assert warnings[-1] == loaded.warnings


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (b"\0" * 3, {"format": "s16le", "rate": 16_000, "channels": 2}, "within a frame of 4"),
        (b"\0" * 8, {"format": "mp3", "rate": 16_000, "channels": 1}, "s16le"),
        (b"\0" * 8, {"format": "u8", "rate": 0, "channels": 1}, "0 Hz"),
    ],
)
def test_raw_streams_that_cannot_be(data: bytes, options: dict[str, object], message: str) -> None:
    with pytest.raises(AudioError, match=message):
        list(raw_pieces(io.BytesIO(data), **options))  # type: ignore[arg-type]


def test_noise_is_no_stream() -> None:
    with pytest.raises(AudioError, match="pipe"):
        list(decoded_pieces(Portions(bytes(range(256)) * 50, 0), "pipe"))


def test_without_sounddevice_the_microphone_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(AudioError, match="pip install sounddevice"):
        next(microphone_pieces(lambda: False))


class FakeSoundDevice:
    """Stands in for sounddevice: a microphone that hears a ramp."""

    class PortAudioError(Exception):
        pass

    class InputStream:
        def __init__(self, *, samplerate: int, channels: int, dtype: str, device: str | None, callback: object):
            if device == "none":
                raise FakeSoundDevice.PortAudioError("no such device")
            self._callback = callback

        def __enter__(self) -> "FakeSoundDevice.InputStream":
            for start in range(0, 300, 100):
                block = np.arange(start, start + 100, dtype=np.float32)[:, None]
                self._callback(block, 100, None, start == 200)  # type: ignore[operator]
                block[:] = np.nan  # the driver reuses its buffer
            return self

        def __exit__(self, *_: object) -> None:
            pass


def test_the_microphone_is_heard_until_it_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", FakeSoundDevice)
    warnings: list[tuple[str, ...]] = []
    pieces = microphone_pieces(lambda: False, warn=warnings.append)
    heard = [next(pieces) for _ in range(3)]
    assert {rate for _, rate in heard} == {16_000}
    np.testing.assert_array_equal(np.concatenate([piece for piece, _ in heard]), np.arange(300))
    assert [(len(found), "audio is missing in 1 place" in found[0]) for found in warnings] == [(1, True)]
    assert list(microphone_pieces(lambda: True)) == []
    with pytest.raises(AudioError, match="no such device"):
        list(microphone_pieces(lambda: True, "none"))


def test_a_stream_that_breaks_is_an_error(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as unreadable, pytest.raises(AudioError, match="cannot be read"):
        list(raw_pieces(unreadable, "u8", rate=8000, channels=1))
