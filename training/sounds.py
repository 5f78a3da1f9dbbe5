"""The sound events of afnext-tiny, each drawn with random length, pitch and shape. All at 16 kHz with a peak of 1."""

import random

import numpy as np

from .voices import RATE

_PITCH_RANGES = {"low": (180.0, 380.0), "medium": (600.0, 1000.0), "high": (1700.0, 3400.0)}


def make_sound(kind: str, rng: random.Random) -> tuple[np.ndarray, str | None]:
    """Samples of a sound of `kind` (one of SOUNDS), float32, and the pitch of a tone ("low", "medium" or "high")."""
    if kind == "tone":
        pitch = rng.choice(sorted(_PITCH_RANGES))
        return _shaped(_sine(rng.uniform(*_PITCH_RANGES[pitch]), rng.uniform(0.5, 1.0)), 0.03), pitch
    samples = _MAKERS[kind](rng)
    return (samples / np.abs(samples).max()).astype(np.float32), None


def _time(seconds: float) -> np.ndarray:
    return np.arange(round(seconds * RATE)) / RATE


def _sine(frequency: float | np.ndarray, seconds: float) -> np.ndarray:
    """A sine whose frequency in hertz may change over time."""
    phase = np.cumsum(np.broadcast_to(frequency, _time(seconds).shape)) / RATE
    return np.asarray(np.sin(2 * np.pi * phase), np.float32)


def _shaped(samples: np.ndarray, fade: float) -> np.ndarray:
    ramp = np.minimum(1, np.arange(len(samples)) / (fade * RATE))
    return np.asarray(samples * ramp * ramp[::-1], np.float32)


def _noise(seconds: float, rng: random.Random) -> np.ndarray:
    return np.random.default_rng(rng.getrandbits(32)).standard_normal(round(seconds * RATE))


def _beep(rng: random.Random) -> np.ndarray:
    seconds, frequency = rng.uniform(0.09, 0.2), rng.uniform(900, 1600)
    return _shaped(np.tanh(rng.uniform(1.5, 4) * _sine(frequency, seconds)), 0.005)


def _chirp(rng: random.Random) -> np.ndarray:
    seconds, start = rng.uniform(0.2, 0.45), rng.uniform(400, 900)
    sweep = start * (rng.uniform(3, 6) ** (_time(seconds) / seconds))
    return _shaped(_sine(sweep, seconds), 0.01)


def _click(rng: random.Random) -> np.ndarray:
    return _noise(0.03, rng) * np.exp(-_time(0.03) / rng.uniform(0.001, 0.004))


def _burst(rng: random.Random) -> np.ndarray:
    return _shaped(_noise(rng.uniform(0.3, 0.8), rng), 0.02)


def _knock(rng: random.Random) -> np.ndarray:
    frequency, decay = rng.uniform(110, 260), rng.uniform(0.02, 0.05)
    thud = (_sine(frequency, 0.22) + 0.5 * _sine(2.3 * frequency, 0.22)) * np.exp(-_time(0.22) / decay)
    return np.asarray(thud + 0.2 * _noise(0.22, rng) * np.exp(-_time(0.22) / 0.004))


def _siren(rng: random.Random) -> np.ndarray:
    seconds, middle = rng.uniform(1.2, 2.0), rng.uniform(700, 1100)
    swing = np.sin(2 * np.pi * rng.uniform(1.5, 3) * _time(seconds))
    return _shaped(_sine(middle * (1 + 0.35 * swing), seconds), 0.03)


def _bell(rng: random.Random) -> np.ndarray:
    seconds, base = rng.uniform(0.7, 1.1), rng.uniform(500, 900)
    partials = ((1, 1.0), (2.76, 0.6), (5.4, 0.35), (8.93, 0.2))
    decays = {ratio: np.exp(-_time(seconds) * 4 * ratio**0.5) for ratio, _ in partials}
    return np.asarray(sum(level * _sine(base * ratio, seconds) * decays[ratio] for ratio, level in partials))


def _buzz(rng: random.Random) -> np.ndarray:
    seconds = rng.uniform(0.3, 0.7)
    return _shaped(2 * ((_time(seconds) * rng.uniform(90, 150)) % 1) - 1, 0.02)


_MAKERS = {
    "beep": _beep,
    "chirp": _chirp,
    "click": _click,
    "noise": _burst,
    "knock": _knock,
    "siren": _siren,
    "bell": _bell,
    "buzz": _buzz,
}
