"""Pooling, norm and time embedding against transformers, every backend against the float64 reference."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.accuracy import DTYPES, assert_accurate, backends, exactly, poisoned
from torch import Tensor
from torch.nn import functional as F
from transformers.models.musicflamingo.configuration_musicflamingo import MusicFlamingoConfig
from transformers.models.musicflamingo.modeling_musicflamingo import (
    MusicFlamingoModel,
    MusicFlamingoRotaryEmbedding,
    apply_rotary_time_emb,
)

from afnext.bench.ops.guarded import guarded
from afnext.kernels import rote as module
from afnext.kernels.rote import TimeEmbedding, pool_norm_rotate, pooled_length

WINDOWS, FRAMES = 60, 750
NATIVE = [backend for backend in backends(module._operation) if "native" in str(backend)]
# windows, positions before pooling, channels, rotary channels of each axis (None: no time embedding)
SHAPES = [(31, 2, 20, 2), (29, 3, 24, 12), (3, 7, 20, 6), (2, 31, 64, 32), (1, 60, 1280, 256), (2, 9, 67, None)]


def inputs(
    shape: tuple[int, int, int, int | None], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x, weight, bias in `dtype`, and the angles of random windows out of half an hour."""
    batch, positions, channels, dim = shape
    angles = None
    if dim is not None:
        windows = torch.randint(0, WINDOWS, (batch,), device=device)
        angles = TimeEmbedding(1200.0, dim, FRAMES, 0.04).angles(windows, positions // 2)
    tensors = (2 * torch.randn(batch, positions, channels) + 1, torch.rand(channels) + 0.5, torch.randn(channels))
    x, weight, bias = (t.to(device, dtype) for t in tensors)
    return x, weight, bias, angles


def composed(x: Tensor, weight: Tensor, bias: Tensor, angles: Tensor | None) -> Tensor:
    """The same three steps with the functions of torch and transformers, in the precision of x."""
    pooled = F.avg_pool1d(x.transpose(1, 2), 2, stride=2).transpose(1, 2)
    out = F.layer_norm(pooled, weight.shape, weight, bias, 1e-5)
    if angles is None:
        return out
    angles = angles.to(x.dtype).repeat_interleave(2, dim=-1)
    return apply_rotary_time_emb(out, angles.cos(), angles.sin())  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("theta", [1200.0, 1800.0])
def test_angles_are_those_of_transformers_to_the_bit(theta: float) -> None:
    """At every frame of half an hour. Only cos and sin come out of the model's class, so these are compared."""
    config = MusicFlamingoConfig(
        rope_parameters={"rope_theta": theta, "rope_type": "default", "partial_rotary_factor": 0.2}
    )
    embedding = MusicFlamingoRotaryEmbedding(config)
    tokens = torch.full((1, WINDOWS * FRAMES), config.audio_token_id)
    build_timestamps: Any = MusicFlamingoModel._build_audio_timestamps
    timestamps = build_timestamps(SimpleNamespace(config=config), tokens, torch.full((WINDOWS,), FRAMES), FRAMES)
    time_embedding = TimeEmbedding(theta, 256, FRAMES, 4 * config.audio_frame_step)
    for windows in torch.arange(WINDOWS).split(10):
        angles = time_embedding.angles(windows, FRAMES)
        assert (angles.shape, angles.dtype) == ((len(windows), FRAMES, 256), torch.float32)
        cos, sin = embedding(timestamps[windows], FRAMES)
        repeated = angles.repeat_interleave(2, dim=-1)
        assert torch.equal(repeated.cos(), cos)
        assert torch.equal(repeated.sin(), sin)


def test_angles_of_a_short_window_are_the_first_of_a_full_one(seed: int) -> None:
    time_embedding = TimeEmbedding(1200.0, 256, FRAMES, 0.04)
    windows = torch.randint(0, WINDOWS, (3,))
    full = time_embedding.angles(windows, FRAMES)
    for length in (1, 7, 749):
        assert torch.equal(time_embedding.angles(windows, length), full[:, :length])


@pytest.mark.parametrize("count", [1, 3, 8])
def test_the_table_holds_the_angles_of_every_window(count: int) -> None:
    time_embedding = TimeEmbedding(1800.0, 16, 31, 0.04)
    table = time_embedding.table(count, torch.device("cpu"))
    assert len(table) >= count
    assert torch.equal(table, time_embedding.angles(torch.arange(len(table)), 31))
    assert time_embedding.table(count, torch.device("cpu")) is table


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_pooling_norm_and_rotation(shape: tuple[int, int, int, int | None], seed: int) -> None:
    x, weight, bias, angles = inputs(shape, torch.float64, torch.device("cpu"))
    actual = exactly(partial(pool_norm_rotate, angles=angles), x, weight, bias)
    torch.testing.assert_close(actual, composed(x, weight, bias, angles), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", backends(module._operation))
def test_accuracy(
    backend: str, shape: tuple[int, int, int, int | None], dtype: torch.dtype, seed: int, device: torch.device
) -> None:
    x, weight, bias, angles = inputs(shape, dtype, device)
    before = x.clone()
    with poisoned(backend):
        actual = pool_norm_rotate(x, weight, bias, angles=angles)
    exact = exactly(partial(pool_norm_rotate, angles=angles), x, weight, bias)
    assert_accurate(actual, exact, composed(x.float(), weight.float(), bias.float(), angles).to(dtype))
    assert torch.equal(x, before)


@pytest.mark.parametrize("backend", ["reference", *backends(module._operation)])
def test_rows_find_their_angles_in_the_table(backend: str, seed: int, device: torch.device) -> None:
    time_embedding = TimeEmbedding(1200.0, 6, 13, 0.04)
    windows = torch.randint(0, 11, (3,), device=device)
    x, weight, bias, _ = inputs((3, 19, 20, None), torch.float32, device)
    table, angles = time_embedding.table(11, device), time_embedding.angles(windows, 9)
    with poisoned(backend):
        indexed = pool_norm_rotate(x, weight, bias, angles=table, windows=windows)
        assert torch.equal(indexed, pool_norm_rotate(x, weight, bias, angles=angles))


@pytest.mark.parametrize("largest", [0.5, 4.0, 1e3, 1e5])
@pytest.mark.parametrize("backend", backends(module._operation))
def test_angles_of_any_size(backend: str, largest: float, seed: int, device: torch.device) -> None:
    """Multiples of pi / 8 among them, rounded to float32: there one of sine and cosine is small or both are alike."""
    x, weight, bias, _ = inputs((1, 40, 256, None), torch.float32, device)
    angles = largest * (2 * torch.rand(1, 20, 128) - 1)
    angles[:, ::2] = (angles[:, ::2] / (torch.pi / 8)).round() * (torch.pi / 8)
    angles = angles.to(device)
    with poisoned(backend):
        actual = pool_norm_rotate(x, weight, bias, angles=angles)
    exact = exactly(partial(pool_norm_rotate, angles=angles), x, weight, bias)
    assert_accurate(actual, exact, composed(x, weight, bias, angles))


@pytest.mark.parametrize("backend", backends(module._operation))
def test_strided_inputs(backend: str, seed: int, device: torch.device) -> None:
    x, weight, bias, angles = inputs((3, 26, 24, 6), torch.float32, device)
    assert angles is not None
    with poisoned(backend):
        expected = pool_norm_rotate(x[:, ::2].contiguous(), weight, bias, angles=angles[:, :6].contiguous())
        assert torch.equal(pool_norm_rotate(x[:, ::2], weight, bias, angles=angles[:, :6]), expected)
        channels_first = x.transpose(1, 2).contiguous().transpose(1, 2)
        assert torch.equal(pool_norm_rotate(channels_first[:, ::2], weight, bias, angles=angles[:, :6]), expected)


@pytest.mark.parametrize("backend", ["reference", *backends(module._operation)])
def test_an_odd_last_position_is_dropped(backend: str, seed: int, device: torch.device) -> None:
    x, weight, bias, angles = inputs((2, 9, 64, 16), torch.float32, device)
    x[:, 8] = torch.nan
    with poisoned(backend):
        odd, even = (pool_norm_rotate(part, weight, bias, angles=angles) for part in (x, x[:, :8]))
    torch.testing.assert_close(odd, even, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", *backends(module._operation)])
def test_channels_beyond_the_rotary_width_pass_through(backend: str, seed: int, device: torch.device) -> None:
    x, weight, bias, angles = inputs((2, 12, 80, 24), torch.float32, device)
    with poisoned(backend):
        rotated = pool_norm_rotate(x, weight, bias, angles=angles)
        plain = pool_norm_rotate(x, weight, bias)
    torch.testing.assert_close(rotated[..., 48:], plain[..., 48:], rtol=0, atol=1e-6)
    assert not torch.allclose(rotated[..., :48], plain[..., :48], atol=0.1)


@pytest.mark.parametrize("backend", ["reference", *backends(module._operation)])
def test_eps_is_used(backend: str, seed: int, device: torch.device) -> None:
    """With eps far above the variance the norm is a division by sqrt(eps)."""
    x = 1e-3 * torch.randn(1, 6, 64).to(device)
    pooled = (x[:, ::2] + x[:, 1::2]) / 2
    with poisoned(backend):
        out = pool_norm_rotate(x, torch.ones(64, device=device), torch.zeros(64, device=device), eps=4.0)
    torch.testing.assert_close(out, (pooled - pooled.mean(-1, keepdim=True)) / 2, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("backend", NATIVE)
def test_native_stays_within_its_memory(
    backend: str, threads: int, dtype: torch.dtype, seed: int, restored_threads: None
) -> None:
    """Tensors that end where memory ends, rows of no whole vector; any number of threads gives the same."""
    x, weight, bias, angles = inputs((5, 40, 1283, 37), dtype, torch.device("cpu"))
    assert angles is not None
    torch.set_num_threads(1)
    with poisoned(backend):
        expected = pool_norm_rotate(x, weight, bias, angles=angles)
    torch.set_num_threads(threads)
    with poisoned(backend):
        actual = pool_norm_rotate(guarded(x), guarded(weight), guarded(bias), angles=guarded(angles))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("window", [-1, 4])
@pytest.mark.parametrize("backend", NATIVE)
def test_native_reads_no_window_that_is_not_there(backend: str, window: int) -> None:
    x, table = torch.zeros(2, 6, 8), torch.zeros(4, 3, 2)
    with poisoned(backend), pytest.raises(IndexError, match=str(window)):
        pool_norm_rotate(x, torch.ones(8), torch.ones(8), angles=table, windows=torch.tensor([0, window]))


def test_pooled_length_is_that_of_average_pooling() -> None:
    for positions in range(2, 40):
        assert pooled_length(positions) == F.avg_pool1d(torch.zeros(1, 1, positions), 2, stride=2).shape[-1]
    assert [pooled_length(positions) for positions in (0, 1, 1500)] == [0, 0, 750]


@pytest.mark.parametrize(
    ("x", "weight", "bias", "angles"),
    [
        ((2, 1, 8), (8,), (8,), None),
        ((6, 8), (8,), (8,), None),
        ((2, 6, 8), (7,), (7,), None),
        ((2, 6, 8), (8,), (1,), None),
        ((2, 6, 8), (8,), (8,), (2, 4, 2)),
        ((2, 6, 8), (8,), (8,), (1, 3, 2)),
        ((2, 6, 8), (8,), (8,), (2, 3, 5)),
    ],
)
def test_wrong_shapes(
    x: tuple[int, ...], weight: tuple[int, ...], bias: tuple[int, ...], angles: tuple[int, ...] | None
) -> None:
    with pytest.raises(ValueError, match=r"expected x|angles") as error:
        pool_norm_rotate(
            torch.zeros(x),
            torch.zeros(weight),
            torch.zeros(bias),
            angles=None if angles is None else torch.zeros(angles),
        )
    assert str(x) in str(error.value)
    assert str(bias if angles is None else angles) in str(error.value)


@pytest.mark.parametrize(
    ("angles", "windows"),
    [(None, (2,)), ((5, 3, 2), (3,)), ((5, 3, 2), (2, 1)), ((5, 2, 2), (2,)), ((5, 3, 5), (2,)), ((3, 2), (2,))],
)
def test_wrong_tables(angles: tuple[int, ...] | None, windows: tuple[int, ...]) -> None:
    table = None if angles is None else torch.zeros(angles)
    with pytest.raises(ValueError, match=r"windows"):
        pool_norm_rotate(
            torch.zeros(2, 6, 8),
            torch.zeros(8),
            torch.zeros(8),
            angles=table,
            windows=torch.zeros(windows, dtype=torch.int64),
        )
