"""nvfp4 and mxfp4 packing: the error of each weight, exact cases, and what is refused."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from afnext.quant.nvfp4 import dequantize_nvfp4, quantize_mxfp4, quantize_nvfp4
from afnext.quant.nvfp4_importer import Nvfp4Format

E4M3 = torch.float8_e4m3fn
LEVELS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


@settings(max_examples=15)
@given(
    out=st.integers(1, 9),
    blocks=st.integers(1, 5),
    exponent=st.integers(-25, 25),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_the_error_is_at_most_that_of_the_plain_scale(
    out: int, blocks: int, exponent: int, dtype: torch.dtype, seed: int
) -> None:
    """Rounding to the nearest with a block's largest weight at 6, in the whole block together."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(out, 32 * blocks, generator=generator) * 10.0**exponent).to(dtype)
    codes, scales, channels = quantize_nvfp4(weight)
    assert (codes.dtype, codes.shape) == (torch.uint8, (out, 16 * blocks))
    assert (scales.dtype, scales.shape) == (E4M3, (out, 2 * blocks))
    assert (channels.dtype, channels.shape) == (torch.float32, (out,))
    wide = weight.double().unflatten(1, (-1, 16))
    steps = (wide.abs().amax(-1) / 6 / channels.double()[:, None]).float().to(E4M3).double() * channels.double()[
        :, None
    ]
    assert_within(wide, dequantize_nvfp4(codes, scales, channels, torch.float64), steps)

    codes, scales = quantize_mxfp4(weight)
    assert (codes.dtype, codes.shape) == (torch.uint8, (out, 16 * blocks))
    assert (scales.dtype, scales.shape) == (torch.uint8, (out, blocks))
    wide = weight.double().unflatten(1, (-1, 32))
    steps = 2.0 ** (wide.abs().amax(-1) / 6).log2().ceil()
    assert_within(wide, dequantize_nvfp4(codes, scales, None, torch.float64), steps)


def assert_within(wide: torch.Tensor, restored: torch.Tensor, steps: torch.Tensor) -> None:
    levels = torch.cat((-LEVELS.flip(0), LEVELS)).double()
    plain = ((wide / steps[..., None])[..., None] - levels).abs().amin(-1) * steps[..., None]
    error = restored.view(wide.shape) - wide
    assert (error.square().sum(-1) <= 1.0001 * plain.square().sum(-1)).all()


def test_levels_pack_to_themselves() -> None:
    levels = torch.cat((LEVELS, -LEVELS))
    row = torch.cat((levels, 0.25 * levels, 64 * levels, torch.zeros(16)))
    weight = torch.stack((row, 2.0**-9 * row, 2.0**20 * row))
    codes, scales, channels = quantize_nvfp4(weight)
    assert torch.equal(dequantize_nvfp4(codes, scales, channels), weight)
    weight = torch.stack((levels.repeat(2), 2.0**-20 * levels.repeat(2), torch.zeros(32)))
    codes, scales = quantize_mxfp4(weight)
    assert torch.equal(dequantize_nvfp4(codes, scales), weight)
    assert codes[0, 1] == 0b0011_0010  # 1 in the low four bits, 1.5 above it


def test_extreme_channels() -> None:
    weight = torch.zeros(4, 32)
    weight[1, 3] = -1e38
    weight[2, 5] = 1e-44  # below the smallest normal number
    weight[3] = 1.0
    codes, scales, channels = quantize_nvfp4(weight)
    restored = dequantize_nvfp4(codes, scales, channels)
    assert channels[0] == 0
    assert restored[:1].count_nonzero() == 0
    torch.testing.assert_close(restored[[1, 3]], weight[[1, 3]], rtol=0.05, atol=0)
    restored = dequantize_nvfp4(*quantize_mxfp4(weight))
    assert restored[:1].count_nonzero() == 0
    torch.testing.assert_close(restored[[1, 3]], weight[[1, 3]], rtol=0.34, atol=0)


@pytest.mark.parametrize("quantize", [quantize_nvfp4, quantize_mxfp4])
def test_importance_moves_error_to_inputs_that_matter_less(
    quantize: Callable[..., tuple[torch.Tensor, ...]], seed: int
) -> None:
    weight, importance = torch.randn(64, 256), torch.rand(256) ** 4
    with_it, without = (
        ((dequantize_nvfp4(*quantize(weight, given)) - weight).square() * importance).sum()
        for given in (importance, None)
    )
    assert with_it < without


@pytest.mark.parametrize("quantize", [quantize_nvfp4, quantize_mxfp4])
@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(3), r"\(3,\)"),
        (torch.zeros(3, 0), r"\(3, 0\)"),
        (torch.zeros(2, 32, dtype=torch.int8), "int8"),
        (torch.zeros(2, 40), "40 inputs are not divisible"),
        (torch.full((1, 32), float("nan")), "32 of 32"),
        (torch.full((1, 32), float("inf")), "32 of 32"),
    ],
)
def test_refusals(quantize: Callable[..., tuple[torch.Tensor, ...]], weight: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(weight)


def test_importance_must_fit() -> None:
    for importance in (torch.ones(16), -torch.ones(32)):
        with pytest.raises(ValueError, match="importance"):
            quantize_nvfp4(torch.zeros(2, 32), importance)


def test_weights_packed_by_compressed_tensors_itself(seed: int) -> None:
    library = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers", reason="needs compressed-tensors")
    levels = torch.cat((LEVELS, -LEVELS))[torch.randint(0, 16, (8, 64))]
    scales, divisor = (448 * torch.rand(8, 4)).to(E4M3), torch.rand(1) + 50_000
    tensors = {
        "weight_packed": library.pack_fp4_to_uint8(levels),
        "weight_scale": scales,
        "weight_global_scale": divisor,
    }
    packed = Nvfp4Format("compressed-tensors").weight("layer", tensors)
    expected = levels * scales.float().repeat_interleave(16, 1) / divisor
    torch.testing.assert_close(dequantize_nvfp4(*packed), expected, rtol=2.0**-22, atol=0)  # three roundings
