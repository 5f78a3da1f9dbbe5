"""Dense linear layers: every backend against the float64 reference, and who computes what on a CPU."""

import logging

import pytest
import torch
from support.accuracy import DTYPES, assert_accurate, backends, exactly, native_backends, poisoned
from torch import Tensor
from torch.nn import functional as F

from afnext.bench.ops.guarded import guarded
from afnext.kernels import linear as module
from afnext.kernels import native
from afnext.kernels.linear import linear, linear_swiglu

# rows, in, out: few rows and many, parts of vectors, of tiles of rows and of panels, several passes of rows
SHAPES = [
    (1, 128, 33),
    (5, 67, 16),
    (16, 40, 35),
    (19, 64, 70),
    (70, 1, 40),
    (75, 333, 129),
    (600, 150, 65),
    (40, 96, 7),
]


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    rows, inner, columns = shape
    x, weight, bias = torch.randn(rows, inner), torch.randn(columns, inner) / inner**0.5, torch.randn(columns)
    return x.to(device, dtype), weight.to(device, dtype), bias.to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", backends(module._operation))
def test_accuracy(
    backend: str, shape: tuple[int, int, int], dtype: torch.dtype, seed: int, device: torch.device
) -> None:
    x, weight, bias = inputs(shape, dtype, device)
    for biased in (bias, None):
        with poisoned(backend):
            actual = linear(x, weight, biased)
        assert_accurate(actual, exactly(linear, x, weight, biased), F.linear(x, weight, biased))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 128, 33), (16, 40, 35), (19, 64, 32), (75, 333, 129), (600, 150, 65), (40, 96, 7)]
)
@pytest.mark.parametrize("backend", backends(module._swiglu))
def test_swiglu_accuracy(
    backend: str, shape: tuple[int, int, int], dtype: torch.dtype, seed: int, device: torch.device
) -> None:
    x, gate, _ = inputs(shape, dtype, device)
    up = torch.randn_like(gate.float()).to(dtype) / 8
    with poisoned(backend):
        actual = linear_swiglu(x, gate, up)
    plain = F.silu(F.linear(x, gate)) * F.linear(x, up)
    assert_accurate(actual, exactly(linear_swiglu, x, gate, up), plain)


@pytest.mark.parametrize("backend", backends(module._operation, module._swiglu))
def test_strided_and_empty_inputs(backend: str, seed: int, device: torch.device) -> None:
    x, weight = torch.randn(5, 4, 256).to(device)[..., :128], torch.randn(128, 40).to(device).T
    with poisoned(backend):
        torch.testing.assert_close(linear(x, weight), linear(x.contiguous(), weight.contiguous()))
        assert linear(x, weight).shape == (5, 4, 40)
        assert linear(x[:0], weight).shape == (0, 4, 40)
        pair = linear_swiglu(x.contiguous(), weight.contiguous(), weight.contiguous())
        torch.testing.assert_close(linear_swiglu(x, weight, weight), pair)
        assert linear_swiglu(x[:0], weight, weight).shape == (0, 4, 40)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 7, 19, 300])
@pytest.mark.parametrize("backend", native_backends(module._operation, module._swiglu))
def test_native_stays_within_its_memory(
    backend: str, rows: int, threads: int, seed: int, restored_threads: None
) -> None:
    """Tensors that end where readable memory ends, aligned to nothing; and any number of threads gives the same."""
    x, weight, bias = inputs((rows, 203, 53), torch.bfloat16, torch.device("cpu"))
    torch.set_num_threads(1)
    with poisoned(backend):
        expected, pair = linear(x, weight, bias), linear_swiglu(x, weight, weight)
    torch.set_num_threads(threads)
    x, weight, bias = map(guarded, (x, weight, bias))
    with poisoned(backend):
        assert torch.equal(linear(x, weight, bias), expected)
        assert torch.equal(linear_swiglu(x, weight, weight), pair)


@pytest.mark.parametrize("level", native.supported_levels())
def test_torch_multiplies_what_it_has_instructions_for(
    level: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """bfloat16 goes to the native kernels where the level widens it, float32 always to torch; the log says so.

    With AVX512-BF16, which torch has products for, only a few rows are native; with ARM's bfloat16, all are.
    """
    monkeypatch.setenv("AFNEXT_ISA", level)
    monkeypatch.delenv("AFNEXT_BACKEND", raising=False)
    monkeypatch.setattr(module._operation, "_logged", set())
    with caplog.at_level(logging.INFO, "afnext.kernels"):
        linear(torch.ones(2, 64).bfloat16(), torch.ones(40, 64).bfloat16())
        few = "linear on cpu runs on native" in caplog.text
        caplog.clear()
        monkeypatch.setattr(module._operation, "_logged", set())
        linear(torch.ones(20, 64).bfloat16(), torch.ones(40, 64).bfloat16())
        linear(torch.ones(2, 64), torch.ones(40, 64))
    widened = level in ("avx2", "avxvnni", "avx512vnni", "neon", "neondot", "i8mm")
    assert few == (widened or level == "avx512")
    assert ("linear on cpu runs on native" in caplog.text) == widened
    assert "linear on cpu runs on torch" in caplog.text
    assert ("does not cover float32" in caplog.text) == widened or f"at the level {level}" in caplog.text


@pytest.mark.parametrize("level", native.supported_levels())
def test_pairs_of_many_rows_are_multiplied_at_once(
    level: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In bfloat16 wherever the native products are no slower than torch's, which the log says."""
    monkeypatch.setenv("AFNEXT_ISA", level)
    monkeypatch.delenv("AFNEXT_BACKEND", raising=False)
    monkeypatch.setattr(module._swiglu, "_logged", set())
    with caplog.at_level(logging.INFO, "afnext.kernels"):
        weight = torch.ones(40, 64).bfloat16()
        linear_swiglu(torch.ones(20, 64).bfloat16(), weight, weight)
    fused = level in ("avx2", "avxvnni", "avx512vnni", "avx512", "neon", "neondot", "i8mm")
    assert ("linear_swiglu on cpu runs on native" in caplog.text) == fused
    assert ("linear_swiglu on cpu runs on torch" in caplog.text) == (not fused)


def test_refusals() -> None:
    x, weight, bias = torch.zeros(2, 64), torch.zeros(5, 64), torch.zeros(5)
    with pytest.raises(ValueError, match=r"\(2, 64\) and \(5, 32\)"):
        linear(x, weight[:, :32])
    with pytest.raises(ValueError, match=r"\(4,\)"):
        linear(x, weight, bias[:4])
    with pytest.raises(ValueError, match=r"bfloat16, torch.float32"):
        linear(x, weight.bfloat16())
    with pytest.raises(ValueError, match="one shape"):
        linear_swiglu(x, weight, weight[:4])
    with pytest.raises(ValueError, match=r"\(2, 32\)"):
        linear_swiglu(x[:, :32], weight, weight)
