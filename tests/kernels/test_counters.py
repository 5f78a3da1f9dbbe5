"""The counters that find the last block of a launch."""

import gc

import pytest
import torch
from support.accuracy import poisoned
from support.fake_cuda import FakeCuda

pytest.importorskip("triton")

from afnext.kernels import counters
from afnext.kernels.counters import counters_of
from afnext.kernels.linear_int4 import linear_int4
from afnext.kernels.packed_weight import Packed


def weight() -> Packed:
    return Packed(torch.randint(0, 256, (96, 512), dtype=torch.uint8), torch.rand(96, 16).half() / 256)


def test_counters_are_those_of_one_tensor_and_go_with_it(seed: int) -> None:
    x, first, second = torch.randn(3, 1024).half(), weight(), weight()
    gc.collect()
    before = len(counters._counters)
    with poisoned("triton"):
        for _ in range(2):
            linear_int4(x, first)
            linear_int4(x, second)
    assert len(counters._counters) == before + 2
    assert counters_of(first.codes, 1).data_ptr() != counters_of(second.codes, 1).data_ptr()
    del first
    gc.collect()
    assert len(counters._counters) == before + 1


def test_a_launch_that_needs_more_counters_leaves_the_others_where_they_are() -> None:
    owner = torch.zeros(1)
    few = counters_of(owner, 7)
    assert len(few) >= 7
    assert not few.any()
    many = counters_of(owner, 100 * len(few) + 1)
    assert len(many) > 100 * len(few)
    assert counters_of(owner, 7) is few
    assert counters_of(owner, len(many)) is many


def test_counters_made_during_a_capture_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are zero when the graph is replayed, but not before."""
    if torch.cuda.is_available():
        pytest.skip("there is a real GPU")
    with FakeCuda(monkeypatch).active():
        owner = torch.zeros(8, 8, dtype=torch.uint8, device="cuda:1")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        captured = counters_of(owner, 9)
        assert counters_of(owner, 9) is not captured
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        kept = counters_of(owner, 9)
        assert counters_of(owner, 9) is kept
        assert kept.device == owner.device
