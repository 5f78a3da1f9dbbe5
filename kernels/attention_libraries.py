"""Attention of other libraries as a backend of `attention` and `decode_attention`: flash-attn and cuDNN.

They run where `AFNEXT_BACKEND` names them, `attention=flash_attn` or `attention=cudnn+triton`, or where
`AFNEXT_AUTOTUNE=1` times them and they are faster, and only for what they cover: bfloat16 and float16, on NVIDIA's GPUs
from compute capability 8.0 on.

flash-attn is three packages of one author. The GPU and the installed packages decide which one runs:

    flash-attn-3    `flash_attn_interface`     compute capability 9.x; pages of any size
    flash-attn-4    `flash_attn.cute`          9.x to 11.x; pages of any size
    flash-attn      `flash_attn`, from 2.6 on  8.0 and later; pages of a multiple of 256 tokens, the engine's default

For paged keys of flash-attn 2, the varlen function is called: since 2.8.4, its function for KV caches reads the longest
length on the host, which waits for the device and cannot be captured in a CUDA graph. The varlen function divides the
keys of a sequence among blocks only if one token is new.

cuDNN, through torch's `scaled_dot_product_attention`, covers dense keys: the encoder.
Source: github.com/Dao-AILab/flash-attention; torch.nn.attention.sdpa_kernel.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .device_state import TRITON_FLOOR, capability
from .dispatch import Timing
from .int4_cache import KeyBias
from .rotary import Rotation, rotary
from .row_groups import is_row_invariant

HALF = (torch.bfloat16, torch.float16)
_log = logging.getLogger("afnext.kernels")

# (q, k, v, causal, scale, key_lengths int32 or None, page_table int32 or None) -> like q
Attend = Callable[[Tensor, Tensor, Tensor, bool, float, Tensor | None, Tensor | None], Tensor]


@dataclass(frozen=True)
class Package:
    """One package. version: "unknown" if it states none; page_multiple: tokens per page must be a multiple of it;
    widest_head: largest head_dim."""

    name: str
    version: str
    attend: Attend
    page_multiple: int
    widest_head: int


def _with_version_2(module: Any) -> Attend:
    def attend(
        q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, lengths: Tensor | None, pages: Tensor | None
    ) -> Tensor:
        if lengths is None:
            return module.flash_attn_func(q, k, v, softmax_scale=scale, causal=causal)
        if pages is None:
            return module.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, softmax_scale=scale, causal=causal)
        batch, queries = q.shape[:2]
        out = module.flash_attn_varlen_func(
            q.flatten(0, 1),
            k,
            v,
            cu_seqlens_q=torch.arange(0, (batch + 1) * queries, queries, dtype=torch.int32, device=q.device),
            cu_seqlens_k=F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
            max_seqlen_q=queries,
            max_seqlen_k=pages.shape[1] * k.shape[1],
            softmax_scale=scale,
            causal=causal,
            block_table=pages,
        )
        return out.unflatten(0, (batch, queries))

    return attend


def _with_version_3(module: Any) -> Attend:
    def attend(
        q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, lengths: Tensor | None, pages: Tensor | None
    ) -> Tensor:
        return module.flash_attn_with_kvcache(
            q, k, v, cache_seqlens=lengths, page_table=pages, softmax_scale=scale, causal=causal
        )

    return attend


def _with_version_4(module: Any) -> Attend:
    def attend(
        q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, lengths: Tensor | None, pages: Tensor | None
    ) -> Tensor:
        out, _ = module.flash_attn_varlen_func(
            q,
            k,
            v,
            max_seqlen_k=None if pages is None else pages.shape[1] * k.shape[1],
            seqused_k=lengths,
            page_table=pages,
            softmax_scale=scale,
            causal=causal,
            num_splits=_splits(q),
        )
        return out

    return attend


def _splits(q: Tensor) -> int:
    """Parts of a sequence's keys for flash-attn 4: 0, so that it chooses, where it can divide them at all."""
    return 0 if _major(q.device) in (10, 11) else 1


_VERSIONS: dict[str, tuple[str, Callable[[Any], Attend], int, int]] = {
    "flash-attn 3": ("flash_attn_interface", _with_version_3, 1, 256),
    "flash-attn 4": ("flash_attn.cute", _with_version_4, 1, 128),
    "flash-attn": ("flash_attn", _with_version_2, 256, 256),
}
_BY_MAJOR = {9: ("flash-attn 3", "flash-attn 4", "flash-attn"), 10: ("flash-attn 4", "flash-attn")}
_BY_MAJOR[11] = _BY_MAJOR[10]


@cache
def _library(major: int) -> Package | None:
    """The package for GPUs of this major compute capability, or None if none that fits is installed."""
    for name in _BY_MAJOR.get(major, ("flash-attn",)):
        module, adapted, *limits = _VERSIONS[name]
        try:
            imported = import_module(module)
            package = Package(name, str(getattr(imported, "__version__", "unknown")), adapted(imported), *limits)
        except ImportError as error:
            _log.debug("%s cannot be imported: %s", name, error)
            continue
        _log.info("attention by flash_attn is that of %s", name)
        return package
    return None


@cache
def versions(device: torch.device) -> tuple[str, ...]:
    """The versions of the libraries for attention on a GPU: torch with cuDNN, and flash-attn if it is installed."""
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    library = _library(_major(device))
    return (
        f"torch {torch.__version__}",
        f"cuDNN {cudnn or 'missing'}",
        "flash-attn missing" if library is None else f"{library.name} {library.version}",
    )


def shapes(q: Tensor, k: Tensor, causal: bool, page_table: Tensor | None) -> str:
    """What the fastest library depends on. Sizes are rounded up to powers of two, so that few choices are timed."""
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1] if page_table is None else k.shape[1] * page_table.shape[1]
    kind = f"{str(q.dtype).removeprefix('torch.')}, {heads} heads of {head_dim} on {k.shape[2]}"
    sizes = f"{_power_of_two(batch)} x {_power_of_two(queries)} queries, {_power_of_two(keys)} keys"
    pages = "" if page_table is None else f" in pages of {k.shape[1]}"
    return f"{kind}, {sizes}{pages}{', causal' if causal else ''}"


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()


def half_full(q: Tensor, k: Tensor, key_lengths: Tensor | None, page_table: Tensor | None) -> Tensor | None:
    """Key lengths to time with: in pages, half of what they hold, as only the device knows how many keys there are."""
    if key_lengths is None or page_table is None:
        return key_lengths
    room = k.shape[1] * page_table.shape[1]
    return torch.full_like(key_lengths, min(room, max(q.shape[1], room // 2)))


def _major(device: torch.device) -> int:
    return (capability(device) or TRITON_FLOOR)[0]


def _misfit(q: Tensor, k: Tensor, widest_head: int) -> str | None:
    """What neither library covers, or None."""
    if q.device.type != "cuda":
        return f"tensors on {q.device.type}"
    if (capability(q.device) or TRITON_FLOOR) < TRITON_FLOOR:
        return "GPUs before compute capability 8.0"
    if q.dtype not in HALF or k.dtype != q.dtype:
        names = dict.fromkeys(str(x.dtype).removeprefix("torch.") for x in (q, k))
        return f"queries and keys in {' and '.join(names)}"
    if q.shape[3] % 8 or q.shape[3] > widest_head:
        return f"head_dim {q.shape[3]}"
    if is_row_invariant():
        return "batch_invariant, as it may divide its work by the size of the batch"
    return None


def flash_misfit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    key_lengths: Tensor | None,
    page_table: Tensor | None,
    *_: object,
) -> str | None:
    """What of these arguments of `attention` flash-attn does not cover, or None."""
    library = _library(_major(q.device)) if q.device.type == "cuda" else None
    if reason := _misfit(q, k, 256 if library is None else library.widest_head):
        return reason
    if library is None:
        return "machines without flash-attn; install it, or choose another backend"
    if page_table is not None and k.shape[1] % library.page_multiple:
        return f"pages of {k.shape[1]} tokens, as {library.name} takes multiples of {library.page_multiple}"
    return None


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    key_lengths: Tensor | None,
    page_table: Tensor | None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    rotation: Rotation | None = None,
    key_bias: KeyBias | None = None,
    rounds: bool = False,
) -> Tensor:
    """`attention` by flash-attn, where `flash_misfit` returns None."""
    library = _library(_major(q.device))
    assert library is not None
    if rotation is not None:
        q = rotary(q, rotation)
    lengths, pages = (None if x is None else x.to(torch.int32).contiguous() for x in (key_lengths, page_table))
    return library.attend(q, k, v, causal, scale, lengths, pages)


def cudnn_misfit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    key_lengths: Tensor | None,
    page_table: Tensor | None,
    *_: object,
) -> str | None:
    """What of these arguments of `attention` cuDNN does not cover, or None."""
    if page_table is not None:
        return "keys in pages"
    if causal:
        return "causal attention"
    if q.shape[2] != k.shape[2]:
        return "query heads that share keys"
    return _misfit(q, k, 128)


def cudnn_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    key_lengths: Tensor | None,
    page_table: Tensor | None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    rotation: Rotation | None = None,
    key_bias: KeyBias | None = None,
    rounds: bool = False,
) -> Tensor:
    """`attention` by cuDNN, where `cudnn_misfit` returns None. Raises RuntimeError if this build of torch lacks it."""
    if rotation is not None:
        q = rotary(q, rotation)
    mask = None
    if key_lengths is not None:  # only the device knows whether all keys exist
        mask = (torch.arange(k.shape[1], device=q.device) < key_lengths[:, None])[:, None, None, :]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


TIMING = Timing(
    lambda q, k, v, causal, scale, key_lengths, page_table, *_: shapes(q, k, causal, page_table),
    lambda q, k, v, causal, scale, key_lengths, page_table, *rest: (
        *(q, k, v, causal, scale, half_full(q, k, key_lengths, page_table), page_table, *rest),
    ),
    versions,
)
"""How the backends of `attention` are timed."""

DECODE_TIMING = Timing(
    lambda q, k, v, scale, key_lengths, page_table, *_: shapes(q, k, True, page_table),
    lambda q, k, v, scale, key_lengths, page_table, *rest: (
        *(q, k, v, scale, half_full(q, k, key_lengths, page_table), page_table, *rest),
    ),
    versions,
)
"""How the backends of `decode_attention` are timed."""
