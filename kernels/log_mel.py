"""Log-mel spectrogram of 30 s windows, as Whisper's feature extractor defines it.

    power[k, t] = | sum_n hann[n] * x[160 t + n - 200] * exp(-2 pi i k n / 400) |^2        k = 0..200
    mel[m, t]   = log10(max(sum_k filters[k, m] * power[k, t], 1e-10))
    out[m, t]   = (max(mel[m, t], max(mel) - 8) + 4) / 4

x is the window, zero-padded to `window_samples` and extended by 200 reflected samples on both sides; `hann` is
periodic; `filters` are triangles on Slaney's mel scale with Slaney's area normalization. max(mel) is the maximum of the
window.

Frames of zero padding have the value of the floor and cannot raise the maximum, so only the frames that overlap the
signal are computed: `frame_count(samples)`, two more than the valid ones, which is all that the convolution stem reads.
A window of n samples costs about 400 * 201 * 2 * n / 160 multiply-adds as a plain DFT;
the torch implementation uses an FFT. Bytes: 4 n in, 4 * mel_bins * n / 160 out.

The Triton implementation takes two launches: mel and the maxima of its tiles, then the normalization, which needs the
window's maximum. It reads frames from the waveform, reflected by index arithmetic, and computes the DFT as products
with a quarter of the FLOPs of a plain DFT. Time is counted from the frame's center, which changes phases but not the
power. With c_d = hann[d] * cos(2 pi k d / 400), s_d likewise, and x[d] the sample d after the center,

    Re[k] = sum over d = 0..199 of c_d * (x[d] + x[-d])   (d = 0 at half weight)    = E + O     even d and odd d
    Im[k] = sum over d = 1..199 of s_d * (x[d] - x[-d])                             = E' + O'
    power[k] = (E + O)^2 + (E' + O')^2,   power[200 - k] = (E - O)^2 + (E' - O')^2

so four products over 100 distances give the frequencies 0..100, and with them all 201. With padding, a frame costs 4 *
112 * 112 multiply-adds for these and 2 * 112 * mel_bins for the filters, 79 thousand for 128 mels, and a window of 30 s
costs 473 MFLOP. Tensor cores need three times as many, because each float32 operand is the sum of two tf32 numbers
("tf32x3"), which keep 22 of 24 bits. Accumulation is float32, so the error stays within twice that of torch's FFT even
if the tensor cores truncate their sums; that of a single tf32 product is 600 times as large. AMD's matrix cores
multiply float32. Bytes: in addition to those above, the unnormalized mel is written and read once in float32, 3 MB per
window, and tables of 315 KB stay in the L2 cache.

Source: Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision", section 2.2; Slaney 1998,
"Auditory Toolbox".
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from .audio_format import SAMPLE_RATE, WINDOW_SAMPLES
from .configs import Config, Configs, family
from .dispatch import Operation
from .triton_language import tl, triton

N_FFT = 400
HOP_LENGTH = 160


def valid_frames(samples: int) -> int:
    """Number of valid mel frames in a window of `samples` samples: one per hop, the last one possibly incomplete."""
    return -(-samples // HOP_LENGTH)


def frame_count(samples: int, window_samples: int = WINDOW_SAMPLES) -> int:
    """Number of frames that `log_mel` returns for `samples` samples: those that overlap the signal."""
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


def reference(waveforms: Tensor, mel_bins: int, window_samples: int, dtype: torch.dtype) -> Tensor:
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
    return _normalize(power @ mel_filters(mel_bins, x.device, torch.float64)).transpose(1, 2).to(dtype)


_operation = Operation("log_mel", reference)


# The Triton kernels' padded sizes: distances of one parity (100), and frequencies 0..100.
_DISTANCES, _FREQUENCIES = 112, 112
_BLOCK_NORMALIZE = 4096

_spectrum_configs = Configs(
    "log_mel", Config({"BLOCK_FRAMES": 32, "BLOCK_FREQUENCIES": 16, "BLOCK_DISTANCES": 16}, num_warps=8, num_stages=2)
)


@lru_cache(maxsize=2)
def _dft_tables(device: torch.device) -> Tensor:
    """Windowed cosines for even and odd distances, then sines: [4, _DISTANCES, _FREQUENCIES] float32, padded with 0."""
    k = torch.arange(_FREQUENCIES, dtype=torch.float64)
    tables = []
    for turn in (torch.cos, torch.sin):
        for parity in (0, 1):
            d = 2 * torch.arange(_DISTANCES, dtype=torch.float64) + parity
            hann = (0.5 + 0.5 * torch.cos(2 * math.pi * d / N_FFT)) * (d < N_FFT // 2)
            weight = hann * torch.where(d == 0, 0.5, 1.0)
            phase = 2 * math.pi * ((d[:, None] * k) % N_FFT) / N_FFT
            tables.append(weight[:, None] * turn(phase) * (k <= N_FFT // 4))
    return torch.stack(tables).to(device, torch.float32)


@lru_cache(maxsize=8)
def _folded_filters(mel_bins: int, device: torch.device) -> Tensor:
    """Filters of frequencies 0..100, then those of 200..101 beside 0..99: [2, _FREQUENCIES, padded mels] float32."""
    half = N_FFT // 4
    filters = mel_filters(mel_bins, torch.device("cpu"), torch.float32)
    folded = torch.zeros(2, _FREQUENCIES, triton.next_power_of_2(max(mel_bins, 16)))
    folded[0, : half + 1, :mel_bins] = filters[: half + 1]
    folded[1, :half, :mel_bins] = filters[half + 1 :].flip(0)
    return folded.to(device)


@triton.jit
def _load_samples(row, index, samples, window_samples):  # type: ignore[no-untyped-def]
    """Samples of one window, float32: reflected at both its ends, zero after the signal."""
    index = tl.abs(index)
    index = tl.where(index < window_samples, index, 2 * (window_samples - 1) - index)
    return tl.load(row + index, mask=index < samples, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["waveform_row", "samples", "frames"])
def _spectrum_kernel(  # type: ignore[no-untyped-def]
    waveforms,
    dft,
    filters,
    out,
    maxima,
    waveform_row,
    samples,
    window_samples,
    frames,
    mel_bins,
    HOP: tl.constexpr,
    DISTANCES: tl.constexpr,
    FREQUENCIES: tl.constexpr,
    MELS: tl.constexpr,
    BLOCK_FRAMES: tl.constexpr,
    BLOCK_FREQUENCIES: tl.constexpr,
    BLOCK_DISTANCES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """log10 of the mel energies of some frames, at least -10, and their maximum."""
    window = tl.program_id(1).to(tl.int64)
    row = waveforms + window * waveform_row
    frame = tl.program_id(0) * BLOCK_FRAMES + tl.arange(0, BLOCK_FRAMES)[:, None]
    center = tl.minimum(frame, frames - 1) * HOP  # past the end, repeat the last frame: the maximum stays the same
    mels = tl.arange(0, MELS)[None, :]
    energy = tl.zeros((BLOCK_FRAMES, MELS), tl.float32)
    for first in range(0, FREQUENCIES, BLOCK_FREQUENCIES):
        frequency = first + tl.arange(0, BLOCK_FREQUENCIES)
        even_re = tl.zeros((BLOCK_FRAMES, BLOCK_FREQUENCIES), tl.float32)
        odd_re, even_im, odd_im = even_re, even_re, even_re
        for start in range(0, DISTANCES, BLOCK_DISTANCES):
            step = start + tl.arange(0, BLOCK_DISTANCES)
            table = dft + step[:, None] * FREQUENCIES + frequency[None, :]
            distance = 2 * step[None, :]
            after = _load_samples(row, center + distance, samples, window_samples)
            before = _load_samples(row, center - distance, samples, window_samples)
            even_re = tl.dot(after + before, tl.load(table), even_re, input_precision=PRECISION)
            table += DISTANCES * FREQUENCIES
            sines = table + DISTANCES * FREQUENCIES
            even_im = tl.dot(after - before, tl.load(sines), even_im, input_precision=PRECISION)
            after = _load_samples(row, center + distance + 1, samples, window_samples)
            before = _load_samples(row, center - distance - 1, samples, window_samples)
            odd_re = tl.dot(after + before, tl.load(table), odd_re, input_precision=PRECISION)
            sines += DISTANCES * FREQUENCIES
            odd_im = tl.dot(after - before, tl.load(sines), odd_im, input_precision=PRECISION)
        re, im = even_re + odd_re, even_im + odd_im
        filter = filters + frequency[:, None] * MELS + mels
        energy = tl.dot(re * re + im * im, tl.load(filter), energy, input_precision=PRECISION)
        re, im = even_re - odd_re, even_im - odd_im
        filter += FREQUENCIES * MELS
        energy = tl.dot(re * re + im * im, tl.load(filter), energy, input_precision=PRECISION)
    # The floor of 1e-10 is applied after the logarithm, where it is exact; the floor before it only avoids log(0).
    mel = tl.maximum(tl.log(tl.maximum(energy, 1e-20)) * 0.4342944819032518, -10.0)
    tl.store(maxima + window * tl.num_programs(0) + tl.program_id(0), tl.max(mel))
    tl.store(out + (window * mel_bins + mels) * frames + frame, mel, mask=(frame < frames) & (mels < mel_bins))


@triton.jit(do_not_specialize=["tiles", "elements"])
def _normalize_kernel(mel, maxima, out, tiles, elements, TILES: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """(max(mel, maximum of the window - 8) + 4) / 4 for a block of one window's elements."""
    window = tl.program_id(1).to(tl.int64)
    highest = tl.full((TILES,), -10.0, tl.float32)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        highest = tl.maximum(highest, tl.load(maxima + window * tiles + tile, mask=tile < tiles, other=-10.0))
    floor = tl.max(highest) - 8.0
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < elements
    values = tl.maximum(tl.load(mel + window * elements + i, mask=inside, other=0.0), floor)
    tl.store(out + window * elements + i, ((values + 4.0) * 0.25).to(out.dtype.element_ty), mask=inside)


@_operation.implementation("triton")
def _triton(waveforms: Tensor, mel_bins: int, window_samples: int, dtype: torch.dtype) -> Tensor:
    waveforms = waveforms if waveforms.stride(1) == 1 else waveforms.contiguous()
    batch, samples = waveforms.shape
    frames = frame_count(samples, window_samples)
    config = _spectrum_configs.on(waveforms.device)
    tiles = triton.cdiv(frames, config.blocks["BLOCK_FRAMES"])
    mel = waveforms.new_empty(batch, mel_bins, frames, dtype=torch.float32)
    out = mel if dtype == torch.float32 else torch.empty_like(mel, dtype=dtype)
    maxima = mel.new_empty(batch, tiles)
    filters = _folded_filters(mel_bins, waveforms.device)
    _spectrum_kernel[(tiles, batch)](
        waveforms,
        _dft_tables(waveforms.device),
        filters,
        mel,
        maxima,
        waveforms.stride(0),
        samples,
        window_samples,
        frames,
        mel_bins,
        HOP=HOP_LENGTH,
        DISTANCES=_DISTANCES,
        FREQUENCIES=_FREQUENCIES,
        MELS=filters.shape[-1],
        PRECISION="ieee" if family(waveforms.device).startswith("gfx") else "tf32x3",
        **config.options(),
    )
    grid = triton.cdiv(mel_bins * frames, _BLOCK_NORMALIZE), batch
    _normalize_kernel[grid](mel, maxima, out, tiles, mel_bins * frames, TILES=128, BLOCK=_BLOCK_NORMALIZE, num_warps=8)
    return out


@_operation.implementation("torch")
def _torch(waveforms: Tensor, mel_bins: int, window_samples: int, dtype: torch.dtype) -> Tensor:
    frames = frame_count(waveforms.shape[-1], window_samples)
    # Only zeros follow the requested frames, so the right-hand reflection matters only in a full window.
    length = min(window_samples, frames * HOP_LENGTH + N_FFT)
    x = torch.nn.functional.pad(waveforms.to(torch.float32), (0, length - waveforms.shape[-1]))
    hann = torch.hann_window(N_FFT, device=x.device)
    spectrum = torch.stft(x, N_FFT, HOP_LENGTH, window=hann, center=True, pad_mode="reflect", return_complex=True)
    power = spectrum[:, :, :frames].abs().square()
    filters = mel_filters(mel_bins, x.device, torch.float32)
    return _normalize(filters.T @ power).to(dtype)


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
    Raises ValueError for any other shape, and for windows shorter than one frame.
    """
    if waveforms.ndim != 2 or not 0 < waveforms.shape[1] <= window_samples or not waveforms.is_floating_point():
        raise ValueError(
            f"log_mel takes float waveforms of shape [batch, 1..{window_samples}], "
            f"got {waveforms.dtype} {tuple(waveforms.shape)}"
        )
    if window_samples < N_FFT:
        raise ValueError(
            f"log_mel needs windows of at least {N_FFT} samples to reflect their ends, got {window_samples}"
        )
    return _operation.on(waveforms.device)(waveforms, mel_bins, window_samples, dtype)


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
