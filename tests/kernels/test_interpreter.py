"""The interpreter that the kernels' tests trust: bfloat16 as in torch, and every planted mistake found."""

# ruff: noqa: N803 (Triton kernels write their constexprs in capitals)

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from support.accuracy import poisoned
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from afnext.bench.ops.interpreter import OutOfBoundsError, RaceError, interpreted

BF16, F32 = torch.bfloat16, torch.float32


@triton.jit
def _convert_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n).to(y.dtype.element_ty), mask=i < n)


@triton.jit
def _arithmetic_kernel(x, y, out, n, OPERATION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + i, mask=i < n)
    b = tl.load(y + i, mask=i < n)
    if OPERATION == "add":
        c = a + b
    elif OPERATION == "sub":
        c = a - b
    elif OPERATION == "mul":
        c = a * b
    elif OPERATION == "max":
        c = tl.maximum(a, b).to(a.dtype)
    elif OPERATION == "less":
        c = tl.where(a < b, a, b)
    elif OPERATION == "halve":
        c = a * 0.5
    elif OPERATION == "abs":
        c = tl.abs(a)
    tl.store(out + i, c, mask=i < n)


@triton.jit
def _dot_kernel(x, y, out, SIZE: tl.constexpr, INNER: tl.constexpr):
    i = tl.arange(0, SIZE)
    k = tl.arange(0, INNER)
    a = tl.load(x + i[:, None] * INNER + k[None, :])
    b = tl.load(y + k[:, None] * SIZE + i[None, :])
    tl.store(out + i[:, None] * SIZE + i[None, :], tl.dot(a, b))


@triton.jit
def _sum_kernel(x, out, BLOCK: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, BLOCK)), 0))


@triton.jit
def _shifted(pointer, i, shift):
    return tl.load(pointer + i + shift)


@triton.jit
def _memory_kernel(x, y, n, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    """y = 2 x over n elements, with the mistake FAULT."""
    program = tl.program_id(0)
    i = program * BLOCK + tl.arange(0, BLOCK)
    if FAULT == "load before":
        value = _shifted(x, i, -1)
    elif FAULT == "load without a mask":
        value = tl.load(x + i)
    else:
        value = tl.load(x + i, mask=i < n)
    if FAULT == "store without a mask":
        tl.store(y + i, 2 * value)
    elif FAULT == "programs overlap":
        tl.store(y + i - program, 2 * value, mask=i < n)
    elif FAULT == "lanes overlap":
        tl.store(y + i // 2, 2 * value, mask=i < n)
    elif FAULT == "a neighbour's result":
        tl.store(y + i, 2 * value + tl.load(y + program * BLOCK - 1, mask=program > 0, other=0), mask=i < n)
    elif FAULT == "a neighbour's input":
        tl.store(x + (i + 1) % n, value, mask=i < n)
    elif FAULT == "atomic out of bounds":
        tl.atomic_add(y + i + n, value, mask=i < n)
    else:
        tl.store(y + i, 2 * value, mask=i < n)


@triton.jit
def _last_one_sums_kernel(x, partial, counter, out, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr):
    program = tl.program_id(0)
    tl.store(partial + program, tl.sum(tl.load(x + program * BLOCK + tl.arange(0, BLOCK)), 0))
    if tl.atomic_add(counter, 1) == PROGRAMS - 1:
        tl.store(out, tl.sum(tl.load(partial + tl.arange(0, PROGRAMS)), 0))


def bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def assert_same_numbers(actual: Tensor, expected: Tensor) -> None:
    """Equal bit by bit, except that any NaN equals any other."""
    assert torch.equal(actual.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(bits(actual)[number], bits(expected)[number])


def convert(x: Tensor, dtype: torch.dtype) -> Tensor:
    y = torch.full_like(x, 77, dtype=dtype)
    with interpreted():
        _convert_kernel[(triton.cdiv(len(x), 4096),)](x, y, len(x), BLOCK=4096)
    return y


def every_bf16() -> Tensor:
    """All 65 536 numbers: zeros, subnormals, infinities and NaNs of both signs."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(BF16)


def test_float32_rounds_to_bf16_as_in_torch() -> None:
    """After every upper half, the lower halves about the tie and the ends; ties on both even and odd numbers."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        x = (upper | lower).view(F32)
        assert_same_numbers(convert(x, BF16), x.to(BF16))


def test_conversions_from_and_to_bf16(seed: int) -> None:
    x = every_bf16()
    assert_same_numbers(convert(x, F32), x.to(F32))
    assert_same_numbers(convert(x, torch.float16), x.to(torch.float16))
    assert torch.equal(bits(convert(x, BF16)), bits(x))
    integers = torch.randint(-(2**24), 2**24, (4096,), dtype=torch.int32)
    assert_same_numbers(convert(integers, BF16), integers.to(BF16))
    assert torch.equal(convert(integers.to(BF16), torch.int32), integers.to(BF16).to(torch.int32))


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("add", torch.add),
        ("sub", torch.sub),
        ("mul", torch.mul),
        ("max", lambda a, b: torch.where(a.isnan(), b, torch.where(b.isnan(), a, torch.maximum(a, b)))),
        ("less", lambda a, b: torch.where(a < b, a, b)),
        ("halve", lambda a, b: a * 0.5),
        ("abs", lambda a, b: a.abs()),
    ],
)
def test_bf16_arithmetic_is_that_of_torch(
    operation: str, expected: Callable[[Tensor, Tensor], Tensor], seed: int
) -> None:
    x = every_bf16()
    y = x[torch.randperm(len(x))]
    out = torch.full_like(x, 77)
    with interpreted():
        _arithmetic_kernel[(16,)](x, y, out, len(x), operation, BLOCK=4096)
    reference = expected(x, y)
    same_zero = (out == 0) & (reference == 0)  # max(0, -0) may be either
    assert_same_numbers(torch.where(same_zero, 0, out), torch.where(same_zero, 0, reference))


def test_the_maximum_of_a_number_and_nan_is_the_number() -> None:
    x, y = torch.tensor([1.0, torch.nan]), torch.tensor([torch.nan, 2.0])
    out = torch.empty(2)
    with interpreted():
        _arithmetic_kernel[(1,)](x, y, out, 2, "max", BLOCK=2)
    assert out.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("dtype", [BF16, torch.float16, F32])
def test_dot(dtype: torch.dtype, seed: int) -> None:
    """Integers small enough for exact sums: any wrong term shows."""
    x, y = torch.randint(-9, 10, (16, 32)), torch.randint(-9, 10, (32, 16))
    out = torch.empty(16, 16)
    with interpreted():
        _dot_kernel[(1,)](x.to(dtype), y.to(dtype), out, SIZE=16, INNER=32)
    assert torch.equal(out, (x @ y).float())


def test_what_would_be_wrong_is_refused() -> None:
    x, out = torch.ones(16, 8, dtype=BF16), torch.empty(16, 16)
    with interpreted(), pytest.raises(AssertionError, match="K >= 16"):
        _dot_kernel[(1,)](x, x, out, SIZE=16, INNER=8)
    with interpreted(), pytest.raises(NotImplementedError, match="bfloat16"):
        _sum_kernel[(1,)](x, out, BLOCK=16)


def launch_memory_kernel(fault: str, n: int, block: int = 16) -> tuple[Tensor, Tensor]:
    x = torch.arange(1.0, n + 1)
    y = torch.zeros(n)
    with interpreted():
        _memory_kernel[(triton.cdiv(n, block),)](x, y, n, fault, BLOCK=block)
    return x, y


@pytest.mark.parametrize("n", [1, 15, 16, 40])
def test_a_correct_kernel_passes(n: int) -> None:
    x, y = launch_memory_kernel("", n)
    assert torch.equal(y, 2 * x)


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("load before", OutOfBoundsError, r"program \(0, 0, 0\).*load.* 1 of 16.*-4 bytes after.*`x`, which has 160"),
        ("load without a mask", OutOfBoundsError, r"program \(2, 0, 0\).*load.* 8 of 16.*160 bytes after.*`x`"),
        ("store without a mask", OutOfBoundsError, r"program \(2, 0, 0\).*store.* 8 of 16.*160 bytes after.*`y`"),
        ("atomic out of bounds", OutOfBoundsError, r"program \(0, 0, 0\).*atomic.* 16 of 16"),
        ("programs overlap", RaceError, r"program \(1, 0, 0\).*store at 1 addresses.*60 bytes.*`y`"),
        ("lanes overlap", RaceError, "lanes of one store"),
        ("a neighbour's result", RaceError, r"program \(1, 0, 0\).*load at 1 addresses"),
        ("a neighbour's input", RaceError, r"program \(1, 0, 0\).*load at 1 addresses.*64 bytes.*`x`"),
    ],
)
def test_mistakes_are_found(fault: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        launch_memory_kernel(fault, 40)


def test_the_bounds_are_those_of_the_view() -> None:
    """A load past a view is a mistake, also where the storage goes on; views of one storage do not race."""
    storage = torch.arange(64.0)
    with interpreted(), pytest.raises(OutOfBoundsError):
        _memory_kernel[(2,)](storage[:20], torch.empty(32), 20, "load without a mask", BLOCK=16)
    with interpreted():
        _memory_kernel[(2,)](storage[:32], storage[32:], 32, "", BLOCK=16)
    assert torch.equal(storage[32:], 2 * storage[:32])


def test_programs_ordered_by_atomics_do_not_race(seed: int) -> None:
    x = torch.randint(-9, 10, (64,)).float()
    partial, out, counter = torch.empty(4), torch.empty(1), torch.zeros(1, dtype=torch.int32)
    with interpreted():
        _last_one_sums_kernel[(4,)](x, partial, counter, out, BLOCK=16, PROGRAMS=4)
    assert float(out) == float(x.sum())


def test_nesting_and_restoring() -> None:
    before = {name: vars(tl.core)[name] for name in ("load", "reduce")}
    with poisoned("triton"), interpreted():
        launch_memory_kernel("", 20)
        launch_memory_kernel("", 20)
    with pytest.raises(OutOfBoundsError):
        launch_memory_kernel("load before", 20)
    assert all(vars(tl.core)[name] is value for name, value in before.items())


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="everything is interpreted in this process")
def test_a_kernel_that_was_interpreted_still_compiles() -> None:
    test_programs_ordered_by_atomics_do_not_race(0)
    signature = {"x": "*fp32", "partial": "*fp32", "counter": "*i32", "out": "*fp32"}
    constants = {"BLOCK": 16, "PROGRAMS": 4}
    source = ASTSource(_last_one_sums_kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
    assert "atom" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]


def test_where_the_interpreter_is_on_for_the_whole_process(pytestconfig: pytest.Config) -> None:
    """With TRITON_INTERPRET=1 set before Triton is imported, the repairs and the checks work as well."""
    names = "rounds_to_bf16 or add or dot or mistakes or atomics or refused or nesting"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", names, __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, cwd=pytestconfig.rootpath, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
