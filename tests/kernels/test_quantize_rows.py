"""Rows rounded to int8 or e4m3: every backend gives the codes and scales of the reference, bit by bit."""

import pytest
import torch
from support.accuracy import DTYPES, backends, poisoned

from afnext.kernels import quantize_rows as module
from afnext.kernels.quantize_rows import quantize_rows


@pytest.mark.parametrize("backend", backends(module._operation))
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantized_rows_are_those_of_the_reference(
    backend: str, dtype: torch.dtype, seed: int, device: torch.device
) -> None:
    x = (torch.randn(11, 1, 301) * 10.0 ** torch.randint(-3, 4, (11, 1, 1))).to(device, dtype)
    x[3] = 0
    x[4] = torch.arange(301) % 5 - 2.0  # scale 2 / 127, ties at none
    x[5, 0] = torch.arange(301) % 8 * 0.5  # after scaling to 127 = 3.5 * 36.3
    x[6, 0] = torch.cat([torch.tensor([127.0]), torch.arange(300) % 100 + 0.5])  # scale 1: ties everywhere
    with poisoned(backend):
        codes, scales = quantize_rows(x)
    expected_codes, expected_scales = module.reference(x)
    torch.testing.assert_close(scales, expected_scales, rtol=0, atol=0)
    assert torch.equal(codes, expected_codes)
    assert codes[3].count_nonzero() == 0
    assert int(codes[6, 0, 1]) == 0
    assert int(codes[6, 0, 2]) == 2


@pytest.mark.parametrize("backend", [name for name in backends(module._operation) if "native" not in str(name)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_in_e4m3_have_the_nearest_codes(backend: str, dtype: torch.dtype, seed: int, device: torch.device) -> None:
    x = (torch.randn(7, 1, 301) * 10.0 ** torch.randint(-3, 4, (7, 1, 1))).to(device, dtype)
    x[3] = 0
    x[4, 0] = torch.cat([torch.tensor([448.0]), torch.arange(300) / 8 - 15])  # scale 1: many ties
    x[5, 0] = torch.cat([torch.tensor([448.0]), (torch.arange(300) - 150) * 2.0**-11])  # and below the smallest normal
    with poisoned(backend):
        codes, scales = quantize_rows(x, torch.float8_e4m3fn)
    expected_codes, expected_scales = module.reference(x, torch.float8_e4m3fn)
    torch.testing.assert_close(scales, expected_scales, rtol=0, atol=0)
    assert torch.equal(codes.view(torch.uint8), expected_codes.view(torch.uint8))
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    values = values[~values.isnan()]
    shares = x.double().cpu() / scales.double().cpu()[..., None].clamp_min(1e-300)
    nearest = (shares[..., None] - values).abs().amin(-1)
    assert ((shares - codes.double().cpu()).abs() <= nearest * (1 + 1e-5) + 1e-5 * shares.abs()).all()


@pytest.mark.parametrize("backend", backends(module._operation))
@pytest.mark.parametrize("width", [1, 15, 16, 63, 64, 65, 200])
def test_the_largest_is_found_wherever_it_stands(backend: str, width: int, seed: int, device: torch.device) -> None:
    x = torch.rand(width, width).to(device, torch.bfloat16)
    x.fill_diagonal_(-3.0)
    with poisoned(backend):
        codes, scales = quantize_rows(x)
    assert torch.equal(codes.diagonal(), torch.full((width,), -127, dtype=torch.int8, device=device))
    torch.testing.assert_close(scales, torch.full((width,), 3 / 127, device=device))


def test_integers_are_refused() -> None:
    with pytest.raises(ValueError, match="int32"):
        quantize_rows(torch.zeros(2, 32, dtype=torch.int32))


def test_other_codes_are_refused() -> None:
    with pytest.raises(ValueError, match="int16"):
        quantize_rows(torch.zeros(2, 32), torch.int16)
