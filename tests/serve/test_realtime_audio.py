"""Audio of realtime sessions: G.711 against libsndfile, the buffer against a list, where speech begins and ends."""

import base64
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("starlette", reason="serving needs the extra `serve`")
import soundfile

from afnext.serve.errors import ApiError
from afnext.serve.realtime_audio import Buffer, Detector, decoded

RATE = 8000


@pytest.mark.parametrize(("encoding", "subtype"), [("audio/pcmu", "ULAW"), ("audio/pcma", "ALAW")])
def test_all_values_of_g711_are_those_of_libsndfile(encoding: str, subtype: str) -> None:
    content = bytes(range(256))
    expected, _ = soundfile.read(
        io.BytesIO(content), samplerate=RATE, channels=1, format="RAW", subtype=subtype, dtype="int16"
    )
    assert np.array_equal(decoded(base64.b64encode(content).decode(), encoding), expected)


@pytest.mark.parametrize("data", [None, 3, "?", "AAAA", "AA==\n", "é"])
def test_what_is_no_audio_is_refused(data: object) -> None:
    """The base64 "AAAA" is three bytes, a sample and a half."""
    with pytest.raises(ApiError) as error:
        decoded(data, "audio/pcm")
    assert error.value.code == "invalid_audio"


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(-5, 80), st.booleans()), max_size=20))
def test_the_buffer_is_a_list_with_positions(steps: list[tuple[int, int, bool]]) -> None:
    buffer, everything, start = Buffer(), np.empty(0, np.int16), 0
    for count, position, take in steps:
        piece = np.arange(len(everything), len(everything) + count).astype(np.int16)
        everything = np.concatenate([everything, piece])
        buffer.append(piece)
        end = max(start, min(position, len(everything)))
        if take:
            assert np.array_equal(buffer.take(position), everything[start:end])
        else:
            buffer.drop(position)
        start = end
        assert (buffer.start, buffer.end) == (start, len(everything))


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 900), min_size=1, max_size=30))
def test_turns_do_not_depend_on_the_pieces(seed: int, sizes: list[int]) -> None:
    rng = np.random.default_rng(seed)
    loudness = np.repeat(rng.choice([0, 6000], 40), rng.integers(50, 1500, 40))
    samples = (loudness * rng.uniform(-1, 1, len(loudness))).astype(np.int16)
    whole = Detector(RATE, threshold=0.5, silence_ms=300)
    expected = whole.push(samples)
    pieces = Detector(RATE, threshold=0.5, silence_ms=300)
    turns, start = [], 0
    for size in [*sizes, len(samples)]:
        turns += pieces.push(samples[start : start + size])
        start += size
    assert turns == expected
    assert pieces.speaking == whole.speaking


def test_speech_begins_and_ends_where_the_sound_does() -> None:
    rng = np.random.default_rng(7)
    loud = (6000 * rng.uniform(-1, 1, RATE)).astype(np.int16)
    quiet = np.zeros(RATE, np.int16)
    click = quiet.copy()
    click[100:200] = 20000
    turns = Detector(RATE, threshold=0.5, silence_ms=500).push(np.concatenate([click, loud, quiet, loud, quiet]))
    assert [turn.kind for turn in turns] == ["started", "stopped"] * 2
    assert [turn.position / RATE for turn in turns] == pytest.approx([1.0, 2.5, 3.0, 4.5], abs=0.021)
