"""int3 packing: the layout, exact cases, the error of each weight and of a group, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from afnext.quant.int3 import dequantize_int3, fit_int3, pack_int3, unpack_int3
from afnext.quant.int4 import pack_int4


def test_layout() -> None:
    """The first 96 inputs lie as in int4; the bits of the last 32 are spread over the lowest bits of their codes."""
    codes = torch.zeros(1, 128, dtype=torch.uint8)
    codes[0, 0], codes[0, 33], codes[0, 64] = 14, 6, 2
    assert pack_int3(codes).shape == (1, 48)
    assert pack_int3(codes)[0, [0, 16, 32]].tolist() == [0x0E, 0x60, 0x02]
    codes[0, 96], codes[0, 97] = 2, 12
    assert pack_int3(codes)[0, [0, 16, 32]].tolist() == [0x0F, 0x70, 0x12]


@pytest.mark.parametrize("inputs", [128, 384])
def test_codes_pack_to_themselves(inputs: int, seed: int) -> None:
    codes = 2 * torch.randint(0, 8, (6, inputs), dtype=torch.uint8)
    assert torch.equal(unpack_int3(pack_int3(codes)), pack_int4(codes))


@pytest.mark.parametrize("group", [32, 64, 128])
def test_weights_on_the_grid_are_exact(group: int, seed: int) -> None:
    codes = 2 * torch.randint(0, 8, (6, 256), dtype=torch.uint8)
    codes[:, ::group] = 0
    scales = (2.0 ** torch.randint(-6, 6, (6, 256 // group))) * (2 * torch.randint(0, 2, (6, 256 // group)) - 1)
    weight = dequantize_int3(pack_int3(codes), scales)
    expected = (codes.float() - 8) * scales.repeat_interleave(group, 1)
    assert torch.equal(weight, expected)
    packed, found = fit_int3(weight, group)
    assert torch.equal(dequantize_int3(packed, found), expected)


@settings(max_examples=40)
@given(
    out=st.integers(1, 5),
    blocks=st.integers(1, 3),
    group=st.sampled_from([32, 64, 128]),
    exponent=st.integers(-3, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_codes_are_the_nearest(out: int, blocks: int, group: int, exponent: int, dtype: torch.dtype, seed: int) -> None:
    """No other of the eight values of a weight's group is nearer."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(out, blocks * 128, generator=generator) * 10.0**exponent).to(dtype)
    packed, scales = fit_int3(weight, group)
    assert (packed.dtype, packed.shape) == (torch.uint8, (out, blocks * 48))
    assert (scales.dtype, scales.shape) == (torch.bfloat16, (out, blocks * 128 // group))
    steps = scales.double().repeat_interleave(group, 1)[..., None]
    values = (2 * torch.arange(8) - 8) * steps
    nearest = (values - weight.double()[..., None]).abs().amin(-1)
    error = (dequantize_int3(packed, scales, torch.float64) - weight.double()).abs()
    assert (error <= nearest * (1 + 1e-5) + 1e-12).all()


def test_error_of_normal_weights(seed: int) -> None:
    """What `quant/int3.py` states."""
    weight = torch.randn(64, 1024)

    def error(approximation: torch.Tensor) -> float:
        return float((approximation - weight).norm() / weight.norm())

    found = error(dequantize_int3(*fit_int3(weight, 64)))
    assert 0.17 < found < 0.185
    assert error(dequantize_int3(*fit_int3(weight, 128))) > found


def test_important_inputs_have_smaller_errors(seed: int) -> None:
    weight, importance = torch.randn(32, 128), torch.ones(128)
    importance[:16] = 100.0
    plain, weighted = (dequantize_int3(*fit_int3(weight, 128, importance=each)) for each in (None, importance))
    assert (weighted - weight)[:, :16].norm() < (plain - weight)[:, :16].norm()


def test_refusals() -> None:
    for weight, message in (
        (torch.zeros(2, 64), "multiples of 128"),
        (torch.zeros(2, 100), "divisible"),
        (torch.full((2, 128), torch.inf), "finite"),
        (torch.full((2, 128), 3e38), "scales"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_int3(weight, 64, torch.float16)
