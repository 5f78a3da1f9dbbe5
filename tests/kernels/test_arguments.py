"""Public operations refuse tensors of a dtype that they do not take, and tensors of several devices."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, ones, zeros

from afnext.kernels.activation import gelu, swiglu
from afnext.kernels.attention import attention
from afnext.kernels.conv_stem import conv_stem
from afnext.kernels.decode_attention import decode_attention
from afnext.kernels.dispatch import operations
from afnext.kernels.kv_write import kv_write
from afnext.kernels.linear import linear, linear_swiglu
from afnext.kernels.linear_fp8 import linear_fp8, linear_fp8_swiglu
from afnext.kernels.linear_int3 import linear_int3, linear_int3_swiglu
from afnext.kernels.linear_int4 import linear_int4, linear_int4_swiglu
from afnext.kernels.linear_int8 import linear_int8, linear_int8_swiglu
from afnext.kernels.linear_int8_groups import linear_int8_groups, linear_int8_groups_swiglu
from afnext.kernels.linear_nf4 import linear_nf4, linear_nf4_swiglu
from afnext.kernels.linear_norm import linear_norm
from afnext.kernels.linear_nvfp4 import linear_nvfp4, linear_nvfp4_swiglu
from afnext.kernels.linear_w4a8 import linear_w4a8, linear_w4a8_swiglu
from afnext.kernels.linear_w8a8 import linear_w8a8, linear_w8a8_swiglu
from afnext.kernels.log_mel import log_mel
from afnext.kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from afnext.kernels.packed_weight import Packed
from afnext.kernels.quantize_rows import quantize_rows
from afnext.kernels.rotary import Rotation, rotary
from afnext.kernels.rote import pool_norm_rotate
from afnext.kernels.sampling import SamplingRows, greedy, penalize, sample

I8, U8, I32, I64 = torch.int8, torch.uint8, torch.int32, torch.int64


def sample_rows(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, u: Tensor) -> Tensor:
    return sample(logits, SamplingRows(temperature, top_k, top_p, min_p), u)


def rotary_of(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    return rotary(x, Rotation(positions, frequencies))


def with_packed(function: Callable[..., Any], *names: str) -> Callable[..., Any]:
    """`function` with its packed weights `names` as their tensors: weight_codes, weight_scales."""

    def call(**tensors: Tensor) -> Any:
        packed = {name: Packed(*(tensors.pop(f"{name}_{part}", None) for part in Packed._fields)) for name in names}
        return function(**packed, **tensors)

    return call


def kv_write_of(positions: Tensor, frequencies: Tensor, **tensors: Tensor) -> Tensor:
    return kv_write(rotation=Rotation(positions, frequencies), **tensors)


PRODUCTS = (
    (linear_int8, linear_int8_swiglu),
    (linear_w8a8, linear_w8a8_swiglu),
    (linear_fp8, linear_fp8_swiglu),
    (linear_int8_groups, linear_int8_groups_swiglu),
    (linear_int4, linear_int4_swiglu),
    (linear_w4a8, linear_w4a8_swiglu),
    (linear_int3, linear_int3_swiglu),
    (linear_nf4, linear_nf4_swiglu),
    (linear_nvfp4, linear_nvfp4_swiglu),
)
PACKED = {
    "int8": Packed(zeros(3, 128, dtype=I8), ones(3)),
    "w8a8": Packed(zeros(3, 128, dtype=I8), ones(3)),
    "fp8": Packed(zeros(3, 128, dtype=torch.float8_e4m3fn), ones(3)),
    "int8_groups": Packed(zeros(3, 128, dtype=I8), ones(3, 4), ones(3, 4)),
    "int4": Packed(zeros(3, 64, dtype=U8), ones(3, 4), ones(3, 4)),
    "w4a8": Packed(zeros(3, 64, dtype=U8), ones(3, 4), ones(3, 4)),
    "int3": Packed(zeros(3, 48, dtype=U8), ones(3, 2)),
    "nf4": Packed(zeros(3, 64, dtype=U8), ones(3, 2)),
    "nvfp4": Packed(zeros(3, 64, dtype=U8), zeros(3, 8, dtype=torch.float8_e4m3fn), ones(3)),
}


def products() -> dict[str, tuple[Callable[..., Any], dict[str, Tensor]]]:
    """Calls of the products with packed weights, alone and as pairs."""
    calls: dict[str, tuple[Callable[..., Any], dict[str, Tensor]]] = {}
    for function, pair in PRODUCTS:
        weight = PACKED[function.__name__.removeprefix("linear_")]
        x, rest = {"x": ones(2, 128)}, {"bias": ones(3), "residual": ones(2, 3)}
        calls[function.__name__] = with_packed(function, "weight"), x | weight.named() | rest
        calls[pair.__name__] = with_packed(pair, "gate", "up"), x | weight.named("gate") | weight.named("up")
    return calls


PAGES = {
    "key_lengths": ones(2, dtype=I32),
    "page_table": zeros(2, 1, dtype=I32),
    "k_scales": ones(1, 16, 2),
    "v_scales": ones(1, 16, 2),
}
CACHE = zeros(1, 16, 2, 8, dtype=I8)
TURN = {"positions": ones(2, 1), "frequencies": ones(4)}
NORM = {"x": ones(2, 8), "residual": ones(2, 8), "weight": ones(8), "bias": ones(8)}
STEM = {"mel": ones(1, 4, 6), "weight1": ones(8, 4, 3), "bias1": ones(8), "weight2": ones(8, 8, 3), "bias2": ones(8)}

CALLS: dict[str, tuple[Callable[..., Any], dict[str, Tensor]]] = {
    "gelu": (gelu, {"x": ones(2, 8)}),
    "swiglu": (swiglu, {"gate": ones(2, 8), "up": ones(2, 8)}),
    "attention": (attention, {"q": ones(2, 1, 4, 8), "k": CACHE, "v": CACHE, **PAGES}),
    "decode_attention": (decode_attention, {"q": ones(2, 1, 4, 8), "k": CACHE, "v": CACHE, **PAGES}),
    "conv_stem": (conv_stem, {**STEM, "positions": ones(9, 8)}),
    "kv_write": (
        kv_write_of,
        {
            "q": ones(2, 1, 4, 8),
            "k": ones(2, 1, 2, 8),
            "v": ones(2, 1, 2, 8),
            "k_cache": CACHE.clone(),
            "v_cache": CACHE.clone(),
            "slots": torch.arange(2)[:, None],
            "k_scales": ones(1, 16, 2),
            "v_scales": ones(1, 16, 2),
            **TURN,
        },
    ),
    "linear": (linear, {"x": ones(2, 8), "weight": ones(3, 8), "bias": ones(3)}),
    "linear_swiglu": (linear_swiglu, {"x": ones(2, 8), "gate": ones(3, 8), "up": ones(3, 8)}),
    "linear_norm": (
        with_packed(partial(linear_norm, "linear_int4"), "weight"),
        {"x": ones(2, 128), **PACKED["int4"].named(), "residual": ones(2, 3), "norm": ones(3)},
    ),
    **products(),
    "log_mel": (log_mel, {"waveforms": ones(1, 1600)}),
    "layer_norm": (layer_norm, {name: NORM[name] for name in ("x", "weight", "bias")}),
    "rms_norm": (rms_norm, {name: NORM[name] for name in ("x", "weight")}),
    "add_layer_norm": (add_layer_norm, NORM),
    "add_rms_norm": (add_rms_norm, {name: NORM[name] for name in ("x", "residual", "weight")}),
    "quantize_rows": (quantize_rows, {"x": ones(2, 8)}),
    "rotary": (rotary_of, {"x": ones(2, 1, 4, 8), **TURN}),
    "pool_norm_rotate": (
        pool_norm_rotate,
        {
            "x": ones(2, 4, 8),
            "weight": ones(8),
            "bias": ones(8),
            "angles": ones(3, 2, 2),
            "windows": zeros(2, dtype=I64),
        },
    ),
    "penalize": (penalize, {"logits": ones(2, 9), "seen": zeros(2, 9, dtype=torch.bool), "penalty": ones(2)}),
    "greedy": (greedy, {"logits": ones(2, 9)}),
    "sample": (
        sample_rows,
        {
            "logits": ones(2, 9),
            "temperature": ones(2),
            "top_k": ones(2, dtype=I64),
            "top_p": ones(2),
            "min_p": zeros(2),
            "u": zeros(2),
        },
    ),
}
TENSORS = [(operation, name) for operation, (_, tensors) in CALLS.items() for name in tensors]


def test_every_operation_is_called_here() -> None:
    assert {operation.name for operation in operations()} <= CALLS.keys()


@pytest.mark.parametrize("operation", CALLS)
def test_a_valid_call_runs(operation: str) -> None:
    function, tensors = CALLS[operation]
    function(**tensors)


@pytest.mark.parametrize(("operation", "name"), TENSORS)
def test_a_dtype_of_another_kind_is_refused(operation: str, name: str) -> None:
    """Numbers where indices or codes are meant, whole numbers where others are, and complex ones anywhere."""
    function, tensors = CALLS[operation]
    tensor = tensors[name]
    wrong = [torch.complex64, torch.float32 if not tensor.is_floating_point() else torch.int16]
    if tensor.dtype == I8:
        wrong.append(U8)
    if name in ("temperature", "top_p", "min_p", "u", "penalty", "k_scales", "v_scales", "angles"):
        wrong += [torch.float64, torch.int64]
    for dtype in wrong:
        with pytest.raises(ValueError, match=str(dtype).removeprefix("torch.")):
            function(**{**tensors, name: tensor.to(dtype)})


@pytest.mark.parametrize(
    ("operation", "name"), [(op, name) for op, name in TENSORS if name != next(iter(CALLS[op][1]))]
)
def test_tensors_of_two_devices_are_refused(operation: str, name: str) -> None:
    function, tensors = CALLS[operation]
    with pytest.raises(ValueError, match="meta"):
        function(**{**tensors, name: tensors[name].to("meta")})
