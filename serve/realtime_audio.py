"""Audio of realtime sessions: samples from and to base64, voice activity detection, and the recording as a file."""

import base64
import binascii
import wave
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .errors import ApiError

_FRAME_SECONDS = 0.02
_FRAMES_OF_SPEECH = 3  # in a row; a click is shorter


def decoded(data: Any, encoding: str) -> np.ndarray:
    """Samples, int16 [n], of audio in base64. encoding: "audio/pcm" (16 bits, little endian), "audio/pcmu" or
    "audio/pcma". Raises ApiError for anything else."""
    if not isinstance(data, str):
        raise ApiError(400, "invalid_audio", "audio has to be samples in base64", param="audio")
    try:
        content = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, "invalid_audio", f"audio is not valid base64 ({error})", param="audio") from None
    if encoding != "audio/pcm":
        table = _A_LAW if encoding == "audio/pcma" else _MU_LAW
        samples: np.ndarray = table[np.frombuffer(content, np.uint8)]
        return samples
    if len(content) % 2:
        raise ApiError(400, "invalid_audio", "audio/pcm has two bytes per sample; these are odd", param="audio")
    return np.frombuffer(content, "<i2").astype(np.int16)


def _mu_law() -> np.ndarray:
    """The value of each byte of G.711 mu-law, int16 [256]."""
    code = ~np.arange(256, dtype=np.int32) & 0xFF
    exponent, mantissa = code >> 4 & 7, code & 15
    magnitude = ((2 * mantissa + 33) << (exponent + 2)) - 132
    return np.where(code & 0x80, -magnitude, magnitude).astype(np.int16)


def _a_law() -> np.ndarray:
    """The value of each byte of G.711 A-law, int16 [256]."""
    code = np.arange(256, dtype=np.int32) ^ 0x55
    exponent, mantissa = code >> 4 & 7, code & 15
    magnitude = np.where(exponent == 0, 2 * mantissa + 1, (2 * mantissa + 33) << np.maximum(exponent - 1, 0)) << 3
    return np.where(code & 0x80, magnitude, -magnitude).astype(np.int16)


_MU_LAW, _A_LAW = _mu_law(), _a_law()


def encoded(samples: np.ndarray, encoding: str) -> str:
    """Samples, int16 [n], in base64, in one of the encodings of `decoded`; G.711 rounds to the nearest value."""
    if encoding == "audio/pcm":
        return base64.b64encode(samples.astype("<i2").tobytes()).decode()
    table = _A_LAW if encoding == "audio/pcma" else _MU_LAW
    order = np.argsort(table, kind="stable")
    values = table[order].astype(np.int32)
    codes = order[np.searchsorted((values[1:] + values[:-1]) / 2, samples)]
    return base64.b64encode(codes.astype(np.uint8).tobytes()).decode()


class Recording:
    """The samples of a session in a WAV file."""

    def __init__(self, path: Path, rate: int):
        self.path = path
        self._file = wave.open(str(path), "wb")  # noqa: SIM115
        self._file.setparams((1, 2, rate, 0, "NONE", ""))

    def append(self, samples: np.ndarray) -> None:
        """Write samples, int16 [n]."""
        self._file.writeframesraw(samples.astype("<i2").tobytes())

    def close(self) -> None:
        """Complete the file's header."""
        self._file.close()


@dataclass(frozen=True)
class Turn:
    """A place at which speech begins or ends. position: in samples from the start of the session."""

    kind: Literal["started", "stopped"]
    position: int


class Detector:
    """Finds speech by its energy: the level of frames of 20 ms against a threshold."""

    def __init__(self, rate: int, *, threshold: float, silence_ms: int, position: int = 0):
        """threshold: 0 to 1, for -60 to -20 dBFS. silence_ms: silence that ends speech. position: of the first sample
        to be pushed."""
        self._frame = max(1, round(rate * _FRAME_SECONDS))
        self._level = 32768.0 * 10 ** ((40 * threshold - 60) / 20)
        self._silence = max(1, round(silence_ms / 1000 / _FRAME_SECONDS))
        self._position = position
        self._rest = np.empty(0, np.int16)
        self._loud = self._quiet = 0  # frames in a row
        self.speaking = False

    def push(self, samples: np.ndarray) -> list[Turn]:
        """The beginnings and ends of speech in the next samples, int16 [n]."""
        samples = np.concatenate([self._rest, samples])
        count = len(samples) // self._frame
        frames = samples[: count * self._frame].reshape(count, self._frame).astype(np.float32)
        self._rest = samples[count * self._frame :]
        turns = []
        for loud in np.sqrt(np.square(frames).mean(axis=1)) >= self._level if count else ():
            self._position += self._frame
            self._loud, self._quiet = (self._loud + 1, 0) if loud else (0, self._quiet + 1)
            if not self.speaking and self._loud == _FRAMES_OF_SPEECH:
                self.speaking = True
                turns.append(Turn("started", self._position - _FRAMES_OF_SPEECH * self._frame))
            elif self.speaking and self._quiet == self._silence:
                self.speaking = False
                turns.append(Turn("stopped", self._position))
        return turns


class Buffer:
    """Samples that are not committed yet. Positions count from the start of the session."""

    def __init__(self) -> None:
        self._pieces: deque[np.ndarray] = deque()
        self.start = self.end = 0

    def append(self, samples: np.ndarray) -> None:
        """Append samples, int16 [n]."""
        if len(samples):
            self._pieces.append(samples)
            self.end += len(samples)

    def drop(self, position: int) -> None:
        """Drop the samples before a position."""
        self.take(position)

    def take(self, position: int) -> np.ndarray:
        """Remove and return the samples before a position: int16 [n]."""
        taken = [np.empty(0, np.int16)]
        while self._pieces and self.start < position:
            piece = self._pieces.popleft()
            if len(piece) > position - self.start:
                self._pieces.appendleft(piece[position - self.start :])
                piece = piece[: position - self.start]
            taken.append(piece)
            self.start += len(piece)
        return np.concatenate(taken)
