"""How much work an operation must do at least: the formulas behind projected times, all in this place.

Bytes: a kernel must move every distinct tensor that it is given once. Tensors of which a call reads or writes only a
part, such as a pool of KV pages, count that part (`Work.touched`).
Operations: a multiply and an add of a matrix product are two. Elementwise arithmetic is not counted, since these
kernels' elementwise parts are bound by memory.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..kernels.log_mel import N_FFT, frame_count

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Work:
    """operations: in matrix products; dtype: whose peak bounds them (a key of `Gpu.peaks`); touched: bytes really read
    or written of the arguments named, where that can be less than their size."""

    operations: float = 0.0
    dtype: str = "bfloat16"
    touched: Mapping[str, int] = field(default_factory=dict)


def work_of(operation: str, arguments: Arguments, context: int) -> Work:
    """The work of one call of `operation`.

    arguments: by the names of its reference; context: tokens in each sequence of the KV cache, the new ones included.
    """
    formula = _FORMULAS.get(operation)
    return formula(arguments, context) if formula else Work()


def _attention(arguments: Arguments, context: int) -> Work:
    q, k = arguments["q"], arguments["k"]
    batch, queries, heads, head_dim = q.shape
    paged = arguments.get("page_table") is not None
    keys = context if paged else k.shape[1]
    pairs = queries * keys
    if arguments.get("causal", True):
        pairs -= queries * (queries - 1) // 2  # the last query sees all keys, the one before it one less, ...
    touched = _pool_bytes(arguments, ("k", "v", "k_scales", "v_scales"), batch * context) if paged else {}
    return Work(4 * head_dim * heads * batch * pairs, _dtype(q), touched)


def _kv_write(arguments: Arguments, context: int) -> Work:
    names = ("k_cache", "v_cache", "k_scales", "v_scales")
    return Work(touched=_pool_bytes(arguments, names, arguments["slots"].numel()))


def _log_mel(arguments: Arguments, context: int) -> Work:
    batch, samples = arguments["waveforms"].shape
    frames, bins = frame_count(samples, arguments["window_samples"]), N_FFT // 2 + 1
    # Symmetries leave a quarter of the DFT's products, and float32 is three products of tf32; see `log_mel.py`.
    per_frame = N_FFT * bins // 2 + bins * arguments["mel_bins"]
    return Work(2 * 3 * batch * frames * per_frame, "tf32")


def _pool_norm_rotate(arguments: Arguments, context: int) -> Work:
    x, angles = arguments["x"], arguments.get("angles")
    if angles is None or len(angles) <= len(x):
        return Work()
    return Work(touched={"angles": len(x) * angles[0].numel() * angles.element_size()})  # of the table, its windows


def _linear(arguments: Arguments, context: int) -> Work:
    x = arguments["x"]
    weight = next(arguments[name] for name in ("packed", "codes", "weight") if name in arguments)
    return Work(2 * x.numel() * len(weight), _dtype(x))


def _linear_swiglu(arguments: Arguments, context: int) -> Work:
    x = arguments["x"]
    return Work(2 * x.numel() * (len(arguments["gate"]) + len(arguments["up"])), _dtype(x))


def _linear_w8a8(arguments: Arguments, context: int) -> Work:
    return replace(_linear(arguments, context), dtype="int8")


def _pool_bytes(arguments: Arguments, names: tuple[str, ...], tokens: int) -> dict[str, int]:
    pools = {name: arguments[name] for name in names if arguments.get(name) is not None}
    return {name: tokens * pool.element_size() * pool.shape[2:].numel() for name, pool in pools.items()}


def _dtype(tensor: Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    return "tf32" if name == "float32" else name


_FORMULAS: dict[str, Callable[[Arguments, int], Work]] = {
    "log_mel": _log_mel,
    "attention": _attention,
    "decode_attention": _attention,
    "kv_write": _kv_write,
    "pool_norm_rotate": _pool_norm_rotate,
    "linear_int8": _linear,
    "linear_int8_swiglu": _linear_swiglu,
    "linear_w8a8": _linear_w8a8,
    "linear_int4": _linear,
    "linear_int4_swiglu": _linear_swiglu,
    "linear_w4a8": _linear_w8a8,
    "linear_nf4": _linear,
    "linear_nf4_swiglu": _linear_swiglu,
}
