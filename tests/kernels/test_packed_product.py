"""Products whose inner dimension is split: the order of their sums, and of their accesses to memory."""

import pytest
import torch

pytest.importorskip("triton")

import triton
from support.accuracy import poisoned
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from afnext.bench.codegen.trace import recorded_launches
from afnext.kernels import packed_product
from afnext.kernels.configs import targeting
from afnext.kernels.counters import counters_of
from afnext.kernels.linear_int4 import config_of, linear_int4, linear_int4_swiglu
from afnext.kernels.packed_weight import Packed

ROWS, INNER, COLUMNS, GROUP = 3, 1024, 96, 64


def weight() -> Packed:
    packed = torch.randint(0, 256, (COLUMNS, INNER // 2), dtype=torch.uint8)
    return Packed(packed, (torch.rand(COLUMNS, INNER // GROUP) / 8 / INNER**0.5).half())


def parts_of(x: Tensor) -> list[Tensor]:
    """x with all but the inputs of one split set to zero, for each split in order."""
    config = config_of(len(x), GROUP, False, x.device)
    splits, steps = packed_product.split_inner(config, len(x), COLUMNS, INNER, x.device)
    assert splits > 2
    width = steps * config.blocks["BLOCK_K"]
    parts = []
    for start in range(0, INNER, width):
        part = torch.zeros_like(x)
        part[:, start : start + width] = x[:, start : start + width]
        parts.append(part)
    return parts


def added_in_order(products: list[Tensor]) -> Tensor:
    total = products[0]
    for product in products[1:]:
        total = total + product
    return total


def test_partial_sums_are_added_from_the_first_split_to_the_last(seed: int) -> None:
    x, codes, bias, residual = torch.randn(ROWS, INNER), weight(), torch.randn(COLUMNS), torch.randn(ROWS, COLUMNS)
    with poisoned("triton"):
        expected = added_in_order([linear_int4(part, codes) for part in parts_of(x)]) + bias + residual
        for _ in range(2):  # the second time with the counters that the first one left
            assert torch.equal(linear_int4(x, codes, bias, residual), expected)
    assert not counters_of(codes.codes, 1).any()


def test_a_pair_is_added_before_it_is_gated(seed: int) -> None:
    x, gate, up = torch.randn(ROWS, INNER), weight(), weight()
    with poisoned("triton"):
        sums = [added_in_order([linear_int4(part, codes) for part in parts_of(x)]) for codes in (gate, up)]
        actual = linear_int4_swiglu(x, gate, up)
    torch.testing.assert_close(actual, torch.nn.functional.silu(sums[0]) * sums[1], rtol=1e-6, atol=1e-7)


def test_partial_sums_are_written_before_they_are_counted_and_read_after() -> None:
    """The interpreter runs one program after the other, so the order of memory is read from the machine's assembly."""
    x = torch.empty(1, 3584, dtype=torch.bfloat16, device="meta")
    packed = torch.empty(3584, 1792, dtype=torch.uint8, device="meta")
    scales = torch.empty(3584, 56, dtype=torch.bfloat16, device="meta")
    with targeting("sm90"), recorded_launches() as recording:
        linear_int4(x, Packed(packed, scales))
    (launch,) = recording.launches
    kernel = launch.specialization
    source = ASTSource(kernel.kernel, kernel.signature, kernel.constexprs, kernel.attributes)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(kernel.options)).asm["ptx"]
    before, _, after = ptx.partition("atom.global.gpu.acq_rel.add")
    assert before.rindex("st.global") < before.rindex("bar.sync")
    assert 0 <= after.index("bar.sync") < after.index("ld.global.cg")
    assert "ld.global.cg" not in before
