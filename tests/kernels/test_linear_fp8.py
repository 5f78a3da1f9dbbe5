"""Products with e4m3 weights: every backend against a float64 product of the decoded numbers, and what rounding costs.

The decoding and rounding here are written from the format's definition, independently of torch's dtype.
"""

import numpy as np
import pytest
import torch
from support.accuracy import DTYPES, assert_accurate, backends, exactly, poisoned
from support.int8_products import product
from torch import Tensor
from torch.nn import functional as F

from afnext.kernels import linear_fp8 as module
from afnext.kernels.configs import targeting
from afnext.kernels.linear_fp8 import linear_fp8, linear_fp8_swiglu, rounds_inputs
from afnext.kernels.packed_product import FEW_ROWS
from afnext.kernels.packed_weight import Packed
from afnext.kernels.row_groups import row_invariant

E4M3 = torch.float8_e4m3fn
SHAPES = [(1, 256, 96), (3, 144, 37), (64, 512, 64), (66, 16, 1), (70, 144, 131), (131, 272, 40)]  # rows, in, out


def values() -> np.ndarray:
    """The 256 numbers: sign, four exponent bits with a bias of 7, three of mantissa; 127 and 255 are NaN."""
    bits = np.arange(256)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    return np.where(bits & 127 == 127, np.nan, np.where(bits < 128, size, -size))


def weights(columns: int, inner: int, device: torch.device) -> Packed:
    """Codes of all magnitudes, and scales."""
    codes = torch.randint(0, 127, (columns, inner)) + 128 * torch.randint(0, 2, (columns, inner))
    return Packed(codes.byte().view(E4M3).to(device), (torch.rand(columns) / 100 / inner**0.5).to(device))


def decoded(weight: Packed) -> Tensor:
    """The weights in float64."""
    return (
        torch.from_numpy(values()[weight.codes.cpu().view(torch.uint8).numpy()]) * weight.scales.cpu().double()[:, None]
    )


def rounded(x: Tensor) -> Tensor:
    """Each row's nearest multiples of its scale among the 256 numbers, ties to even codes, in float64."""
    wide = x.cpu().float()
    scales = wide.abs().amax(-1) / 448
    shares = (wide / torch.where(scales > 0, scales, 1)[:, None]).numpy().astype(np.float64)
    positive = values()[:127]
    places = np.clip(np.searchsorted(positive, np.abs(shares)), 1, 126)
    below, above = positive[places - 1], positive[places]
    middle = (below + above) / 2
    upper = (np.abs(shares) > middle) | ((np.abs(shares) == middle) & (places % 2 == 0))
    return torch.from_numpy(np.copysign(np.where(upper, above, below), shares)) * scales.double()[:, None]


def exact_product(x: Tensor, weight: Packed) -> Tensor:
    tokens = rounded(x) if len(x) > FEW_ROWS else x.cpu().double()
    return (tokens @ decoded(weight).T).to(x.device)


def plain_product(x: Tensor, weight: Packed) -> Tensor:
    tokens = rounded(x).to(x.device, x.dtype) if len(x) > FEW_ROWS else x
    return product(tokens, decoded(weight).to(x.device, x.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", backends(module.FP8.single))
def test_accuracy(
    backend: str, shape: tuple[int, int, int], dtype: torch.dtype, seed: int, device: torch.device
) -> None:
    rows, inner, columns = shape
    x = torch.randn(rows, inner).to(device, dtype)
    weight = weights(columns, inner, device)
    bias, residual = torch.randn(columns).to(device, dtype), torch.randn(rows, columns).to(device, dtype)
    with poisoned(backend):
        actual = linear_fp8(x, weight, bias, residual)
    exact = exact_product(x, weight) + bias.double() + residual.double()
    assert_accurate(actual, exact, plain_product(x, weight) + bias + residual)
    torch.testing.assert_close(exactly(linear_fp8, x, weight, bias, residual), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 512, 48), (9, 144, 37), (66, 80, 129)])
@pytest.mark.parametrize("backend", backends(module.FP8.pair))
def test_swiglu_accuracy(
    backend: str, shape: tuple[int, int, int], dtype: torch.dtype, seed: int, device: torch.device
) -> None:
    rows, inner, columns = shape
    x = (3 * torch.randn(rows, inner)).to(device, dtype)
    gate, up = weights(columns, inner, device), weights(columns, inner, device)
    with poisoned(backend):
        actual = linear_fp8_swiglu(x, gate, up)
    exact = F.silu(exact_product(x, gate)) * exact_product(x, up)
    assert_accurate(actual, exact, F.silu(plain_product(x, gate)) * plain_product(x, up))
    torch.testing.assert_close(exactly(linear_fp8_swiglu, x, gate, up), exact)


@pytest.mark.parametrize("chip", ["sm80", "sm86", "gfx942"])
@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("backend", [name for name in backends(module.FP8.single) if isinstance(name, str)])
def test_chips_without_e4m3_do_not_round_inputs(backend: str, rows: int, chip: str, seed: int) -> None:
    x, weight = torch.randn(rows, 144).bfloat16(), weights(37, 144, torch.device("cpu"))
    exact = x.double() @ decoded(weight).T
    plain = product(x, decoded(weight).to(x.dtype))
    with targeting(chip):
        assert not rounds_inputs(x)
        with poisoned(backend):
            assert_accurate(linear_fp8(x, weight), exact, plain)
            pair = linear_fp8_swiglu(x, weight, weight)
    assert_accurate(pair, F.silu(exact) * exact, F.silu(plain) * plain)


@pytest.mark.parametrize("chip", ["sm89", "sm90", "sm100", "sm120"])
@pytest.mark.parametrize("backend", [name for name in backends(module.FP8.single) if isinstance(name, str)])
def test_every_config_gives_the_product(backend: str, chip: str, seed: int) -> None:
    x, weight = torch.randn(70, 272).bfloat16(), weights(37, 272, torch.device("cpu"))
    with targeting(chip), poisoned(backend):
        actual = linear_fp8(x, weight)
    assert_accurate(actual, exact_product(x, weight), plain_product(x, weight))


def test_rows_that_are_computed_alone_are_not_rounded() -> None:
    x = torch.zeros(FEW_ROWS + 1, 16)
    assert rounds_inputs(x)
    assert not rounds_inputs(x[1:])
    with row_invariant():
        assert not rounds_inputs(x)


def test_is_close_to_the_product_of_unrounded_activations(seed: int) -> None:
    x = torch.randn(FEW_ROWS + 8, 512)
    weight = weights(60, 512, x.device)
    exact = x.double() @ decoded(weight).T
    error = exactly(linear_fp8, x, weight) - exact
    assert 0 < error.square().mean() / exact.square().mean() < 0.04**2


@pytest.mark.parametrize("backend", backends(module.FP8.single, module.FP8.pair))
def test_strided_and_empty_inputs(backend: str, seed: int, device: torch.device) -> None:
    weight = weights(20, 32, device)
    wide = torch.randn(33, 2, 64).to(device)
    x, residual = wide[..., :32], torch.randn(20, 2, 33).to(device).permute(2, 1, 0)
    empty = torch.empty(0, 32, device=device)
    with poisoned(backend):
        expected = linear_fp8(x.contiguous(), weight, None, residual.contiguous())
        assert torch.equal(linear_fp8(x, weight, None, residual), expected)
        assert linear_fp8(empty, weight).shape == (0, 20)
        assert linear_fp8_swiglu(empty, weight, weight).shape == (0, 20)


@pytest.mark.parametrize("backend", backends(module.FP8.single))
def test_the_largest_numbers(backend: str, seed: int, device: torch.device) -> None:
    """float16 neither overflows in a sum nor in a weight."""
    x = torch.full((70, 256), 3.0, dtype=torch.float16, device=device)
    codes = torch.full((40, 256), 448.0).to(E4M3).to(device)
    with poisoned(backend):
        for rows in (2, 70):
            actual = linear_fp8(x[:rows], Packed(codes, torch.full((40,), 2.0**-6, device=device)))
            assert torch.equal(actual, torch.full_like(actual, 3 * 448 * 256 / 64))


def test_refusals() -> None:
    x, codes, scales = torch.zeros(2, 32), torch.zeros(5, 32).to(E4M3), torch.zeros(5)
    cases = [
        (lambda: linear_fp8(x[:, :16], Packed(codes, scales)), r"\(2, 16\)"),
        (lambda: linear_fp8(x, Packed(codes.float(), scales)), "float8_e4m3fn"),
        (lambda: linear_fp8(x, Packed(codes.to(torch.float8_e5m2), scales)), "float8_e4m3fn"),
        (lambda: linear_fp8(x[:, :8], Packed(codes[:, :8].contiguous(), scales)), "multiple of 16"),
        (lambda: linear_fp8(x, Packed(codes, scales[:4])), "scales"),
        (lambda: linear_fp8(x, Packed(codes, scales), residual=torch.zeros(2, 4)), "residual"),
        (lambda: linear_fp8_swiglu(x, Packed(codes, scales), Packed(codes[:4], scales[:4])), "one shape"),
        (lambda: linear_fp8_swiglu(x, Packed(codes, scales), Packed(codes.float(), scales)), "float8_e4m3fn"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
