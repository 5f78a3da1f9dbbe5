"""Native calls made again: with what is in their tensors by then, and only where nothing else was computed."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from support.accuracy import poisoned
from torch import Tensor

from afnext.kernels import native
from afnext.kernels.decode_attention import decode_attention
from afnext.kernels.linear_int8 import linear_int8
from afnext.kernels.native.recording import recording
from afnext.kernels.norm import rms_norm
from afnext.kernels.packed_weight import Packed

pytestmark = pytest.mark.skipif(not native.AVAILABLE, reason="the native kernels are not built")


@torch.inference_mode()
def test_calls_read_what_their_tensors_hold_by_then(seed: int) -> None:
    x, weight = torch.randn(3, 64), torch.rand(64)
    codes, scales, bias = (
        torch.randint(-127, 128, (32, 64), dtype=torch.int8),
        torch.rand(32),
        torch.randn(32).bfloat16(),
    )
    with recording() as calls:
        normed = rms_norm(x, weight, 1e-6)
        out = linear_int8(normed.view(3, 64), Packed(codes, scales), bias)
    assert (calls.obstacle, len(calls)) == (None, 2)
    x.copy_(torch.randn(3, 64))
    calls()
    assert torch.equal(out, linear_int8(rms_norm(x, weight, 1e-6), Packed(codes, scales), bias))


@pytest.mark.parametrize(
    ("compute", "obstacle"),
    [
        (lambda x: x + 1, "aten::add.Tensor"),
        (lambda x: x.t().contiguous(), "aten::contiguous"),
        (lambda x: x.t().flatten(), "aten::flatten.using_ints"),
        (lambda x: x.mul_(2), "aten::mul_.Tensor"),
        (lambda x: int(x.max()), "aten::max"),
    ],
)
@torch.inference_mode()
def test_what_torch_computes_between_is_an_obstacle(compute: Callable[[Tensor], object], obstacle: str) -> None:
    x = torch.ones(2, 3)
    with recording() as calls:
        compute(x)
        compute(x)
    assert calls.obstacle == obstacle


@torch.inference_mode()
def test_views_and_allocations_are_none() -> None:
    with recording() as calls:
        x = torch.empty(2, 12).new_empty(2, 12)
        x.view(24)[None].unflatten(-1, (4, 6)).transpose(0, 1).contiguous().to(torch.float32)
    assert (calls.obstacle, len(calls)) == (None, 0)


@torch.inference_mode()
def test_attention_recorded_for_few_keys_serves_many(seed: int, device: torch.device) -> None:
    """Its memory is for as many as the pages hold, whatever lengths were recorded."""
    if device.type != "cpu":
        pytest.skip("native kernels run on the CPU")
    q, lengths = torch.randn(2, 1, 4, 64).bfloat16(), torch.tensor([3, 1])
    k, v = torch.randn(8, 128, 2, 64).bfloat16(), torch.randn(8, 128, 2, 64).bfloat16()
    table = torch.randperm(8).view(2, 4).int()
    with poisoned("native"), recording() as calls:
        out = decode_attention(q, k, v, key_lengths=lengths, page_table=table)
    assert calls.obstacle is None
    lengths.copy_(torch.tensor([77, 512]))
    calls()
    assert torch.equal(out, decode_attention(q, k, v, key_lengths=lengths, page_table=table))


def test_recording_does_not_import_the_compiler() -> None:
    """torch's compiler takes most of a second to import, which the first answer would wait for."""
    script = (
        "import sys, torch; from afnext.kernels.native.recording import recording\n"
        "with recording(): torch.empty(3).view(3)\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
