"""The layers that hold dense or packed matrices."""

import pytest
import torch
from torch.nn import functional as F

from afnext.quant.linear import Embedding, Linear, joined
from afnext.quant.scheme import Scheme, SchemeError, parse_scheme

SPELLINGS = ("int8", "int8-w8a8", "int4-g32", "int4-g64-zeros", "int4-g32-w4a8", "int3-g64", "nf4")


def scheme_of(spelling: str) -> Scheme:
    scheme = parse_scheme(spelling)
    assert scheme is not None
    return scheme


def filled(layer: Linear | Embedding, weight: torch.Tensor, spelling: str) -> torch.Tensor:
    """Fill the layer, packed as spelled; returns the weight that it then stands for, in float64."""
    scheme = parse_scheme(spelling)
    if scheme is None:
        layer.register_buffer("weight", weight)
        return weight.double()
    packed = scheme.quantize(weight)
    layer.use(scheme)
    for name, tensor in packed.named().items():
        assert layer.get_buffer(name).is_meta
        layer.register_buffer(name, tensor)
    return scheme.dequantize(packed, torch.float64)


def assert_near(actual: torch.Tensor, exact: torch.Tensor, relative: float = 0.02) -> None:
    assert actual.shape == exact.shape
    assert (actual.double() - exact).square().mean().sqrt() <= relative * exact.square().mean().sqrt()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("spelling", ["dense", *SPELLINGS])
def test_linear(spelling: str, bias: bool, seed: int) -> None:
    layer = Linear(128, 48, bias=bias)
    weight = filled(layer, torch.randn(48, 128), spelling)
    exact = torch.zeros(48)
    if bias:
        layer.register_buffer("bias", torch.randn(48))
        assert layer.bias is not None
        exact = layer.bias
    x = torch.randn(2, 3, 128)
    layer.prepare(torch.float32)
    exact = x.double() @ weight.T + exact.double()
    assert_near(layer(x), exact)
    residual = 10 * torch.randn(2, 3, 48)
    assert_near(layer(x, residual=residual), exact + residual.double())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("spelling", ["dense", *SPELLINGS])
def test_joined_layers_compute_what_each_did(spelling: str, bias: bool, seed: int) -> None:
    layers = [Linear(128, outputs, bias=bias) for outputs in (48, 16, 32)]
    for layer, outputs in zip(layers, (48, 16, 32), strict=True):
        filled(layer, torch.randn(outputs, 128), spelling)
        if bias:
            layer.register_buffer("bias", torch.randn(outputs))
    x = torch.randn(2, 3, 128)
    expected, stored = [layer(x) for layer in layers], [dict(layer.state_dict()) for layer in layers]
    whole = joined(*layers)
    assert whole is not None
    torch.testing.assert_close(whole(x), torch.cat(expected, -1), rtol=1e-5, atol=1e-5)
    for layer, out, before in zip(layers, expected, stored, strict=True):
        torch.testing.assert_close(layer(x), out, rtol=1e-5, atol=1e-5)
        assert layer.state_dict().keys() == before.keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
        for name, tensor in layer.state_dict().items():
            assert tensor.untyped_storage().data_ptr() == whole.get_buffer(name).untyped_storage().data_ptr()


def test_layers_stored_differently_are_not_joined(seed: int) -> None:
    dense, other, biased = Linear(128, 48, bias=False), Linear(128, 48, bias=False), Linear(128, 48, bias=True)
    filled(other, torch.randn(48, 128), "int8")
    assert joined(dense, other) is None
    assert joined(dense, biased) is None


@pytest.mark.parametrize("spelling", ["dense", *SPELLINGS])
def test_embedding(spelling: str, seed: int) -> None:
    table = Embedding(50, 128)
    weight = filled(table, torch.randn(50, 128), spelling)
    ids = torch.randint(0, 50, (2, 7))
    torch.testing.assert_close(table(ids, torch.float32), weight[ids].float(), rtol=1e-6, atol=0)
    assert table(ids[:0], torch.float32).shape == (0, 7, 128)
    x = torch.randn(3, 128)
    assert_near(table.scores(x), x.double() @ weight.T)


@pytest.mark.parametrize(
    "spellings",
    [
        ("dense", "dense"),
        ("dense", "int8"),
        ("int8", "int8"),
        ("int4-g32", "int4-g32"),
        ("int4-g32", "int8"),
        ("nf4", "nf4"),
    ],
)
def test_gated_pair(spellings: tuple[str, str], seed: int) -> None:
    layers = [Linear(128, 48, bias=False) for _ in range(2)]
    gate, up = (filled(layer, torch.randn(48, 128) / 8, text) for layer, text in zip(layers, spellings, strict=True))
    x = torch.randn(5, 128)
    assert_near(layers[0](x, up=layers[1]), F.silu(x.double() @ gate.T) * (x.double() @ up.T))


def test_a_scheme_that_does_not_fit_leaves_the_layer_dense() -> None:
    layer = Linear(40, 8, bias=False)
    with pytest.raises(SchemeError, match="40"):
        layer.use(scheme_of("int4-g32"))
    assert layer.scheme is None
    assert layer.weight.shape == (8, 40)
