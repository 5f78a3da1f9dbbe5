"""int8 packing: the error of each weight, exact cases, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from afnext.kernels.linear_w8a8 import linear_w8a8
from afnext.kernels.packed_weight import Packed
from afnext.quant.int8 import dequantize_int8, quantize_int8


@settings(max_examples=40)
@given(
    out=st.integers(1, 9),
    inner=st.integers(1, 70),
    exponent=st.integers(-30, 30),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_error_is_at_most_half_a_step(out: int, inner: int, exponent: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(out, inner, generator=generator) * 10.0**exponent).to(dtype)
    codes, scales = quantize_int8(weight)
    assert (codes.dtype, codes.shape, scales.dtype, scales.shape) == (torch.int8, (out, inner), torch.float32, (out,))
    error = (dequantize_int8(codes, scales, torch.float64) - weight.double()).abs()
    assert (error <= 0.5001 * scales.double()[:, None]).all()
    assert (codes.int().abs().amax(1) == 127).all()


def test_codes_pack_to_themselves(seed: int) -> None:
    codes = torch.randint(-127, 128, (6, 48), dtype=torch.int8)
    codes[:, 0] = 127
    scales = 2.0 ** torch.randint(-8, 8, (6,))
    again, same = quantize_int8(codes.float() * scales[:, None])
    assert torch.equal(again, codes)
    assert torch.equal(same, scales)


def test_extreme_channels() -> None:
    weight = torch.zeros(4, 16)
    weight[1, 3] = -1e38
    weight[2, 5] = 1e-44  # below the smallest normal number
    weight[3] = 1.0
    codes, scales = quantize_int8(weight)
    assert scales[0] == 0
    assert codes[0].count_nonzero() == 0
    assert codes[1].tolist() == [0] * 3 + [-127] + [0] * 12
    assert codes[3].tolist() == [127] * 16
    assert dequantize_int8(codes, scales).isfinite().all()


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(3), r"\(3,\)"),
        (torch.zeros(3, 0), r"\(3, 0\)"),
        (torch.zeros(2, 4, dtype=torch.int8), "int8"),
        (torch.tensor([[1.0, float("nan")]]), "1 of 2"),
        (torch.tensor([[float("inf"), 1.0]]), "1 of 2"),
    ],
)
def test_refusals(weight: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_int8(weight)


def test_codes_are_those_of_bitsandbytes(seed: int) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(50, 320).half()
    weight[4] = 0
    codes, scales = quantize_int8(weight)
    theirs, largest, _ = functional.int8_vectorwise_quant(weight)
    assert torch.equal(scales, largest / 127)
    # Both round w * 127 / largest, but not in the same steps: next to a tie the two may part.
    shares = weight.double() / largest.double().clamp(min=1e-9)[:, None] * 127
    at_tie = (shares - shares.floor() - 0.5).abs() < 1e-4
    assert torch.equal(codes[~at_tie], theirs[~at_tie])
    assert int((codes.int() - theirs.int()).abs().max()) <= 1


def test_the_product_with_int8_inputs_is_that_of_bitsandbytes(seed: int) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    x, weight = torch.randn(24, 256).half(), torch.randn(40, 256).half()
    codes, scales = quantize_int8(weight)
    row_codes, largest, _ = functional.int8_vectorwise_quant(x)
    sums = functional.int8_linear_matmul(row_codes, codes)
    theirs = functional.int8_mm_dequant(sums, largest, 127 * scales).float()
    ours = linear_w8a8(x.float(), Packed(codes, scales))
    # float16 holds their result; an input next to a tie may have the neighbouring code.
    allowed = 1e-3 * theirs.abs().max() + 128 * scales * largest.max() / 127
    assert ((ours - theirs).abs() <= allowed).all()
    assert (ours - theirs).square().mean().sqrt() <= 1e-3 * theirs.square().mean().sqrt()
