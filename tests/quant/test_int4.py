"""int4 packing: the layout, the error of each weight, exact cases, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from afnext.quant.int4 import dequantize_int4, fit_int4, pack_int4, quantize_int4, unpack_int4


def test_the_even_input_has_the_low_bits() -> None:
    codes = torch.tensor([[1, 2, 3, 15]], dtype=torch.uint8)
    assert pack_int4(codes).tolist() == [[0x21, 0xF3]]
    assert torch.equal(unpack_int4(pack_int4(codes)), codes)


@settings(max_examples=60)
@given(
    out=st.integers(1, 5),
    groups=st.integers(1, 4),
    group=st.sampled_from([32, 64, 128]),
    symmetric=st.booleans(),
    exponent=st.integers(-3, 3),
    offset=st.sampled_from([0.0, 1.0, -5.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_error_is_at_most_half_a_step(
    out: int,
    groups: int,
    group: int,
    symmetric: bool,
    exponent: int,
    offset: float,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = ((torch.randn(out, groups * group, generator=generator) + offset) * 10.0**exponent).to(dtype)
    packed, scales, zeros = quantize_int4(weight, group, symmetric, scale_dtype)
    assert (packed.dtype, packed.shape) == (torch.uint8, (out, groups * group // 2))
    assert (scales.dtype, scales.shape) == (scale_dtype, (out, groups))
    assert (zeros is None) == symmetric
    error = (dequantize_int4(packed, scales, zeros, torch.float64) - weight.double()).abs()
    # Rounding the scale moves the last code's edge by up to 15 roundings, the whole zero point by up to half a step.
    slack = 0.5 + 16 * torch.finfo(scale_dtype).eps + (0 if symmetric else 0.5)
    steps = scales.double().repeat_interleave(group, 1)
    assert (error <= slack * steps + 1e-7 * 10.0**exponent).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_codes_pack_to_themselves(group: int, symmetric: bool, seed: int) -> None:
    codes = torch.randint(0, 16, (6, 2 * group), dtype=torch.uint8)
    codes[:, ::group], codes[:, 1::group] = 15, 1 if symmetric else 0
    scales = 2.0 ** torch.randint(-6, 6, (6, 2))
    zeros = None if symmetric else torch.randint(0, 16, (6, 2)).float()
    if symmetric:
        codes = codes.clamp_min(1)  # -8 takes a larger scale
    weight = dequantize_int4(pack_int4(codes), scales, zeros)
    packed, same_scales, same_zeros = quantize_int4(weight, group, symmetric, torch.float32)
    assert torch.equal(unpack_int4(packed), codes)
    assert torch.equal(same_scales, scales)
    if zeros is not None:
        assert same_zeros is not None
        assert torch.equal(same_zeros, zeros)


def test_groups_are_neighbours_of_one_channel() -> None:
    weight = torch.zeros(2, 128)
    weight[0, 64:] = 7.0
    packed, scales, _ = quantize_int4(weight, 64)
    assert scales.tolist() == [[0.0, 1.0], [0.0, 0.0]]
    assert torch.equal(dequantize_int4(packed, scales), weight)


@pytest.mark.parametrize("symmetric", [True, False])
def test_extreme_values(symmetric: bool) -> None:
    weight = torch.zeros(3, 32)
    weight[0, 4] = -1e38
    weight[1, 5], weight[1, 6] = 1e38, -1e38
    weight[2, 7] = 1e-44
    packed, scales, zeros = quantize_int4(weight, 32, symmetric, torch.float32)
    restored = dequantize_int4(packed, scales, zeros)
    assert restored.isfinite().all()
    assert (restored[0, :4] == 0).all()
    with pytest.raises(ValueError, match="float16"):
        quantize_int4(weight, 32, symmetric)


@pytest.mark.parametrize(
    ("weight", "group", "message"),
    [
        (torch.zeros(3, 100), 64, "not divisible"),
        (torch.zeros(3, 96), 48, "not 48"),
        (torch.zeros(64), 64, r"\(64,\)"),
        (torch.zeros(3, 0), 64, r"\(3, 0\)"),
        (torch.zeros(3, 64, dtype=torch.int32), 64, "int32"),
        (torch.full((1, 32), float("nan")), 32, "32 of 32"),
    ],
)
def test_refusals(weight: torch.Tensor, group: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_int4(weight, group)


def test_an_odd_number_of_codes_is_refused() -> None:
    with pytest.raises(ValueError, match="odd"):
        pack_int4(torch.zeros(2, 3, dtype=torch.uint8))


def squared_error(weight: torch.Tensor, packed: tuple[torch.Tensor, ...], importance: torch.Tensor | None) -> float:
    error = (dequantize_int4(*packed, dtype=torch.float64) - weight.double()).square()
    return float((error if importance is None else error * importance.double()).sum())


@settings(max_examples=60)
@given(
    out=st.integers(1, 5),
    groups=st.integers(1, 3),
    group=st.sampled_from([32, 64, 128]),
    symmetric=st.booleans(),
    weighted=st.booleans(),
    exponent=st.sampled_from([-30, -3, 0, 30]),
    heavy=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_fitted_scales_beat_those_of_the_largest_weight(
    out: int,
    groups: int,
    group: int,
    symmetric: bool,
    weighted: bool,
    exponent: int,
    heavy: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, groups * group, generator=generator)
    if heavy:
        weight = weight**3
    weight = (weight * 10.0**exponent).to(dtype)
    importance = torch.rand(groups * group, generator=generator) ** 4 if weighted else None
    fitted = fit_int4(weight, group, symmetric, torch.float32, importance)
    plain = quantize_int4(weight, group, symmetric, torch.float32)
    assert [None if part is None else part.shape for part in fitted] == [
        None if part is None else part.shape for part in plain
    ]
    # A candidate that is the plain one is among those of asymmetric groups; symmetric ones use one code more.
    assert squared_error(weight, fitted, importance) <= 1.05 * squared_error(weight, plain, importance)


def test_fitting_pays(seed: int) -> None:
    weight = torch.randn(64, 512)
    for symmetric, bar in ((True, 0.75), (False, 0.97)):
        plain = squared_error(weight, quantize_int4(weight, 64, symmetric), None)
        assert squared_error(weight, fit_int4(weight, 64, symmetric), None) < bar * plain


@pytest.mark.parametrize("symmetric", [True, False])
def test_importance_moves_the_error_to_unimportant_inputs(symmetric: bool, seed: int) -> None:
    weight = torch.randn(128, 256)
    importance = torch.ones(256)
    importance[::4] = 1000.0
    alike, weighted = fit_int4(weight, 64, symmetric), fit_int4(weight, 64, symmetric, importance=importance)
    assert squared_error(weight, weighted, importance) < 0.9 * squared_error(weight, alike, importance)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_largest_weight_keeps_its_sign_and_size(symmetric: bool, seed: int) -> None:
    weight = torch.randn(6, 64) / 100
    weight[:3, 10], weight[3:, 10] = 4.0, -4.0
    restored = dequantize_int4(*fit_int4(weight, 64, symmetric))
    assert (restored[:, 10] / weight[:, 10] - 1).abs().max() < 0.04


@pytest.mark.parametrize("symmetric", [True, False])
def test_fitting_extreme_values(symmetric: bool) -> None:
    weight = torch.zeros(4, 32)
    weight[0, 4] = -1e38
    weight[1, 5], weight[1, 6] = 3e38, -3e38
    weight[2, 7] = 1e-44
    restored = dequantize_int4(*fit_int4(weight, 32, symmetric))
    assert restored.isfinite().all()
    assert (restored[3] == 0).all()
    assert (restored[0, :4] == 0).all()
    assert abs(restored[0, 4] / -1e38 - 1) < 0.01
    with pytest.raises(ValueError, match="float16"):
        fit_int4(weight, 32, symmetric, torch.float16)


def test_an_importance_that_does_not_fit_is_refused() -> None:
    for importance in (torch.ones(63), -torch.ones(64), torch.full((64,), float("nan"))):
        with pytest.raises(ValueError, match="importance"):
            fit_int4(torch.zeros(2, 64), 64, importance=importance)
    with pytest.raises(ValueError, match="not divisible"):
        fit_int4(torch.zeros(2, 48), 32)
