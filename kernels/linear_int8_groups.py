"""Linear layers with int8 weights in groups (W8A16), alone or as a SwiGLU pair.

    y[m, n] = sum_k x[m, k] * scales[n, g] * (codes[n, k] - zeros[n, g]) + bias[n] + residual[m, n],    g = k // group
    SwiGLU: y = silu(gate(x)) * up(x), two such products of one x

x: [rows, in] float16, bfloat16 or float32; codes: [out, in] int8; scales, zeros: [out, in / group]; zeros may be
omitted if all are 0. Groups of 16, 32, 64 or 128 inputs. Sums and epilogues are float32 and are rounded to the dtype of
x once.

The format serves existing weights: those of GGUF files with five, six and eight bits. A scale for each channel
(`linear_int8`) is smaller and faster.

Bound by memory up to about 100 rows: a launch reads out * in * (1 + 4 / group) bytes of codes and float32 scales, twice
the scales with zeros, once for every BLOCK_M rows. 2 * rows * out * in operations. Few rows: the tensor cores multiply
the codes minus their zero, and the scale multiplies a group's sum. Many rows: the scale multiplies the weights before
they are rounded. Inner dimensions are split as in `packed_product`.

Native, on a CPU: for up to 16 rows the weights are read once from memory and converted to float32 in registers. For
more rows, and in torch, weights are made dense a tile of channels at a time.
"""

import torch
from torch import Tensor

from .arguments import FLOATING, check_tensors
from .configs import Config, Configs
from .few_rows import few_rows
from .packed_product import (
    AddNorm,
    NativeProduct,
    PackedProduct,
    add_epilogue,
    block_of,
    by_tiles,
    check_groups,
    config_for,
    grouped_misfit,
    launch_product,
    store_product,
    tile_config,
    within_group,
)
from .packed_weight import Packed
from .row_groups import any_rows
from .triton_language import tl, triton

GROUP_SIZES = (16, 32, 64, 128)


def unpacked(weight: Packed) -> Tensor:
    """The weights [out, in], in float32, or float64 if the scales are."""
    codes, scales, zeros = weight
    dtype = torch.promote_types(scales.dtype, torch.float32)
    weights = codes.to(dtype).unflatten(1, (scales.shape[1], -1))
    if zeros is not None:
        weights = weights - zeros.to(dtype)[..., None]
    return (weights * scales.to(dtype)[..., None]).flatten(1)


def linear_int8_groups_reference(x: Tensor, weight: Packed, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """The specification of `linear_int8_groups`, in float64."""
    return add_epilogue(x.double() @ unpacked(weight.wide()).T, bias, residual).to(x.dtype)


@triton.jit
def _add_group(acc, tokens, codes, scales, zeros, at, group, SCALE_WEIGHTS: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc + the product of a tile of weights, whose codes begin at codes + at and lie in one group, with tokens."""
    weights = tl.load(codes + at).to(tl.float32)
    if zeros is not None:
        weights -= tl.load(zeros + group).to(tl.float32)[:, None]
    scale = tl.load(scales + group).to(tl.float32)[:, None]
    if SCALE_WEIGHTS:
        acc = tl.dot((weights * scale).to(DTYPE), tokens, acc, input_precision="ieee")
    else:
        acc += tl.dot(weights.to(DTYPE), tokens, input_precision="ieee") * scale
    return acc


@triton.jit(do_not_specialize=["rows", "steps"])
def _groups_kernel(  # type: ignore[no-untyped-def]
    x,
    codes,
    scales,
    zeros,
    up,
    up_scales,
    up_zeros,
    bias,
    residual,
    out,
    partials,
    counters,
    norm,
    rows,
    columns,
    inner,
    steps,
    GROUP: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    SCALE_WEIGHTS: tl.constexpr = BLOCK_M > 64
    DTYPE: tl.constexpr = x.dtype.element_ty
    m, n = block_of(rows, columns, BLOCK_M, BLOCK_N)
    channel = tl.minimum(n, columns - 1).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    xs = x + m[None, :].to(tl.int64) * inner + k[:, None]
    at = channel[:, None] * inner + k[None, :]
    groups = channel * (inner // GROUP)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up_acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    start = tl.program_id(1) * steps * BLOCK_K
    for first in range(start, tl.minimum(start + steps * BLOCK_K, inner), BLOCK_K):
        tokens = tl.load(xs + first, mask=m[None, :] < rows, other=0)
        here, group = at + first, groups + first // GROUP
        acc = _add_group(acc, tokens, codes, scales, zeros, here, group, SCALE_WEIGHTS, DTYPE)
        if up is not None:
            up_acc = _add_group(up_acc, tokens, up, up_scales, up_zeros, here, group, SCALE_WEIGHTS, DTYPE)
    store_product(acc, up, up_acc, out, partials, counters, bias, residual, norm, m, n, rows, columns, ROW)


# Keys: the most rows that a config is for; the last also serves more. BLOCK_K is cut to the group.
_GROUPS = {
    16: Configs("linear_int8_groups_16", tile_config(16, 64, 64, 4, 4)),
    64: Configs("linear_int8_groups_64", tile_config(64, 64, 64, 8, 3)),
    128: Configs("linear_int8_groups_128", tile_config(128, 64, 64, 8, 3)),
}
# A pair has two sums for each output; with 128 rows they do not fit in registers.
_GROUPS_PAIR = {most: configs for most, configs in _GROUPS.items() if most <= 64}


def _config_of(rows: int, group: int, pair: bool, device: torch.device) -> Config:
    return within_group(config_for(_GROUPS_PAIR if pair else _GROUPS, rows, device), group)


def groups_triton(
    x: Tensor,
    weight: Packed,
    up: Packed | None,
    bias: Tensor | None,
    residual: Tensor | None,
    norm: AddNorm | None = None,
) -> Tensor:
    """The product on a GPU. norm: see `linear_norm`."""
    group = x.shape[-1] // weight.scales.shape[1]
    config, owner = _config_of(x.shape[:-1].numel(), group, up is not None, x.device), weight.codes
    return launch_product(_groups_kernel, x, weight, up, bias, residual, config, owner=owner, norm=norm, GROUP=group)


def check_int8_groups(x: Tensor, weight: Packed) -> None:
    """Raise ValueError unless x [..., in] and a weight in groups are valid for `linear_int8_groups`."""
    codes, scales, zeros = weight
    if codes.dtype != torch.int8 or codes.ndim != 2 or codes.shape[1] == 0 or not codes.is_contiguous():
        raise ValueError(f"codes must be contiguous int8 [out, in], got {codes.dtype} {tuple(codes.shape)}")
    inner = codes.shape[1]
    if not x.is_floating_point() or x.shape[-1:] != (inner,):
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; codes {tuple(codes.shape)} take [..., {inner}]")
    if zeros is not None and zeros.dtype != scales.dtype:
        raise ValueError(f"zeros must be like scales, {scales.dtype}, got {zeros.dtype}")
    check_groups(len(codes), inner, scales, zeros, GROUP_SIZES)
    check_tensors(x, (torch.int8,), codes=codes)
    check_tensors(x, FLOATING, x=x, scales=scales, zeros=zeros)


INT8_GROUPS = PackedProduct(
    "linear_int8_groups", linear_int8_groups_reference, check_int8_groups, groups_triton, zeros=True
)
INT8_GROUPS.implementation("triton", groups=any_rows)(groups_triton)
INT8_GROUPS.implementation("native", grouped_misfit, few_rows)(NativeProduct("int8_groups", grouped=True, panels=False))
INT8_GROUPS.implementation("torch")(by_tiles(unpacked))


def linear_int8_groups(x: Tensor, weight: Packed, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x W^T + bias + residual with int8 weights in groups, W[n, k] = scales[n, g] * (codes[n, k] - zeros[n, g]).

    x: [..., in] floating; weight: codes [out, in] int8, scales and zeros [out, in / group] floating, of groups of 16,
    32, 64 or 128 inputs; bias: [out]; residual: [..., out] in the dtype of x. Returns [..., out] in the dtype of x.
    Raises ValueError for shapes or dtypes that do not fit.
    """
    return INT8_GROUPS.linear(x, weight, bias, residual)


def linear_int8_groups_swiglu(x: Tensor, gate: Packed, up: Packed) -> Tensor:
    """silu(x G^T) * (x U^T), x read once; gate and up are weights of one shape and group as in `linear_int8_groups`.

    Either both have zeros or neither has. Raises ValueError otherwise.
    """
    return INT8_GROUPS.swiglu(x, gate, up)
