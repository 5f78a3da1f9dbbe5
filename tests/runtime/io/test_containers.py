"""Stated lengths against what is there: cut files, joined files, stale sizes, trailing bytes, masses of tags."""

import ctypes
import io
import struct
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from support.audio import speech_like

from afnext.runtime.errors import AudioError
from afnext.runtime.io import byte_source
from afnext.runtime.io.audio import load_audio
from afnext.runtime.io.decode import CODECS
from afnext.runtime.io.live_source import decoded_pieces

FORMATS = [
    ("WAV", "PCM_16"),
    ("WAV", "IMA_ADPCM"),
    ("WAV", "MS_ADPCM"),
    ("RF64", "PCM_16"),
    ("W64", "PCM_16"),
    ("AIFF", "PCM_16"),
    ("AU", "PCM_16"),
    ("CAF", "PCM_16"),
]


def written(container: str, subtype: str, seed: int, seconds: float = 3.0) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, speech_like(seconds, seed), 16_000, format=container, subtype=subtype)
    return file.getvalue()


@pytest.mark.parametrize(("container", "subtype"), FORMATS)
def test_a_cut_file_says_how_much_its_header_states(container, subtype, seed):
    data = written(container, subtype, seed)
    whole = load_audio(data)
    assert whole.warnings == ()
    cut = load_audio(data[: int(0.7 * len(data))])
    assert cut.duration == pytest.approx(0.7 * whole.duration, abs=0.1)
    assert f"of a stated {whole.duration:.1f}"[:-1] in " ".join(cut.warnings)


@pytest.mark.parametrize(("container", "subtype"), FORMATS)
def test_joined_files_are_heard_to_the_end(container, subtype, seed):
    parts = [written(container, subtype, seed), written(container, subtype, seed + 1, 2.0)]
    audio = load_audio(b"".join(parts))
    np.testing.assert_array_equal(audio.samples, np.concatenate([load_audio(part).samples for part in parts]))
    assert audio.warnings == ()


@pytest.mark.parametrize(("container", "subtype"), FORMATS)
def test_bytes_after_the_end_are_reported_unless_they_are_padding(container, subtype, seed):
    data = written(container, subtype, seed)
    samples = load_audio(data).samples
    junk = load_audio(data + np.random.default_rng(seed).bytes(20_000))
    np.testing.assert_array_equal(junk.samples, samples)
    assert "goes on for 20000 bytes" in junk.warnings[0]
    for harmless in (bytes(20_000), b"TAG" + bytes(125)):
        audio = load_audio(data + harmless)
        np.testing.assert_array_equal(audio.samples, samples)
        assert audio.warnings == ()


def test_a_stale_size_of_the_samples_in_a_file_of_the_right_size(seed):
    data = bytearray(written("WAV", "PCM_16", seed))
    samples = load_audio(data).samples
    data[40:44] = struct.pack("<I", 32_000)
    np.testing.assert_array_equal(load_audio(data).samples, samples)


def test_joined_m4a_files_are_heard_to_the_end(seed):
    parts = []
    for seconds in (2.0, 1.0):
        file = io.BytesIO()
        with av.open(file, "w", format="ipod") as output:
            stream = output.add_stream("alac", rate=16_000, layout="mono")
            stream.codec_context.format = "s16p"
            block = (speech_like(seconds, seed) * 32767).astype(np.int16)[None]
            for start in range(0, block.shape[1], 4096):
                piece = np.ascontiguousarray(block[:, start : start + 4096])
                frame = av.AudioFrame.from_ndarray(piece, format="s16p", layout="mono")
                frame.sample_rate, frame.pts = 16_000, start
                output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
        parts.append(file.getvalue())
    audio = load_audio(b"".join(parts))
    assert audio.duration == pytest.approx(3.0, abs=1e-3)


def test_what_follows_and_cannot_be_decoded_is_a_warning(seed):
    data = written("WAV", "PCM_16", seed)
    audio = load_audio(data + data[:20] + struct.pack("<H", 0x7777) + data[22:])
    assert len(audio.samples) == 48_000
    assert "what follows at 3.00 s cannot be decoded" in audio.warnings[0]


class AVCodec(ctypes.Structure):
    """The beginning of FFmpeg's AVCodec."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("long_name", ctypes.c_char_p),
        ("type", ctypes.c_int),
        ("id", ctypes.c_int),
    ]


def test_every_codec_is_allowed_by_the_name_of_the_decoder_that_ffmpeg_takes():
    libraries = list((Path(av.__file__).parents[1] / "av.libs").glob("*avcodec*"))
    if not libraries:
        pytest.skip("libavcodec is not beside PyAV")
    library = ctypes.CDLL(str(libraries[0]))
    library.avcodec_find_decoder.restype = ctypes.POINTER(AVCodec)
    library.avcodec_find_decoder_by_name.restype = ctypes.POINTER(AVCodec)
    for name in CODECS:
        codec = library.avcodec_find_decoder_by_name(name.encode())
        taken = library.avcodec_find_decoder(codec.contents.id)
        assert taken.contents.name.decode() in CODECS, name


@pytest.mark.parametrize("container", ["wav", "mpegts", "matroska", "avi", "mp2"])
def test_mp2_is_decoded_in_every_container(container, seed):
    assert load_audio(mp2(container, seed)).duration == pytest.approx(1.0, abs=0.05)


def mp2(container: str, seed: int) -> bytes:
    """A second."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream("mp2", rate=48_000, layout="mono")
        block = (speech_like(3.0, seed) * 32767).astype(np.int16)[None]
        for start in range(0, 48_000 // 1152 * 1152, 1152):
            piece = np.ascontiguousarray(block[:, start : start + 1152])
            frame = av.AudioFrame.from_ndarray(piece, format="s16", layout="mono")
            frame.sample_rate, frame.pts = 48_000, start
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize("container", ["avi", "matroska"])
def test_video_containers_that_are_cut_joined_or_followed_by_something_say_so(container, seed):
    data = mp2(container, seed)
    whole = load_audio(data)
    assert whole.warnings == ()
    cut = load_audio(data[: len(data) // 2])
    assert "cut short or damaged" in cut.warnings[0]
    assert 0 < cut.duration < whole.duration
    followed = load_audio(data + b"what is this" * 100)
    np.testing.assert_array_equal(followed.samples, whole.samples)
    assert "goes on for 1200 bytes" in followed.warnings[0]
    assert load_audio(data + bytes(3000)).warnings == ()
    joined = load_audio(data + data)
    assert joined.warnings == ()
    assert joined.duration == pytest.approx(2 * whole.duration, abs=0.05)


def test_bytes_after_the_objects_of_an_asf_are_reported(seed):
    data = mp2("asf", seed)
    whole, followed = load_audio(data), load_audio(data + b"what is this" * 100)
    assert whole.warnings == ()
    np.testing.assert_array_equal(followed.samples, whole.samples)
    assert "goes on for 1200 bytes" in followed.warnings[0]
    joined = load_audio(data + data)
    assert joined.warnings == ()
    assert joined.duration == pytest.approx(2 * whole.duration, abs=0.05)


def test_bytes_after_the_packets_of_a_transport_stream_are_reported(seed):
    data = mp2("mpegts", seed)
    whole, followed = load_audio(data), load_audio(data + b"what is this" * 100)
    assert whole.warnings == ()
    np.testing.assert_array_equal(followed.samples, whole.samples)
    assert "goes on for 1200 bytes" in followed.warnings[0]
    assert load_audio(data + data[:100]).warnings == ()  # a packet that a recorder cut
    joined = load_audio(data + written("WAV", "PCM_16", seed, 0.5))
    assert joined.duration == pytest.approx(whole.duration + 0.5, abs=0.05)


def test_a_long_avi_goes_on_in_further_riffs(seed):
    data = mp2("avi", seed)
    more = data + b"RIFF" + struct.pack("<I", 4 + 200) + b"AVIX" + bytes(range(200))
    assert load_audio(more).warnings == ()


# tags: a dictionary of n of them costs n ** 2


def flac_bomb(seed: int) -> bytes:
    data = written("FLAC", "PCM_16", seed, 0.5)
    tags = b"".join(struct.pack("<I", 8) + b"%06x=a" % index for index in range(100_000))
    block = bytes(4) + struct.pack("<I", 100_000) + tags
    return data[:42] + b"\4" + len(block).to_bytes(3, "big") + block + data[42:]


def wav_bomb(seed: int) -> bytes:
    data = written("WAV", "PCM_16", seed, 0.5)
    names = (bytes([65 + i % 26, 65 + i // 26 % 26, 65 + i // 676 % 26, 65 + i // 17_576]) for i in range(200_000))
    info = b"INFO" + b"".join(name + b"\2\0\0\0a\0" for name in names)
    return data[:12] + b"LIST" + struct.pack("<I", len(info)) + info + data[12:]


def id3_tag(frames: bytes) -> bytes:
    return b"ID3\3\0\0" + bytes(len(frames) >> shift & 0x7F for shift in (21, 14, 7, 0)) + frames


def id3_bomb() -> bytes:
    return id3_tag(b"".join(b"TXXX\0\0\0\x0a\0\0\0%07x\0a" % index for index in range(80_000)))


def mp3_bomb(seed: int) -> bytes:
    return id3_bomb() + written("MP3", "MPEG_LAYER_III", seed, 1.0)


def ogg_bomb(seed: int) -> bytes:
    data = written("OGG", "VORBIS", seed, 0.5)
    first = 27 + data[26] + sum(data[27 : 27 + data[26]])
    head = data[first:]
    lacing = head[27 : 27 + head[26]]
    body = head[27 + head[26] : 27 + head[26] + sum(lacing)]
    comments = next(index for index, segment in enumerate(lacing) if segment < 255) + 1
    setup = body[sum(lacing[:comments]) :]
    tags = b"".join(struct.pack("<I", 8) + b"%06x=a" % index for index in range(100_000))
    packets = [b"\3vorbis" + bytes(4) + struct.pack("<I", 100_000) + tags + b"\1", setup]
    segments = [s for packet in packets for s in [255] * (len(packet) // 255) + [len(packet) % 255]]
    content, made, sequence = b"".join(packets), b"", 1
    reverse = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
    while segments:
        table, segments = bytes(segments[:255]), segments[255:]
        page = b"OggS\0\0" + bytes(8) + data[14:18] + struct.pack("<I", sequence) + bytes(4) + bytes([len(table)])
        page += table + content[: sum(table)]
        content = content[sum(table) :]
        check = zlib.crc32(page.translate(reverse), 0xFFFFFFFF) ^ 0xFFFFFFFF
        made += page[:22] + check.to_bytes(4, "little").translate(reverse)[::-1] + page[26:]
        sequence += 1
    return data[:first] + made + head[27 + head[26] + sum(lacing) :]


BOMBS = {
    flac_bomb: ("FLAC", "PCM_16", 0.5),
    wav_bomb: ("WAV", "PCM_16", 0.5),
    mp3_bomb: ("MP3", "MPEG_LAYER_III", 1.0),
    ogg_bomb: ("OGG", "VORBIS", 0.5),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_masses_of_tags_are_hidden_from_ffmpeg(bomb, seed):
    """Each of these takes minutes where FFmpeg sees the tags; the suite's timeout would end them."""
    container, codec, seconds = BOMBS[bomb]
    data = bomb(seed)
    assert len(data) > 1_000_000
    expected = load_audio(written(container, codec, seed, seconds))
    np.testing.assert_array_equal(load_audio(data, max_decode_seconds=20).samples, expected.samples)


def test_a_few_tags_and_a_cover_change_nothing(seed):
    data = written("MP3", "MPEG_LAYER_III", seed)
    cover = id3_tag(b"APIC" + struct.pack(">I", 200_001) + bytes(2) + b"\0" * 200_001)
    np.testing.assert_array_equal(load_audio(cover + data).samples, load_audio(data).samples)


class Pipe(io.RawIOBase):
    """Bytes that can be read once."""

    def __init__(self, data: bytes):
        self._file = io.BytesIO(data)

    def readable(self):
        return True

    def read(self, size=-1):
        return self._file.read(size)


@pytest.mark.parametrize("small", [b"", id3_tag(bytes(100)), id3_tag(bytes(5000)), id3_tag(bytes(200_000))])
@pytest.mark.parametrize("bombs", [0, 1, 3])
def test_tags_of_a_stream_are_hidden_as_they_come(small, bombs, seed):
    """FFmpeg reads one tag after the other before it looks for sound; two of these take it a minute."""
    data = written("MP3", "MPEG_LAYER_III", seed)
    expected = np.concatenate([block for block, _ in decoded_pieces(Pipe(data), "pipe")])
    tagged = small + id3_bomb() * bombs + small + data
    heard = np.concatenate([block for block, _ in decoded_pieces(Pipe(tagged), "pipe")])
    np.testing.assert_array_equal(heard, expected)


def test_a_header_without_an_end_is_given_up(monkeypatch, seed):
    monkeypatch.setattr(byte_source, "MAX_HEADER_BYTES", 1 << 18)
    data = written("WAV", "PCM_16", seed)
    chunk = b"cart" + struct.pack("<I", 1 << 20) + bytes(1 << 20)
    with pytest.raises(AudioError, match="header of <bytes> is too large"):
        load_audio(data[:12] + b"bext" + chunk[4:] + data[12:])
