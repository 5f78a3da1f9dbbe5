"""The reader between a caller's file and FFmpeg: how often it touches the file, interrupts, deadlines."""

import io
import os
import signal
import struct
import threading
import time
from typing import Any

import numpy as np
import pytest
import soundfile
from support.audio import speech_like

from afnext.runtime.errors import AudioError
from afnext.runtime.io.audio import load_audio
from afnext.runtime.io.byte_source import ByteSource, View


class Counting(io.BytesIO):
    """Counts what is asked of it."""

    calls = 0

    def read(self, size: int | None = -1) -> bytes:
        self.calls += 1
        return super().read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        self.calls += 1
        return super().seek(offset, whence)


def wav(seconds: float, seed: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, speech_like(seconds, seed), 16_000, format="WAV", subtype="PCM_16")
    return file.getvalue()


@pytest.mark.parametrize("inside", [True, False])
def test_a_tail_of_zeros_costs_no_calls(inside, seed):
    data = bytearray(wav(1.0, seed))
    tail = bytes(4 << 20)
    if inside:
        data[4:8] = struct.pack("<I", len(data) - 8 + len(tail))
    file = Counting(bytes(data) + tail)
    assert len(load_audio(file).samples) == 16_000
    assert file.calls < 100


def test_a_view_gives_the_patched_bytes_of_its_part(seed):
    rng = np.random.default_rng(seed)
    content = rng.bytes(1000)
    patches = {100: b"ab", 149: b"XYZ", 298: b"1234"}
    expected = bytearray(content)
    for offset, new in patches.items():
        expected[offset : offset + len(new)] = new
    view = View(ByteSource(io.BytesIO(content), "x", None), 100, 300, patches)
    position = 0
    for _ in range(200):
        if rng.random() < 0.3:
            position = int(rng.integers(0, 201))
            assert view.seek(position) == position
        piece = view.read(int(rng.integers(1, 60)))
        assert piece == bytes(expected[100:300])[position : position + len(piece)]
        assert piece or position == 200
        position += len(piece)
    assert view.seek(-1, 2) == 199


class Interrupted(io.BytesIO):
    """Raises the signal SIGINT within the call of `read` that is the `when`-th."""

    def __init__(self, data: bytes, when: int):
        super().__init__(data)
        self.left = when

    def read(self, size: int | None = -1) -> bytes:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)
        return super().read(size)


@pytest.mark.parametrize("when", [1, 2, 3, 5])
@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG"])
def test_an_interrupt_within_a_read_is_raised(when, format, seed, capfd):
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(seed).uniform(-0.5, 0.5, 1_000_000), 16_000, format=format)
    with pytest.raises(KeyboardInterrupt):
        load_audio(Interrupted(file.getvalue(), when))
    assert "ignored" not in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_at_any_time_is_raised(seed, capfd):
    """Most of them come within FFmpeg, and would be handled in the first callback out of it."""
    file = io.BytesIO()
    soundfile.write(file, speech_like(120.0, seed), 16_000, format="OGG")
    data = file.getvalue()
    began = time.perf_counter()
    load_audio(data)
    takes = time.perf_counter() - began
    rng = np.random.default_rng(seed)

    def interrupted(delay: float) -> None:
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        load_audio(data)
        timer.join()
        time.sleep(1)

    for _ in range(30):
        with pytest.raises(KeyboardInterrupt):
            interrupted(float(rng.uniform(0, 0.7 * takes)))
    assert "ignored" not in capfd.readouterr().err


def test_a_handler_of_the_caller_is_called_and_may_return(seed):
    received: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        audio = load_audio(Interrupted(wav(20.0, seed), 2))
    finally:
        signal.signal(signal.SIGINT, before)
    assert received == [signal.SIGINT]
    assert len(audio.samples) == 320_000


def test_decoding_has_a_deadline(seed, monkeypatch):
    data = wav(20.0, seed)
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 0.01
        return now

    monkeypatch.setattr(time, "monotonic", clock)
    assert load_audio(data, max_decode_seconds=100).duration == 20
    with pytest.raises(AudioError, match=r"took longer than the 0\.1 s"):
        load_audio(data, max_decode_seconds=0.1)


def test_waiting_for_a_stream_is_not_decoding(seed, monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            nonlocal now
            now += 1000
            return super().read(size)

    assert load_audio(Slow(wav(20.0, seed)), max_decode_seconds=1).duration == 20


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_senseless_deadlines_are_refused(seconds: Any, seed):
    with pytest.raises(AudioError, match="max_decode_seconds"):
        load_audio(wav(1.0, seed), max_decode_seconds=seconds)
