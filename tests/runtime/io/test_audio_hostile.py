"""Hostile audio: playlists that point elsewhere, forged headers, decompression bombs, random and mutated bytes."""

import contextlib
import io
import json
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from afnext.kernels.errors import AfnextError
from afnext.runtime.errors import AudioError, AudioTooLongError
from afnext.runtime.io.audio import load_audio


def encoded(file_format: str, seconds: float = 0.3, rate: int = 16_000, **settings: Any) -> bytes:
    samples = 0.3 * np.sin(np.arange(round(seconds * rate)) * 0.1)
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=file_format, **settings)
    return file.getvalue()


# files that name other files


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n"),
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"),
        ("list.wav", "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n"),
        ("list.ffconcat", "ffconcat version 1.0\nfile {target}\n"),
        ("list.ffconcat", "ffconcat version 1.0\nfile secret.wav\n"),
        ("list.pls", "[playlist]\nFile1={target}\n"),
        ("session.sdp", "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 9 RTP/AVP 0\n"),
        (
            "manifest.mpd",
            '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>{target}</BaseURL></MPD>',
        ),
    ],
)
def test_a_file_that_names_other_files_is_refused(name, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = tmp_path / "secret.wav"
    target.write_bytes(encoded("WAV"))
    (tmp_path / name).write_text(text.format(target=target))
    with pytest.raises(AudioError):
        load_audio(name)
    with open(name, "rb") as file, pytest.raises(AudioError):
        load_audio(file)
    with pytest.raises(AudioError):
        load_audio((tmp_path / name).read_bytes())


def test_a_path_is_never_taken_for_a_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.wav").write_bytes(encoded("WAV"))
    for url in ("concat:a.wav|a.wav", "file:a.wav", "subfile,,start,0,end,0,,:a.wav", "pipe:0", "data:audio/wav,x"):
        with pytest.raises(AudioError, match="no file"):
            load_audio(url)
    (tmp_path / "concat:a.wav").write_bytes(encoded("WAV"))
    assert load_audio("concat:a.wav").duration == pytest.approx(0.3), "a file of that very name is a file"


# forged headers and bombs, measured in a process of their own


def wav(
    data: bytes, *, channels: int = 1, rate: int = 16_000, bits: int = 16, size: int | None = None, code: int = 1
) -> bytes:
    block = channels * bits // 8 & 0xFFFF
    fmt = struct.pack("<HHIIHH", code, channels, rate, rate * block & 0xFFFFFFFF, block, bits)
    size = len(data) if size is None else size
    return (
        b"RIFF"
        + struct.pack("<I", size + 36 & 0xFFFFFFFF)
        + b"WAVEfmt "
        + struct.pack("<I", 16)
        + fmt
        + (b"data" + struct.pack("<I", size) + data)
    )


def mp4(packets: int, duration: int, codec: bytes) -> bytes:
    """An MP4 of 1.5 KB whose sample table claims `packets` packets of one byte."""

    def box(name: bytes, *parts: bytes) -> bytes:
        return struct.pack(">I4s", 8 + sum(map(len, parts)), name) + b"".join(parts)

    def full(name: bytes, *words: int | bytes) -> bytes:
        return box(name, bytes(4), *(w if isinstance(w, bytes) else struct.pack(">I", w) for w in words))

    entry = box(codec, bytes(6), struct.pack(">H8xHHHHI", 1, 2, 16, 0, 0, 48_000 << 16))
    table = box(
        b"stbl",
        full(b"stsd", 1, entry),
        full(b"stts", 1, packets, duration),
        full(b"stsc", 1, 1, packets, 1),
        full(b"stsz", 1, packets),
        full(b"stco", 1, 48),
    )
    references = box(b"dinf", full(b"dref", 1, box(b"url ", bytes([0, 0, 0, 1]))))
    media = box(
        b"mdia",
        full(b"mdhd", 0, 0, 48_000, 48_000, 0),
        full(b"hdlr", 0, b"soun" + bytes(14)),
        box(b"minf", full(b"smhd", 0), references, table),
    )
    track = box(b"trak", full(b"tkhd", 0, 0, 1, 0, 1000, bytes(60)), media)
    return (
        box(b"ftyp", b"isom" + bytes(4) + b"isom")
        + box(b"moov", full(b"mvhd", 0, 0, 1000, 1000, bytes(80)), track)
        + box(b"mdat", bytes(1000))
    )


def patched(data: bytes, offset: int, new: bytes) -> bytes:
    return data[:offset] + new + data[offset + len(new) :]


def opus_of_silence(seconds: int) -> bytes:
    """One packet of silence, 0.12 s long, again and again."""
    file = io.BytesIO()
    with av.open(file, "w", format="ogg") as output:
        stream: Any = output.add_stream("libopus", rate=48_000, layout="mono")
        stream.options = {"frame_duration": "120"}
        stream.codec_context.format = "s16"
        stream.codec_context.open()
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 5760), np.int16), format="s16", layout="mono")
        frame.sample_rate = 48_000
        packet = [*stream.encode(frame), *stream.encode(None)][0]
        for index in range(round(seconds / 0.12)):
            again: Any = av.Packet(bytes(packet))
            again.stream, again.time_base = stream, packet.time_base
            again.pts = again.dts = index * 5760
            again.duration = 5760
            output.mux(again)
    return file.getvalue()


def flac_of_silence(seconds: int) -> bytes:
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", 8000, 1, format="FLAC", subtype="PCM_16") as output:
        for _ in range(seconds // 600):
            output.write(np.zeros(600 * 8000, np.int16))
    return file.getvalue()


PCM = bytes(range(256)) * 20
FLAC = encoded("FLAC")
BOMBS: dict[str, tuple[Callable[[], bytes], str, float]] = {
    # name: (bytes, what comes of it, seconds that may be heard)
    "wav of 2**31 - 1 bytes": (lambda: wav(PCM, size=2**31 - 1), "ok", 1800),
    "wav of 2**32 - 2 bytes": (lambda: wav(PCM, size=2**32 - 2), "ok", 1800),
    "wav of 65535 channels": (lambda: wav(PCM * 100, channels=65535, bits=8), "AudioError", 1800),
    "wav of 255 channels": (lambda: wav(PCM * 100, channels=255), "AudioError", 1800),
    "wav of no channels": (lambda: wav(PCM, channels=0), "AudioError", 1800),
    "wav of 0 Hz": (lambda: wav(PCM, rate=0), "AudioError", 1800),
    "wav of 2**31 Hz": (lambda: wav(PCM, rate=2**31 - 1), "AudioError", 1800),
    "wav of 4e9 Hz": (lambda: wav(PCM, rate=4_000_000_000), "AudioError", 1800),
    "wav of 1 Hz": (lambda: wav(PCM * 100, rate=1), "AudioTooLongError", 600),
    "wav of 0 bits": (lambda: wav(PCM, bits=0), "AudioError", 1800),
    "flac of 2**36 - 1 samples": (
        lambda: patched(FLAC, 21, bytes([FLAC[21] | 15, 255, 255, 255, 255])),
        "ok",
        1800,
    ),
    "aiff of 2**32 - 1 frames": (
        lambda: patched((data := encoded("AIFF")), data.index(b"COMM") + 10, b"\xff" * 4),
        "AudioError",
        1800,
    ),
    "mp3 with a tag of 256 MB": (
        lambda: b"ID3\4\0\0\x7f\x7f\x7f\x7fAPIC\x7f\x7f\x7f\x7f\0\0" + PCM,
        "AudioError",
        1800,
    ),
    "mp4 of 5 * 10**7 packets": (lambda: mp4(5 * 10**7, 1024, b"mp4a"), "AudioError", 1800),
    "mp4 of 2**32 - 1 packets": (lambda: mp4(2**32 - 1, 1024, b"mp4a"), "AudioError", 1800),
    "mp4 of 10**8 pcm samples": (lambda: mp4(10**8, 1, b"sowt"), "ok", 1800),
    "31 minutes of opus": (lambda: opus_of_silence(1860), "AudioTooLongError", 1800),
    "2 hours of opus, 20 s heard": (lambda: opus_of_silence(7200), "AudioTooLongError", 20),
    "4 hours of flac, 20 s heard": (lambda: flac_of_silence(14_400), "AudioTooLongError", 20),
}
LIMITED_MB = {
    "31 minutes of opus": 300,  # half an hour is 115 MB, held twice while the buffer moves
    "wav of 1 Hz": 400,  # soxr works on blocks of its own, here minutes long
}

MEASURE = """
import json, sys, time
from afnext.kernels.errors import AfnextError
from afnext.runtime.io.audio import load_audio

def peak():
    return next(int(line.split()[1]) / 1000 for line in open("/proc/self/status") if line.startswith("VmHWM"))

def reset():
    open("/proc/self/clear_refs", "w").write("5")

outcomes = {}
load_audio(sys.argv[1] + "/warmup")
for name, (path, seconds) in json.load(open(sys.argv[1] + "/cases.json")).items():
    reset()
    before, start = peak(), time.process_time()
    try:
        load_audio(path, max_seconds=seconds)
        outcome = "ok"
    except AfnextError as error:
        outcome = type(error).__name__
    outcomes[name] = outcome, peak() - before, time.process_time() - start
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def bombed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, float, float]]:
    """Outcome, MB of memory and seconds of every bomb."""
    if not sys.platform.startswith("linux"):
        pytest.skip("peak memory is read from /proc")
    folder = tmp_path_factory.mktemp("bombs")
    cases = {}
    for index, (name, (make, _, seconds)) in enumerate(BOMBS.items()):
        path = folder / f"{index}"
        path.write_bytes(make())
        assert path.stat().st_size < 2_500_000, "a bomb is a small file"
        cases[name] = str(path), seconds
    (folder / "cases.json").write_text(json.dumps(cases))
    (folder / "warmup").write_bytes(encoded("FLAC", rate=44_100))
    process = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder)], capture_output=True, text=True, timeout=120, check=False
    )
    assert process.returncode == 0, process.stderr
    outcomes: dict[str, tuple[str, float, float]] = json.loads(process.stdout)
    return outcomes


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_costs_neither_memory_nor_time(name, bombed):
    outcome, megabytes, seconds = bombed[name]
    expected = BOMBS[name][1]
    assert outcome == expected
    assert megabytes < LIMITED_MB.get(name, 80)
    assert seconds < 15


def test_the_bombs_are_as_long_as_they_claim():
    """So that the limits above are met by stopping early and not by a file that decodes to little."""
    with pytest.raises(AudioTooLongError):
        load_audio(opus_of_silence(60), max_seconds=59)
    assert load_audio(opus_of_silence(60), max_seconds=61).duration == pytest.approx(60, abs=0.2)


# noise and mutations

SEEDS = {
    "wav": encoded("WAV"),
    "float wav": encoded("WAV", subtype="FLOAT"),
    "flac": FLAC,
    "ogg": encoded("OGG"),
    "opus": encoded("OGG", rate=48_000, subtype="OPUS"),
    "mp3": encoded("MP3"),
    "aiff": encoded("AIFF"),
    "mp4": mp4(20, 1024, b"mp4a"),
}
relaxed = settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def check_harmless(data: bytes) -> None:
    start = time.perf_counter()
    with contextlib.suppress(AfnextError):
        audio = load_audio(data, max_seconds=60)
        assert audio.samples.dtype == np.float32
        assert audio.samples.ndim == 1
        assert 0 < len(audio.samples) <= 60 * 16_000
        assert np.isfinite(audio.samples).all()
    assert time.perf_counter() - start < 10


@relaxed
@given(
    st.sampled_from([b"", b"RIFF", b"fLaC", b"OggS", b"ID3", b"FORM", b"\xff\xfb", b"....ftyp"]),
    st.binary(max_size=4000),
)
def test_noise_raises_nothing_but_audio_errors(magic, noise):
    check_harmless(magic + noise)


@pytest.mark.parametrize("name", SEEDS)
def test_mutations_raise_nothing_but_audio_errors(name):
    seed = SEEDS[name]
    position = st.one_of(st.integers(0, min(200, len(seed) - 1)), st.integers(0, len(seed) - 1))
    values = st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff"]))

    @relaxed
    @given(st.lists(st.tuples(position, values), min_size=1, max_size=8), st.integers(0, len(seed)))
    def mutate(changes, cut):
        data = bytearray(seed)
        for offset, new in changes:
            data[offset : offset + len(new)] = new
        check_harmless(bytes(data))
        check_harmless(bytes(data[:cut]))

    mutate()
