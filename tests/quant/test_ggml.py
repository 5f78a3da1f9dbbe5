"""ggml's block formats: decoded as the package `gguf` decodes them, and packed without rounding the weights again."""

import numpy as np
import pytest
import torch

from afnext.kernels.packed_weight import Packed
from afnext.quant import ggml
from afnext.quant.ggml import FORMATS, dequantized, packed_codes, packed_scales

gguf = pytest.importorskip("gguf", reason="the package gguf is what decoders are compared with")
pytest.importorskip("support.ggml")
from support.ggml import random_blocks, weights_of  # noqa: E402 - needs gguf


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def packed(kind: str, blocks: np.ndarray) -> Packed:
    data = torch.from_numpy(blocks)
    return Packed(packed_codes(kind, data), *packed_scales(kind, data))


@pytest.mark.parametrize("kind", FORMATS)
def test_every_weight_is_what_gguf_decodes(kind: str, rng: np.random.Generator) -> None:
    blocks = random_blocks(kind, 7, 1024, rng)
    np.testing.assert_array_equal(dequantized(kind, torch.from_numpy(blocks)).numpy(), weights_of(kind, blocks))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_weights_that_gguf_quantized(kind: str, rng: np.random.Generator) -> None:
    blocks = gguf.quants.quantize(rng.normal(size=(5, 256)).astype(np.float32), gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(dequantized(kind, torch.from_numpy(blocks)).numpy(), weights_of(kind, blocks))


@pytest.mark.parametrize("kind", FORMATS)
def test_packed_weights_are_the_same_numbers(
    kind: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly where there are no minimums; else within the rounding of a zero point to float32."""
    monkeypatch.setattr(ggml, "_CHUNK", 3 * 512)
    blocks = random_blocks(kind, 8, 512, rng)
    scheme, made = FORMATS[kind].scheme, packed(kind, blocks)
    for name, part in made.named().items():
        stored = scheme.stored((8, 512))[name]
        assert part.shape == stored.shape
        assert part.dtype in stored.dtypes
    exact = scheme.dequantize(made, torch.float64).numpy()
    expected = weights_of(kind, blocks).astype(np.float64)
    if made.zeros is None:
        np.testing.assert_array_equal(exact.astype(np.float32), expected)
    else:
        largest = np.abs(expected).reshape(8, -1, 32).max(-1).repeat(32, 1)
        offset = (made.scales.double() * made.zeros.double()).abs().numpy().repeat(32, 1)
        assert np.all(np.abs(exact - expected) <= 2.0**-23 * (largest + offset))


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_1", "Q4_K", "Q5_K"])
def test_groups_of_one_number(kind: str, rng: np.random.Generator) -> None:
    """A scale of zero leaves the minimum, which zero points alone could not say."""
    blocks = random_blocks(kind, 4, 512, rng)
    scales = slice(4, 8) if kind.endswith("K") else slice(0, 2)
    blocks.reshape(4, -1, FORMATS[kind].nbytes)[:, 0, scales] = 0
    blocks.reshape(4, -1, FORMATS[kind].nbytes)[2, 0, 2:4] = 0
    if kind.endswith("K"):
        assert len(np.unique(weights_of(kind, blocks)[0, :32])) == 1
    exact = FORMATS[kind].scheme.dequantize(packed(kind, blocks), torch.float64).numpy()
    expected = weights_of(kind, blocks).astype(np.float64)
    constant = expected.reshape(4, -1, 32).min(-1) == expected.reshape(4, -1, 32).max(-1)
    assert constant.sum() >= 4
    where = constant.repeat(32, 1)
    np.testing.assert_array_equal(exact[where], expected[where])
    assert np.all(np.abs(exact - expected) <= 2.0**-22)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(kind: str, bad: float, rng: np.random.Generator) -> None:
    blocks = random_blocks(kind, 2, 256, rng)
    place = slice(208, 210) if kind == "Q6_K" else slice(0, 2)
    blocks[1, place] = np.frombuffer(np.float16(bad).tobytes(), np.uint8)
    with pytest.raises(match="not finite"):
        packed(kind, blocks)


def test_a_minimum_beyond_all_zero_points_is_refused(rng: np.random.Generator) -> None:
    blocks = random_blocks("Q4_1", 2, 64, rng)
    blocks[0, :4] = np.frombuffer(np.array([1e-6, 1000], np.float16).tobytes(), np.uint8)
    with pytest.raises(match="60,000 times"):
        packed("Q4_1", blocks)


def test_formats_have_the_sizes_that_gguf_states() -> None:
    for kind, form in FORMATS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == (form.weights, form.nbytes)
