"""Late starts, gaps and damage become silence where time stamps tell; nothing else does."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from support.audio import speech_like

from afnext.runtime.errors import AudioTooLongError
from afnext.runtime.io.audio import load_audio
from afnext.runtime.io.timeline import MAX_BROADCAST_GAP, Timeline

RATE = 48_000
SECONDS = 4.0
CONTAINERS = [
    ("aac", "mp4", "fltp"),
    ("aac", "mov", "fltp"),
    ("aac", "matroska", "fltp"),
    ("libopus", "webm", "flt"),
    ("mp2", "mpegts", "s16"),
    ("aac", "mpegts", "fltp"),
    ("libmp3lame", "asf", "fltp"),
]


def muxed(codec: str, container: str, kind: str, when: Callable[[float], float | None], video: bool = True) -> bytes:
    """SECONDS of sound in every frame of which the time is `when` of what it would be, None to leave it out, beside a
    video from 0 s on."""
    file = io.BytesIO()
    sound = speech_like(3 * SECONDS, 3)
    with av.open(file, "w", format=container) as output:
        stream: Any = output.add_stream(codec, rate=RATE, layout="mono")
        stream.codec_context.format = kind
        stream.codec_context.thread_count = 1
        stream.codec_context.open()
        if video:
            codecs = {"webm": "libvpx", "mpegts": "mpeg2video"}
            pictures: Any = output.add_stream(codecs.get(container, "mpeg4"), rate=25)
            pictures.width = pictures.height = 32
            pictures.pix_fmt = "yuv420p"
            for index in range(3 * 25):
                picture = av.VideoFrame(32, 32, "yuv420p")
                picture.pts = index
                output.mux(pictures.encode(picture))
            output.mux(pictures.encode(None))
        size = stream.codec_context.frame_size
        packets = []
        for start in range(0, round(SECONDS * RATE) // size * size, size):
            block = sound[None, start : start + size]
            block = (block * 32767).astype(np.int16) if kind == "s16" else block
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(block), format=kind, layout="mono")
            frame.sample_rate, frame.pts = RATE, start
            packets += stream.encode(frame)
        for packet in [*packets, *stream.encode(None)]:
            moved = when(float(packet.pts * packet.time_base))
            if moved is not None:
                packet.pts = packet.dts = round(moved / packet.time_base)
                output.mux(packet)
    return file.getvalue()


def quiet(samples: np.ndarray, begin: float, end: float) -> bool:
    return not samples[round(begin * 16_000) : round(end * 16_000)].any()


@pytest.mark.parametrize(("codec", "container", "kind"), CONTAINERS)
def test_a_late_start_and_a_gap_are_silence(codec, container, kind):
    plain = load_audio(muxed(codec, container, kind, lambda time: time))
    assert plain.warnings == ()
    assert plain.duration == pytest.approx(SECONDS, abs=0.1)

    late = load_audio(muxed(codec, container, kind, lambda time: time + 2.5))
    assert late.duration == pytest.approx(plain.duration + 2.5, abs=0.05)
    assert quiet(late.samples, 0, 2.4)
    assert re.search(r"the audio starts 2\.[45]", late.warnings[0])
    assert delay(late.samples, plain.samples) == pytest.approx(2.5, abs=0.03)

    gap = load_audio(muxed(codec, container, kind, lambda time: None if 1 <= time < 2 else time))
    assert gap.duration == pytest.approx(plain.duration, abs=0.01)
    assert quiet(gap.samples, 1.2, 1.9)
    assert "a gap in the audio at 1.0" in " ".join(gap.warnings)
    assert delay(gap.samples[36_000:], plain.samples[36_000:]) == pytest.approx(0, abs=0.002)


@pytest.mark.parametrize(("codec", "container", "kind"), CONTAINERS[:4])
def test_jitter_and_steps_back_insert_nothing(codec, container, kind, seed):
    rng = np.random.default_rng(seed)
    plain = load_audio(muxed(codec, container, kind, lambda time: time))
    jitter = load_audio(muxed(codec, container, kind, lambda time: time + (time > 0.1) * rng.uniform(-0.002, 0.002)))
    assert jitter.warnings == ()
    np.testing.assert_array_equal(jitter.samples, plain.samples)


def test_a_hostile_time_stamp_counts_as_audio_and_takes_no_memory():
    data = muxed("libopus", "webm", "flt", lambda time: time if time < 2 else time + 1e7)
    with pytest.raises(AudioTooLongError):
        load_audio(data)
    cut = load_audio(data, max_seconds=10, truncate=True)
    assert (cut.duration, cut.truncated) == (10, True)


def test_a_clock_that_had_been_going_on_is_no_late_start():
    data = muxed("libopus", "webm", "flt", lambda time: time + 7200, video=False)
    audio = load_audio(data)
    assert audio.duration == pytest.approx(SECONDS, abs=0.1)
    assert "time stamps begin at 7200" in audio.warnings[0]


def test_avi_starts_where_its_header_says():
    """AVI numbers its chunks, wrongly so where their sizes vary: only the start counts."""
    data = muxed("libmp3lame", "avi", "fltp", lambda time: time, video=False)
    plain = load_audio(data)
    assert plain.warnings == ()
    header = data.index(b"auds")
    scale, rate = (int.from_bytes(data[header + at : header + at + 4], "little") for at in (20, 24))
    late = data[: header + 28] + round(2 * rate / scale).to_bytes(4, "little") + data[header + 32 :]
    audio = load_audio(late)
    assert audio.duration == pytest.approx(plain.duration + 2, abs=0.05)
    assert "starts" in audio.warnings[0]


def test_transport_streams_that_are_joined_follow_one_another():
    data = muxed("mp2", "mpegts", "s16", lambda time: time, video=False)
    one = load_audio(data)
    two = load_audio(data + muxed("mp2", "mpegts", "s16", lambda time: time + 4000, video=False))
    assert two.duration == pytest.approx(2 * one.duration, abs=0.1)


def test_the_files_that_revealed_faults(shared_data: Path):
    faults = shared_data / "faults"
    scene = load_audio(Path(__file__).parents[3] / "bench/data/scene.flac").samples

    late = load_audio(faults / "audio_starts_at_4.9s.mkv")
    assert len(late.samples) == pytest.approx(len(scene) + 4.9 * 16_000, abs=200)
    assert delay(late.samples, scene) == pytest.approx(4.9, abs=0.01)

    gap = load_audio(faults / "gap_3s_to_6s_video.mkv")
    assert gap.duration == pytest.approx(13, abs=0.02)
    assert quiet(gap.samples, 3.2, 6)
    assert delay(gap.samples[8 * 16_000 :], scene[8 * 16_000 :]) == pytest.approx(0, abs=0.01)

    joined = load_audio(faults / "two_wavs_joined.wav")
    np.testing.assert_array_equal(joined.samples, scene)
    assert joined.warnings == ()

    broadcast = load_audio(faults / "dvb_mp2.ts")
    assert (broadcast.duration, broadcast.warnings) == (pytest.approx(13, abs=0.03), ())

    track = load_audio(faults / "first_track_is_dts.mkv")
    assert np.abs(track.samples).max() > 0.01, "the track of silence is the first one"
    assert "2 audio streams" in track.warnings[0]
    assert "number 2, opus" in track.warnings[0]

    damaged = load_audio(faults / "damaged.mp3")
    assert 12.5 < damaged.duration < 13.1
    assert "4 damaged packets skipped, the first at 4.29 s" in damaged.warnings[0]


def delay(samples: np.ndarray, original: np.ndarray) -> float:
    """Seconds by which `samples` come later, by their correlation."""
    n = len(samples) + len(original)
    product = np.fft.irfft(np.fft.rfft(samples, n) * np.conj(np.fft.rfft(original, n)), n)
    lag = int(np.argmax(product))
    return (lag if lag < n // 2 else lag - n) / 16_000


def test_damaged_flac_keeps_its_time(seed):
    sound = speech_like(6.0, seed)
    file = io.BytesIO()
    soundfile.write(file, sound, 16_000, format="FLAC")
    data = bytearray(file.getvalue())
    third = len(data) // 3
    data[third : third + 3000] = np.random.default_rng(seed).bytes(3000)
    audio = load_audio(data)
    assert len(audio.samples) == len(sound)
    assert "silence" in audio.warnings[0]
    np.testing.assert_allclose(audio.samples[-16_000:], sound[-16_000:], atol=1e-4)


@pytest.mark.parametrize("format", ["mp3", "wav", "aac", "mov,mp4,m4a,3gp,3g2,mj2", "mpegts", "flac", "avi"])
def test_small_offsets_are_no_gaps(format):
    timeline = Timeline(format, 0.02)
    seconds = 0.0
    for index in range(1000):
        time = 0.03 + 0.02 * index + 0.001 * (index % 3)
        assert timeline.silence(time, seconds, 48_000, damaged=False, said=seconds) == 0
        seconds += 0.02
    assert timeline.all_warnings() == []


def test_a_broadcast_clock_that_jumps_is_another_clock():
    timeline = Timeline("mpegts", 1.4)
    assert timeline.silence(1.4, 0, 48_000, damaged=False, said=0) == 0
    assert timeline.silence(3.4, 1, 48_000, damaged=False, said=1) == 48_000
    assert timeline.silence(5.4 + MAX_BROADCAST_GAP + 10, 3, 48_000, damaged=False, said=3) == 0
    assert "another clock" in " ".join(timeline.all_warnings())
    assert timeline.silence(6.4 + MAX_BROADCAST_GAP + 10, 4, 48_000, damaged=False, said=4) == 0
