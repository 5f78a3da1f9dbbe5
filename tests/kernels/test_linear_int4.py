"""int4 linear layers: every backend against the float64 reference, and the error against a plain dense product."""

import pytest
import torch
from support.accuracy import DTYPES, assert_accurate, backends, exactly, native_backends, poisoned
from support.ptx import run_ptx
from torch import Tensor
from torch.nn import functional as F

from afnext.bench.ops.guarded import guarded
from afnext.kernels import linear_int4 as module
from afnext.kernels.linear_int4 import linear_int4, linear_int4_swiglu, prepare_int4
from afnext.kernels.packed_product import FEW_CPU_ROWS
from afnext.kernels.packed_weight import Packed

# rows, in, out, group
SHAPES = [
    (1, 512, 96, 128),
    (3, 192, 37, 64),
    (401, 320, 1, 32),
    (33, 256, 70, 128),
    (64, 384, 64, 64),
    (70, 96, 131, 32),
]


def weights(
    columns: int, inner: int, group: int, with_zeros: bool, device: torch.device, dtype: torch.dtype = torch.float16
) -> Packed:
    packed = torch.randint(0, 256, (columns, inner // 2), dtype=torch.uint8).to(device)
    scales = (torch.rand(columns, inner // group) / 8 / inner**0.5).to(device, dtype)
    zeros = torch.randint(0, 16, scales.shape).to(device, dtype) if with_zeros else None
    return Packed(packed, scales, zeros)


def dense(packed: Tensor, scales: Tensor, zeros: Tensor | None, dtype: torch.dtype) -> Tensor:
    columns, half = packed.shape
    group = 2 * half // scales.shape[1]
    weight = torch.empty(columns, 2 * half, device=packed.device)
    for k in range(2 * half):
        code = (packed[:, k // 2] >> 4 if k % 2 else packed[:, k // 2] & 15).float()
        zero = 8 if zeros is None else zeros[:, k // group].float()
        weight[:, k] = (code - zero) * scales[:, k // group].float()
    return weight.to(dtype)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T, one product added after the other in float32: libraries sum in an order that GPUs do not."""
    y = torch.zeros(len(x), len(weight), device=x.device)
    for k in range(x.shape[1]):
        y += x[:, k, None].float() * weight[:, k].float()
    return y.to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_zeros", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", backends(module.INT4.single))
def test_accuracy(
    backend: str,
    shape: tuple[int, int, int, int],
    with_zeros: bool,
    dtype: torch.dtype,
    seed: int,
    device: torch.device,
) -> None:
    rows, inner, columns, group = shape
    x = torch.randn(rows, inner).to(device, dtype)
    weight = weights(columns, inner, group, with_zeros, device)
    with poisoned(backend):
        actual = linear_int4(x, weight)
    assert_accurate(actual, exactly(linear_int4, x, weight), product(x, dense(*weight, dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_zeros", [False, True])
@pytest.mark.parametrize("shape", [(1, 512, 96, 128), (3, 192, 80, 64), (33, 256, 64, 32), (70, 96, 16, 32)])
def test_accuracy_of_prepared_weights(
    shape: tuple[int, int, int, int], with_zeros: bool, dtype: torch.dtype, seed: int
) -> None:
    rows, inner, columns, group = shape
    x = torch.randn(rows, inner).to(dtype)
    weight = weights(columns, inner, group, with_zeros, x.device)
    bias = torch.randn(columns).to(dtype)
    with poisoned("torch"):
        prepare_int4(weight, dtype)
        assert weight.codes in module._copies
        actual = linear_int4(x, weight, bias)
    exact = exactly(linear_int4, x, weight, bias)
    assert_accurate(actual, exact, product(x, dense(*weight, dtype)) + bias)


def test_a_prepared_copy_goes_with_its_weight(seed: int) -> None:
    before = len(module._copies)
    weight = weights(32, 64, 32, False, torch.device("cpu"))
    with poisoned("torch"):
        prepare_int4(weight, torch.float32)
        assert len(module._copies) == before + 1
        del weight
    assert len(module._copies) == before


def test_what_needs_no_copy_gets_none(seed: int) -> None:
    weight = weights(37, 64, 32, False, torch.device("cpu"))
    with poisoned("torch"):
        prepare_int4(weight, torch.float32)  # torch's kernel takes channels in multiples of 16
    assert weight.codes not in module._copies
    with poisoned("reference"):
        other = weights(32, 64, 32, False, torch.device("cpu"))
        prepare_int4(other, torch.float32)
    assert other.codes not in module._copies


@pytest.mark.parametrize("rows", [5, 70])
@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("backend", backends(module.INT4.single))
def test_bias_residual_and_fractional_zeros(
    backend: str, scale_dtype: torch.dtype, rows: int, seed: int, device: torch.device
) -> None:
    x = torch.randn(1, rows, 256).to(device, torch.bfloat16)
    packed, scales, zeros = weights(43, 256, 64, True, device, scale_dtype)
    zeros = zeros + 0.375
    bias, residual = torch.randn(43).to(device, x.dtype), torch.randn(1, rows, 43).to(device, x.dtype)
    with poisoned(backend):
        actual = linear_int4(x, Packed(packed, scales, zeros), bias, residual)
    exact = exactly(linear_int4, x, Packed(packed, scales, zeros), bias, residual)
    assert_accurate(actual, exact, F.linear(x, dense(packed, scales, zeros, x.dtype), bias) + residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_zeros", [False, True])
@pytest.mark.parametrize("shape", [(1, 512, 48, 128), (9, 64, 37, 32), (66, 128, 129, 64)])
@pytest.mark.parametrize("backend", backends(module.INT4.pair))
def test_swiglu_accuracy(
    backend: str,
    shape: tuple[int, int, int, int],
    with_zeros: bool,
    dtype: torch.dtype,
    seed: int,
    device: torch.device,
) -> None:
    rows, inner, columns, group = shape
    x = (3 * torch.randn(rows, inner)).to(device, dtype)
    gate, up = (weights(columns, inner, group, with_zeros, device) for _ in range(2))
    with poisoned(backend):
        actual = linear_int4_swiglu(x, gate, up)
    plain = F.silu(product(x, dense(*gate, dtype))) * product(x, dense(*up, dtype))
    assert_accurate(actual, exactly(linear_int4_swiglu, x, gate, up), plain)


def test_reference_is_the_dense_product(seed: int) -> None:
    x = torch.randn(3, 64, dtype=torch.float64)
    weight = weights(5, 64, 32, True, x.device, torch.float32)
    torch.testing.assert_close(exactly(linear_int4, x, weight), x @ dense(*weight, torch.float64).T)


@pytest.mark.parametrize("backend", backends(module.INT4.single, module.INT4.pair))
def test_strided_and_empty_inputs(backend: str, seed: int, device: torch.device) -> None:
    packed, scales, _ = weights(20, 64, 32, False, device)
    x, residual = torch.randn(5, 2, 128).to(device)[..., :64], torch.randn(20, 2, 5).to(device).permute(2, 1, 0)
    empty = torch.empty(0, 64, device=device)
    with poisoned(backend):
        expected = linear_int4(x.contiguous(), Packed(packed, scales), residual=residual.contiguous())
        assert torch.equal(linear_int4(x, Packed(packed, scales), residual=residual), expected)
        assert linear_int4(empty, Packed(packed, scales)).shape == (0, 20)
        assert linear_int4_swiglu(empty, Packed(packed, scales), Packed(packed, scales)).shape == (0, 20)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("rows", [1, 7, 19, 50])
@pytest.mark.parametrize("backend", native_backends(module.INT4.single, module.INT4.pair))
def test_native_stays_within_its_memory(
    backend: str, rows: int, group: int, threads: int, seed: int, restored_threads: None
) -> None:
    """Tensors that end where readable memory ends, aligned to nothing; and any number of threads gives the same.

    Many rows may be added up by torch, whose order depends on the threads.
    """
    tolerance = {"rtol": 0, "atol": 0 if rows <= FEW_CPU_ROWS else 0.05}
    inner = 7 * group
    packed, scales, zeros = weights(53, inner, group, True, torch.device("cpu"))
    x, bias, residual = torch.randn(rows, inner).bfloat16(), torch.randn(53), torch.randn(rows, 53).bfloat16()
    torch.set_num_threads(1)
    with poisoned(backend):
        expected = linear_int4(x, Packed(packed, scales, zeros), bias, residual)
        pair = linear_int4_swiglu(x, Packed(packed, scales, zeros), Packed(packed, scales, zeros))
    torch.set_num_threads(threads)
    x, packed, scales, zeros, bias, residual = map(guarded, (x, packed, scales, zeros, bias, residual))
    with poisoned(backend):
        torch.testing.assert_close(linear_int4(x, Packed(packed, scales, zeros), bias, residual), expected, **tolerance)
        torch.testing.assert_close(
            linear_int4_swiglu(x, Packed(packed, scales, zeros), Packed(packed, scales, zeros)), pair, **tolerance
        )


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("backend", backends(module.INT4.single))
def test_a_few_large_activations_do_not_cost_the_others(backend: str, rows: int, seed: int) -> None:
    """One input in a hundred a thousand times as large, as in language models: other groups keep their precision."""
    x = torch.randn(rows, 1024)
    x[:, 5::100] *= 1000
    x = x.bfloat16()
    weight = weights(64, 1024, 64, False, x.device)
    with poisoned(backend):
        actual = linear_int4(x, weight)
    assert_accurate(actual, exactly(linear_int4, x, weight), product(x, dense(*weight, x.dtype)))


def test_refusals() -> None:
    x, packed, scales = torch.zeros(2, 128), torch.zeros(5, 64, dtype=torch.uint8), torch.zeros(5, 2)
    cases = [
        (lambda: linear_int4(x[:, :64], Packed(packed, scales)), r"\(2, 64\)"),
        (lambda: linear_int4(x, Packed(packed.char(), scales)), "uint8"),
        (lambda: linear_int4(x, Packed(packed, scales[:4])), "scales"),
        (lambda: linear_int4(x, Packed(packed, torch.zeros(5, 8))), "group"),
        (lambda: linear_int4(x, Packed(packed, torch.zeros(5, 3))), "group"),
        (lambda: linear_int4(x, Packed(packed, scales, torch.zeros(5, 1))), "zeros"),
        (lambda: linear_int4(x, Packed(packed, scales), bias=torch.zeros(4)), "bias"),
        (lambda: linear_int4(x, Packed(packed, scales), residual=torch.zeros(2, 4)), "residual"),
        (lambda: linear_int4_swiglu(x, Packed(packed, scales), Packed(packed, torch.zeros(5, 4))), "one shape"),
        (lambda: linear_int4_swiglu(x, Packed(packed, scales, scales), Packed(packed, scales)), "zeros"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.skipif("triton" not in module.INT4.single.implementations, reason="Triton is not installed")
@pytest.mark.parametrize(("dtype", "base", "first_bit"), [(torch.bfloat16, 128, 0), (torch.float16, 16, 6)], ids=str)
def test_the_instruction_that_the_interpreter_cannot_run(
    dtype: torch.dtype, base: int, first_bit: int, seed: int
) -> None:
    """The PTX of the kernel for few rows makes base + code of two codes, wherever the shifts put them."""
    source = (module.BFLOAT16_NUMBERS if dtype == torch.bfloat16 else module.FLOAT16_NUMBERS).value
    words = torch.cat((torch.tensor([0, 0x76543210, 0xFEDCBA98]), torch.randint(0, 2**32, (1000,))))
    (pairs,) = run_ptx(source, words << first_bit, dtype, results=1)
    numbers = torch.stack((pairs, pairs >> 16), -1).to(torch.int16).view(dtype)
    codes = torch.stack((words & 15, words >> 16 & 15), -1)
    assert torch.equal(numbers.double(), base + codes.double())


@pytest.mark.parametrize("backend", backends(module.INT4.single, module.INT4.pair))
def test_codes_that_begin_within_a_word(backend: str, seed: int, device: torch.device) -> None:
    memory = torch.randint(0, 256, (1 + 48 * 64,), dtype=torch.uint8).to(device)
    packed, scales = memory[1:].view(48, 64), torch.rand(48, 2).bfloat16().to(device)
    x = torch.randn(2, 128).bfloat16().to(device)
    with poisoned(backend):
        assert torch.equal(linear_int4(x, Packed(packed, scales)), linear_int4(x, Packed(packed.clone(), scales)))
        pair = linear_int4_swiglu(x, Packed(packed, scales), Packed(packed, scales))
        assert torch.equal(pair, linear_int4_swiglu(x, Packed(packed.clone(), scales), Packed(packed.clone(), scales)))
