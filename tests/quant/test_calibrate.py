"""A stage quantized from statistics: what it computes, what calibration gains, and the statistics themselves."""

import pytest
import torch
from torch import Tensor, nn

from afnext.kernels.packed_weight import Packed
from afnext.quant.awq import Fold
from afnext.quant.calibrate import Calibration, InputStatistics, LayerReport, gathering, quantize_stage
from afnext.quant.linear import Linear
from afnext.quant.scheme import NF4, Int4, Int8, Scheme


class Block(nn.Module):
    """A norm's weight, two layers that read it, and one behind the first: up(norm) and down(up), gate(norm)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.norm = nn.Module()
        self.norm.register_buffer("weight", 1 + 0.1 * torch.randn(width))
        self.gate, self.up = Linear(width, inner, bias=True), Linear(width, inner, bias=True)
        self.down = Linear(inner, width, bias=False)
        for layer in (self.gate, self.up, self.down):
            layer.register_buffer("weight", torch.randn(layer.weight.shape) * layer.weight.shape[1] ** -0.5)
            if layer.bias is not None:
                layer.register_buffer("bias", torch.randn(layer.bias.shape))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.norm.get_buffer("weight")
        return self.gate(x)[..., : x.shape[-1]].sigmoid() * self.down(self.up(x))


FOLDS = (Fold("norm", ("gate", "up")), Fold("up", ("down",)))


def outlier_tokens(tokens: int, magnitudes: Tensor) -> Tensor:
    return torch.randn(tokens, len(magnitudes) // 4) @ torch.randn(
        len(magnitudes) // 4, len(magnitudes), generator=torch.Generator().manual_seed(3)
    ) * magnitudes + 0.05 * torch.randn(tokens, len(magnitudes))


def outliers(width: int) -> Tensor:
    magnitudes = torch.ones(width)
    magnitudes[torch.randperm(width)[: width // 16]] = 30.0
    return magnitudes


def quantized(
    block: Block, x: Tensor, scheme: Scheme | None, options: Calibration
) -> tuple[dict[str, Tensor | Packed], list[LayerReport]]:
    statistics = {
        "gate": InputStatistics(64, len(x), options.rows),
        "down": InputStatistics(128, len(x), options.rows),
    }
    with gathering(block, FOLDS, statistics):
        for part in x.split(37):
            block(part)
    reports: list[LayerReport] = []
    result = quantize_stage(
        dict(block.named_buffers()), FOLDS, statistics, lambda _: scheme, options, report=reports.append
    )
    return dict(result), reports


def restored(parameters: dict[str, Tensor | Packed], scheme: Scheme) -> Block:
    block = Block(64, 128)
    for name, value in parameters.items():
        layer, _, kind = name.rpartition(".")
        dense = scheme.dequantize(value, torch.float32) if isinstance(value, Packed) else value
        block.get_submodule(layer).register_buffer(kind, dense)
    return block


@pytest.mark.parametrize("scheme", [Int4(32), Int4(64, symmetric=False), Int8(), NF4()], ids=str)
def test_the_stage_computes_what_it_did_but_for_rounding(scheme: Scheme, seed: int) -> None:
    block, magnitudes = Block(64, 128), outliers(64)
    x, held_out = outlier_tokens(300, magnitudes), outlier_tokens(100, magnitudes)
    expected = block(held_out)
    errors = []
    for options in (Calibration(scaling=False, feedback=False), Calibration()):
        parameters, reports = quantized(block, x, scheme, options)
        assert {name for name, value in parameters.items() if isinstance(value, Packed)} == {
            "gate.weight", "up.weight", "down.weight",
        }  # fmt: skip
        assert {report.layer for report in reports} == {"gate", "up", "down"}
        assert all(0 < report.error < 0.3 for report in reports)
        errors.append(float((restored(parameters, scheme)(held_out) - expected).norm() / expected.norm()))
    assert errors[1] < (1 if isinstance(scheme, NF4) else 0.4) * errors[0]


def test_folding_alone_changes_nothing(seed: int) -> None:
    block = Block(64, 128)
    x = outlier_tokens(300, outliers(64))
    statistics = {"gate": InputStatistics(64, 300, 300), "down": InputStatistics(128, 300, 300)}
    with gathering(block, FOLDS, statistics):
        block(x)
    # The layer behind `up` is dense, so only `up` itself is scaled on its input side, and the norm divided.
    parameters = dict(
        quantize_stage(
            dict(block.named_buffers()), FOLDS, statistics, lambda name: Int8() if name == "up" else None, Calibration()
        )
    )
    assert not torch.equal(parameters["norm.weight"], block.norm.get_buffer("weight"))
    assert torch.equal(parameters["down.weight"], block.down.weight)
    assert relative(restored(parameters, Int8())(x), block(x)) < 0.01
    parameters["up.weight"] = block.up.weight * (block.norm.get_buffer("weight") / parameters["norm.weight"])
    assert relative(restored(parameters, Int8())(x), block(x)) < 1e-5


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def test_dense_layers_stay_as_they_are(seed: int) -> None:
    block = Block(64, 128)
    parameters, reports = quantized(block, torch.randn(50, 64), None, Calibration())
    assert reports == []
    for name, buffer in block.named_buffers():
        assert torch.equal(parameters[name], buffer)


def test_the_same_inputs_give_the_same_bytes(seed: int) -> None:
    block, x = Block(64, 128), torch.randn(100, 64)
    first, second = (quantized(block, x, Int4(32), Calibration())[0] for _ in range(2))
    for name, value in first.items():
        for a, b in zip(value, second[name], strict=True):
            assert a is b is None or torch.equal(a, b)


def test_unrelated_inputs_are_not_calibrated_to_death(seed: int) -> None:
    # As many tokens as inputs, all independent: what feedback learns from them is chance.
    weight, x, held_out = torch.randn(40, 64), torch.randn(80, 64), torch.randn(500, 64)
    folds, scheme = (Fold(None, ("layer",)),), Int4(32)
    errors, chosen = [], []
    for options in (Calibration(feedback=False), Calibration()):
        statistics = InputStatistics(64, len(x), 512)
        statistics.add(x)
        reports: list[LayerReport] = []
        ((_, packed),) = quantize_stage(
            {"layer.weight": weight}, folds, {"layer": statistics}, lambda _: scheme, options, report=reports.append
        )
        assert isinstance(packed, Packed)
        chosen.append(reports[0].feedback)
        errors.append(relative(held_out @ scheme.dequantize(packed, torch.float32).T, held_out @ weight.T))
    assert chosen == [False, False]
    assert errors[0] == errors[1]


@pytest.mark.parametrize(
    ("tokens", "rows", "count"), [(100, 10, 10), (7, 10, 1), (40, 10, 10), (101, 33, 25), (1, 5, 1)]
)
def test_statistics_keep_evenly_spaced_rows_aside(tokens: int, rows: int, count: int, seed: int) -> None:
    x = torch.randn(tokens, 6, dtype=torch.float64)
    statistics = InputStatistics(6, tokens, rows)
    given = x.float()
    for part in given.split(4):
        statistics.add(part[None])
    assert torch.equal(given, x.float())
    kept = [i * tokens // count for i in range(count)]
    others = [i for i in range(tokens) if i not in kept]
    torch.testing.assert_close(statistics.rows, x[kept].float())
    torch.testing.assert_close(statistics.gram, (x[others].T @ x[others]).float())
    scales = torch.rand(6) + 0.5
    statistics.divide(scales)
    torch.testing.assert_close(statistics.rows, (x[kept] / scales).float())
    torch.testing.assert_close(statistics.gram, ((x[others] / scales).T @ (x[others] / scales)).float())
    torch.testing.assert_close(statistics.mean_squares, (x[others] / scales).square().sum(0).float())
