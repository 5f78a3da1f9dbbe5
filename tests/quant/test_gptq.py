"""Error feedback: the paper's formula column by column in float64, held-out activations, and what is refused."""

import pytest
import torch
from torch import Tensor

from afnext.quant.gptq import feedback_factor, gptq_int3, gptq_int4, gptq_int8
from afnext.quant.int3 import dequantize_int3, fit_int3, pack_int3
from afnext.quant.int4 import dequantize_int4, fit_int4, unpack_int4
from afnext.quant.int8 import dequantize_int8, quantize_int8


def correlated(rows: int, inputs: int, mixing: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Activations [rows, inputs] float64 that live mostly in few directions, and what mixes them."""
    if mixing is None:
        mixing = torch.randn(inputs // 4, inputs, dtype=torch.float64)
        mixing[:, torch.randperm(inputs)[: inputs // 16]] *= 20  # outlier channels
    noise = 0.1 * torch.randn(rows, inputs, dtype=torch.float64)
    return torch.randn(rows, len(mixing), dtype=torch.float64) @ mixing + noise, mixing


def step_of(weights: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero of each row of a group, as the layout defines them, with float16 scales."""
    weights = weights.float()
    if symmetric:
        scale = (weights.abs().amax(1) / 7).half().double()
        return scale, torch.full_like(scale, 8)
    low, high = weights.amin(1).clamp(max=0), weights.amax(1).clamp(min=0)
    scale = ((high.double() - low.double()) / 15).half().double()
    return scale, (-low / scale.float()).round().clamp(0, 15).double()


def naive(
    weight: Tensor, gram: Tensor, group: int, symmetric: bool, damping: float, activation_order: bool
) -> tuple[Tensor, Tensor]:
    """Codes and dequantized weights by Frantar et al. 2022, equations 2 and 3, column after column."""
    weight, inputs = weight.clone(), weight.shape[1]
    hessian = 2 * gram + damping * (2 * gram).diagonal().mean() * torch.eye(inputs, dtype=torch.float64)
    inverse = torch.linalg.inv(hessian)
    order = sorted(range(inputs), key=lambda i: -float(gram[i, i])) if activation_order else list(range(inputs))
    grids = {g: step_of(weight[:, g * group : (g + 1) * group], symmetric) for g in range(inputs // group)}
    codes, result = torch.zeros_like(weight), torch.zeros_like(weight)
    for i in order:
        if not activation_order and i % group == 0:
            grids[i // group] = step_of(weight[:, i : i + group], symmetric)
        scale, zero = grids[i // group]
        codes[:, i] = (weight[:, i] / scale + zero).round().clamp(0, 15)
        result[:, i] = (codes[:, i] - zero) * scale
        weight -= (weight[:, i] - result[:, i])[:, None] * inverse[i] / inverse[i, i]
        inverse -= inverse[:, i : i + 1] @ inverse[i : i + 1] / inverse[i, i]
    return codes, result


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("inputs", "group"), [(96, 32), (128, 64), (256, 128)])
def test_equals_the_formula(inputs: int, group: int, symmetric: bool, activation_order: bool, seed: int) -> None:
    weight = torch.randn(5, inputs, dtype=torch.float64)
    x, _ = correlated(3 * inputs, inputs)
    codes, result = naive(weight, x.T @ x, group, symmetric, 0.01, activation_order)
    packed, scales, zeros = gptq_int4(
        weight, x.T @ x, group, symmetric, torch.float16, activation_order=activation_order, search=False
    )
    assert torch.equal(unpack_int4(packed).double(), codes)
    assert torch.equal(dequantize_int4(packed, scales, zeros, torch.float64), result)


@pytest.mark.parametrize("activation_order", [False, True])
def test_int8_equals_the_formula(activation_order: bool, seed: int) -> None:
    inputs = 150  # more than a block of columns
    weight = torch.randn(4, inputs, dtype=torch.float64)
    x, _ = correlated(400, inputs)
    gram = x.T @ x
    scale = (weight.float().abs().amax(1) / 127).double()
    left, expected = weight.clone(), torch.zeros_like(weight)
    inverse = torch.linalg.inv(gram + 0.02 * gram.diagonal().mean() * torch.eye(inputs, dtype=torch.float64))
    order = gram.diagonal().argsort(descending=True).tolist() if activation_order else range(inputs)
    for i in order:
        expected[:, i] = (left[:, i] / scale).round().clamp(-127, 127)
        left -= (left[:, i] - expected[:, i] * scale)[:, None] * inverse[i] / inverse[i, i]
        inverse -= inverse[:, i : i + 1] @ inverse[i : i + 1] / inverse[i, i]
    codes, scales = gptq_int8(weight, gram, damping=0.02, activation_order=activation_order)
    assert codes.dtype == torch.int8
    assert torch.equal(codes.double(), expected)
    assert torch.equal(scales, quantize_int8(weight)[1])


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_beats_nearest_rounding_on_held_out_activations(
    dtype: torch.dtype, symmetric: bool, activation_order: bool, seed: int
) -> None:
    weight = torch.randn(48, 256).to(dtype)
    x, mixing = correlated(2000, 256)
    held_out, _ = correlated(500, 256, mixing)
    nearest = dequantize_int4(*fit_int4(weight, 64, symmetric), torch.float64)
    fed_back = dequantize_int4(
        *gptq_int4(weight, x.T @ x, 64, symmetric, activation_order=activation_order), torch.float64
    )
    errors = [(held_out @ (rounded - weight.double()).T).norm() for rounded in (nearest, fed_back)]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("activation_order", [False, True])
def test_int3_beats_nearest_rounding_on_held_out_activations(activation_order: bool, seed: int) -> None:
    weight = torch.randn(48, 256)
    x, mixing = correlated(2000, 256)
    held_out, _ = correlated(500, 256, mixing)
    nearest = dequantize_int3(*fit_int3(weight, 64), torch.float64)
    packed, scales = gptq_int3(weight, x.T @ x, 64, activation_order=activation_order)
    fed_back = dequantize_int3(packed, scales, torch.float64)
    errors = [(held_out @ (rounded - weight.double()).T).norm() for rounded in (nearest, fed_back)]
    assert errors[1] < 0.8 * errors[0]
    codes = fed_back / scales.double().repeat_interleave(64, 1) + 8
    assert torch.equal(pack_int3(codes.round().byte()), packed)


def test_int8_beats_nearest_rounding_on_held_out_activations(seed: int) -> None:
    weight = torch.randn(48, 200)
    x, mixing = correlated(2000, 200)
    held_out, _ = correlated(500, 200, mixing)
    nearest = dequantize_int8(*quantize_int8(weight), torch.float64)
    fed_back = dequantize_int8(*gptq_int8(weight, x.T @ x), torch.float64)
    errors = [(held_out @ (rounded - weight.double()).T).norm() for rounded in (nearest, fed_back)]
    assert errors[1] < 0.8 * errors[0]


def test_unrelated_inputs_are_rounded_to_the_nearest(seed: int) -> None:
    weight, gram = torch.randn(6, 128), torch.diag(torch.rand(128) + 0.1)
    importance = gram.diagonal() + 0.01 * gram.diagonal().mean()
    nearest = fit_int4(weight, 64, False, importance=importance)
    for actual, expected in zip(gptq_int4(weight, gram, 64, False), nearest, strict=True):
        assert actual is not None
        assert expected is not None
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("activation_order", [False, True])
def test_silent_and_repeated_inputs(activation_order: bool, seed: int) -> None:
    weight = torch.randn(6, 64)
    weight[2] = 0
    x = torch.randn(20, 64)  # fewer rows than inputs: H is singular
    x[:, 5] = 0
    x[:, 9] = x[:, 8]
    packed, scales, _ = gptq_int4(weight, x.T @ x, 32, activation_order=activation_order)
    assert dequantize_int4(packed, scales).isfinite().all()
    assert (dequantize_int4(packed, scales)[2] == 0).all()
    nothing, _, _ = gptq_int4(weight, torch.zeros(64, 64), 32)
    assert torch.equal(nothing, fit_int4(weight, 32)[0])


def test_rows_do_not_depend_on_each_other(seed: int) -> None:
    weight = torch.randn(4100, 128, dtype=torch.float64)  # more rows than are handled at once
    x, _ = correlated(200, 128)
    for quantize in (gptq_int4, gptq_int8):
        whole, last = quantize(weight, x.T @ x), quantize(weight[4090:], x.T @ x)
        assert torch.equal(whole[0][4090:], last[0])
        assert torch.equal(whole[1][4090:], last[1])


def test_the_factor_is_that_of_the_inverse(seed: int) -> None:
    x, _ = correlated(100, 40)
    gram = x.T @ x
    factor = feedback_factor(gram, 0.05)
    damped = gram + 0.05 * gram.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(damped), rtol=1e-8, atol=0)


@pytest.mark.parametrize(
    ("gram", "damping", "message"),
    [
        (torch.eye(32), 0.01, "Gram matrix"),
        (torch.full((64, 64), float("nan")), 0.01, "finite"),
        (torch.eye(64), -0.1, "at least 0"),
        (torch.ones(64, 64), 0.0, "larger"),
        (-torch.eye(64), 0.0, "larger"),
    ],
)
def test_refusals(gram: Tensor, damping: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gptq_int4(torch.ones(2, 64), gram, 32, damping=damping)


def test_weights_are_refused_as_without_feedback() -> None:
    with pytest.raises(ValueError, match="not divisible"):
        gptq_int4(torch.ones(2, 65), torch.eye(65), 64)
    with pytest.raises(ValueError, match="not finite"):
        gptq_int8(torch.full((2, 8), float("inf")), torch.eye(8))
