"""Rotary embedding against complex numbers and transformers' Qwen2, every backend against the float64 reference."""

import math

import pytest
import torch
from support.accuracy import DTYPES, assert_accurate, backends, exactly, poisoned
from torch import Tensor
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding, apply_rotary_pos_emb

from afnext.kernels import rotary as module
from afnext.kernels.rotary import Pairing, Rotation, rope_frequencies, rotary

CPU = torch.device("cpu")
PAIRINGS: tuple[Pairing, ...] = ("half", "interleaved")
# batch, time, heads, head_dim, rotated channels
SHAPES = [(1, 1, 1, 2, 2), (2, 7, 3, 64, 64), (1, 13, 5, 128, 128), (3, 5, 2, 20, 14), (2, 31, 1, 67, 32)]


def turned(x: Tensor, rotation: Rotation) -> Tensor:
    """The rotation as a product of complex numbers, one for each channel pair, in the precision of x."""
    width = 2 * rotation.frequencies.numel()
    paired = x[..., :width]
    paired = paired.unflatten(-1, (2, -1)).transpose(-1, -2) if rotation.pairing == "half" else paired
    numbers = torch.view_as_complex(paired.reshape(*x.shape[:-1], width // 2, 2).contiguous())
    angles = (rotation.positions[..., None, None] * rotation.frequencies).to(x.dtype)
    pairs = torch.view_as_real(numbers * torch.polar(torch.ones_like(angles), angles))
    pairs = pairs.transpose(-1, -2) if rotation.pairing == "half" else pairs
    return torch.cat((pairs.flatten(-2), x[..., width:]), dim=-1)


def inputs(
    shape: tuple[int, int, int, int, int], pairing: Pairing, device: torch.device = CPU
) -> tuple[Tensor, Rotation]:
    """x in float32, and a rotation at positions up to the end of the context."""
    batch, time, heads, head_dim, width = shape
    positions = torch.randint(0, 131_072, (batch, time)).float().to(device)
    frequencies = rope_frequencies(width, 15.3e6, device)
    return torch.randn(batch, time, heads, head_dim).to(device), Rotation(positions, frequencies, pairing)


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_multiplication_of_complex_numbers(
    shape: tuple[int, int, int, int, int], pairing: Pairing, seed: int
) -> None:
    x, rotation = inputs(shape, pairing)
    torch.testing.assert_close(exactly(rotary, x, rotation), turned(x.double(), rotation), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", *backends(module._operation)])
def test_half_split_is_qwen2s(backend: str, seed: int, device: torch.device) -> None:
    """At the positions around the ends of the context, where float32 angles are coarsest."""
    config = Qwen2Config(
        hidden_size=256,
        num_attention_heads=2,
        rope_parameters={"rope_theta": 15_300_000.0, "rope_type": "default"},
    )
    embedding = Qwen2RotaryEmbedding(config)
    x, positions = torch.randn(1, 40, 2, 128), torch.cat((torch.arange(20), torch.arange(131_052, 131_072)))[None]
    cos, sin = embedding(x, positions)
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
    frequencies = rope_frequencies(128, 15.3e6)
    assert torch.equal(frequencies, embedding.inv_freq)
    with poisoned(backend):
        actual = rotary(x.to(device), Rotation(positions.float().to(device), frequencies.to(device)))
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", backends(module._operation))
def test_accuracy(
    backend: str,
    shape: tuple[int, int, int, int, int],
    pairing: Pairing,
    dtype: torch.dtype,
    seed: int,
    device: torch.device,
) -> None:
    wide, rotation = inputs(shape, pairing, device)
    x = wide.to(dtype)
    with poisoned(backend):
        actual = rotary(x, rotation)
    assert_accurate(actual, exactly(rotary, x, rotation), turned(x.float(), rotation).to(dtype))
    width = shape[-1]
    assert torch.equal(actual[..., width:], x[..., width:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", backends(module._operation))
def test_seconds_as_positions(backend: str, dtype: torch.dtype, seed: int, device: torch.device) -> None:
    """The report's RoTE: the angle is -2 pi times the token's time, here the last 40 ms tokens of half an hour."""
    seconds = torch.arange(44_950, 45_000).float()[None] * 0.04
    rotation = Rotation((-2 * math.pi * seconds).to(device), rope_frequencies(64, 1200.0, device), "interleaved")
    x = torch.randn(1, 50, 2, 64).to(device, dtype)
    with poisoned(backend):
        actual = rotary(x, rotation)
    assert_accurate(actual, exactly(rotary, x, rotation), turned(x.float(), rotation).to(dtype))


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("backend", ["reference", *backends(module._operation)])
def test_turning_back_and_standing_still(backend: str, pairing: Pairing, seed: int, device: torch.device) -> None:
    x, rotation = inputs((2, 9, 3, 64, 64), pairing, device)
    back = Rotation(-rotation.positions, rotation.frequencies, pairing)
    still = Rotation(torch.zeros_like(rotation.positions), rotation.frequencies, pairing)
    with poisoned(backend):
        torch.testing.assert_close(rotary(rotary(x, rotation), back), x, rtol=0, atol=1e-5)
        assert torch.equal(rotary(x, still), x)


@pytest.mark.parametrize("backend", ["reference", *backends(module._operation)])
def test_a_quarter_turn_tells_the_pairings_apart(backend: str, device: torch.device) -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], device=device).view(1, 1, 1, 4)
    position = torch.full((1, 1), math.pi / 2, device=device)
    one = torch.ones(2, device=device)
    with poisoned(backend):
        half = rotary(x, Rotation(position, one, "half"))
        interleaved = rotary(x, Rotation(position, one, "interleaved"))
    torch.testing.assert_close(half.flatten().cpu(), torch.tensor([-3.0, -4.0, 1.0, 2.0]), rtol=0, atol=1e-6)
    torch.testing.assert_close(interleaved.flatten().cpu(), torch.tensor([-2.0, 1.0, -4.0, 3.0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["reference", *backends(module._operation)])
def test_input_is_left_alone(backend: str, dtype: torch.dtype, seed: int, device: torch.device) -> None:
    wide, rotation = inputs((2, 5, 2, 16, 12), "half", device)
    x = wide.to(dtype)
    before = x.clone()
    with poisoned(backend):
        assert rotary(x, rotation).dtype == dtype
    assert torch.equal(x, before)


def test_float64_stays_float64(seed: int) -> None:
    """Whichever backend the device has first."""
    x, rotation = inputs((2, 5, 2, 16, 12), "half", torch.device("cpu"))
    out = rotary(x.double(), rotation)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, exactly(rotary, x, rotation), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", backends(module._operation))
def test_strided_input(backend: str, seed: int, device: torch.device) -> None:
    """Queries as a slice of a fused projection."""
    x, rotation = inputs((2, 9, 7, 32, 32), "half", device)
    with poisoned(backend):
        torch.testing.assert_close(rotary(x[:, :, 2:5], rotation), rotary(x, rotation)[:, :, 2:5])


@pytest.mark.parametrize(
    ("x", "positions", "pairs"),
    [
        ((2, 5, 3, 8), (2, 4), 4),
        ((2, 5, 3, 8), (1, 5), 4),
        ((2, 5, 3, 8), (2, 5), 5),
        ((2, 5, 8), (2, 5), 4),
    ],
)
def test_wrong_shapes(x: tuple[int, ...], positions: tuple[int, ...], pairs: int) -> None:
    with pytest.raises(ValueError, match=f"with {pairs} pairs") as error:
        rotary(torch.zeros(x), Rotation(torch.zeros(positions), torch.ones(pairs)))
    assert str(x) in str(error.value)
    assert str(positions) in str(error.value)
