"""Q4_K by llama.cpp's own rounding."""

import pytest
import torch

from afnext.kernels.errors import AfnextError
from afnext.quant.scheme import Int4, Int8, SchemeError

pytest.importorskip("gguf", reason="Q4_K's number is taken from the package gguf")
q4_k = pytest.importorskip("afnext.bench.quality.q4_k")


@pytest.fixture(autouse=True)
def needs_llama_cpp() -> None:
    try:
        q4_k.library()
    except AfnextError as problem:
        pytest.skip(str(problem))


@pytest.mark.parametrize("shape", [(24, 512), (6, 384)])
def test_its_error_is_near_that_of_our_own_groups_of_32(shape: tuple[int, int], seed: int) -> None:
    weight = torch.randn(shape)
    scheme = q4_k.Q4K()
    packed = scheme.quantize(weight)
    assert {name: part.shape for name, part in packed.named().items()} == {
        name: stored.shape for name, stored in scheme.stored(shape).items()
    }
    values = scheme.dequantize(packed, torch.float32)
    error = float((values - weight).norm() / weight.norm())
    best, eight = (
        float((s.dequantize(s.quantize(weight), torch.float32) - weight).norm() / weight.norm())
        for s in (Int4(32, symmetric=False), Int8())
    )
    assert max(eight, 0.9 * best) < error < 1.5 * best


def test_what_has_no_whole_runs_is_refused() -> None:
    with pytest.raises(SchemeError, match="256"):
        q4_k.Q4K().quantize(torch.randn(3, 96))
