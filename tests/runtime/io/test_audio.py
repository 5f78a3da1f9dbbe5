"""What load_audio gives for arrays, bytes, paths and file objects: samples, limits, windows and errors."""

import io
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
import torch

from afnext.kernels.errors import AfnextError
from afnext.runtime.errors import AudioError, AudioTooLongError
from afnext.runtime.io.audio import SAMPLE_RATE, Audio, load_audio, windows


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def noise(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.uniform(-0.9, 0.9, shape).astype(np.float32)


def wav(samples: np.ndarray, rate: int = SAMPLE_RATE, subtype: str = "FLOAT") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype=subtype)
    return file.getvalue()


def sine(frequency: float, rate: int, seconds: float = 1.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def decibels(error: np.ndarray, signal: np.ndarray) -> float:
    return float(10 * np.log10(np.mean(np.square(error, dtype=np.float64)) / np.mean(np.square(signal)) + 1e-30))


def test_loading_imports_no_torch(rng: np.random.Generator, tmp_path: Path) -> None:
    """Processes that only decode start in a moment and stay small."""
    path = tmp_path / "a.wav"
    path.write_bytes(wav(noise(rng, 4000)))
    code = (
        "import sys; from afnext.runtime.io.audio import load_audio\n"
        "for source in (sys.argv[1], open(sys.argv[1], 'rb').read()):\n"
        "    assert len(load_audio(source).samples) == 4000\n"
        "assert not {'torch', 'triton'} & set(sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, path], timeout=99).returncode == 0


# arrays


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_float_array_at_16_khz_is_taken_as_it_is(make, rng):
    samples = noise(rng, 12_345)
    audio = load_audio((make(samples.copy()), SAMPLE_RATE))
    np.testing.assert_array_equal(audio.samples, samples)
    assert audio.samples.dtype == np.float32
    assert (audio.sample_rate_in, audio.channels_in, audio.source) == (SAMPLE_RATE, 1, "<array>")
    assert (audio.truncated, audio.warnings) == (False, ())
    assert audio.duration == 12_345 / 16_000


def test_the_callers_array_is_neither_changed_nor_shared(rng):
    samples = noise(rng, 2, 5000)
    before = samples.copy()
    audio = load_audio((samples, SAMPLE_RATE))
    audio.samples[:] = 7
    np.testing.assert_array_equal(samples, before)
    mono = before[0].copy()
    load_audio((mono, SAMPLE_RATE)).samples[:] = 7
    np.testing.assert_array_equal(mono, before[0])


@pytest.mark.parametrize(
    ("dtype", "zero", "full"),
    [("int8", 0, 128), ("uint8", 128, 128), ("int16", 0, 32768), ("uint16", 32768, 32768), ("int32", 0, 2**31)],
)
@pytest.mark.parametrize("order", ["<", ">"])
def test_integers_are_scaled_to_one(dtype, zero, full, order, rng):
    info = np.iinfo(dtype)
    values = rng.integers(info.min, info.max, 1000, endpoint=True).astype(np.dtype(dtype).newbyteorder(order))
    values[:2] = info.min, info.max
    expected = (values.astype(np.float64) - zero) / full
    samples = load_audio((values, SAMPLE_RATE)).samples
    np.testing.assert_allclose(samples, expected, rtol=0, atol=1e-7)
    assert samples[0] == -1.0
    assert samples[1] <= 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_of_torch(dtype, rng):
    tensor = torch.from_numpy(noise(rng, 500)).to(dtype).requires_grad_()
    np.testing.assert_array_equal(load_audio((tensor, SAMPLE_RATE)).samples, tensor.detach().float().numpy())


@pytest.mark.parametrize("channels", [1, 2, 6, 32])
def test_channels_are_averaged_whichever_way_the_array_lies(channels, rng):
    samples = noise(rng, channels, 4001)
    expected = samples.mean(axis=0, dtype=np.float64)
    for array in (samples, samples.T, np.asfortranarray(samples), np.ascontiguousarray(samples.T)):
        audio = load_audio((array, SAMPLE_RATE))
        np.testing.assert_allclose(audio.samples, expected, rtol=0, atol=2e-7)
        assert audio.channels_in == channels


@pytest.mark.parametrize("shape", [(2, 2), (33, 33), (33, 40), (100, 2000), (2, 3, 4), ()])
def test_ambiguous_shapes_are_refused(shape, rng):
    with pytest.raises(AudioError, match="shape"):
        load_audio((np.zeros(shape, np.float32), SAMPLE_RATE))


@pytest.mark.parametrize("array", [np.zeros(5, bool), np.zeros(5, complex), np.zeros(5, np.int64), np.array(["a"])])
def test_dtypes_without_a_full_scale_are_refused(array):
    with pytest.raises(AudioError, match="full scale"):
        load_audio((array, SAMPLE_RATE))


@pytest.mark.parametrize(
    "rate", [0, -16_000, 768_001, 2**31, float("nan"), float("inf"), 44_100.5, "16000", None, True]
)
def test_senseless_rates_are_refused(rate):
    with pytest.raises(AudioError, match="sample rate"):
        load_audio((np.zeros(100, np.float32), rate))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("position", [0, 1, 299_999, 400_000])
def test_the_first_senseless_sample_is_named(bad, position, rng):
    samples = noise(rng, 2, 400_001)
    samples[1, position:] = bad
    with pytest.raises(AudioError, match=rf"\(sample {position}\)"):
        load_audio((samples, 44_100))


@pytest.mark.parametrize(
    "source",
    [([0.0, 1.0], 16_000), (np.zeros(5),), (np.zeros((0, 2)), 16_000), (np.zeros(0), 16_000), 5, None, ["a.wav"]],
)
def test_other_sources_are_refused(source):
    with pytest.raises(AudioError):
        load_audio(source)


def test_a_masked_sample_is_refused_and_an_empty_mask_is_none(rng):
    samples = noise(rng, 500)
    with pytest.raises(AudioError, match=r"masked.*filled"):
        load_audio((np.ma.array(samples, mask=np.arange(500) == 7), SAMPLE_RATE))
    np.testing.assert_array_equal(load_audio((np.ma.array(samples), SAMPLE_RATE)).samples, samples)


@pytest.mark.parametrize("array", [np.zeros(100, np.float32), torch.zeros(100), np.zeros((2, 100))])
def test_an_array_without_a_rate_gets_advice(array):
    with pytest.raises(AudioError, match=r"pass \(array, sample_rate\)"):
        load_audio(array)


@pytest.mark.parametrize("kind", ["array", "file"])
def test_channels_that_cancel_each_other_are_reported(kind, rng):
    left = noise(rng, 20_000)

    def warnings(right: np.ndarray) -> tuple[str, ...]:
        both = np.stack([left, right])
        return load_audio((both, SAMPLE_RATE) if kind == "array" else wav(both.T)).warnings

    assert "cancel each other" in warnings(-left)[0]
    assert "cancel each other" in warnings(-0.9 * left)[0]
    for harmless in (left, 0 * left, noise(rng, 20_000), 0.5 * left):
        assert warnings(harmless) == ()


# resampling


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000, 192_000, 37_123])
def test_a_tone_survives_resampling(rate):
    samples = load_audio((sine(1000, rate), rate)).samples
    expected = sine(1000, SAMPLE_RATE)
    assert len(samples) == len(expected)
    middle = slice(2000, -2000)
    assert decibels(samples[middle] - expected[middle], expected[middle]) < -80


@pytest.mark.parametrize("rate", [44_100, 48_000, 96_000])
@pytest.mark.parametrize("frequency", [8_200, 9_000, 15_900, 20_000])
def test_tones_above_8_khz_vanish(rate, frequency):
    samples = load_audio((sine(frequency, rate), rate)).samples
    assert decibels(samples[2000:-2000], sine(1000, SAMPLE_RATE)) < -80


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000, 15_999])
def test_streaming_equals_one_shot_resampling_at_every_block_boundary(rate, rng):
    for n in (1, 2, rate - 1, rate, rate + 1, 2 * rate, 2**18 - 1, 2**18, 2**18 + 1):
        samples = noise(rng, n)
        expected = soxr.resample(samples, rate, SAMPLE_RATE, "HQ")
        got = load_audio((samples, rate)).samples
        assert len(got) == -(-n * SAMPLE_RATE // rate), f"{n} samples at {rate} Hz"
        np.testing.assert_array_equal(got[: len(expected)], expected)
        np.testing.assert_array_equal(got[len(expected) :], 0)


def test_a_very_low_rate_does_not_swell_a_block(rng):
    audio = load_audio((noise(rng, 20), 1))
    assert len(audio.samples) == 20 * SAMPLE_RATE
    with pytest.raises(AudioTooLongError):
        load_audio((noise(rng, 1_000_000), 1))
    cut = load_audio((noise(rng, 1_000_000), 1), max_seconds=3, truncate=True)
    assert len(cut.samples) == 48_000


# limits


def test_half_an_hour_is_heard_and_a_second_more_is_not():
    whole = np.zeros(1800 * 8000, np.int16)
    assert load_audio((whole, 8000)).duration == 1800.0
    longer = np.zeros(round(1800.5 * 8000), np.int16)
    with pytest.raises(AudioTooLongError, match=r"1800\.50 s.*1800 s.*truncate=True"):
        load_audio((longer, 8000))
    audio = load_audio((longer, 8000), truncate=True)
    assert (len(audio.samples), audio.truncated) == (1800 * SAMPLE_RATE, True)


@pytest.mark.parametrize("rate", [16_000, 44_100, 8_000])
@pytest.mark.parametrize("kind", ["array", "file"])
def test_truncation_is_exact_and_keeps_the_beginning(rate, kind, rng):
    samples = noise(rng, rate * 3 + 17)
    source = (samples, rate) if kind == "array" else wav(samples, rate)
    whole = load_audio(source)
    for seconds in (0.01, 1.0, 1.2345, 2.0):
        cut = load_audio(source, max_seconds=seconds, truncate=True)
        assert len(cut.samples) == round(seconds * SAMPLE_RATE)
        assert cut.truncated
        np.testing.assert_array_equal(cut.samples, whole.samples[: len(cut.samples)])
        with pytest.raises(AudioTooLongError):
            load_audio(source, max_seconds=seconds)


@pytest.mark.parametrize("extra", [-1, 0, 1])
@pytest.mark.parametrize("kind", ["array", "file", "audio"])
def test_the_limit_is_a_matter_of_one_sample(extra, kind, rng):
    samples = noise(rng, 2 * SAMPLE_RATE + extra)
    source = {"array": (samples, SAMPLE_RATE), "file": wav(samples), "audio": load_audio((samples, SAMPLE_RATE))}[kind]
    if extra > 0:
        with pytest.raises(AudioTooLongError):
            load_audio(source, max_seconds=2)
    else:
        assert not load_audio(source, max_seconds=2).truncated
    cut = load_audio(source, max_seconds=2, truncate=True)
    np.testing.assert_array_equal(cut.samples, samples[: 2 * SAMPLE_RATE])
    assert cut.truncated == (extra > 0)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 1e-9])
def test_senseless_limits_are_refused(seconds):
    with pytest.raises(AudioError, match="max_seconds"):
        load_audio((np.zeros(100, np.float32), SAMPLE_RATE), max_seconds=seconds)


def test_a_loaded_audio_is_returned_as_it_is(rng):
    audio = load_audio((noise(rng, 1000), 8000))
    assert load_audio(audio) is audio
    assert isinstance(audio, Audio)


def test_progress_counts_the_seconds_and_may_interrupt(rng):
    heard: list[float] = []
    load_audio(wav(noise(rng, 5 * 44_100 + 100), 44_100), progress=heard.append)
    assert heard == sorted(heard)
    assert len(heard) >= 5
    assert heard[-1] == pytest.approx(5 + 100 / 44_100, abs=1e-3)

    class StopListeningError(Exception):
        pass

    def stop(seconds: float) -> None:
        raise StopListeningError

    with pytest.raises(StopListeningError):
        load_audio(wav(noise(rng, 44_100), 22_050), progress=stop)


# windows


@pytest.mark.parametrize(
    ("seconds", "lengths"),
    [
        (0, []),
        (0.01, [160]),
        (29.9, [478_400]),
        (29.99, [479_840]),
        (30.0, [480_000]),
        (30.01, [480_000, 160]),
        (60.0, [480_000, 480_000]),
        (90.5, [480_000, 480_000, 480_000, 8_000]),
    ],
)
def test_windows_cover_the_audio_without_overlap(seconds, lengths):
    samples = np.arange(round(seconds * SAMPLE_RATE), dtype=np.float32)
    parts = windows(samples)
    assert [len(part) for part in parts] == lengths
    np.testing.assert_array_equal(np.concatenate([*parts, samples[:0]]), samples)
    assert all(np.shares_memory(part, samples) for part in parts)


def test_windows_of_another_length_and_senseless_ones():
    assert [len(part) for part in windows(np.zeros(10), 4)] == [4, 4, 2]
    with pytest.raises(AudioError):
        windows(np.zeros((2, 10)))
    with pytest.raises(AudioError):
        windows(np.zeros(10), 0)


# files


class Pipe(io.RawIOBase):
    """Bytes that can be read once, from front to back."""

    name = 7  # as the file object of a descriptor has it

    def __init__(self, data: bytes):
        self._file = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self._file.read(min(size, 1000) if size > 0 else size)


def test_paths_bytes_and_file_objects_agree(tmp_path, rng):
    data = wav(noise(rng, 30_000, 2), 44_100, "PCM_16")
    path = tmp_path / "Ünïcode name.wav"
    path.write_bytes(data)
    expected = load_audio(str(path))
    assert expected.source == str(path)
    advanced = io.BytesIO(data)
    advanced.seek(999)
    with open(path, "rb") as file:
        for source, name in [
            (path, str(path)),
            (data, "<bytes>"),
            (bytearray(data), "<bytes>"),
            (memoryview(data), "<bytes>"),
            (io.BytesIO(data), "<file>"),
            (advanced, "<file>"),
            (Pipe(data), "<file>"),
            (file, str(path)),
        ]:
            audio = load_audio(source)
            np.testing.assert_array_equal(audio.samples, expected.samples)
            assert (audio.source, audio.sample_rate_in, audio.channels_in) == (name, 44_100, 2)
        assert not file.closed


def test_a_real_pipe_is_read_to_its_end(rng):
    data = wav(noise(rng, 200_000))
    reading, writing = os.pipe()

    def feed() -> None:
        with open(writing, "wb") as file:
            file.write(data)

    writer = threading.Thread(target=feed)
    writer.start()
    with open(reading, "rb") as file:
        audio = load_audio(file)
    writer.join()
    assert len(audio.samples) == 200_000


class Broken(io.BytesIO):
    """A file whose reads fail, or give too much, from the third one on."""

    def __init__(self, data: bytes, answer: object):
        super().__init__(data)
        self.answer, self.reads = answer, 0

    def read(self, size: int | None = -1) -> bytes:
        self.reads += 1
        if self.reads < 3:
            return super().read(size)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer  # type: ignore[return-value]


@pytest.mark.parametrize("answer", [OSError("disk gone"), ValueError("closed"), "text", None, b"x" * 10**6])
@pytest.mark.parametrize("seekable", [True, False])
def test_a_file_object_that_fails_midway_is_an_error(answer, seekable, rng):
    file = Broken(wav(noise(rng, 4_000_000)), answer)
    if not seekable:
        if isinstance(answer, bytes) or answer is None:
            pytest.skip("a pipe may end or give any number of bytes")
        file.seekable = lambda: False  # type: ignore[method-assign]
    with pytest.raises(AudioError, match="cannot be read"):
        load_audio(file)
    assert file.reads == 3, "a failed file is not read again"
    assert len(load_audio(wav(noise(rng, 1000))).samples) == 1000, "the failure must not leak into the next file"


def test_text_files_and_closed_files_are_refused(tmp_path, rng):
    path = tmp_path / "a.wav"
    path.write_bytes(wav(noise(rng, 1000)))
    with open(path, encoding="latin-1") as text, pytest.raises(AudioError, match="mode 'rb'"):
        load_audio(text)
    closed = io.BytesIO(b"abc")
    closed.close()
    with pytest.raises(AudioError, match="cannot be read"):
        load_audio(closed)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.wav", "check the path"),
        ("", "check the path"),
        (".", "folder"),
        ("/dev/null", "not a regular file"),
        ("nul\0byte.wav", "cannot be opened"),
        ("x" * 5000, "cannot be opened"),
        ("http://127.0.0.1:9/a.wav", "only local files"),
        ("https://example.com/a.mp3", "only local files"),
        ("file:///etc/hostname", "only local files"),
    ],
)
def test_paths_that_are_no_files_are_named(path, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AudioError, match=message):
        load_audio(path)
    with pytest.raises(AfnextError):
        load_audio(Path(path)) if "\0" not in path else load_audio(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_an_error(tmp_path, rng):
    path = tmp_path / "secret.wav"
    path.write_bytes(wav(noise(rng, 1000)))
    path.chmod(0)
    with pytest.raises(AudioError, match="permissions"):
        load_audio(path)


@pytest.mark.parametrize("suffix", [".pcm", ".raw", ".PCM"])
def test_headerless_pcm_asks_for_array_and_rate(suffix, tmp_path, rng):
    path = tmp_path / f"speech{suffix}"
    path.write_bytes(noise(rng, 16_000).tobytes())
    with pytest.raises(AudioError, match=r"headerless PCM.*\(array, sample_rate\)"):
        load_audio(path)


@pytest.mark.parametrize(("rate", "seconds", "limit"), [(16_000, 95, 1800), (44_100, 61, 1800), (16_000, 95, 75)])
def test_windows_are_given_as_soon_as_they_are_complete(rate: int, seconds: int, limit: int, seed: int) -> None:
    """They are those of the result; a file that states to be too long gives none, since it is refused."""
    file = io.BytesIO()
    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, seconds * rate).astype(np.float32)
    soundfile.write(file, noise, rate, format="FLAC")
    given: list[tuple[np.ndarray, float | None]] = []
    decoded: list[float] = []

    def on_window(window: np.ndarray, stated: float | None) -> None:
        given.append((window, stated))
        assert decoded[-1] < (len(given) + 1) * 30, "not before the rest has been decoded"

    options: Any = {"max_seconds": limit, "on_window": on_window, "progress": decoded.append}
    audio = load_audio(file.getvalue(), truncate=True, **options)
    assert [stated for _, stated in given] == [seconds] * (len(audio.samples) // 480_000)
    for index, (window, _) in enumerate(given):
        assert np.array_equal(window, audio.samples[480_000 * index :][:480_000])
    given.clear()
    if seconds > limit:
        with pytest.raises(AudioTooLongError):
            load_audio(file.getvalue(), **options)
        assert not given
