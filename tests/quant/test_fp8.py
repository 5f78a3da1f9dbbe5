"""fp8 packing: the error of each weight, exact cases, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from afnext.quant.fp8 import dequantize_fp8, quantize_fp8

E4M3 = torch.float8_e4m3fn


@settings(max_examples=40)
@given(
    out=st.integers(1, 9),
    inner=st.integers(1, 70),
    exponent=st.integers(-30, 30),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_error_is_at_most_a_sixteenth(out: int, inner: int, exponent: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(out, inner, generator=generator) * 10.0**exponent).to(dtype)
    codes, scales = quantize_fp8(weight)
    assert (codes.dtype, codes.shape, scales.dtype, scales.shape) == (E4M3, (out, inner), torch.float32, (out,))
    error = (dequantize_fp8(codes, scales, torch.float64) - weight.double()).abs()
    allowed = torch.maximum(weight.double().abs() / 16, scales.double()[:, None] * 2**-10)
    assert (error <= 1.0001 * allowed).all()
    assert (codes.float().abs().amax(1) == 448).all()


def test_codes_pack_to_themselves() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    values = values[values.isfinite()].expand(3, -1)
    scales = 2.0 ** torch.tensor([-9.0, 0.0, 5.0])
    codes, same = quantize_fp8(values * scales[:, None])
    assert torch.equal(codes.float(), values)
    assert torch.equal(same, scales)


def test_extreme_channels() -> None:
    weight = torch.zeros(4, 16)
    weight[1, 3] = -1e38
    weight[2, 5] = 1e-44  # below the smallest normal number
    weight[3] = 1.0
    codes, scales = quantize_fp8(weight)
    assert scales[0] == 0
    assert codes[0].float().count_nonzero() == 0
    assert codes[1].float().tolist() == [0] * 3 + [-448] + [0] * 12
    assert codes[3].float().tolist() == [448] * 16
    assert dequantize_fp8(codes, scales).isfinite().all()


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
        quantize_fp8(weight)
