"""Sound events are finite, of unit peak, and as high as they are called."""

import random

import numpy as np
import pytest

from training.sounds import make_sound
from training.vocabulary import SOUNDS
from training.voices import RATE


@pytest.mark.parametrize("kind", SOUNDS)
def test_sounds_are_audible_and_bounded(kind: str, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(20):
        samples, pitch = make_sound(kind, rng)
        assert samples.dtype == np.float32
        assert np.isfinite(samples).all()
        assert 0.5 < np.abs(samples).max() <= 1.0001
        assert 0.02 <= len(samples) / RATE <= 2.1
        assert (pitch is not None) == (kind == "tone")


def test_the_pitch_of_a_tone_is_where_its_spectrum_peaks(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(30):
        samples, pitch = make_sound("tone", rng)
        peak = np.abs(np.fft.rfft(samples)).argmax() * RATE / len(samples)
        assert pitch == ("low" if peak < 500 else "medium" if peak < 1300 else "high")
