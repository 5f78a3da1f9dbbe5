"""Damaged and forged audio files, as a path, as bytes and through pipes, against `load_audio` and `decoded_pieces`.

The right outcome is an AfnextError, or finite float32 samples within the limit.
"""

import contextlib
import io
import random
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
from support.audio import speech_like

from afnext.kernels.errors import AfnextError
from afnext.runtime.io.audio import load_audio
from afnext.runtime.io.live_source import decoded_pieces

SECONDS = 30.0
MEGABYTES = 700  # two streams' worth of allocations that FFmpeg may make, and half an hour of samples
MAX_SECONDS = 600.0
LARGEST = 300_000  # bytes of a file of the corpus

SOUNDFILE = [
    *(("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "IMA_ADPCM"), ("WAV", "MS_ADPCM"), ("RF64", "PCM_16")),
    *(("W64", "PCM_24"), ("AIFF", "PCM_16"), ("AU", "PCM_16"), ("CAF", "PCM_16"), ("CAF", "ALAC_16")),
    *(("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")),
]
ENCODED = [
    *(("aac", "mp4", "fltp"), ("aac", "adts", "fltp"), ("aac", "mpegts", "fltp"), ("alac", "ipod", "s16p")),
    *(("libopus", "webm", "flt"), ("flac", "matroska", "s16"), ("flac", "ogg", "s16"), ("libmp3lame", "avi", "fltp")),
    *(("mp2", "mpegts", "s16"), ("ac3", "matroska", "fltp"), ("wmav2", "asf", "fltp"), ("pcm_s16le", "mov", "s16")),
]
EXTREMES = [bytes(4), b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80\0\0\0", b"\0\0\0\x80", b"\0\0\0\1"]


def check(data: bytes) -> None:
    """`data`: one byte that says how the rest, a file, is handed over."""
    way, content = data[0] % 4, data[1:]
    with contextlib.suppress(AfnextError):
        if way == 3:
            heard = 0
            for block, rate in decoded_pieces(Stream(content), "pipe"):
                assert np.isfinite(block).all()
                heard += len(block) / rate
                if heard > MAX_SECONDS:
                    break
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "audio"
            path.write_bytes(content)
            source: Any = (path, content, Stream(content))[way]
            audio = load_audio(source, max_seconds=MAX_SECONDS)
        assert audio.samples.dtype == np.float32
        assert 0 < len(audio.samples) <= MAX_SECONDS * 16_000
        assert np.isfinite(audio.samples).all()


def cases(rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Files of the corpus, each changed in one to three ways."""
    files = corpus(rng.randrange(2**31))
    names = sorted(files)
    while True:
        name = rng.choice(names)
        data, how = files[name], [name]
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            mutate = rng.choice(MUTATIONS)
            data = mutate(data, files[rng.choice(names)], rng)
            how.append(mutate.__name__)
        way = rng.randrange(4)
        yield f"{', '.join(how)}; as {('path', 'bytes', 'pipe', 'live pipe')[way]}", bytes([way]) + data


def corpus(seed: int) -> dict[str, bytes]:
    """Small files of every container and codec, and the shared recordings where they are beside the checkout."""
    files = {}
    samples = speech_like(1.5, seed)
    for container, subtype in SOUNDFILE:
        file = io.BytesIO()
        soundfile.write(file, samples, 16_000, format=container, subtype=subtype)
        files[f"{container} {subtype}"] = file.getvalue()
    for codec, container, sample_format in ENCODED:
        files[f"{container} {codec}"] = encoded(samples, codec, container, sample_format)
    shared = Path(__file__).parents[3] / "shared" / "data"
    for path in sorted(shared.glob("*/*")):
        if path.parent.name in ("odd", "corrupt", "faults", "speech") and 0 < path.stat().st_size < LARGEST:
            files[path.name] = path.read_bytes()
    return files


def encoded(samples: np.ndarray, codec: str, container: str, sample_format: str) -> bytes:
    """Mono `samples` of 16 kHz, taken as 48 kHz, with FFmpeg."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream: Any = output.add_stream(codec, rate=48_000, layout="mono")
        stream.bit_rate = 64_000
        stream.codec_context.thread_count = 1
        stream.codec_context.format = sample_format
        stream.codec_context.open()
        size = stream.codec_context.frame_size or 1024
        for start in range(0, len(samples), size):
            block = samples[None, start : start + size]
            block = (block * 32767).astype(np.int16) if sample_format.startswith("s16") else block
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(block), format=sample_format, layout="mono")
            frame.sample_rate, frame.pts = 48_000, start
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def flips(data: bytes, other: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(2 ** rng.randrange(8)):
        changed[place(data, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncated(data: bytes, other: bytes, rng: random.Random) -> bytes:
    return data[: 1 + place(data, rng)]


def overwritten(data: bytes, other: bytes, rng: random.Random) -> bytes:
    start, size = place(data, rng), min(2 ** rng.randrange(16), len(data))
    return data[:start] + rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size))) + data[start + size :]


def spliced(data: bytes, other: bytes, rng: random.Random) -> bytes:
    return data[: place(data, rng)] + other[place(other, rng) :]


def joined(data: bytes, other: bytes, rng: random.Random) -> bytes:
    return data + rng.choice((other, data, bytes(rng.randrange(100_000))))


def cut_out(data: bytes, other: bytes, rng: random.Random) -> bytes:
    start = place(data, rng)
    return data[:start] + data[start + 2 ** rng.randrange(16) :] or b"\0"


def repeated(data: bytes, other: bytes, rng: random.Random) -> bytes:
    start = place(data, rng)
    part = data[start : start + 2 ** rng.randrange(4, 14)]
    return (data[:start] + part * rng.randrange(2, 1000) + data[start:])[:4_000_000]


def forged_size(data: bytes, other: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        start = place(data, rng)
        new = rng.choice((*EXTREMES, rng.randbytes(4), struct.pack("<I", len(data)), struct.pack(">I", len(data))))
        changed[start : start + len(new)] = new
    return bytes(changed)


def tag_bomb(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Up to 3 MB of tags at the place where this format has them."""
    count = 10 ** rng.randrange(2, 6)
    if data.startswith(b"fLaC"):
        comments = b"".join(struct.pack("<I", 8) + b"%06x=a" % index for index in range(min(count, 200_000)))
        block = bytes(4) + struct.pack("<I", min(count, 200_000)) + comments
        return data[:42] + b"\4" + struct.pack(">I", len(block))[1:] + block + data[42:]
    if data.startswith((b"RIFF", b"RF64")):
        info = b"INFO" + b"".join(b"%04x\2\0\0\0a\0" % (index % 65536) for index in range(min(count, 300_000)))
        return data[:12] + b"LIST" + struct.pack("<I", len(info)) + info + data[12:]
    frames = b"".join(b"TXXX\0\0\0\x0a\0\0\0%07x\0a" % index for index in range(min(count, 150_000)))
    size = bytes(len(frames) >> shift & 0x7F for shift in (21, 14, 7, 0))
    return b"ID3\3\0\0" + size + frames + data


def place(data: bytes, rng: random.Random) -> int:
    """Where to change `data`: half the time in its header, now and then at its end."""
    part = rng.random()
    if part < 0.5:
        return rng.randrange(min(256, len(data)))
    return rng.randrange(max(0, len(data) - 256), len(data)) if part < 0.6 else rng.randrange(len(data))


MUTATIONS: list[Callable[[bytes, bytes, random.Random], bytes]] = [
    *(flips, truncated, overwritten, spliced, joined, cut_out, repeated, forged_size, forged_size, tag_bomb),
]


class Stream(io.RawIOBase):
    """A pipe: bytes that can be read once, in small portions."""

    def __init__(self, data: bytes):
        self._file = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self._file.read(min(size, 10_000) if size > 0 else size)
