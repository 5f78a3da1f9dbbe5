"""Log-mel features against Whisper's own extractor, and every backend against the float64 reference."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from support.accuracy import DTYPES, assert_accurate, backends, exactly, poisoned
from torch import Tensor
from transformers import WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank

from afnext import kernels
from afnext.kernels import log_mel as module
from afnext.kernels.audio_format import WINDOW_SAMPLES
from afnext.kernels.log_mel import HOP_LENGTH, frame_count, log_mel, mel_filters, valid_frames

CPU = torch.device("cpu")
SIGNALS = ["silence", "full scale", "noise", "quiet noise", "one click", "tone"]


def signal(kind: str, samples: int) -> Tensor:
    """[samples] float32 within [-1, 1]."""
    noise = torch.randn(samples)
    if kind == "silence":
        return torch.zeros(samples)
    if kind == "full scale":
        return noise.sign()
    if kind == "one click":
        return torch.nn.functional.one_hot(torch.tensor(samples // 2), samples).float()
    if kind == "tone":
        return torch.sin(torch.arange(samples) * 0.17 + torch.rand(())) + 1e-3 * noise.clamp(-1, 1)
    return noise.clamp(-4, 4) / (4 if kind == "noise" else 4e4)


@cache
def whisper() -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=128)  # type: ignore[no-untyped-call]


def plain(waveforms: Tensor, mel_bins: int, window_samples: int) -> Tensor:
    """The formula read aloud in float32: the DFT as products with cosines and sines."""
    samples = waveforms.shape[1]
    x = torch.nn.functional.pad(waveforms.float(), (0, window_samples - samples))
    x = torch.cat((x[:, 1:201].flip(1), x, x[:, -201:-1].flip(1)), dim=1)
    n = torch.arange(400, device=x.device)
    framed = x.unfold(1, 400, 160)[:, : frame_count(samples, window_samples)] * torch.hann_window(400, device=x.device)
    turns = (torch.outer(n, n[:201]) % 400) / 400 * (2 * torch.pi)
    power = (framed @ turns.cos()) ** 2 + (framed @ turns.sin()) ** 2
    mel = (power @ mel_filters(mel_bins, x.device, torch.float32)).clamp(min=1e-10).log10()
    highest = mel.amax((1, 2), keepdim=True)
    return ((mel.maximum(highest - 8) + 4) / 4).transpose(1, 2)


@pytest.mark.parametrize("mel_bins", [80, 128])
def test_filters_are_slaneys(mel_bins: int) -> None:
    expected = mel_filter_bank(201, mel_bins, 0.0, 8000.0, 16_000, norm="slaney", mel_scale="slaney")
    np.testing.assert_allclose(mel_filters(mel_bins, CPU, torch.float64).numpy(), expected, rtol=0, atol=1e-14)
    assert mel_filters(mel_bins, CPU, torch.float32).shape == (201, mel_bins)


def assert_like_whisper(backend: str, waveform: Tensor) -> None:
    """Compare with the extractor's way in NumPy, whose transform is float64, or in torch, where it is float32.

    Float32 transforms of two different orders are farther apart than 1e-5 in the quietest filters of a window.
    """
    padded = torch.nn.functional.pad(waveform, (0, WINDOW_SAMPLES - len(waveform)))[None].numpy()
    if backend == "reference":
        expected = torch.from_numpy(whisper()._np_extract_fbank_features(padded, device="cpu"))[0]
    else:
        expected = torch.from_numpy(whisper()._torch_extract_fbank_features(padded))[0]
    with poisoned(backend):
        actual = log_mel(waveform[None])[0]
    frames = actual.shape[1]
    assert (actual.dtype, actual.shape[0], expected.shape) == (torch.float32, 128, (128, 3000))
    torch.testing.assert_close(actual, expected[:, :frames], rtol=0, atol=1e-5)
    floor = max((-10 + 4) / 4, float(expected.max()) - 2)
    torch.testing.assert_close(expected[:, frames:], torch.full_like(expected[:, frames:], floor), rtol=0, atol=1e-5)


@pytest.mark.parametrize("samples", [1, 160, 161, 400, 16_001, 479_839, 479_840, 479_841, WINDOW_SAMPLES])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_like_whisper_at_any_length(backend: str, samples: int, seed: int) -> None:
    """Also: the frames that are not computed hold the floor of their window and nothing else."""
    assert_like_whisper(backend, signal("noise", samples))


@pytest.mark.parametrize("kind", SIGNALS)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_like_whisper_on_any_signal(backend: str, kind: str, seed: int) -> None:
    assert_like_whisper(backend, signal(kind, 50_021))


def test_like_whisper_on_full_windows_of_silence_and_full_scale(seed: int) -> None:
    assert_like_whisper("torch", signal("silence", WINDOW_SAMPLES))
    assert_like_whisper("torch", signal("full scale", WINDOW_SAMPLES))


def test_like_whisper_on_speech(shared_data: Path) -> None:
    recording = next(path for path in sorted((shared_data / "speech").iterdir()) if soundfile_reads(path))
    waveform, _ = soundfile.read(recording, dtype="float32", always_2d=True)
    assert_like_whisper("torch", torch.from_numpy(waveform[:WINDOW_SAMPLES, 0].copy()))


def soundfile_reads(path: Path) -> bool:
    return path.suffix[1:].upper() in soundfile.available_formats()


# The float32 error of a few frames is a matter of luck, that of its rounding to 16 bits is not.
ACCURACY_CASES = [(samples, dtype) for samples in (1, 159, 161) for dtype in DTYPES[1:]]
ACCURACY_CASES += [(7919, torch.float32), (15_841, torch.bfloat16), (16_000, torch.float32)]


@pytest.mark.parametrize(("samples", "dtype"), ACCURACY_CASES)
@pytest.mark.parametrize("backend", backends(module._operation))
def test_accuracy(backend: str, samples: int, dtype: torch.dtype, seed: int, device: torch.device) -> None:
    """`dtype` is that of the features; each row of the batch is loud or quiet by itself."""
    rows = [signal(kind, samples) for kind in ("noise", "full scale", "quiet noise")]
    waveforms = torch.stack(rows).to(device)
    with poisoned(backend):
        actual = log_mel(waveforms, mel_bins=80, window_samples=16_000, dtype=dtype)
    exact = exactly(log_mel, waveforms, mel_bins=80, window_samples=16_000, dtype=torch.float64)
    naive = plain(waveforms, 80, 16_000).to(dtype)
    assert actual.dtype == dtype
    loudest = exact.amax((1, 2), keepdim=True)
    assert_accurate(*(amplitudes(features, loudest) for features in (actual, exact, naive)))


def amplitudes(features: Tensor, loudest: Tensor) -> Tensor:
    """Square roots of the mel energies, relative to the loudest of each row.

    On this scale the rounding errors of a transform are alike in all filters; on the logarithmic one, the few filters
    in which waves happen to cancel would decide over the RMS.
    """
    return 10 ** (2 * (features.double() - loudest))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", backends(module._operation))
def test_waveforms_of_other_dtypes(backend: str, dtype: torch.dtype, seed: int, device: torch.device) -> None:
    waveforms = signal("noise", 2003)[None].to(device, dtype)
    with poisoned(backend):
        torch.testing.assert_close(log_mel(waveforms), log_mel(waveforms.float()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", backends(module._operation))
def test_rows_are_independent(backend: str, seed: int, device: torch.device) -> None:
    """The maximum is that of a row, not of the batch."""
    rows = [signal(kind, 4000).to(device) for kind in SIGNALS]
    with poisoned(backend):
        together = log_mel(torch.stack(rows))
        for row, features in zip(rows, together, strict=True):
            torch.testing.assert_close(log_mel(row[None])[0], features, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", backends(module._operation))
def test_strided_waveforms(backend: str, seed: int, device: torch.device) -> None:
    waveforms = torch.randn(2, 1000).to(device)
    with poisoned(backend):
        expected = log_mel(waveforms[:, 1:901:2].contiguous(), window_samples=1600)
        assert torch.equal(log_mel(waveforms[:, 1:901:2], window_samples=1600), expected)
        assert torch.equal(
            log_mel(waveforms[:, :450], window_samples=1600), log_mel(waveforms[:, :450].clone(), window_samples=1600)
        )


@pytest.mark.parametrize("backend", ["reference", *backends(module._operation)])
def test_range_is_eight_decades_below_the_maximum(backend: str, seed: int, device: torch.device) -> None:
    waveforms = torch.cat((signal("noise", 4000), torch.zeros(4000)))[None].to(device)
    with poisoned(backend):
        features = log_mel(waveforms)
        silent = log_mel(torch.zeros(1, 4000, device=device))
    assert float(features.max() - features.min()) == pytest.approx(2, abs=1e-5)
    assert (silent == -1.5).all()


@pytest.mark.parametrize("samples", [1, 160, 161, 7919, 479_839, 479_841, WINDOW_SAMPLES])
def test_whole_extractor(samples: int, seed: int) -> None:
    """Features through the extractor's front door, and as many valid frames as its mask has."""
    waveform = signal("noise", samples)
    extracted = whisper()(waveform.numpy(), sampling_rate=16_000, return_tensors="pt", return_attention_mask=True)
    with kernels.backend("torch"):
        features = log_mel(waveform[None])
    torch.testing.assert_close(features, extracted.input_features[:, :, : features.shape[2]], rtol=0, atol=1e-5)
    assert int(extracted.attention_mask.sum()) == valid_frames(samples)


def test_frame_counts() -> None:
    assert [valid_frames(n) for n in (0, 1, 160, 161, 479_840, 479_841, 480_000)] == [0, 1, 1, 2, 2999, 3000, 3000]
    assert [frame_count(n) for n in (1, 160, 161, 479_520, 479_521, 480_000)] == [3, 3, 4, 2999, 3000, 3000]
    for samples in (1, 160, 4001, 15_999, 16_000):
        assert log_mel(torch.zeros(1, samples), window_samples=16_000).shape[2] == frame_count(samples, 16_000)
    assert HOP_LENGTH == 160


@pytest.mark.parametrize(
    "waveforms",
    [
        torch.zeros(100),
        torch.zeros(1, 0),
        torch.zeros(1, 1, 100),
        torch.zeros(1, WINDOW_SAMPLES + 1),
        torch.zeros(1, 100, dtype=torch.int16),
    ],
)
def test_refuses_other_shapes_and_integers(waveforms: Tensor) -> None:
    with pytest.raises(ValueError, match=r"log_mel takes float waveforms") as error, kernels.backend("torch"):
        log_mel(waveforms)
    assert str(tuple(waveforms.shape)) in str(error.value)
    assert str(waveforms.dtype) in str(error.value)


def test_refuses_windows_shorter_than_a_frame() -> None:
    with pytest.raises(ValueError, match=r"at least 400 samples.*got 320"), kernels.backend("torch"):
        log_mel(torch.zeros(1, 100), window_samples=320)
