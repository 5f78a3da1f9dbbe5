"""nvfp4 and mxfp4 linear layers: every backend against the float64 reference, and the error against a dense product."""

import pytest
import torch
from support.accuracy import DTYPES, assert_accurate, backends, exactly, poisoned
from support.ptx import run_ptx
from torch import Tensor
from torch.nn import functional as F

from afnext.kernels import linear_nvfp4 as module
from afnext.kernels.linear_nvfp4 import linear_nvfp4, linear_nvfp4_swiglu
from afnext.kernels.packed_weight import Packed

FORMATS = ("nvfp4", "mxfp4")
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def weight_of(kind: str, columns: int, inner: int, device: torch.device) -> Packed:
    """Random codes and scales of weights around 1 / sqrt(inner)."""
    codes = torch.randint(0, 256, (columns, inner // 2), dtype=torch.uint8).to(device)
    if kind == "mxfp4":
        return Packed(codes, torch.randint(118, 124, (columns, inner // 32), dtype=torch.uint8).to(device))
    scales = (448 * torch.rand(columns, inner // 16) ** 4).to(torch.float8_e4m3fn).to(device)
    return Packed(codes, scales, (torch.rand(columns) / 200 / inner**0.5).to(device))


def dense(weight: Packed) -> Tensor:
    """The weights, code by code, in float64."""
    codes, scales, channels = weight
    wide = torch.empty(len(codes), 2 * codes.shape[1], dtype=torch.float64, device=codes.device)
    levels = torch.tensor(MAGNITUDES, dtype=torch.float64, device=codes.device)
    steps = 2.0 ** (scales.double() - 127) if channels is None else scales.double()
    block = wide.shape[1] // scales.shape[1]
    for k in range(wide.shape[1]):
        code = (codes[:, k // 2] >> 4 if k % 2 else codes[:, k // 2] & 15).long()
        wide[:, k] = levels[code & 7] * (1 - 2 * (code >> 3)) * steps[:, k // block]
    return wide if channels is None else wide * channels.double()[:, None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("shape", [(1, 128, 33), (5, 192, 16), (40, 64, 1), (19, 96, 33), (70, 320, 129)])
@pytest.mark.parametrize("backend", backends(module.NVFP4.single))
def test_accuracy(
    backend: str, shape: tuple[int, int, int], kind: str, dtype: torch.dtype, seed: int, device: torch.device
) -> None:
    rows, inner, columns = shape
    x = torch.randn(rows, inner).to(device, dtype)
    weight = weight_of(kind, columns, inner, device)
    bias, residual = torch.randn(columns).to(device, dtype), torch.randn(rows, columns).to(device, dtype)
    with poisoned(backend):
        actual = linear_nvfp4(x, weight, bias, residual)
    exact = exactly(linear_nvfp4, x, weight, bias, residual)
    assert_accurate(actual, exact, F.linear(x, dense(weight).to(dtype), bias) + residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("shape", [(1, 192, 33), (5, 128, 16), (19, 64, 70)])
@pytest.mark.parametrize("backend", backends(module.NVFP4.pair))
def test_swiglu_accuracy(
    backend: str, shape: tuple[int, int, int], kind: str, dtype: torch.dtype, seed: int, device: torch.device
) -> None:
    rows, inner, columns = shape
    x = torch.randn(rows, inner).to(device, dtype)
    gate, up = (weight_of(kind, columns, inner, device) for _ in range(2))
    with poisoned(backend):
        actual = linear_nvfp4_swiglu(x, gate, up)
    gated, raised = (F.linear(x, dense(weight).to(dtype)) for weight in (gate, up))
    assert_accurate(actual, exactly(linear_nvfp4_swiglu, x, gate, up), F.silu(gated) * raised)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("backend", backends(module.NVFP4.single))
def test_every_code_and_scale_has_its_exact_value(
    backend: str, kind: str, dtype: torch.dtype, device: torch.device
) -> None:
    """A product with the unit matrix gives the weights, rounded once."""
    codes = torch.arange(256, dtype=torch.uint8)
    if kind == "nvfp4":  # all but NaN; -0 is 0
        scales = torch.tensor([s for s in range(256) if s & 127 != 127], dtype=torch.uint8).view(torch.float8_e4m3fn)
        channels = torch.ones(len(scales))
    else:
        low, high = (103, 140) if dtype == torch.float16 else (1, 250)
        scales, channels = torch.arange(low, high, dtype=torch.uint8), None
    block = 16 if kind == "nvfp4" else 32
    weight = Packed(
        codes.expand(len(scales), 256).contiguous().to(device),
        scales[:, None].expand(len(scales), 512 // block).contiguous().to(device),
        None if channels is None else channels.to(device),
    )
    x = torch.eye(512, dtype=dtype, device=device)[::7]  # codes of even and odd inputs
    with poisoned(backend):
        few, many = linear_nvfp4(x[:32], weight), linear_nvfp4(x, weight)
    expected = dense(weight).to(dtype).T[::7]
    assert torch.equal(many, expected)
    assert torch.equal(few, expected[:32])


@pytest.mark.skipif("triton" not in module.NVFP4.single.implementations, reason="Triton is not installed")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_instructions_that_the_interpreter_cannot_run(dtype: torch.dtype, seed: int) -> None:
    """The PTX of the kernel makes the value of each code, in the order of the inputs."""
    source = (module.BFLOAT16_PAIRS if dtype == torch.bfloat16 else module.FLOAT16_PAIRS).value
    words = torch.cat((torch.tensor([0, 0x76543210, 0xFEDCBA98]), torch.randint(0, 2**32, (1000,))))
    pairs = torch.stack(run_ptx(source, words, dtype), -1)
    numbers = torch.stack((pairs, pairs >> 16), -1).to(torch.int16).view(dtype).flatten(-2)
    codes = torch.stack([words >> 4 * i & 15 for i in range(8)], -1)
    levels = torch.tensor([*MAGNITUDES, *(-magnitude for magnitude in MAGNITUDES)])
    assert torch.equal(numbers.float(), levels[codes])


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("backend", backends(module.NVFP4.single, module.NVFP4.pair))
def test_strided_and_empty_inputs(backend: str, kind: str, seed: int, device: torch.device) -> None:
    x = torch.randn(5, 2, 256).to(device)[..., :128]
    weight = weight_of(kind, 20, 128, device)
    with poisoned(backend):
        assert torch.equal(linear_nvfp4(x, weight), linear_nvfp4(x.contiguous(), weight))
        assert linear_nvfp4(x[:0], weight).shape == (0, 2, 20)
        assert linear_nvfp4_swiglu(x[:0], weight, weight).shape == (0, 2, 20)


@pytest.mark.parametrize("kind", FORMATS)
def test_reference_is_the_dense_product(kind: str, seed: int) -> None:
    x, weight = torch.randn(3, 128, dtype=torch.float64), weight_of(kind, 5, 128, torch.device("cpu"))
    torch.testing.assert_close(exactly(linear_nvfp4, x, weight), x @ dense(weight).T)


def test_refusals() -> None:
    x = torch.zeros(2, 128)
    codes, scales, channels = weight_of("nvfp4", 5, 128, x.device)
    other = weight_of("mxfp4", 5, 128, x.device).scales
    weight, mixed = Packed(codes, scales, channels), Packed(codes, other)
    cases = [
        (lambda: linear_nvfp4(x[:, :64], weight), r"\(2, 64\)"),
        (lambda: linear_nvfp4(x[:, :80], weight._replace(codes=codes[:, :40].contiguous())), "multiple of 32"),
        (lambda: linear_nvfp4(x, weight._replace(codes=codes.char())), "uint8"),
        (lambda: linear_nvfp4(x, weight._replace(scales=scales[:4])), "scales"),
        (lambda: linear_nvfp4(x, weight._replace(scales=scales.float())), "scales"),
        (lambda: linear_nvfp4(x, weight._replace(scales=other)), "mxfp4 has none"),
        (lambda: linear_nvfp4(x, weight._replace(zeros=None)), "a scale for each channel"),
        (lambda: linear_nvfp4(x, weight._replace(zeros=channels[:4])), "channels"),
        (lambda: linear_nvfp4(x, weight._replace(zeros=channels.char())), "channels"),
        (lambda: linear_nvfp4(x, weight, torch.zeros(4)), "bias"),
        (lambda: linear_nvfp4_swiglu(x, weight, weight.rows(slice(4))), "one shape"),
        (lambda: linear_nvfp4_swiglu(x, weight, mixed), "one shape"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
