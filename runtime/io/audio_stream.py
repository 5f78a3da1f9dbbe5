"""Audio that is still being recorded: takes pieces of any size, returns windows as they complete."""

import numpy as np

from ...kernels.audio_format import SAMPLE_RATE, WINDOW_SAMPLES
from ..errors import AudioTooLongError
from .audio import Array, array_channels, mono_blocks
from .resample import Resampler


class AudioStream:
    """Mixes and resamples pieces as `load_audio` does whole audio, in time proportional to their length.

    Complete windows equal those of the whole recording bit for bit. If the rate is not 16 kHz, the end of the
    incomplete one is provisional: see `Resampler.rest`.
    """

    def __init__(self, max_seconds: float):
        """max_seconds: most audio that may be fed in total."""
        self._limit = round(max_seconds * SAMPLE_RATE)
        self._resampler = Resampler(SAMPLE_RATE)
        self._finished = 0  # samples at 16 kHz from before the current resampler
        self._complete: list[np.ndarray] = []
        self._open = np.empty(WINDOW_SAMPLES, np.float32)
        self._filled = 0  # samples of the incomplete window

    @property
    def samples(self) -> int:
        """Length of all audio fed, at 16 kHz."""
        return self._finished + self._resampler.length

    def feed(self, pcm: Array, rate: int | float) -> None:
        """Append a piece: an array in a format of `load_audio`, of `rate` samples per second, or an empty one.

        Raises AudioError for an invalid piece, and AudioTooLongError beyond the limit; then nothing is appended.
        """
        if len(pcm) == 0:
            return
        frequency, channels = array_channels(pcm, rate)
        blocks = list(mono_blocks(channels, frequency))
        if self.samples + channels.shape[1] * SAMPLE_RATE / frequency > self._limit:
            raise AudioTooLongError(
                f"the recording would exceed the {self._limit / SAMPLE_RATE:g} s that are heard at once; "
                "finish it, and begin another."
            )
        if frequency != self._resampler.rate:
            self.finish()
            self._resampler = Resampler(frequency)
        for block in blocks:
            for start in range(0, len(block), frequency):
                self._append(self._resampler.push(block[start : start + frequency]))

    def finish(self) -> None:
        """Flush the resampler. Audio fed afterwards starts a new one, as after a change of rate."""
        self._append(self._resampler.finish())
        self._finished = self.samples
        self._resampler = Resampler(SAMPLE_RATE)

    def take_windows(self) -> list[np.ndarray]:
        """The windows of 30 s that have become complete: float32 [480 000] each."""
        complete, self._complete = self._complete, []
        return complete

    def open_windows(self) -> list[np.ndarray]:
        """The audio after the complete windows, as if the recording ended here: zero or one window, or two if the
        provisional end completes one."""
        rest = np.concatenate([self._open[: self._filled], self._resampler.rest()])
        return [rest[start : start + WINDOW_SAMPLES] for start in range(0, len(rest), WINDOW_SAMPLES)]

    def _append(self, samples: np.ndarray) -> None:
        while len(samples):
            count = min(len(samples), WINDOW_SAMPLES - self._filled)
            self._open[self._filled : self._filled + count] = samples[:count]
            self._filled += count
            samples = samples[count:]
            if self._filled == WINDOW_SAMPLES:
                self._complete.append(self._open)
                self._open, self._filled = np.empty(WINDOW_SAMPLES, np.float32), 0
