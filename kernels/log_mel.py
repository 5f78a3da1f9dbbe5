"""Log-mel spectrogram of 30 s windows, as Whisper's feature extractor defines it.

    power[k, t] = | sum_n hann[n] * x[160 t + n - 200] * exp(-2 pi i k n / 400) |^2        k = 0..200
    mel[m, t]   = log10(max(sum_k filters[k, m] * power[k, t], 1e-10))
    out[m, t]   = (max(mel[m, t], max(mel) - 8) + 4) / 4

x is the window, zero-padded to `window_samples` and extended by 200 reflected samples on both sides; `hann` is
periodic; `filters` are triangles on Slaney's mel scale with Slaney's area normalization. The maximum is that of the
window.

Frames that hold nothing but zero padding all have the value of the floor and cannot raise the maximum, so only the
frames that touch the signal are computed: `frame_count(samples)`, two more than the valid ones, which is also all that
the convolution stem reads. A window of n samples costs about 400 * 201 * 2 * n / 160 multiply-adds as a plain DFT;
the torch implementation uses an FFT. Bytes: 4 n in, 4 * mel_bins * n / 160 out.

Source: Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision", section 2.2; Slaney 1998,
"Auditory Toolbox".
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from .dispatch import Operation

SAMPLE_RATE = 16_000
N_FFT = 400
HOP_LENGTH = 160
WINDOW_SAMPLES = 30 * SAMPLE_RATE


def valid_frames(samples: int) -> int:
    """Number of mel frames that count as audio in a window of `samples` samples: one per started hop."""
    return -(-samples // HOP_LENGTH)


def frame_count(samples: int, window_samples: int = WINDOW_SAMPLES) -> int:
    """Number of frames that `log_mel` returns for `samples` samples: those that the signal reaches."""
    return min(valid_frames(samples) + 2, window_samples // HOP_LENGTH)


@lru_cache(maxsize=8)
def mel_filters(mel_bins: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Triangular mel filters from 0 Hz to 8 kHz, shape [N_FFT // 2 + 1, mel_bins]."""
    bins = torch.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1, dtype=torch.float64)
    edges = _mel_to_hertz(torch.linspace(0, _hertz_to_mel(SAMPLE_RATE / 2), mel_bins + 2, dtype=torch.float64))
    low, center, high = edges[:-2], edges[1:-1], edges[2:]
    rising = (bins[:, None] - low) / (center - low)
    falling = (high - bins[:, None]) / (high - center)
    triangles = torch.minimum(rising, falling).clamp_min(0) * (2.0 / (high - low))
    return triangles.to(device=device, dtype=dtype)


def reference(waveforms: Tensor, mel_bins: int, window_samples: int) -> Tensor:
    """The specification: float64, the DFT as a matrix product over explicitly indexed frames."""
    x = waveforms.to(torch.float64)
    frames = frame_count(x.shape[-1], window_samples)
    x = torch.nn.functional.pad(x, (0, window_samples - x.shape[-1]))
    starts = torch.arange(frames, device=x.device) * HOP_LENGTH - N_FFT // 2
    index = (starts[:, None] + torch.arange(N_FFT, device=x.device)).abs()
    index = torch.where(index >= window_samples, 2 * (window_samples - 1) - index, index)
    n = torch.arange(N_FFT, dtype=torch.float64, device=x.device)
    k = torch.arange(N_FFT // 2 + 1, dtype=torch.float64, device=x.device)
    phase = 2 * math.pi * ((n[:, None] * k) % N_FFT) / N_FFT
    framed = x[:, index] * (0.5 - 0.5 * torch.cos(2 * math.pi * n / N_FFT))
    power = (framed @ torch.cos(phase)).square() + (framed @ torch.sin(phase)).square()
    return _normalize(power @ mel_filters(mel_bins, x.device, torch.float64)).transpose(1, 2)


_operation = Operation("log_mel", reference)


@_operation.implementation("torch")
def _torch(waveforms: Tensor, mel_bins: int, window_samples: int) -> Tensor:
    frames = frame_count(waveforms.shape[-1], window_samples)
    # Beyond the frames asked for only zeros follow, so the right-hand reflection matters in a full window alone.
    length = min(window_samples, frames * HOP_LENGTH + N_FFT)
    x = torch.nn.functional.pad(waveforms.to(torch.float32), (0, length - waveforms.shape[-1]))
    hann = torch.hann_window(N_FFT, device=x.device)
    spectrum = torch.stft(x, N_FFT, HOP_LENGTH, window=hann, center=True, pad_mode="reflect", return_complex=True)
    power = spectrum[:, :, :frames].abs().square()
    filters = mel_filters(mel_bins, x.device, torch.float32)
    return _normalize(filters.T @ power)


def log_mel(
    waveforms: Tensor,
    *,
    mel_bins: int = 128,
    window_samples: int = WINDOW_SAMPLES,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Log-mel features of a batch of windows.

    waveforms: [batch, samples] float, mono at 16 kHz, at most `window_samples` samples; shorter rows are zero-padded at
    the end. Returns [batch, mel_bins, frame_count(samples)] in `dtype`; computed in float32.
    Raises ValueError for any other shape.
    """
    if waveforms.ndim != 2 or not 0 < waveforms.shape[1] <= window_samples or not waveforms.is_floating_point():
        raise ValueError(
            f"log_mel takes float waveforms of shape [batch, 1..{window_samples}], "
            f"got {waveforms.dtype} {tuple(waveforms.shape)}"
        )
    return _operation.on(waveforms.device)(waveforms, mel_bins, window_samples).to(dtype)


def _normalize(mel: Tensor) -> Tensor:
    decibels = mel.clamp_min(1e-10).log10()
    floor = decibels.amax(dim=(1, 2), keepdim=True) - 8.0
    return (torch.maximum(decibels, floor) + 4.0) / 4.0


# Slaney's mel scale: linear below 1 kHz at 3/200 mel per hertz, logarithmic above with a step of ln(6.4)/27 per mel.
_KNEE_HERTZ, _KNEE_MEL, _LOG_STEP = 1000.0, 15.0, math.log(6.4) / 27.0


def _hertz_to_mel(hertz: float) -> float:
    return hertz * 3 / 200 if hertz < _KNEE_HERTZ else _KNEE_MEL + math.log(hertz / _KNEE_HERTZ) / _LOG_STEP


def _mel_to_hertz(mel: Tensor) -> Tensor:
    return torch.where(mel < _KNEE_MEL, mel * 200 / 3, _KNEE_HERTZ * torch.exp((mel - _KNEE_MEL) * _LOG_STEP))
