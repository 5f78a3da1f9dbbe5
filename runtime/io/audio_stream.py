"""Audio that is still being recorded: pieces of any size in, windows out as they complete."""

import numpy as np

from ...kernels.audio_format import SAMPLE_RATE, WINDOW_SAMPLES
from ..errors import AudioTooLongError
from .audio import Array, array_channels, mono_blocks
from .resample import Resampler


class AudioStream:
    """Mixes and resamples pieces as `load_audio` does the whole, in time proportional to their length.

    Complete windows are bit for bit those of the whole recording. The end of the open one is provisional while audio of
    another rate than 16 kHz comes: see `Resampler.rest`.
    """

    def __init__(self, max_seconds: float):
        """max_seconds: how much may be fed in all."""
        self._limit = round(max_seconds * SAMPLE_RATE)
        self._resampler = Resampler(SAMPLE_RATE)
        self._finished = 0  # samples at 16 kHz from before the present resampler
        self._complete: list[np.ndarray] = []
        self._open = np.empty(WINDOW_SAMPLES, np.float32)
        self._filled = 0  # samples of the open window

    @property
    def samples(self) -> int:
        """Length of everything fed, at 16 kHz."""
        return self._finished + self._resampler.length

    def feed(self, pcm: Array, rate: int | float) -> None:
        """Append a piece: an array as `load_audio` takes it, of `rate` samples per second, or an empty one.

        Raises AudioError for a piece that is no audio, and AudioTooLongError beyond the limit, and appends nothing.
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
        """Complete what has been fed. What is fed after that begins anew, as after a change of rate."""
        self._append(self._resampler.finish())
        self._finished = self.samples
        self._resampler = Resampler(SAMPLE_RATE)

    def take_windows(self) -> list[np.ndarray]:
        """The windows of 30 s that have become complete: float32 [480 000] each."""
        complete, self._complete = self._complete, []
        return complete

    def open_windows(self) -> list[np.ndarray]:
        """The audio after the complete windows, as if the recording ended here: no window, one, or two if the
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
