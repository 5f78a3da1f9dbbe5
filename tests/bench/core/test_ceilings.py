"""Measured ceilings: plausible, remembered, and the yardstick they are meant to be."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from afnext.bench.core import ceilings as module
from afnext.bench.core.ceilings import Ceilings, measured_ceilings
from afnext.bench.core.timing import threads

CPU = torch.device("cpu")
MACHINE = Ceilings(copy=100e9, read=120e9, flops={"float32": 1e12, "bfloat16": 8e12})


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On a busy machine two threads wait for each other far longer than these small products take."""
    with threads(1):
        yield


def test_this_machine_has_plausible_ceilings() -> None:
    found = measured_ceilings(CPU, quick=True)
    assert 1e8 < found.copy < 1e14
    assert 1e8 < found.read < 1e14
    assert {"float32", "bfloat16"} <= found.flops.keys()
    assert all(1e7 < rate < 1e16 for rate in found.flops.values())
    # An independent clock and count: no such product here may beat the ceiling by much, and none by far.
    x = torch.randn(128, 128)
    start = time.perf_counter()
    for _ in range(20):
        x @ x
    assert 20 * 2 * 128**3 / (time.perf_counter() - start) < 10 * found.flops["float32"]


def test_ceilings_are_measured_once_for_each_thread_count(monkeypatch: pytest.MonkeyPatch) -> None:
    first = measured_ceilings(CPU, quick=True)
    measured: list[Any] = []

    def best(device: torch.device, call: Any) -> float:
        measured.append(call)
        return 1e-3

    monkeypatch.setattr(module, "_best", best)
    assert measured_ceilings(CPU, quick=True) is first
    assert not measured
    with threads(torch.get_num_threads() + 1):
        assert measured_ceilings(CPU, quick=True).copy == pytest.approx(2 * (1 << 20) / 1e-3)
    assert measured
    module._measured.cache_clear()


def test_a_product_that_torch_lacks_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "_int_mm", raising=False)
    module._measured.cache_clear()
    assert "int8" not in measured_ceilings(CPU, quick=True).flops
    module._measured.cache_clear()


def test_a_slow_product_is_measured_at_a_smaller_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sides: list[int] = []

    def product(device: torch.device, dtype: str, side: int) -> Any:
        sides.append(side)
        return lambda: time.sleep(20 * (side / 3072) ** 3)

    monkeypatch.setattr(module, "_product", product)
    monkeypatch.setattr(module, "_dtypes", lambda device: ("int8",))
    monkeypatch.setattr(module, "_bandwidths", lambda device, size: (1.0, 1.0))
    module._measured.cache_clear()
    assert 1e9 < measured_ceilings(CPU).flops["int8"] <= 2 * 3072**3 / 20
    assert max(sides) < 3072
    module._measured.cache_clear()


def test_what_reaches_the_ceiling_has_100_percent() -> None:
    assert MACHINE.percent(1.0, flops=8e12, bytes=1, dtype="bfloat16") == pytest.approx(100)
    assert MACHINE.percent(2.0, flops=8e12, bytes=1, dtype="bfloat16") == pytest.approx(50)
    assert MACHINE.percent(1.0, flops=1, bytes=60e9, dtype="float32") == pytest.approx(50)


def test_the_nearer_ceiling_is_the_limit() -> None:
    assert MACHINE.least_seconds(flops=1e12, bytes=1e9, dtype="float32") == (1.0, "compute")
    assert MACHINE.least_seconds(flops=1e9, bytes=120e9, dtype="float32") == (1.0, "memory")
    assert MACHINE.least_seconds(flops=1e30, bytes=120e9, dtype="int8") == (1.0, "memory")


def test_the_figures_carry_their_units() -> None:
    assert MACHINE.values() == {
        "copy_bytes_per_s": 100e9,
        "read_bytes_per_s": 120e9,
        "float32_flops_per_s": 1e12,
        "bfloat16_flops_per_s": 8e12,
    }
