"""Activation-aware scaling: the search against every exponent by hand in float64, folding, and clipping."""

import numpy as np
import pytest
import torch
from torch import Tensor

from afnext.quant.awq import scaled_source, scaled_target, scales_for, search_scales
from afnext.quant.int4 import dequantize_int4, quantize_int4


def rounded(weight: Tensor, group: int = 32) -> Tensor:
    return dequantize_int4(*quantize_int4(weight, group), torch.float64)


def outlier_rows(rows: int, inputs: int, magnitudes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Activations float64 with a few channels far larger than the rest, and the channels' magnitudes."""
    if magnitudes is None:
        magnitudes = torch.rand(inputs, dtype=torch.float64) + 0.1
        magnitudes[torch.randperm(inputs)[: inputs // 16]] *= 40
    return torch.randn(rows, inputs, dtype=torch.float64) * magnitudes, magnitudes


def by_hand(weights: list[np.ndarray], x: np.ndarray, magnitude: np.ndarray, columns: np.ndarray) -> list[float]:
    """The error of every exponent 0, 1/20 .. 1, from outputs."""
    errors = []
    for step in range(21):
        s = (magnitude / magnitude.max()).clip(1e-4) ** (step / 20)
        s = (s / np.sqrt(s.max() * s.min())).astype(np.float32).astype(np.float64)[columns]
        total = 0.0
        for w in weights:
            stored = rounded(torch.from_numpy(w * s)).numpy()
            total += (((x / s) @ stored.T - x @ w.T) ** 2).sum()
        errors.append(total)
    return errors


def test_the_search_finds_the_best_exponent(seed: int) -> None:
    weights = [torch.randn(out, 96, dtype=torch.float64) for out in (7, 5)]
    x, _ = outlier_rows(40, 96)
    found = search_scales([(w, rounded) for w in weights], x)
    errors = by_hand([w.numpy() for w in weights], x.numpy(), x.abs().mean(0).numpy(), np.arange(96))
    assert found.alpha == int(np.argmin(errors)) / 20
    np.testing.assert_allclose(found.error, min(errors), rtol=1e-9)
    np.testing.assert_allclose(found.plain_error, errors[0], rtol=1e-9)


def test_channels_that_share_a_scale_count_by_their_mean(seed: int) -> None:
    weight, columns = torch.randn(6, 64, dtype=torch.float64), torch.arange(64) % 16
    x, _ = outlier_rows(30, 64)
    found = search_scales([(weight, rounded)], x, columns=columns)
    magnitude = x.abs().mean(0).numpy().reshape(4, 16).mean(0)
    errors = by_hand([weight.numpy()], x.numpy(), magnitude, columns.numpy())
    assert found.scales.shape == (16,)
    assert found.alpha == int(np.argmin(errors)) / 20
    np.testing.assert_allclose(found.error, min(errors), rtol=1e-9)


def test_held_out_activations_gain_and_nothing_is_lost_without_outliers(seed: int) -> None:
    weight = torch.randn(40, 256)
    x, magnitudes = outlier_rows(200, 256)
    held_out, _ = outlier_rows(200, 256, magnitudes)
    s = search_scales([(weight, rounded)], x.float()).scales.double()
    scaled = rounded(weight.double() * s) / s
    errors = [(held_out @ (w - weight.double()).T).norm() for w in (rounded(weight), scaled)]
    assert errors[1] < 0.7 * errors[0]
    even = search_scales([(weight, rounded)], torch.randn(200, 256))
    assert even.error <= even.plain_error


def test_many_rows_are_searched_as_few_are(seed: int) -> None:
    weight = torch.randn(4200, 32, dtype=torch.float64)  # more rows than are taken at once
    x, _ = outlier_rows(8, 32)
    errors = by_hand([weight.numpy()], x.numpy(), x.abs().mean(0).numpy(), np.arange(32))
    np.testing.assert_allclose(search_scales([(weight, rounded)], x).error, min(errors), rtol=1e-9)


def test_silent_channels_have_finite_scales() -> None:
    magnitudes = torch.tensor([0.0, 1.0, 100.0])
    for alpha in (0.0, 0.5, 1.0):
        scales = scales_for(magnitudes, alpha)
        assert scales.isfinite().all()
        assert (scales > 0).all()
        torch.testing.assert_close(scales.max() * scales.min(), torch.tensor(1.0))
    assert scales_for(torch.zeros(3), 0.5).tolist() == [1, 1, 1]


def test_folding_changes_nothing_before_rounding(seed: int) -> None:
    # Two value heads of 3 channels, each read by two query heads, as in grouped-query attention.
    value, bias = torch.randn(6, 10, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    output, columns = torch.randn(4, 12, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5])
    x, scales = torch.randn(7, 10, dtype=torch.float64), torch.rand(6, dtype=torch.float64) + 0.5
    before = (x @ value.T + bias)[:, columns] @ output.T
    scaled = x @ scaled_source(value, scales).T + scaled_source(bias, scales)
    assert not torch.allclose(scaled, x @ value.T + bias)
    after = scaled[:, columns] @ scaled_target(output, scales, columns).T
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        search_scales([(torch.ones(2, 64), rounded)], torch.ones(3, 32))
    with pytest.raises(ValueError, match="one row"):
        search_scales([(torch.ones(2, 64), rounded)], torch.ones(0, 64))
    with pytest.raises(ValueError, match="finite"):
        search_scales([(torch.ones(2, 64), rounded)], torch.full((3, 64), float("nan")))
