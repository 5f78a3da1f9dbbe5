"""Linear layers with nf4 weights: a codebook of 16 values, one scale for each 64 neighbouring inputs of a channel
(W4A16), alone or as a SwiGLU pair.

    y[m, n] = sum_k x[m, k] * scales[n, k // 64] * LEVELS[code[n, k]] + bias[n] + residual[m, n]
    SwiGLU: y = silu(gate(x)) * up(x), two such products of one x

x: [rows, in] float16, bfloat16 or float32; codes: [out, in / 2] uint8, the even input in a byte's HIGH four bits;
scales: [out, in / 64] float32; the layout of bitsandbytes. The format serves existing weights; int4 in groups is
smaller and as exact.

The native kernels read out * in * (1/2 + 1/16) bytes once for up to 16 rows: they look up codebook values in registers,
16 or, as bfloat16, 32 at a time, and scale the sums. For more rows they unpack weights in panels where the instruction
set allows; otherwise, and in torch, weights are made dense in tiles of channels, which write and read out * in * 2
bytes more.

On GPUs the kernel is that of `linear_int4`, with the same limits and splits, but another lookup: the lanes of a warp
hold the codebook, and a shuffle fetches the value of each weight, 32 weights per cycle and multiprocessor.

Source: Dettmers et al. 2023, arXiv:2305.14314.
"""

from functools import cache

import torch
from torch import Tensor

from .arguments import FLOATING, check_tensors
from .few_rows import few_rows
from .linear_int4 import w4a16_triton
from .packed_product import AddNorm, NativeProduct, PackedProduct, add_epilogue, by_tiles, misfit
from .packed_weight import Packed
from .row_groups import any_rows

BLOCK_SIZE = 64
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@cache
def codebook(device: torch.device) -> Tensor:
    """LEVELS on a device: [16] float32."""
    return torch.tensor(LEVELS, dtype=torch.float32, device=device)


def unpacked(weight: Packed) -> Tensor:
    """The weights [out, in], in float32, or float64 if the scales are."""
    codes, scales, _ = weight
    levels = codebook(codes.device).to(scales.dtype)
    # Row b: the two values of the byte b. One lookup per byte keeps unpacking fast without a kernel.
    table = torch.stack((levels.repeat_interleave(16), levels.repeat(16)), -1)
    pairs = table.index_select(0, codes.flatten().int()).view(len(codes), scales.shape[1], BLOCK_SIZE)
    return (pairs * scales[..., None]).flatten(1)


def linear_nf4_reference(x: Tensor, weight: Packed, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """The specification of `linear_nf4`, in float64."""
    return add_epilogue(x.double() @ unpacked(weight.wide()).T, bias, residual).to(x.dtype)


def nf4_triton(
    x: Tensor,
    weight: Packed,
    up: Packed | None,
    bias: Tensor | None,
    residual: Tensor | None,
    norm: AddNorm | None = None,
) -> Tensor:
    """The product on a GPU. norm: see `linear_norm`."""
    return w4a16_triton(x, _contiguous(weight), up and _contiguous(up), bias, residual, norm, codebook(x.device))


def _contiguous(weight: Packed) -> Packed:
    return weight._replace(scales=weight.scales.contiguous())


def check_nf4(x: Tensor, weight: Packed) -> None:
    """Raise ValueError unless x [..., in] and the weight are valid for `linear_nf4`."""
    codes, scales, _ = weight
    if codes.dtype != torch.uint8 or codes.ndim != 2 or not codes.is_contiguous():
        raise ValueError(f"codes must be contiguous uint8 [out, in / 2], got {codes.dtype} {tuple(codes.shape)}")
    inner = 2 * codes.shape[1]
    if not x.is_floating_point() or x.shape[-1:] != (inner,) or inner % BLOCK_SIZE or inner == 0:
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)}; codes {tuple(codes.shape)} take [..., {inner}], a multiple of 64"
        )
    if scales.shape != (len(codes), inner // BLOCK_SIZE) or not scales.is_floating_point():
        raise ValueError(
            f"scales must be floating {(len(codes), inner // BLOCK_SIZE)}, got {scales.dtype} {tuple(scales.shape)}"
        )
    check_tensors(x, (torch.uint8,), codes=codes)
    check_tensors(x, FLOATING, x=x, scales=scales)


NF4 = PackedProduct("linear_nf4", linear_nf4_reference, check_nf4, nf4_triton)
NF4.implementation("triton", groups=any_rows)(nf4_triton)
NF4.implementation("native", misfit, few_rows)(NativeProduct("nf4", grouped=False))
NF4.implementation("torch")(by_tiles(unpacked))


def linear_nf4(x: Tensor, weight: Packed, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x W^T + bias + residual with nf4 weights, W[n, k] = scales[n, k // 64] * LEVELS[code[n, k]].

    x: [..., in] floating, in a multiple of 64; weight: codes [out, in / 2] uint8, scales [out, in / 64] float32; bias:
    [out]; residual: [..., out] in the dtype of x. Returns [..., out] in the dtype of x. Raises ValueError when shapes
    or dtypes do not fit.
    """
    return NF4.linear(x, weight, bias, residual)


def linear_nf4_swiglu(x: Tensor, gate: Packed, up: Packed) -> Tensor:
    """silu(x G^T) * (x U^T), x read once; gate and up are packed weights of one shape as in `linear_nf4`.

    Raises ValueError when shapes or dtypes do not fit.
    """
    return NF4.swiglu(x, gate, up)
