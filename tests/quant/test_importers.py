"""Imported weights against packing written here from the formats' definitions, and what cannot be imported."""

from typing import Any

import numpy as np
import pytest
import torch
from support.foreign import as_compressed, as_gptq, compressed_config, configs, example, stored_as

from afnext.quant.importers import ForeignFormat, ImportFormatError
from afnext.quant.int4 import dequantize_int4, unpack_int4


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group", "ours"), [(32, 32), (128, 128), (256, 128)])
@pytest.mark.parametrize("method", ["gptq", "gptq_v2", "awq", "compressed-tensors"])
def test_every_weight_is_what_the_format_says(method: str, group: int, ours: int, symmetric: bool, seed: int) -> None:
    codes, scales, zeros = example(24, 512, group, symmetric)
    tensors = stored_as(method, codes, scales, zeros, symmetric)
    packed, our_scales, our_zeros = ForeignFormat.from_config(configs(group)[method]).weight("layer", tensors)
    assert our_scales.shape == (24, 512 // ours)
    assert our_scales.dtype == torch.float16
    assert (our_zeros is None) == symmetric
    np.testing.assert_array_equal(unpack_int4(packed).numpy(), codes)
    expected = (codes - zeros.repeat(group, 1)) * scales.astype(np.float64).repeat(group, 1)
    np.testing.assert_array_equal(dequantize_int4(packed, our_scales, our_zeros, torch.float64).numpy(), expected)


def test_a_scale_for_a_whole_channel_is_repeated(seed: int) -> None:
    codes, scales, zeros = example(8, 192, 192, False)
    for config in (configs(-1)["gptq_v2"], compressed_config(0, strategy="channel")):
        gptq = config["quant_method"] == "gptq"
        tensors = as_gptq(codes, scales, zeros, less=0) if gptq else as_compressed(codes, scales, zeros)
        packed, our_scales, our_zeros = ForeignFormat.from_config(config).weight("layer", tensors)
        expected = (codes - zeros) * scales.astype(np.float64)
        np.testing.assert_array_equal(dequantize_int4(packed, our_scales, our_zeros, torch.float64).numpy(), expected)


def test_weights_packed_by_compressed_tensors_itself(seed: int) -> None:
    library = pytest.importorskip("compressed_tensors.compressors.pack_quantized", reason="needs compressed-tensors")
    codes, scales, zeros = example(16, 128, 64, False)
    tensors = {
        "weight_packed": library.pack_to_int32(torch.from_numpy(codes - 8).to(torch.int8), 4),
        "weight_zero_point": library.pack_to_int32(torch.from_numpy(zeros - 8).to(torch.int8), 4, packed_dim=0),
        "weight_scale": torch.from_numpy(scales.copy()),
        "weight_shape": torch.tensor(codes.shape),
    }
    packed, our_scales, our_zeros = ForeignFormat.from_config(compressed_config(64)).weight("layer", tensors)
    expected = (codes - zeros.repeat(64, 1)) * scales.astype(np.float64).repeat(64, 1)
    np.testing.assert_array_equal(dequantize_int4(packed, our_scales, our_zeros, torch.float64).numpy(), expected)


def test_activation_order_is_refused_and_a_trivial_order_is_not(seed: int) -> None:
    codes, scales, zeros = example(8, 128, 32, True)
    tensors = as_gptq(codes, scales, zeros, less=1)
    form = ForeignFormat.from_config({**configs(32)["gptq"], "desc_act": True, "static_groups": True})
    form.weight("layer", tensors)
    tensors["g_idx"] = tensors["g_idx"][torch.randperm(128)]
    with pytest.raises(ImportFormatError, match=r"decoder\.x .*activation order"):
        form.weight("decoder.x", tensors)


@pytest.mark.parametrize("method", ["gptq", "gptq_v2", "compressed-tensors"])
def test_zero_points_that_contradict_a_symmetric_config_are_refused(method: str, seed: int) -> None:
    stated = {"sym": True} if method != "compressed-tensors" else {}
    config = compressed_config(32, symmetric=True) if method == "compressed-tensors" else configs(32)[method]
    form = ForeignFormat.from_config(config | stated)
    codes, scales, zeros = example(8, 64, 32, symmetric=True)
    tensors = stored_as(method, codes, scales, zeros, symmetric=False)
    assert form.weight("layer", tensors)[2] is None
    zeros[3, 1] = 5
    with pytest.raises(ImportFormatError, match=r"decoder\.x has a zero point of 5, .* symmetric"):
        form.weight("decoder.x", stored_as(method, codes, scales, zeros, symmetric=False))


def test_symmetric_weights_in_the_other_gptq_format_are_refused_with_advice(seed: int) -> None:
    codes, scales, zeros = example(8, 64, 32, symmetric=True)
    form = ForeignFormat.from_config(configs(32)["gptq"] | {"sym": True})
    with pytest.raises(ImportFormatError, match=r"zero point of 9, .* \"checkpoint_format\" to \"gptq_v2\""):
        form.is_symmetric("layer", as_gptq(codes, scales, zeros, less=0))


def test_wrapped_zero_points_are_refused(seed: int) -> None:
    codes, scales, zeros = example(8, 64, 32, False)
    zeros[3, 1] = 0
    tensors = as_gptq(codes, scales, (zeros - 1) % 16, less=0)
    with pytest.raises(ImportFormatError, match="gptq_v2"):
        ForeignFormat("gptq", 32).weight("layer", tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": torch.ones(3, 8)}, "do not belong to groups of 32"),
        ({"scales": torch.full((2, 8), float("nan"))}, "not finite"),
        ({"scales": torch.ones(2, 8, dtype=torch.int32)}, r"layer\.scales is torch\.int32"),
        ({"qweight": torch.ones(8, 8)}, r"layer\.qweight is torch\.float32"),
        ({"qzeros": torch.ones(1, 1, dtype=torch.int32)}, "do not belong"),
        ({"g_idx": torch.zeros(3, dtype=torch.int32)}, "activation order"),
        ({"perm": torch.zeros(3)}, "perm"),
    ],
)
def test_damaged_tensors_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    tensors = as_gptq(*example(8, 64, 32, True), less=1) | change
    with pytest.raises(ImportFormatError, match=message):
        ForeignFormat("gptq", 32).weight("layer", tensors)


def test_a_missing_tensor_is_named() -> None:
    with pytest.raises(ImportFormatError, match="scales"):
        ForeignFormat("awq", 32).weight("layer", {"qweight": torch.zeros(8, 1, dtype=torch.int32)})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "not a JSON object"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 8, "group_size": 128}, "bits = '8'"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "gptq", "bits": 4, "group_size": "all"}, "group_size"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, "gemv"),
        ({**compressed_config(32), "format": "int-quantized"}, "int-quantized"),
        ({**compressed_config(32), "config_groups": {}}, "config group"),
        (compressed_config(32, num_bits=8), "num_bits"),
        (compressed_config(32, strategy="tensor"), "strategy"),
    ],
)
def test_configs_that_cannot_be_imported(config: Any, message: str) -> None:
    with pytest.raises(ImportFormatError, match=message):
        ForeignFormat.from_config(config)


def test_groups_that_have_no_place_here() -> None:
    codes, scales, zeros = example(8, 96, 48, True)
    with pytest.raises(ImportFormatError, match="groups of 48"):
        ForeignFormat("gptq_v2", 48).weight("layer", as_gptq(codes, scales, zeros, less=0))
