"""Real and generated files of every common format against the expectations of FFmpeg and libsndfile."""

import io
import json
import re
import struct
import wave
from pathlib import Path
from typing import Any, BinaryIO, cast

import av
import numpy as np
import pytest
import soundfile
import soxr

from afnext.runtime.errors import AudioError
from afnext.runtime.io import decode
from afnext.runtime.io.audio import SAMPLE_RATE, load_audio
from afnext.runtime.io.decode import Decoder
from afnext.runtime.io.live_source import decoded_pieces

EXPECTATIONS = "vectors/decoder_expectations.json"
UNREADABLE = {
    "corrupt/empty.wav": "is empty",
    "corrupt/ogg_headers_only.ogg": "not an audio file",
    "corrupt/text_named.mp3": "not an audio file",
    "corrupt/text_named.wav": "not an audio file",
    "corrupt/wav_header_only_20_bytes.wav": "not an audio file",
    "corrupt/wav_unknown_codec.wav": "unknown codec",
    "odd/raw_s16le_16k_mono.pcm": "headerless PCM",
    "odd/wav_zero_samples.wav": "no audio samples",
}
CUT_SHORT = {
    "corrupt/flac_truncated.flac": "1.152 s of a stated 2.000 s",
    "corrupt/mp3_truncated_midframe.mp3": "0.975 s of a stated 2.000 s",
    "corrupt/wav_truncated_header_claims_more.wav": "0.250 s of a stated 2.000 s",
}
# RMS difference from libsndfile's decoder, in dB. Lossless files agree bit for bit before mixing. FFmpeg's Opus delays
# speech (SILK) by up to one sample at 48 kHz, and libsndfile decodes an Opus file of 16 kHz at that rate.
LOSSLESS_DB, LOSSY_DB, OPUS_DB = -130.0, -110.0, -15.0


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def decibels(error: np.ndarray, signal: np.ndarray) -> float:
    power = np.mean(np.square(signal, dtype=np.float64)) + 1e-12
    return float(10 * np.log10(np.mean(np.square(error, dtype=np.float64)) / power + 1e-30))


def test_every_vector_gives_the_expected_length_or_error(shared_data: Path):
    expectations = json.loads((shared_data / EXPECTATIONS).read_text())
    assert len(expectations) >= 38
    for name, expected in expectations.items():
        path = shared_data / name
        if name in UNREADABLE:
            with pytest.raises(AudioError, match=UNREADABLE[name]) as caught:
                load_audio(path)
            assert str(path) in str(caught.value)
            continue
        audio = load_audio(path)
        frames, rate = expected["ffmpeg"]["frames"], expected["ffmpeg"]["sr"]
        assert len(audio.samples) == -(-frames * SAMPLE_RATE // rate), name
        assert (audio.sample_rate_in, audio.channels_in) == (rate, expected["ffmpeg"]["channels"]), name
        if name in CUT_SHORT:
            assert CUT_SHORT[name] in " ".join(audio.warnings)
        else:
            assert audio.warnings == (), name
        np.testing.assert_array_equal(load_audio(path.read_bytes()).samples, audio.samples)


def test_samples_agree_with_libsndfile(shared_data: Path):
    compared = 0
    for path in sorted(shared_data.glob("odd/*")) + sorted(shared_data.glob("speech/*")):
        try:
            reference, rate = soundfile.read(path, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError:
            continue
        if not len(reference):
            continue
        mono = reference.mean(axis=1, dtype=np.float32)
        mono = mono if rate == SAMPLE_RATE else soxr.resample(mono, rate, SAMPLE_RATE, "HQ")
        samples = load_audio(path).samples
        assert 0 <= len(samples) - len(mono) <= 1, path.name
        lossy = {".opus": OPUS_DB, ".ogg": LOSSY_DB, ".mp3": LOSSY_DB}
        limit = lossy.get(path.suffix, LOSSLESS_DB)
        assert decibels(samples[: len(mono)] - mono, mono) < limit, path.name
        compared += 1
    assert compared >= 30


# generated formats


def tone(rate: int, channels: int = 1, seconds: float = 1.0) -> np.ndarray:
    """float32 [n, channels], a 440 Hz tone of amplitude 0.3 in every channel."""
    mono = 0.3 * np.sin(2 * np.pi * 440 * np.arange(round(rate * seconds)) / rate)
    return np.repeat(mono[:, None], channels, axis=1).astype(np.float32)


def encode(codec: str, container: str, rate: int, layout: str, sample_format: str, seconds: float = 1.0) -> bytes:
    """A tone encoded with FFmpeg."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream: Any = output.add_stream(codec, rate=rate, layout=layout)
        stream.codec_context.format = sample_format
        stream.codec_context.open()
        size = stream.codec_context.frame_size or 1024
        samples = tone(rate, stream.codec_context.layout.nb_channels, seconds)
        scale = {"s16": (32767, "i2"), "s32": (2**31 - 1, "i4")}.get(sample_format.rstrip("p"), (1, "f4"))
        samples = (samples * scale[0]).astype(scale[1])
        for start in range(0, len(samples), size):
            block = samples[start : start + size]
            block = block.T if sample_format.endswith("p") else block.reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(block), format=sample_format, layout=layout)
            frame.sample_rate, frame.pts = rate, start
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def amplitude(samples: np.ndarray) -> float:
    """Of the 440 Hz part in the middle of 16 kHz `samples`."""
    middle = samples[4000:12000].astype(np.float64)
    return float(2 * abs(np.mean(middle * np.exp(-2j * np.pi * 440 * np.arange(8000) / SAMPLE_RATE))))


@pytest.mark.parametrize(
    ("codec", "container", "rate", "layout", "sample_format"),
    [
        ("aac", "mp4", 44_100, "stereo", "fltp"),
        ("aac", "adts", 44_100, "stereo", "fltp"),
        ("alac", "ipod", 44_100, "stereo", "s16p"),
        ("flac", "matroska", 44_100, "stereo", "s16"),
        ("libopus", "webm", 48_000, "stereo", "flt"),
        ("libopus", "ogg", 48_000, "7.1", "flt"),
        ("libmp3lame", "mp3", 44_100, "stereo", "fltp"),
        ("libmp3lame", "avi", 44_100, "stereo", "fltp"),
        ("mp2", "mpegts", 44_100, "stereo", "s16"),
        ("ac3", "mov", 44_100, "stereo", "fltp"),
        ("eac3", "matroska", 48_000, "stereo", "fltp"),
        ("adpcm_ms", "wav", 22_050, "mono", "s16"),
        ("adpcm_ima_wav", "wav", 22_050, "mono", "s16p"),
        ("pcm_s24be", "aiff", 44_100, "stereo", "s32"),
        ("pcm_f32le", "caf", 44_100, "stereo", "flt"),
        ("pcm_s16le", "w64", 44_100, "stereo", "s16"),
        ("pcm_s16le", "mov", 44_100, "stereo", "s16"),
        ("pcm_s16le", "avi", 44_100, "stereo", "s16"),
        ("pcm_mulaw", "au", 8_000, "mono", "s16"),
    ],
)
def test_common_codecs_keep_the_tone(codec, container, rate, layout, sample_format):
    audio = load_audio(encode(codec, container, rate, layout, sample_format))
    assert audio.sample_rate_in == rate
    assert audio.channels_in == av.AudioLayout(layout).nb_channels
    assert audio.duration == pytest.approx(1.0, abs=0.05)
    assert amplitude(audio.samples) == pytest.approx(0.3, rel=0.06)
    assert audio.warnings == ()


@pytest.mark.parametrize(
    ("file_format", "subtype", "tolerance"),
    [
        ("WAV", "PCM_U8", 1 / 128),
        ("WAV", "PCM_16", 1 / 32768),
        ("WAV", "PCM_24", 2**-23),
        ("WAV", "PCM_32", 1e-7),
        ("WAV", "FLOAT", 0),
        ("WAV", "DOUBLE", 0),
        ("WAV", "ULAW", 0.03),
        ("WAV", "ALAW", 0.03),
        ("WAVEX", "PCM_24", 2**-23),
        ("RF64", "PCM_16", 1 / 32768),
        ("W64", "PCM_24", 2**-23),
        ("AIFF", "PCM_S8", 1 / 128),
        ("AIFF", "PCM_24", 2**-23),
        ("AIFF", "FLOAT", 0),
        ("AU", "PCM_16", 1 / 32768),
        ("CAF", "PCM_24", 2**-23),
        ("FLAC", "PCM_S8", 1 / 128),
        ("FLAC", "PCM_16", 1 / 32768),
        ("FLAC", "PCM_24", 2**-23),
    ],
)
@pytest.mark.parametrize("channels", [1, 2, 8])
def test_lossless_formats_return_what_was_written(file_format, subtype, tolerance, channels, rng):
    samples = rng.uniform(-0.9, 0.9, (20_002, channels)).astype(np.float32)
    file = io.BytesIO()
    soundfile.write(file, samples, SAMPLE_RATE, format=file_format, subtype=subtype)
    audio = load_audio(file)
    expected = samples.mean(axis=1, dtype=np.float64)
    np.testing.assert_allclose(audio.samples, expected, rtol=0, atol=tolerance + 2e-7)
    assert audio.channels_in == channels


@pytest.mark.parametrize("channels", [9, 32])
def test_many_channels_are_averaged(channels, rng):
    samples = rng.uniform(-0.9, 0.9, (5000, channels)).astype(np.float32)
    file = io.BytesIO()
    soundfile.write(file, samples, SAMPLE_RATE, format="WAV", subtype="FLOAT")
    np.testing.assert_allclose(load_audio(file).samples, samples.mean(axis=1, dtype=np.float64), rtol=0, atol=2e-7)


@pytest.mark.parametrize("around", [1, 1024, 1152, 4096, 32_768, 65_536])
@pytest.mark.parametrize("file_format", ["WAV", "FLAC", "OGG", "MP3"])
def test_no_sample_is_lost_at_a_block_boundary(around, file_format, rng):
    if file_format == "MP3":
        around += 20 * 1152  # FFmpeg does not always recognise an MP3 of two frames of noise
    for n in {max(1, around - 1), around, around + 1}:
        samples = rng.uniform(-0.5, 0.5, n).astype(np.float32)
        file = io.BytesIO()
        soundfile.write(file, samples, SAMPLE_RATE, format=file_format)
        audio = load_audio(file)
        first_page = file_format == "OGG" and n < 30_000  # there FFmpeg trims Vorbis only to whole blocks
        assert abs(len(audio.samples) - n) <= (256 if first_page else 0)
        if file_format in ("WAV", "FLAC"):
            np.testing.assert_allclose(audio.samples, samples, rtol=0, atol=1 / 32768)


def test_the_sound_of_a_video_is_used_and_a_silent_video_is_an_error(shared_data: Path):
    assert load_audio(shared_data / "odd/video_with_aac.mp4").duration == pytest.approx(1.0, abs=0.03)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream: Any = output.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for _ in range(3):
            output.mux(stream.encode(av.VideoFrame(32, 32, "yuv420p")))
        output.mux(stream.encode(None))
    with pytest.raises(AudioError, match="no audio stream"):
        load_audio(file)


def test_the_first_of_several_audio_streams_is_used_and_said(rng):
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as output:
        streams: list[Any] = [output.add_stream("pcm_s16le", rate=16_000, layout="mono") for _ in range(2)]
        for stream, level in zip(streams, (1000, 2000), strict=True):
            frame = av.AudioFrame.from_ndarray(np.full((1, 1600), level, np.int16), format="s16", layout="mono")
            frame.sample_rate = 16_000
            output.mux(stream.encode(frame))
    audio = load_audio(file)
    np.testing.assert_array_equal(audio.samples, np.full(1600, 1000 / 32768, np.float32))
    assert "2 audio streams" in audio.warnings[0]


def test_concatenated_ogg_files_are_heard_to_the_end():
    parts = []
    for _ in range(2):
        file = io.BytesIO()
        soundfile.write(file, tone(22_050), 22_050, format="OGG", subtype="VORBIS")
        parts.append(file.getvalue())
    assert load_audio(parts[0] + parts[1]).duration == pytest.approx(2.0, abs=0.05)


def test_a_rate_that_changes_midway_keeps_pitch_and_time():
    wide, narrow = encode("aac", "adts", 44_100, "stereo", "fltp"), encode("aac", "adts", 16_000, "mono", "fltp")
    for first, second, rate, channels in ((wide, narrow, 44_100, 2), (narrow, wide, 16_000, 1)):
        audio = load_audio(first + second)
        assert (audio.sample_rate_in, audio.channels_in) == (rate, channels)
        assert audio.duration == pytest.approx(load_audio(first).duration + load_audio(second).duration, abs=0.03)
        assert amplitude(audio.samples) == pytest.approx(0.3, rel=0.01)
        assert amplitude(audio.samples[len(audio.samples) // 2 :]) == pytest.approx(0.3, rel=0.01)


# damage


def wav_16(samples: np.ndarray, rate: int = SAMPLE_RATE) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as output:
        output.setnchannels(1)
        output.setsampwidth(2)
        output.setframerate(rate)
        output.writeframes((samples * 32767).astype("<i2").tobytes())
    return file.getvalue()


def test_a_wav_cut_anywhere_gives_its_readable_part(rng):
    samples = rng.uniform(-0.9, 0.9, 50_000)
    data = wav_16(samples)
    for kept in (*rng.integers(1, 49_000, 5), 49_900):
        audio = load_audio(data[: 44 + 2 * kept])
        assert len(audio.samples) == kept
        told = re.search(r"decoded ([\d.]+) s of a stated 3\.125 s", audio.warnings[0])
        assert told is not None
        assert float(told[1]) == pytest.approx(kept / SAMPLE_RATE, abs=6e-4)


def test_a_wav_that_was_streamed_states_no_length(rng):
    data = bytearray(wav_16(rng.uniform(-0.9, 0.9, 5000)))
    for size in (0xFFFFFFFF, 0x7FFFFFFF, 0x80000000):
        data[40:44] = struct.pack("<I", size)
        audio = load_audio(data)
        assert (len(audio.samples), audio.warnings) == (5000, ())


def test_chunks_around_the_samples_are_not_sound(rng):
    data = wav_16(rng.uniform(-0.9, 0.9, 5000))
    odd_chunk = b"LIST" + struct.pack("<I", 5) + b"INFOx\0"
    audio = load_audio(data[:36] + odd_chunk + data[36:] + b"id3 " + struct.pack("<I", 4) + b"ID3\0")
    np.testing.assert_array_equal(audio.samples, load_audio(data).samples)
    assert audio.warnings == ()


def test_damage_in_the_middle_is_skipped_with_a_warning(shared_data: Path):
    for name in ("odd/flac_16k_mono_s16.flac", "odd/mp3_cbr32k_16k_mono.mp3", "odd/aac_lc_44k_stereo.m4a"):
        data = bytearray((shared_data / name).read_bytes())
        whole = load_audio(bytes(data))
        middle = len(data) // 2
        data[middle : middle + 400] = bytes((37 * k) & 255 for k in range(400))
        audio = load_audio(data)
        assert audio.warnings, name
        assert 0.8 * len(whole.samples) < len(audio.samples) <= len(whole.samples), name
        quarter = len(whole.samples) // 4
        assert decibels(audio.samples[:quarter] - whole.samples[:quarter], whole.samples[:quarter]) < -60, name


def test_a_flipped_bit_in_a_flac_is_noticed(rng):
    samples = rng.uniform(-0.5, 0.5, 32_000)
    file = io.BytesIO()
    soundfile.write(file, samples, SAMPLE_RATE, format="FLAC")
    whole = file.getvalue()
    for position in rng.integers(len(whole) // 4, len(whole) - 20, 10):
        data = bytearray(whole)
        data[position] ^= 1 << int(rng.integers(8))
        audio = load_audio(data)
        assert audio.warnings, f"byte {position}"
        assert len(audio.samples) >= 20_000
        assert np.abs(audio.samples).max() < 0.51, "noise of the damaged part must not be heard"


def test_an_mp3_that_states_no_length_is_not_called_short():
    """FFmpeg guesses its length from the bit rate of the beginning, here three times the truth."""
    parts = []
    for bit_rate, seconds in ((32_000, 5), (256_000, 2)):
        file = io.BytesIO()
        with av.open(file, "w", format="mp3", options={"write_xing": "0", "id3v2_version": "0"}) as output:
            stream: Any = output.add_stream("libmp3lame", rate=44_100, layout="mono")
            stream.bit_rate = bit_rate
            for start in range(0, seconds * 44_100, 1152):
                block = tone(44_100, 1, seconds)[start : start + 1152].T
                frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(block), format="fltp", layout="mono")
                frame.sample_rate, frame.pts = 44_100, start
                output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
        parts.append(file.getvalue())
    audio = load_audio(b"".join(parts))
    assert audio.duration == pytest.approx(7, abs=0.2)
    assert audio.warnings == ()


def alac(seconds: float = 1.0) -> bytes:
    return encode("alac", "ipod", 44_100, "stereo", "s16p", seconds)


def spoil(mp4: bytes, rng: np.random.Generator, begin: float, end: float) -> bytes:
    """`mp4` with the part of its sound between two fractions of it replaced by noise."""
    name = mp4.index(b"mdat")
    (size,) = struct.unpack(">I", mp4[name - 4 : name])
    first, last = (name + 4 + int(fraction * (size - 8)) for fraction in (begin, end))
    return mp4[:first] + rng.bytes(last - first) + mp4[last:]


def test_a_file_of_damaged_packets_only_is_an_error(rng):
    with pytest.raises(AudioError, match="none of the audio"):
        load_audio(spoil(alac(), rng, 0, 1))


def test_endless_damage_is_given_up(rng, monkeypatch):
    monkeypatch.setattr(decode, "MAX_DAMAGED_IN_A_ROW", 3)
    audio = load_audio(spoil(alac(3), rng, 0.5, 1))
    assert 1.0 < audio.duration < 1.8
    assert amplitude(audio.samples) == pytest.approx(0.3, rel=0.01)
    assert "given up after 3 damaged packets" in " ".join(audio.warnings)


def test_truncation_does_not_silence_the_warnings(rng):
    data = spoil(alac(3), rng, 0.4, 0.6)
    whole = load_audio(data)
    assert whole.duration == pytest.approx(3.0, abs=0.05), "silence stands where the damage is"
    assert "damaged packet" in whole.warnings[0]
    cut = load_audio(data, max_seconds=whole.duration - 0.1, truncate=True)
    assert cut.truncated
    assert cut.warnings == whole.warnings[:1]
    assert load_audio(data, max_seconds=0.9, truncate=True).warnings == (), "what was not decoded cannot be damaged"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("channel", [0, 1])
def test_a_senseless_sample_in_a_file_is_named(bad, channel, rng):
    samples = rng.uniform(-0.9, 0.9, (100_000, 2))
    samples[70_007, channel] = bad
    file = io.BytesIO()
    soundfile.write(file, samples, 44_100, format="WAV", subtype="DOUBLE")
    with pytest.raises(AudioError, match=r"1\.58746\d s \(sample 70007\)"):
        load_audio(file)


def test_samples_above_full_scale_are_kept():
    samples = np.linspace(-3.5, 3.5, 1000).astype(np.float32)
    file = io.BytesIO()
    soundfile.write(file, samples, SAMPLE_RATE, format="WAV", subtype="FLOAT")
    np.testing.assert_array_equal(load_audio(file).samples, samples)


@pytest.mark.parametrize(
    ("codec", "container", "layout", "sample_format"),
    [("mp3", "mp3", "stereo", "fltp"), ("flac", "flac", "mono", "s16"), ("aac", "adts", "5.1", "fltp")],
)
def test_frames_of_files_are_mixed_together_and_those_of_streams_at_once(
    codec: str, container: str, layout: str, sample_format: str
) -> None:
    """What comes after a frame of a stream may not be there yet. The samples are the same."""

    class Pipe(io.RawIOBase):
        def __init__(self, data: bytes):
            self._data = io.BytesIO(data)

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            return self._data.readinto(buffer)

    data = encode(codec, container, 44_100, layout, sample_format, seconds=5.0)
    with Decoder(io.BytesIO(data), "file") as decoder:
        of_file = [block for block, rate in decoder.blocks()]
    of_stream = [block for block, rate in decoded_pieces(cast(BinaryIO, Pipe(data)), "stream")]
    assert len(of_file) <= 5 * 44_100 // decode.SAMPLES_AT_ONCE + 1
    assert max(map(len, of_file)) <= 44_100
    assert len(of_stream) > 3 * len(of_file)
    whole = np.concatenate(of_file)
    assert np.array_equal(whole, np.concatenate(of_stream)[: len(whole)])  # a stream's end may not say what is padding


@pytest.mark.parametrize(("layout", "sample_format"), [("stereo", "s16"), ("5.1", "s32"), ("5.1", "fltp")])
def test_frames_that_grow_and_shrink_keep_their_samples(
    layout: str, sample_format: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames of any length are mixed together, one longer than all that are usually mixed at once among them."""
    packed = np.dtype({"s16": "<i2", "s32": "<i4", "flt": "<f4"}[sample_format.rstrip("p")])
    channels = av.AudioLayout(layout).nb_channels
    sizes = [*rng.integers(1, 3000, 40), 60_000, *rng.integers(1, 3000, 40)]
    if packed.kind == "f":
        samples = rng.uniform(-1, 1, (channels, sum(sizes))).astype(packed)
        expected = samples
    else:
        samples = rng.integers(-(2**15), 2**15, (channels, sum(sizes))).astype(packed)
        expected = samples.astype(np.float32) / np.float32(2.0 ** (8 * packed.itemsize - 1))
    frames, start = [], 0
    for size in sizes:
        block = samples[:, start : start + size]
        block = block if sample_format.endswith("p") else block.T.reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(block), format=sample_format, layout=layout)
        frame.sample_rate = 96_000
        frames.append(frame)
        start += size

    class Packets:
        def decode(self) -> list[av.AudioFrame]:
            return frames

        pts = None

    with Decoder(io.BytesIO(encode("pcm_s16le", "wav", 8000, "mono", "s16")), "file") as decoder:
        monkeypatch.setattr(decoder, "_packets", lambda: iter([Packets()]))
        monkeypatch.setattr(decoder, "_next_part", lambda: False)
        monkeypatch.setattr(decoder, "_check_length", lambda seconds: None)
        blocks = [block for block, rate in decoder.blocks()]
    assert len(blocks) < len(sizes)
    np.testing.assert_array_equal(np.concatenate(blocks), expected.mean(axis=0, dtype=np.float32))


def wav(data: bytes, bits: int) -> bytes:
    """A WAV file that says that `data` is stereo PCM of so many bits at 44.1 kHz."""
    size = bits // 4
    head = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(data), b"WAVE", b"fmt ", 16, 1, 2, 44_100, 44_100 * size,
                       size, bits, b"data", len(data))  # fmt: skip
    return head + data


def test_samples_of_64_bits_are_an_error() -> None:
    with pytest.raises(AudioError, match=r"holds samples in the format s64, .* convert it to WAV with 16 or 24 bits"):
        load_audio(wav(bytes(160_000), 64))


def test_a_wav_file_is_not_searched_for_other_codecs_to_its_end(rng: np.random.Generator) -> None:
    """FFmpeg would look for DTS in the first five megabytes, which takes longer than to decode them."""

    class Counting(io.BytesIO):
        given = 0

        def read(self, size: int | None = -1) -> bytes:
            data = super().read(size)
            self.given += len(data)
            return data

    file = Counting(wav(rng.integers(0, 256, 6_000_000, np.uint8).tobytes(), 16))
    with Decoder(file, "file") as decoder:
        next(decoder.blocks())
    assert file.given < 2_000_000


def test_dts_disguised_as_pcm_is_named(shared_data: Path) -> None:
    with av.open(str(shared_data / "faults" / "first_track_is_dts.mkv")) as container:
        track = container.streams.audio[0]
        dts = b"".join(bytes(packet) for packet in container.demux(track))
    for lead in (0, 44_100):
        with pytest.raises(AudioError, match="uses the codec dca"):
            load_audio(wav((bytes(lead) + dts)[:400_000], 16))
