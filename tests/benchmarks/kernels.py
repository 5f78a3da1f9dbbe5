"""The kernels under pytest-benchmark, so that runs can be saved and compared:

    pytest tests/benchmarks/kernels.py --benchmark-autosave
    pytest tests/benchmarks/kernels.py --benchmark-compare

The shapes are the model's; AFNEXT_BENCH_SIZES=quick takes small ones, AFNEXT_BENCH_DTYPE another dtype than bfloat16,
and a GPU is used where there is one. Every call is preceded by an eviction of the caches that is not timed.
"""

import os
from typing import Any

import pytest
import torch

from afnext.bench.core.timing import CacheEvictor
from afnext.bench.ops.cases import COMMON, Case, cases
from afnext.bench.ops.problems import QUICK
from afnext.kernels.device_state import synchronize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
QUICKLY = os.environ.get("AFNEXT_BENCH_SIZES") == "quick"
DTYPE: torch.dtype = getattr(torch, os.environ.get("AFNEXT_BENCH_DTYPE", "bfloat16"))
CASES = cases(QUICK if QUICKLY else COMMON, DTYPE)


@pytest.fixture(scope="module")
def evict() -> CacheEvictor:
    return CacheEvictor(DEVICE)


@pytest.mark.parametrize("subject", ["afnext", "torch"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.operation}, {case.label}")
def test_kernel(benchmark: Any, evict: CacheEvictor, case: Case, subject: str) -> None:
    benchmark.group = f"{case.operation}, {case.label}, {case.dtype}"
    benchmark.extra_info.update(flops=case.flops, bytes=case.bytes, device=DEVICE.type)
    with torch.inference_mode():
        call = case.subjects(DEVICE)[subject].call

        def run() -> None:
            call()
            synchronize(DEVICE)

        def cold() -> None:
            if not QUICKLY:
                evict()
            synchronize(DEVICE)

        benchmark.pedantic(run, setup=cold, rounds=3 if DEVICE.type == "cpu" else 20, warmup_rounds=1)
