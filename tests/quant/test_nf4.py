"""nf4: the bits and numbers of bitsandbytes, the error of each weight, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from afnext.quant.nf4 import BLOCK_SIZE, LEVELS, dequantize_nf4, quantize_nf4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-37, 1e-40, 1e2])
def test_bits_and_numbers_are_those_of_bitsandbytes(dtype: torch.dtype, size: float, seed: int) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = (torch.randn(37, 320) * size).to(dtype)
    weight[3] = 0
    weight[5, 7] *= 100
    weight[6, :64] = torch.tensor(LEVELS).repeat(4) * size  # exact levels
    codes, scales = quantize_nf4(weight)
    theirs, state = functional.quantize_4bit(weight, blocksize=BLOCK_SIZE, quant_type="nf4")
    assert torch.equal(codes.flatten(), theirs.flatten())
    assert torch.equal(scales.flatten(), state.absmax)
    # Their AVX-512 code takes numbers below the smallest normal one for 0.
    tiny = torch.finfo(torch.float32).tiny
    torch.testing.assert_close(
        dequantize_nf4(codes, scales, dtype), functional.dequantize_4bit(theirs, state), rtol=0, atol=tiny
    )


@settings(max_examples=40)
@given(
    out=st.integers(1, 6),
    blocks=st.integers(1, 4),
    exponent=st.integers(-30, 30),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_each_weight_goes_to_the_nearest_level(
    out: int, blocks: int, exponent: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(out, blocks * BLOCK_SIZE, generator=generator) * 10.0**exponent).to(dtype)
    codes, scales = quantize_nf4(weight)
    assert (codes.dtype, codes.shape) == (torch.uint8, (out, blocks * BLOCK_SIZE // 2))
    assert (scales.dtype, scales.shape) == (torch.float32, (out, blocks))
    steps = scales.double().repeat_interleave(BLOCK_SIZE, 1)
    nearest = (weight.double()[..., None] - steps[..., None] * torch.tensor(LEVELS).double()).abs().amin(-1)
    error = (dequantize_nf4(codes, scales, torch.float64) - weight.double()).abs()
    assert (error <= nearest + 1e-6 * steps).all()


def test_the_even_input_has_the_high_bits() -> None:
    weight = torch.zeros(1, BLOCK_SIZE)
    weight[0, 0], weight[0, 1] = 2.0, -2.0
    codes, scales = quantize_nf4(weight)
    assert codes[0, :2].tolist() == [0xF0, 0x77]
    assert scales.tolist() == [[2.0]]
    assert torch.equal(dequantize_nf4(codes, scales), weight)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(3, 100), "not divisible"),
        (torch.zeros(64), r"\(64,\)"),
        (torch.zeros(3, 0), r"\(3, 0\)"),
        (torch.zeros(3, 64, dtype=torch.int32), "int32"),
        (torch.full((1, 64), float("inf")), "64 of 64"),
    ],
)
def test_refusals(weight: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_nf4(weight)
