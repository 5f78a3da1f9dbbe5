"""What stands in Whisper's layers once they are quantized."""

import pytest
import torch
from torch import nn

from afnext.bench.quality.quantized_whisper import put
from afnext.quant.scheme import Fp8, Int4, Int8, Scheme


@pytest.mark.parametrize("scheme", [Int8(int8_inputs=True), Int4(64, int8_inputs=True), Fp8(), Int8(), Int4(64)])
@torch.inference_mode()
def test_inputs_are_rounded_where_the_scheme_says_so(scheme: Scheme, seed: int) -> None:
    """With the layer's present bias, also one that is put after the weights."""
    stage, x = nn.ModuleDict({"layer": nn.Linear(128, 32)}), torch.randn(70, 128)
    packed, bias = scheme.quantize(torch.randn(32, 128)), torch.randn(32)
    put(stage, "layer.weight", packed, scheme)
    put(stage, "layer.bias", bias, None)
    actual, unrounded = stage["layer"](x), x @ scheme.dequantize(packed, torch.float32).T + bias
    torch.testing.assert_close(actual, scheme.linear(x, packed, bias), rtol=1e-4, atol=1e-4)
    rounded = str(scheme).endswith(("w8a8", "w4a8", "fp8"))
    assert ((actual - unrounded).abs().max() > 1e-3) == rounded
