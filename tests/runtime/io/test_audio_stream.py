"""Audio fed in pieces is the audio of the whole, whatever the pieces."""

import itertools
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afnext.runtime.errors import AudioError, AudioTooLongError
from afnext.runtime.io.audio import load_audio, windows
from afnext.runtime.io.audio_stream import AudioStream
from afnext.runtime.io.resample import Resampler

RATES = [16_000, 8_000, 44_100, 48_000, 11_025, 22_051, 1_000, 96_000]


def noise(seconds: float, rate: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(round(seconds * rate)) * 0.1).astype(np.float32)


@settings(max_examples=12)
@given(
    rate=st.sampled_from(RATES),
    seconds=st.floats(0.05, 65),
    cuts=st.lists(st.floats(0, 1), max_size=12),
    channels=st.sampled_from([1, 2]),
    integers=st.booleans(),
)
def test_windows_are_bit_for_bit_those_of_the_whole(
    rate: int, seconds: float, cuts: list[float], channels: int, integers: bool
) -> None:
    whole = np.stack([noise(seconds, rate, seed) for seed in range(channels)], 1)
    if integers:
        whole = (whole * 32767).astype(np.int16)
    expected = windows(load_audio((whole[:, 0] if channels == 1 else whole, rate)).samples)
    stream = AudioStream(100)
    complete: list[np.ndarray] = []
    edges = [0, *sorted(round(cut * len(whole)) for cut in cuts), len(whole)]
    for start, stop in itertools.pairwise(edges):
        piece = whole[start:stop]
        if channels == 2 and 0 < len(piece) < 3:
            return  # too short to tell its channels
        stream.feed(piece[:, 0] if channels == 1 else piece, rate)
        complete += stream.take_windows()
        assert sum(map(len, complete + stream.open_windows())) == stream.samples == -(-stop * 16_000 // rate)
    provisional = complete + stream.open_windows()
    rounding = 2e-6 + 1e-6 * seconds * (rate == 22_051)  # where soxr's clock drifts, being no simple fraction
    np.testing.assert_allclose(np.concatenate(provisional), np.concatenate(expected), atol=rounding)
    stream.finish()
    complete += stream.take_windows()
    final = complete + stream.open_windows()
    assert len(final) == len(expected)
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(final, expected, strict=True))


@pytest.mark.parametrize("rate", [8_000, 44_100, 192_000])
def test_looking_at_the_end_changes_nothing(rate: int) -> None:
    samples = noise(7.3, rate)
    looked, left = Resampler(rate), Resampler(rate)
    for start in range(0, len(samples), rate // 3):
        block = samples[start : start + rate // 3]
        ours, theirs = looked.push(block), left.push(block)
        looked.rest()
        assert np.array_equal(ours, theirs)
    assert np.array_equal(looked.finish(), left.finish())


@pytest.mark.parametrize("rate", [8_000, 44_100, 192_000])
def test_little_is_held_however_long_it_goes_on(rate: int) -> None:
    resampler = Resampler(rate)
    for second in range(60):
        for start in range(0, rate, rate // 5):
            resampler.push(noise(1, rate, second)[start : start + rate // 5])
    assert sum(map(len, resampler._recent)) < 6 * rate


@pytest.mark.parametrize("rate", [16_000, 48_000])
def test_small_pieces_are_not_copied_again_and_again(rate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples copied by joining arrays, for 12 s in pieces of 1 ms: none of it may grow with the number of pieces."""
    copied = 0
    concatenate = np.concatenate

    def counting(arrays: Any, *rest: Any, **options: Any) -> np.ndarray:
        nonlocal copied
        joined = concatenate(arrays, *rest, **options)
        copied += len(joined)
        return joined

    monkeypatch.setattr(np, "concatenate", counting)
    samples = noise(12, rate)
    stream = AudioStream(100)
    for start in range(0, len(samples), rate // 1000):
        stream.feed(samples[start : start + rate // 1000], rate)
        stream.take_windows()
    stream.finish()
    assert stream.samples == 12 * 16_000
    assert copied <= 2 * len(samples)


def test_the_time_of_a_piece_does_not_grow_with_the_pieces_before_it() -> None:
    samples = noise(30, 16_000)
    stream = AudioStream(100)

    def feeding(pieces: range) -> float:
        start = time.process_time()
        for piece in pieces:
            stream.feed(samples[16 * piece : 16 * piece + 16], 16_000)
            stream.take_windows()
        return time.process_time() - start

    first, _, last = (feeding(range(start, start + 10_000)) for start in (0, 10_000, 20_000))
    assert last < 3 * first, "quadratic: five times as long"


def test_a_change_of_rate_is_that_of_two_recordings_in_a_row() -> None:
    first, second = noise(1.7, 44_100), noise(0.9, 8_000, 1)
    stream = AudioStream(100)
    stream.feed(first, 44_100)
    stream.feed(second, 8_000)
    stream.finish()
    parts = [load_audio((first, 44_100)).samples, load_audio((second, 8_000)).samples]
    assert np.array_equal(np.concatenate(stream.open_windows()), np.concatenate(parts))


def test_what_is_too_long_or_no_audio_is_refused_and_nothing_of_it_taken() -> None:
    stream = AudioStream(2.0)
    stream.feed(noise(1.5, 8_000), 8_000)
    for piece, error in ((noise(0.6, 8_000), AudioTooLongError), (np.full(9, np.nan), AudioError)):
        with pytest.raises(error):
            stream.feed(piece, 8_000)
    stream.feed([], 8_000)
    stream.feed(noise(0.5, 8_000), 8_000)
    assert stream.samples == 32_000
