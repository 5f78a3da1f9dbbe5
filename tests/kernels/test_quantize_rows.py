"""Rows rounded to int8: every backend gives the codes and scales of the reference, bit by bit."""

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
