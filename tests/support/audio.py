"""Generated recordings."""

import io
import wave

import numpy as np


def speech_like(seconds: float, seed: int) -> np.ndarray:
    """Noise in bursts with a moving tone: [round(seconds * 16000)] float32, nothing a test should depend on."""
    generator = np.random.default_rng(seed)
    t = np.arange(round(seconds * 16_000)) / 16_000
    envelope = np.clip(np.sin(2 * np.pi * 1.7 * t + generator.uniform(0, 6)), 0, 1)
    tone = np.sin(2 * np.pi * (200 + 120 * np.sin(0.9 * t)) * t)
    noise = generator.standard_normal(t.size)
    return ((0.4 * tone + 0.1 * noise) * envelope + 0.003 * noise).astype(np.float32)


def wav_bytes(samples: np.ndarray) -> bytes:
    """A 16 kHz, 16-bit mono wav file."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes((samples.clip(-1, 1) * 32767).astype("<i2").tobytes())
    return buffer.getvalue()
