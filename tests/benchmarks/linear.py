"""Dense and packed layers under pytest-benchmark: the products of full-width decoder layers, for one row and for many.

    pytest tests/benchmarks/linear.py --benchmark-group-by=param:rows

The layers hold random codes; AFNEXT_BENCH_SIZES=quick takes small ones, and a GPU is used where there is one. Each call
is preceded by an eviction of the caches that is not timed.
"""

import os
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import nn

from afnext.bench.core.timing import CacheEvictor
from afnext.kernels.device_state import synchronize
from afnext.quant.linear import Linear
from afnext.quant.scheme import parse_scheme

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
QUICKLY = os.environ.get("AFNEXT_BENCH_SIZES") == "quick"
WIDTH, KEYS, INNER = (256, 64, 512) if QUICKLY else (3584, 512, 18944)
SHAPES = [(WIDTH, WIDTH), (WIDTH, KEYS), (WIDTH, KEYS), (WIDTH, WIDTH), (WIDTH, INNER), (WIDTH, INNER), (INNER, WIDTH)]
SCHEMES = ("dense", "int8", "int8-w8a8", "int4-g64", "int4-g128", "int4-g64-zeros", "int4-g64-w4a8", "nf4")


@lru_cache(maxsize=1)  # one scheme's layers at a time
def decoder_layer(spelling: str) -> nn.ModuleList:
    """The seven matrices of a decoder layer, (in, out) of SHAPES."""
    layers = nn.ModuleList(Linear(inner, out, bias=False) for inner, out in SHAPES)
    scheme = parse_scheme(spelling)
    for layer in layers:
        assert isinstance(layer, Linear)
        if scheme is not None:
            layer.use(scheme)
        for name, buffer in list(layer.named_buffers()):
            filled = torch.empty(buffer.shape, dtype=buffer.dtype, device=DEVICE)
            if buffer.dtype.is_floating_point:
                filled = filled.to(torch.bfloat16 if scheme is None else buffer.dtype).fill_(0.01)
            else:
                info = torch.iinfo(buffer.dtype)
                filled.random_(info.min + 1, info.max)
            layer.register_buffer(name, filled)
        layer.prepare(torch.bfloat16)
    return layers


@pytest.fixture(scope="module")
def evict() -> CacheEvictor:
    return CacheEvictor(DEVICE)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rows", [1, 512])
def test_decoder_layer(benchmark: Any, evict: CacheEvictor, rows: int, scheme: str) -> None:
    layers = decoder_layer(scheme)
    nbytes = sum(buffer.nbytes for buffer in layers.buffers())
    inputs = [torch.randn(rows, inner, dtype=torch.bfloat16, device=DEVICE) for inner, _ in SHAPES]
    benchmark.extra_info.update(weight_bytes=nbytes, device=DEVICE.type)
    with torch.inference_mode():

        def run() -> None:
            for layer, x in zip(layers, inputs, strict=True):
                layer(x)
            synchronize(DEVICE)

        def cold() -> None:
            if not QUICKLY:
                evict()
            synchronize(DEVICE)

        benchmark.pedantic(run, setup=cold, rounds=5 if DEVICE.type == "cpu" else 20, warmup_rounds=1)
