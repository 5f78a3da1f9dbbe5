"""Resamples any rate to 16 kHz as a stream: the output does not depend on how the input is divided."""

import math
from collections import deque

import numpy as np
import soxr

from ...kernels.audio_format import SAMPLE_RATE

_MARGIN = 2  # seconds of input that affect a sample, at rates of 100 Hz and more
_REACH = 256  # length of soxr's HQ filter in samples, which is longer than that at lower rates


class Resampler:
    """soxr HQ for mono float32 samples of one rate: n samples give ceil(n * 16000 / rate), as in librosa, which pads
    soxr's rounded length."""

    def __init__(self, rate: int):
        """rate: samples per second."""
        self.rate = rate
        self._taken = 0
        self._given = 0
        self._margin = max(_MARGIN, math.ceil(_REACH / rate))
        self._recent: deque[np.ndarray] = deque()  # the last input blocks, from sample `_recent_from` on
        self._recent_from = 0
        self._stream = None if rate == SAMPLE_RATE else soxr.ResampleStream(rate, SAMPLE_RATE, 1, "float32", "HQ")

    def push(self, block: np.ndarray) -> np.ndarray:
        """The samples [m] that `block` [n], of at most a second, completes. The block is kept and must not be
        modified."""
        self._taken += len(block)
        if self._stream is None:
            return block
        self._recent.append(block)
        completed = self._stream.resample_chunk(block)
        self._given += len(completed)
        needed_from = self._needed_from * self.rate
        while self._recent and self._recent_from + len(self._recent[0]) <= needed_from:
            self._recent_from += len(self._recent.popleft())
        return completed

    @property
    def _needed_from(self) -> int:
        """The second from which on input samples can still affect later output."""
        return max(0, self._given // SAMPLE_RATE - self._margin)

    @property
    def length(self) -> int:
        """Number of samples that `push` and `finish` return for the input so far."""
        return -(-self._taken * SAMPLE_RATE // self.rate)

    def rest(self) -> np.ndarray:
        """The samples that `finish` would return now; the stream is not changed. Within float32 rounding at the usual
        rates; if the ratio to 16 kHz is not a simple fraction, soxr's clock drifts, by less than 1e-6 of full scale per
        second.
        """
        if self._stream is None:
            return np.zeros(0, np.float32)
        if not self._taken:
            return np.zeros(0, np.float32)
        recent = np.concatenate(self._recent)[self._needed_from * self.rate - self._recent_from :]
        end = soxr.resample(recent, self.rate, SAMPLE_RATE, "HQ") if len(recent) else recent
        return self._padded(end[self._given - self._needed_from * SAMPLE_RATE :])

    def finish(self) -> np.ndarray:
        """The remaining samples; nothing may be pushed afterwards."""
        if self._stream is None:
            return np.zeros(0, np.float32)
        return self._padded(self._stream.resample_chunk(np.zeros(0, np.float32), last=True))

    def _padded(self, end: np.ndarray) -> np.ndarray:
        missing = self.length - self._given - len(end)
        return np.concatenate([end, np.zeros(max(0, missing), np.float32)])
