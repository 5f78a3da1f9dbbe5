"""The lab's table of the operations in `kernels/`: public function, inputs, plain computation, results, odd shapes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch.nn import functional as F

from ...kernels import activation, norm, sampling
from ...kernels.attention import attention
from ...kernels.conv_stem import conv_stem
from ...kernels.decode_attention import decode_attention
from ...kernels.dispatch import Operation, operations
from ...kernels.errors import AfnextError
from ...kernels.kv_write import kv_write
from ...kernels.linear import linear, linear_swiglu
from ...kernels.linear_fp8 import linear_fp8, linear_fp8_swiglu
from ...kernels.linear_int3 import linear_int3, linear_int3_swiglu
from ...kernels.linear_int4 import linear_int4, linear_int4_swiglu
from ...kernels.linear_int8 import linear_int8, linear_int8_swiglu
from ...kernels.linear_int8_groups import linear_int8_groups, linear_int8_groups_swiglu
from ...kernels.linear_nf4 import linear_nf4, linear_nf4_swiglu
from ...kernels.linear_norm import linear_norm
from ...kernels.linear_nvfp4 import linear_nvfp4, linear_nvfp4_swiglu
from ...kernels.linear_w4a8 import linear_w4a8, linear_w4a8_swiglu
from ...kernels.linear_w8a8 import linear_w8a8, linear_w8a8_swiglu
from ...kernels.log_mel import log_mel
from ...kernels.quantize_rows import quantize_rows
from ...kernels.quantize_rows import reference as quantize_rows_reference
from ...kernels.rotary import rotary
from ...kernels.rote import pool_norm_rotate
from . import baselines, inputs, plain
from .inputs import Arguments, Draw, Shape

FLOATS = ("float32", "bfloat16", "float16")


class UnknownOperationError(AfnextError):
    """The lab has no such operation, problem or dtype."""


def _returned(arguments: Arguments, returned: Any) -> Any:
    return returned


@dataclass(frozen=True)
class Spec:
    """One operation.

    function: the public one, whose signature a candidate has; make: keyword arguments from a shape; plain: the naive
    computation on the same arguments; odd: shapes for correctness; results: what to compare, from the arguments and
    what the call returned, as in-place results are in the arguments; dtypes: that the inputs may have; written: the
    arguments that a call writes into; also: another operation, whose results count as right, too: those with int8
    inputs need not round few rows of them.
    """

    function: Callable[..., Any]
    make: Callable[[Shape, Draw], Arguments]
    plain: Callable[..., Any]
    odd: tuple[Mapping[str, int], ...]
    results: Callable[[Arguments, Any], Any] = _returned
    dtypes: tuple[str, ...] = FLOATS
    written: frozenset[str] = frozenset()
    also: str = ""

    @property
    def name(self) -> str:
        """The operation's name."""
        return self.function.__name__

    @property
    def operation(self) -> Operation[Any]:
        """Its registered implementations."""
        return next(operation for operation in operations() if operation.name == self.name)


def spec(name: str) -> Spec:
    """The operation called `name`. Raises UnknownOperationError naming those there are."""
    found = specs().get(name)
    if found is None:
        raise UnknownOperationError(f"unknown operation {name!r}; there are {', '.join(sorted(specs()))}")
    return found


_CACHES = ("k_cache", "v_cache", "k_scales", "v_scales")


def _cache_results(arguments: Arguments, rotated: Any) -> tuple[Any, ...]:
    """The rotated queries, and for each cache the written and the unchanged parts."""
    slots = arguments["slots"].flatten()
    results = [rotated]
    for name in _CACHES:
        if arguments.get(name) is not None:
            cache = arguments[name].flatten(0, 1)
            others = torch.ones(len(cache), dtype=torch.bool, device=cache.device)
            others[slots] = False
            results += [cache[slots], cache[others]]
    return tuple(results)


@cache
def specs() -> dict[str, Spec]:
    """All operations by name, in the order of the model's data flow."""
    rows = ({"rows": 1, "channels": 1}, {"rows": 3, "channels": 7}, {"rows": 5, "channels": 257})
    norms = ({"rows": 1, "channels": 64}, {"rows": 3, "channels": 37}, {"rows": 7, "channels": 1280})
    heads = {"heads": 6, "kv_heads": 2, "head_dim": 32, "page_size": 16}
    gqa = {"heads": 7, "kv_heads": 1, "head_dim": 64, "page_size": 16}
    decode = (
        {"batch": 1, "queries": 1, "keys": 1, **heads, "kv8": 0},
        {"batch": 3, "queries": 1, "keys": 77, **heads, "kv8": 0},
        {"batch": 2, "queries": 3, "keys": 50, **gqa, "kv8": 0},
        {"batch": 3, "queries": 1, "keys": 77, **heads, "kv8": 1},
    )
    prefill = (
        {"batch": 1, "queries": 17, "keys": 17, **heads, "kv8": 0},
        {"batch": 2, "queries": 19, "keys": 53, **gqa, "kv8": 0},
        {"batch": 2, "queries": 19, "keys": 53, **heads, "kv8": 1},
    )
    writes = tuple(
        {"batch": batch, "tokens": tokens, "before": before, **heads, "kv8": kv8}
        for batch, tokens, before, kv8 in ((1, 1, 0, 0), (2, 5, 14, 0), (2, 5, 14, 1))
    )
    vocabularies = ({"batch": 1, "vocab": 33}, {"batch": 3, "vocab": 4099})
    table = [
        Spec(
            log_mel,
            inputs.log_mel,
            plain.log_mel,
            ({"batch": 1, "samples": 1600, "mel_bins": 80}, {"batch": 2, "samples": 4800, "mel_bins": 128}),
            dtypes=("float32",),
        ),
        Spec(
            conv_stem,
            inputs.conv_stem,
            baselines.conv_stem,
            (
                {"batch": 1, "frames": 9, "mel_bins": 8, "hidden": 16},
                {"batch": 2, "frames": 31, "mel_bins": 24, "hidden": 48},
            ),
        ),
        Spec(norm.layer_norm, partial(inputs.norm, centers=True, adds=False), plain.layer_norm, norms),
        Spec(norm.add_layer_norm, partial(inputs.norm, centers=True, adds=True), plain.add_layer_norm, norms),
        Spec(norm.rms_norm, partial(inputs.norm, centers=False, adds=False), plain.rms_norm, norms),
        Spec(norm.add_rms_norm, partial(inputs.norm, centers=False, adds=True), plain.add_rms_norm, norms),
        Spec(activation.gelu, inputs.gelu, F.gelu, rows),
        Spec(activation.swiglu, inputs.swiglu, lambda gate, up: F.silu(gate) * up, rows),
        Spec(
            pool_norm_rotate,
            inputs.pool_norm_rotate,
            plain.pool_norm_rotate,
            (
                {"batch": 1, "positions": 2, "channels": 16, "pairs": 4, "windows": 1},
                {"batch": 3, "positions": 11, "channels": 48, "pairs": 8, "windows": 2},
            ),
        ),
        Spec(
            rotary,
            inputs.rotary,
            plain.rotary,
            tuple(
                {"tokens": tokens, "heads": 3, "head_dim": 32, "interleaved": interleaved}
                for tokens, interleaved in ((1, 0), (37, 0), (37, 1))
            ),
        ),
        Spec(kv_write, inputs.kv_write, plain.kv_write, writes, _cache_results, written=frozenset(_CACHES)),
        Spec(
            attention, _attention, plain.attention, ({"batch": 2, "queries": 37, "heads": 2, "head_dim": 32}, *prefill)
        ),
        Spec(decode_attention, partial(inputs.paged_attention, causal=False), plain.attention, decode),
        *_products(),
        Spec(quantize_rows, inputs.quantize_rows, quantize_rows_reference, rows),
        Spec(sampling.penalize, inputs.penalize, plain.penalize, vocabularies, dtypes=("float32",)),
        Spec(sampling.greedy, inputs.greedy, lambda logits: logits.max(-1).indices, vocabularies, dtypes=("float32",)),
        Spec(
            sampling.sample,
            inputs.sample,
            sampling.sample_reference,
            tuple({**shape, "top_k": top_k} for shape in vocabularies for top_k in (0, 5)),
            dtypes=("float32",),
        ),
    ]
    return {entry.name: entry for entry in table}


def _attention(s: Shape, new: Draw) -> Arguments:
    return inputs.paged_attention(s, new, causal=True) if "page_size" in s else inputs.encoder_attention(s, new)


def _products() -> list[Spec]:
    def shapes(*sizes: tuple[int, int, int, int], **more: int) -> tuple[dict[str, int], ...]:
        names = ("rows", "in_features", "out_features", "bias")
        return tuple({**dict(zip(names, size, strict=True)), **more} for size in sizes)

    dense = shapes((1, 64, 96, 0), (3, 192, 37, 1), (33, 160, 70, 1))
    pair = shapes((1, 64, 96, 0), (3, 192, 37, 0), (33, 160, 70, 0))
    eight = shapes((1, 64, 96, 0), (3, 192, 37, 1), (33, 128, 70, 1))
    four = (*shapes((1, 128, 96, 0), group=64), *shapes((3, 192, 37, 1), (33, 256, 70, 1), group=32))
    three = (*shapes((1, 128, 96, 0), group=64), *shapes((3, 384, 37, 1), (33, 256, 70, 1), group=32))
    blocks = shapes((1, 128, 96, 0), (3, 192, 37, 1), (33, 256, 70, 1))

    floats = (*shapes((1, 128, 96, 0), (33, 256, 70, 1), group=16), *shapes((3, 96, 37, 1), group=32))

    def without_bias(sizes: tuple[dict[str, int], ...]) -> tuple[dict[str, int], ...]:
        return tuple({**size, "bias": 0} for size in sizes)

    found = [
        Spec(linear, inputs.linear, plain.linear, dense),
        Spec(linear_swiglu, inputs.linear_swiglu, plain.linear_swiglu, pair),
    ]
    packed = (
        ("int8", linear_int8, linear_int8_swiglu, eight),
        ("int8_groups", linear_int8_groups, linear_int8_groups_swiglu, four),
        ("int4", linear_int4, linear_int4_swiglu, four),
        ("int3", linear_int3, linear_int3_swiglu, three),
        ("nf4", linear_nf4, linear_nf4_swiglu, blocks),
        ("nvfp4", linear_nvfp4, linear_nvfp4_swiglu, floats),
    )
    for kind, single, double, sizes in packed:
        found.append(Spec(single, partial(inputs.packed_linear, kind=kind), plain.packed_linear, sizes))
        pairs = without_bias(sizes)
        found.append(Spec(double, partial(inputs.packed_swiglu, kind=kind), plain.packed_swiglu, pairs))
    made, sizes = partial(inputs.packed_linear, kind="fp8"), (*eight, *shapes((66, 144, 37, 1)))
    found.append(Spec(linear_fp8, made, plain.fp8_linear, sizes))
    made = partial(inputs.packed_swiglu, kind="fp8")
    found.append(Spec(linear_fp8_swiglu, made, plain.fp8_swiglu, without_bias(sizes)))
    found.append(Spec(linear_norm, inputs.linear_norm, plain.linear_norm, without_bias(four)))
    rounded = (
        ("int8", linear_w8a8, linear_w8a8_swiglu, eight, "linear_int8"),
        ("int4", linear_w4a8, linear_w4a8_swiglu, four, "linear_int4"),
    )
    for kind, single, double, sizes, also in rounded:
        made, pairs = partial(inputs.packed_linear, kind=kind), without_bias(sizes)
        found.append(Spec(single, made, plain.rounded_linear, sizes, also=also))
        made = partial(inputs.packed_swiglu, kind=kind)
        found.append(Spec(double, made, plain.rounded_swiglu, pairs, also=f"{also}_swiglu"))
    return found
