"""Mixes channels by their mean, checks samples, and warns when channels cancel each other."""

from functools import cache

import numpy as np

from ..errors import AudioError

MIN_RATE, MAX_RATE = 1, 768_000  # Hz
MAX_CHANNELS = 32
MAX_AMPLITUDE = 2.0**31  # raw 32-bit samples as floats; far below overflow of a float32 power spectrum
SCALES = {
    "int8": (0.0, 2.0**-7),
    "uint8": (2.0**7, 2.0**-7),
    "int16": (0.0, 2.0**-15),
    "uint16": (2.0**15, 2.0**-15),
    "int32": (0.0, 2.0**-31),
}
_STRIDE = 8  # every eighth sample is enough to compare powers
_CANCELLED = 0.05  # share of the power that uncorrelated channels would leave
_ENOUGH = 1000  # samples compared
_SILENT = 1e-9  # mean power of a channel with full scale 1


def mix(channels: np.ndarray) -> np.ndarray:
    """Plain mean of `channels` [channels, n], any dtype of `SCALES` or floating -> float32 [n].

    Integers are scaled to [-1, 1); the mean is computed in float32, as in librosa. Overflow becomes infinity.
    """
    offset, scale = _offset_and_scale(channels.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        mono = _shifted(channels[0].astype(np.float32), offset)
        if len(channels) > 1:  # same as `mean`, which takes several times as long
            mono += np.float32(0)
            for channel in channels[1:]:
                mono += _shifted(channel.astype(np.float32, copy=bool(offset)), offset)
            mono /= np.float32(len(channels))
        if scale != 1.0:
            mono *= np.float32(scale)
    return mono


def _shifted(samples: np.ndarray, offset: float) -> np.ndarray:
    if offset:
        samples -= np.float32(offset)
    return samples


@cache
def _offset_and_scale(dtype: np.dtype) -> tuple[float, float]:
    """Offset and scale of samples of this dtype; cached, because the name of a numpy dtype is slow."""
    return SCALES.get(dtype.name, (0.0, 1.0))


class Cancellation:
    """Compares the power of a mix with that of its channels: channels of opposite phase cancel each other."""

    def __init__(self) -> None:
        self._mix = self._alone = 0.0  # power of the mix, and its power if the channels were uncorrelated
        self._loudest, self._counted = 0.0, 0

    def add(self, channels: np.ndarray, mono: np.ndarray) -> None:
        """Add `channels` [channels, n] of any dtype that `mix` takes, and their mix [n]."""
        if len(channels) == 1:
            return
        offset, scale = _offset_and_scale(channels.dtype)
        some = channels[:, ::_STRIDE].astype(np.float32)
        if (offset, scale) != (0.0, 1.0):
            some = (some - np.float32(offset)) * np.float32(scale)
        power = float(np.vdot(some, some))
        self._alone += power / len(channels) ** 2
        self._mix += float(np.vdot(mono[::_STRIDE], mono[::_STRIDE]))
        self._loudest = max(self._loudest, power / max(1, some.size))
        self._counted += some.shape[1]

    def warning(self) -> str | None:
        """The warning about the channels so far, or None."""
        if self._counted < _ENOUGH or self._loudest < _SILENT or self._mix > _CANCELLED * self._alone:
            return None
        return (
            "the channels cancel each other: they have opposite phase, and their mix, which the model gets, is far "
            "quieter than each of them; pass one channel alone"
        )


def check_rate(rate: int, name: str) -> None:
    """Raises AudioError unless `rate` lies within `MIN_RATE`..`MAX_RATE` Hz."""
    if not MIN_RATE <= rate <= MAX_RATE:
        raise AudioError(
            f"{name} states a sample rate of {rate} Hz; it must lie between {MIN_RATE} and {MAX_RATE} Hz. "
            "Write the file again with its true rate."
        )


def check_samples(block: np.ndarray, name: str, rate: int, seconds: float) -> None:
    """Raises AudioError naming the first sample of mono `block` that is NaN, infinite or beyond `MAX_AMPLITUDE`.

    `seconds` is where the block starts in the audio.
    """
    if not (len(block) == 0 or (block.max() <= MAX_AMPLITUDE and block.min() >= -MAX_AMPLITUDE)):  # NaN compares false
        index = int(np.argmin(np.abs(block) <= MAX_AMPLITUDE))
        raise AudioError(
            f"{name} contains a sample that is {block[index]:g} at {seconds + index / rate:.6f} s "
            f"(sample {round(seconds * rate) + index}); get an intact copy, or replace such samples."
        )
