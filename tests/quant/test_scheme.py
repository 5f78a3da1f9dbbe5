"""The schemes: what they say they store, what they store, and the products that read it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from afnext.quant import scheme as module
from afnext.quant.scheme import Int3, Int4, Scheme, SchemeError, parse_scheme

SPELLINGS = (
    *("nvfp4", "mxfp4", "int8", "int8-w8a8", "fp8", "nf4", "int3-g32", "int3-g64", "int3-g128"),
    *(f"int4-g{group}{zeros}" for group in (32, 64, 128) for zeros in ("", "-zeros")),
    *("int4-g32-w4a8", "int4-g64-zeros-w4a8", "int4-g32-zeros-f32", "int8-g16", "int8-g128"),
    *("int8-g32-zeros", "int8-g16-f32"),
)
# RMS of the error over that of normal weights, with room for small samples.
ERRORS = {
    "int8": 0.012,
    "fp8": 0.03,
    "nf4": 0.11,
    "nvfp4": 0.09,
    "mxfp4": 0.12,
    "int3": 0.19,
    "int4-g32": 0.09,
    "int4-g64": 0.10,
    "int4-g128": 0.11,
}


def scheme_of(spelling: str) -> Scheme:
    scheme = parse_scheme(spelling)
    assert scheme is not None
    return scheme


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spelling_round_trip(spelling: str) -> None:
    assert str(scheme_of(spelling)) == spelling


def test_dense_and_defaults() -> None:
    assert parse_scheme("dense") is None
    assert parse_scheme("int4") == Int4()
    assert parse_scheme("int3") == Int3(64)
    assert parse_scheme("int4-w4a8") == Int4(int8_inputs=True)


@pytest.mark.parametrize(
    "spelling",
    [
        "",
        "int5",
        "INT8",
        "int4-",
        "int4-g48",
        "int4-g64-zero",
        "int4-g\u0663\u0662",
        "int4-g99999",
        "nf4-g64",
        "nvfp4-g16",
        "int4-w4a8-g32",
        "int8-g8",
        "int8-g32-w8a8",
        "int3-g48",
        "int3-g64-zeros",
        "int3-g64-w4a8",
    ],
)
def test_unknown_schemes_are_refused_by_name(spelling: str) -> None:
    with pytest.raises(SchemeError, match=r"int4|groups"):
        parse_scheme(spelling)


@settings(max_examples=80)
@given(
    spelling=st.sampled_from(SPELLINGS),
    out=st.integers(1, 40),
    blocks=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_what_is_stored_is_what_was_announced(
    spelling: str, out: int, blocks: int, dtype: torch.dtype, seed: int
) -> None:
    scheme = scheme_of(spelling)
    weight = torch.randn(out, 128 * blocks, generator=torch.Generator().manual_seed(seed)).to(dtype)
    packed = scheme.quantize(weight)
    announced = scheme.stored((out, 128 * blocks))
    assert announced.keys() == packed.named().keys()
    for name, tensor in packed.named().items():
        assert tensor.shape == announced[name].shape
        assert tensor.dtype in announced[name].dtypes
    restored = scheme.dequantize(packed, torch.float32)
    error = (restored - weight.float()).square().mean().sqrt() / weight.float().square().mean().sqrt()
    limit = next(limit for name, limit in reversed(ERRORS.items()) if spelling.startswith(name))
    assert error < 1.5 * limit


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_chunks_do_not_show(spelling: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = scheme_of(spelling)
    weight, importance = torch.randn(50, 256), torch.rand(256)
    whole = scheme.quantize(weight, importance)
    monkeypatch.setattr(module, "_CHUNK", 7 * 256)
    for name, part in scheme.quantize(weight, importance).named().items():
        assert torch.equal(part.view(torch.uint8), whole.named()[name].view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 130])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_products_are_those_of_the_restored_weight(spelling: str, rows: int, dtype: torch.dtype, seed: int) -> None:
    scheme = scheme_of(spelling)
    gate, up = (scheme.quantize(torch.randn(64, 256) / 16) for _ in range(2))
    x, bias = torch.randn(2, rows, 256).to(dtype), torch.randn(64).to(dtype)
    exact = [x.double() @ scheme.dequantize(packed, torch.float64).T for packed in (gate, up)]
    loose = (
        0.05
        if spelling == "fp8" and rows > 64
        else 0.02
        if spelling.endswith("a8")
        else 0.01
        if dtype == torch.bfloat16
        else 1e-5
    )
    residual = torch.randn(2, rows, 64).to(dtype)
    assert_near(scheme.linear(x, gate, bias), exact[0] + bias.double(), loose)
    assert_near(scheme.linear(x, gate, None, residual), exact[0] + residual.double(), loose)
    assert_near(scheme.swiglu(x, gate, up), F.silu(exact[0]) * exact[1], loose)


def assert_near(actual: torch.Tensor, exact: torch.Tensor, relative: float) -> None:
    assert actual.shape == exact.shape
    error = (actual.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < relative


@pytest.mark.parametrize(
    ("spelling", "shape", "message"),
    [
        ("int4-g64", (8, 96), "96 inputs are not divisible by groups of 64"),
        ("int3-g64", (8, 192), "multiples of 128, not 192"),
        ("nf4", (8, 96), "96 inputs are not divisible"),
        ("nvfp4", (8, 48), "multiples of 32, not 48"),
        ("mxfp4", (8, 48), "multiples of 32, not 48"),
        ("int8", (8, 40), "multiples of 16, not 40"),
        ("fp8", (8, 40), "multiples of 16, not 40"),
        ("int8-g64", (8, 96), "96 inputs are not divisible by groups of 64"),
        ("int8", (8, 4, 16), r"\[8, 4, 16\]"),
        ("int4-g32", (0, 32), r"\[0, 32\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(spelling: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        scheme_of(spelling).stored(shape)
    with pytest.raises(SchemeError, match=message):
        scheme_of(spelling).quantize(torch.zeros(shape))
