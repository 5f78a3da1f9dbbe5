"""A product, the residual sum and its RMSNorm: the same numbers as by separate calls, in one launch for few rows."""

import re
from collections.abc import Callable

import pytest
import torch
from support.accuracy import DTYPES, assert_accurate, backends, exactly, poisoned
from torch import Tensor

from afnext.kernels import linear_norm as module
from afnext.kernels.linear_norm import PRODUCTS, linear_norm
from afnext.kernels.norm import add_rms_norm
from afnext.kernels.packed_product import NORMED_ROWS
from afnext.kernels.packed_weight import Packed
from afnext.kernels.row_groups import row_invariant

EPS = 1e-5


def int8(columns: int, inner: int) -> Packed:
    return Packed(torch.randint(-127, 128, (columns, inner), dtype=torch.int8), torch.rand(columns) / 127 / inner**0.5)


def fp8(columns: int, inner: int) -> Packed:
    return Packed(torch.randn(columns, inner).to(torch.float8_e4m3fn), torch.rand(columns) / inner**0.5)


def int8_groups(columns: int, inner: int) -> Packed:
    scales = torch.rand(columns, inner // 32) / 127 / inner**0.5
    return Packed(torch.randint(-127, 128, (columns, inner), dtype=torch.int8), scales)


def int4(columns: int, inner: int) -> Packed:
    scales = torch.rand(columns, inner // 64) / inner**0.5
    return Packed(torch.randint(0, 256, (columns, inner // 2), dtype=torch.uint8), scales)


def int3(columns: int, inner: int) -> Packed:
    codes, scales, _ = int4(columns, inner)
    return Packed(codes[:, : inner * 3 // 8].contiguous(), scales)


def int4_with_zeros(columns: int, inner: int) -> Packed:
    codes, scales, _ = int4(columns, inner)
    return Packed(codes, scales, torch.randint(0, 16, scales.shape).float())


def nvfp4(columns: int, inner: int) -> Packed:
    scales = (100 * torch.rand(columns, inner // 16)).to(torch.float8_e4m3fn)
    return Packed(int4(columns, inner).codes, scales, torch.rand(columns) / 100 / inner**0.5)


def mxfp4(columns: int, inner: int) -> Packed:
    return Packed(int4(columns, inner).codes, torch.randint(117, 122, (columns, inner // 32), dtype=torch.uint8))


WEIGHTS: list[tuple[str, Callable[[int, int], Packed]]] = [
    *(("linear_int8", int8), ("linear_w8a8", int8), ("linear_fp8", fp8), ("linear_int8_groups", int8_groups)),
    *(("linear_int4", int4), ("linear_int4", int4_with_zeros), ("linear_w4a8", int4), ("linear_nf4", int4)),
    *(("linear_int3", int3), ("linear_nvfp4", nvfp4), ("linear_nvfp4", mxfp4)),
]


def on(device: torch.device, weight: Packed) -> Packed:
    codes, scales, zeros = weight
    return Packed(codes.to(device), scales.to(device), None if zeros is None else zeros.to(device))


def tensors(
    rows: int, inner: int, columns: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """x, the residual stream and the norm's weight."""
    drawn = torch.randn(rows, inner), 2 * torch.randn(rows, columns) + 1, 1 + 0.3 * torch.randn(columns)
    x, residual, norm = (tensor.to(device, dtype) for tensor in drawn)
    return x, residual, norm


def test_every_product_is_tested() -> None:
    assert {name for name, _ in WEIGHTS} == PRODUCTS.keys()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, NORMED_ROWS, NORMED_ROWS + 1])
@pytest.mark.parametrize(("product", "weights"), WEIGHTS)
@pytest.mark.parametrize("backend", backends(module._operation))
def test_the_numbers_are_those_of_separate_calls(
    backend: str,
    product: str,
    weights: Callable[[int, int], Packed],
    rows: int,
    dtype: torch.dtype,
    seed: int,
    device: torch.device,
) -> None:
    """Twice, so that the second launch finds the counters that the first one left; inner dimensions with and without
    splits."""
    if product in ("linear_fp8", "linear_nvfp4") and backend.startswith("native"):
        pytest.skip("no native kernels")
    for inner in (128, 640):
        x, residual, norm = tensors(rows, inner, 70, dtype, device)
        weight = on(device, weights(70, inner))
        with poisoned(backend):
            expected = add_rms_norm(PRODUCTS[product].linear(x, weight, None, None), residual, norm, EPS)
            for _ in range(2):
                normed, hidden = linear_norm(product, x, weight, residual, norm, EPS)
                assert torch.equal(hidden, expected[1])
                assert torch.equal(normed, expected[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", backends(module._operation))
def test_accuracy(backend: str, dtype: torch.dtype, seed: int, device: torch.device) -> None:
    x, residual, norm = tensors(3, 256, 131, dtype, device)
    codes, scales, _ = on(device, int8(131, 256))
    with poisoned(backend):
        normed, hidden = linear_norm("linear_int8", x[:, None], Packed(codes, scales), residual[:, None], norm, EPS)
    product = (x @ codes.to(dtype).T).float() * scales
    plain = residual + product.to(dtype)
    exact = exactly(linear_norm, "linear_int8", x, Packed(codes, scales), residual, norm, EPS)
    assert_accurate(hidden[:, 0], exact[1], plain)
    wide = plain.float()
    plain_norm = (wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()).to(dtype) * norm
    assert_accurate(normed[:, 0], exact[0], plain_norm)


def launched(product: str, rows: int, columns: int = 3584) -> list[str]:
    """The kernels of a call on meta tensors."""
    pytest.importorskip("triton")
    from afnext.bench.codegen.trace import recorded_launches

    weight = on(torch.device("meta"), dict(WEIGHTS)[product](columns, 128))
    x, residual, norm = tensors(rows, 128, columns, torch.bfloat16, torch.device("meta"))
    with recorded_launches() as recording:
        linear_norm(product, x, weight, residual, norm)
    return [launch.kernel.rpartition(".")[2] for launch in recording.launches]


@pytest.mark.parametrize("product", PRODUCTS)
def test_few_rows_take_one_launch(product: str) -> None:
    alone = launched(product, NORMED_ROWS + 1)[:1]
    assert launched(product, 1) == launched(product, NORMED_ROWS) == alone
    assert launched(product, NORMED_ROWS + 1) == [*alone, "_kernel"]


def test_rows_that_must_not_depend_on_others_and_wide_rows_are_normalized_by_a_launch_of_their_own() -> None:
    with row_invariant():
        assert launched("linear_int4", 1)[1:] == ["_kernel"]
    assert launched("linear_int4", 1, columns=4097)[1:] == ["_kernel"]


def test_both_sum_a_row_in_one_order_and_the_last_block_reads_past_its_cache() -> None:
    """The layout of a row in registers decides in which order its squares are added, which the interpreter ignores."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from afnext.bench.codegen.trace import recorded_launches
    from afnext.kernels.configs import targeting

    x, residual, norm = tensors(1, 3584, 3584, torch.bfloat16, torch.device("meta"))
    weight = on(torch.device("meta"), int4(3584, 3584))
    with targeting("sm90"), recorded_launches() as recording:
        linear_norm("linear_int4", x, weight, residual, norm)
        add_rms_norm(x, residual, norm)
    assembly = []
    for launch in recording.launches:
        kernel = launch.specialization
        source = ASTSource(kernel.kernel, kernel.signature, kernel.constexprs, kernel.attributes)
        assembly.append(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(kernel.options)).asm)
    layouts = []
    for compiled in assembly:
        ((shape, name),) = re.findall(r'"tt\.reduce"\(.*?\}\) : \(tensor<(\w+), (#\w+)>', compiled["ttgir"], re.DOTALL)
        layouts.append((shape, re.findall(rf"^{name} = (.*)$", compiled["ttgir"], re.MULTILINE)))
    assert layouts[0] == layouts[1]
    _, partial_sums, rows = assembly[0]["ptx"].split("atom.global.gpu.acq_rel.add")
    assert "bar.sync" in partial_sums[partial_sums.rindex("st.global") :]
    assert 0 <= rows.index("bar.sync") < rows.index("ld.global.cg")


def test_a_forced_backend_of_the_product_or_the_norm_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    (product,) = launched("linear_int8", 1)
    monkeypatch.setenv("AFNEXT_BACKEND", "add_rms_norm=torch")
    assert launched("linear_int8", 1) == [product]
    monkeypatch.setenv("AFNEXT_BACKEND", "linear_int8=torch")
    assert launched("linear_int8", 1) == ["_kernel"]


def test_strided_and_empty_inputs(seed: int, device: torch.device) -> None:
    weight = on(device, int4(20, 128))
    x, residual, norm = tensors(3, 256, 20, torch.float32, device)
    for name in ("triton",) if "triton" in module._operation.implementations else ("torch",):
        with poisoned(name):
            expected = linear_norm("linear_int4", x[:, :128].contiguous(), weight, residual, norm)
            strided = residual.T.contiguous().T
            actual = linear_norm("linear_int4", x[:, :128], weight, strided, norm)
            none = linear_norm("linear_int4", x[:0, :128], weight, residual[:0], norm)
        assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))
        assert none[0].shape == none[1].shape == (0, 20)


def test_refusals() -> None:
    x, residual, norm = torch.zeros(2, 128), torch.zeros(2, 5), torch.zeros(5)
    codes, scales = torch.zeros(5, 64, dtype=torch.uint8), torch.zeros(5, 2)
    cases = [
        ("linear_int4", x[:, :64], None, residual, norm, r"\(2, 64\)"),
        ("linear_int4", x, None, residual[:, :4], norm, "residual"),
        ("linear_int4", x, None, residual.double(), norm, "residual"),
        ("linear_int4", x, None, residual, norm[:4], r"norm's weight must be \[5\], got \(4,\)"),
        ("linear_nf4", x, scales, residual, norm, "linear_nf4 takes weights without zeros"),
    ]
    for product, x, zeros, residual, norm, message in cases:
        with pytest.raises(ValueError, match=message):
            linear_norm(product, x, Packed(codes, scales, zeros), residual, norm)
