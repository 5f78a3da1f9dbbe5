"""Ogg streams with damaged, missing and cut pages, and chains, against the intact stream."""

import io

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from support.audio import speech_like

from afnext.runtime.io.audio import load_audio

SECONDS = 8.0


def ogg(subtype: str, rate: int = 16_000, seconds: float = SECONDS, seed: int = 5) -> bytes:
    file = io.BytesIO()
    samples = speech_like(seconds * rate / 16_000, seed)
    soundfile.write(file, samples, rate, format="OGG", subtype=subtype)
    return file.getvalue()


def pages(data: bytes) -> list[bytes]:
    found, offset = [], 0
    while offset < len(data):
        size = 27 + data[offset + 26] + sum(data[offset + 27 : offset + 27 + data[offset + 26]])
        found.append(data[offset : offset + size])
        offset += size
    return found


FILES = {"vorbis": ogg("VORBIS"), "opus": ogg("OPUS")}


@pytest.mark.parametrize("name", FILES)
def test_an_intact_stream_gives_no_warning(name):
    audio = load_audio(FILES[name])
    assert audio.warnings == ()
    assert audio.duration == pytest.approx(SECONDS, abs=0.01)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_costs_a_page_and_moves_nothing(name, seed):
    rng = np.random.default_rng(seed)
    whole = load_audio(FILES[name]).samples
    for _ in range(6):
        data = bytearray(FILES[name])
        first_audio = sum(map(len, pages(FILES[name])[:3]))
        last_page = len(data) - len(pages(FILES[name])[-1])
        place = int(rng.integers(first_audio, last_page))
        data[place] ^= 1 << int(rng.integers(8))
        audio = load_audio(data)
        assert len(audio.samples) == pytest.approx(len(whole), abs=64), place
        assert "damaged or missing; silence" in audio.warnings[0]
        same = np.abs(audio.samples[: len(whole)] - whole[: len(audio.samples)]) < 1e-3
        assert same.mean() > 0.6, "what is not damaged stays where it was"


@pytest.mark.parametrize("name", FILES)
def test_missing_pages_are_silence(name):
    parts = pages(FILES[name])
    middle = len(parts) // 2
    whole, audio = load_audio(FILES[name]), load_audio(b"".join(parts[:middle] + parts[middle + 1 :]))
    assert len(audio.samples) == pytest.approx(len(whole.samples), abs=64)
    assert "1 page of the Ogg stream damaged or missing" in audio.warnings[0]
    np.testing.assert_allclose(audio.samples[-8000:], whole.samples[: len(audio.samples)][-8000:], atol=1e-3)


@settings(max_examples=20)
@given(st.sampled_from(sorted(FILES)), st.floats(0.4, 0.995))
def test_a_cut_stream_keeps_every_whole_packet(name, kept):
    data = FILES[name]
    audio = load_audio(data[: int(kept * len(data))])
    assert audio.duration > kept * SECONDS - 0.9, "no more is lost than the cut and the unevenness of the bit rate"
    assert "cut short" in " ".join(audio.warnings)


def test_a_cut_loses_a_packet_and_not_a_page():
    data = FILES["opus"]
    last = len(pages(data)[-2]) + len(pages(data)[-1])
    begins = len(data) - last
    half = load_audio(data[: begins + last // 4])
    none = load_audio(data[:begins])
    assert half.duration > none.duration + 0.1


@pytest.mark.parametrize(
    ("first", "second"), [(("VORBIS", 16_000), ("VORBIS", 44_100)), (("OPUS", 48_000), ("VORBIS", 8000))]
)
def test_a_chain_of_two_rates_is_heard_wholly(first, second):
    parts = [ogg(*first, seconds=3.0), ogg(*second, seconds=2.0)]
    audio = load_audio(b"".join(parts))
    alone = [load_audio(part).samples for part in parts]
    np.testing.assert_array_equal(audio.samples, np.concatenate(alone))
    assert audio.sample_rate_in == first[1]
    assert audio.warnings == ()


def test_a_stream_that_does_not_start_at_zero_has_no_silence_in_front():
    parts = pages(FILES["opus"])
    audio = load_audio(b"".join(parts[:2] + parts[4:]))
    assert audio.samples[:4000].any()
    assert audio.duration < SECONDS - 1
    assert audio.warnings == ()


@pytest.mark.parametrize("name", FILES)
def test_damage_at_the_start_is_silence_in_front(name):
    parts = pages(FILES[name])
    data, place = bytearray(FILES[name]), sum(map(len, parts[:2])) + 400
    data[place + (len(parts[2]) if name == "vorbis" and len(parts[2]) < 1000 else 0)] ^= 1
    audio = load_audio(data)
    assert len(audio.samples) == pytest.approx(len(load_audio(FILES[name]).samples), abs=64)
    assert not audio.samples[:4000].any()
    assert "1 page" in audio.warnings[0]


def test_a_thousand_links_do_not_end_in_a_recursion(seed):
    link = ogg("VORBIS", seconds=0.05)
    audio = load_audio(link * 1200)
    assert audio.duration == pytest.approx(1200 * load_audio(link).duration, rel=1e-3)


def test_noise_between_pages_is_passed_over(seed):
    rng = np.random.default_rng(seed)
    parts = pages(FILES["vorbis"])
    noisy = b"".join(part + rng.bytes(int(rng.integers(0, 500))) for part in parts[:-1]) + parts[-1]
    np.testing.assert_array_equal(load_audio(noisy).samples, load_audio(FILES["vorbis"]).samples)
