"""The least work of each operation: the only table of FLOPs and bytes.

FLOPs: a multiply and an add are two, a transcendental is one; comparisons, conversions and sorts are none. `products`
are those of the matrix products only, as computed on matrix units.
Bytes: every distinct argument tensor is read once and every result is written once. Tensors of which a call reads or
writes only a part, such as a pool of KV pages, count that part (`Work.touched`).
So a kernel's share of the roofline falls when it moves or computes more than it must.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...kernels.conv_stem import conv_length
from ...kernels.linear_fp8 import rounds_inputs
from ...kernels.log_mel import N_FFT, frame_count
from ...kernels.packed_product import has_few_rows
from ...kernels.packed_weight import Packed
from ...kernels.rotary import Rotation
from ...kernels.rote import pooled_length

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Work:
    """flops: total; products: FLOPs in matrix products; dtype: the dtype whose peak bounds them ("int8" for int8
    products, "fp8" for those of e4m3); touched: bytes actually read or written of the named arguments, if less than
    their size; written: bytes of the returned results, and of tables that a call reads in addition to its
    arguments."""

    flops: float = 0.0
    products: float = 0.0
    dtype: str = "bfloat16"
    touched: Mapping[str, int] = field(default_factory=dict)
    written: float = 0.0

    def least_bytes(self, arguments: Arguments) -> float:
        """The bytes that a call with these arguments must move."""
        return distinct_bytes(_tensors(arguments.values()), arguments, self.touched) + self.written


def work_of(operation: str, arguments: Arguments, context: int) -> Work:
    """The work of one call of `operation`; empty for an operation that is not in the table.

    arguments: tensors by the names of the operation's reference, on any device; context: tokens in each sequence of the
    KV cache, the new ones included.
    """
    formula = _FORMULAS.get(operation)
    return formula(arguments, context) if formula else Work()


def distinct_bytes(tensors: Iterable[Tensor], arguments: Arguments, touched: Mapping[str, int]) -> int:
    """Bytes of every distinct tensor once; those that share memory with an argument in `touched` at most that many."""
    limits = {arguments[name].untyped_storage()._cdata: limit for name, limit in touched.items()}
    sizes: dict[Any, int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()._cdata
        lengths = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
        size = tensor.element_size() * torch.Size(lengths).numel()
        view = (storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        sizes[view] = min(size, limits.get(storage, size))
    return sum(sizes.values())


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Packed):
            yield from _tensors(value)
        elif hasattr(value, "__dataclass_fields__") and not isinstance(value, Rotation):
            yield from _tensors(vars(value).values())


def _attention(arguments: Arguments, context: int) -> Work:
    q, k = arguments["q"], arguments["k"]
    batch, queries, heads, head_dim = q.shape
    paged = arguments.get("page_table") is not None
    keys = context if paged else k.shape[1]
    pairs = queries * keys
    if arguments.get("causal", True):
        pairs -= queries * (queries - 1) // 2  # the last query sees all keys, the one before it one less, ...
    touched = _pool_bytes(arguments, ("k", "v", "k_scales", "v_scales"), batch * context) if paged else {}
    flops = 4 * head_dim * heads * batch * pairs
    return Work(flops, flops, _dtype(q), touched, written=_bytes(q))


def _kv_write(arguments: Arguments, context: int) -> Work:
    q, k = arguments["q"], arguments["k"]
    names = ("k_cache", "v_cache", "k_scales", "v_scales")
    touched = _pool_bytes(arguments, names, arguments["slots"].numel())
    tables = _table_bytes(arguments["rotation"])
    return Work(3 * (q.numel() + k.numel()), 0, _dtype(q), touched, written=_bytes(q) + tables)


def _rotary(arguments: Arguments, context: int) -> Work:
    x = arguments["x"]
    return Work(3 * x.numel(), 0, _dtype(x), written=_bytes(x) + _table_bytes(arguments["rotation"]))


def _table_bytes(rotation: Rotation) -> int:
    """cos and sin of every token and pair, float32."""
    return 8 * rotation.positions.numel() * rotation.frequencies.numel()


def _log_mel(arguments: Arguments, context: int) -> Work:
    (batch, samples), mel_bins = arguments["waveforms"].shape, arguments["mel_bins"]
    frames, bins = frame_count(samples, arguments["window_samples"]), N_FFT // 2 + 1
    # A real FFT of N points takes about 2.5 N log2 N FLOPs; magnitudes, the mel product and logarithms come on top.
    per_frame = 2.5 * N_FFT * math.log2(N_FFT) + 3 * bins + 2 * bins * mel_bins + 4 * mel_bins
    # The DFT as products: symmetries leave a quarter of them, and float32 is three products of tf32; see `log_mel.py`.
    products = 2 * 3 * (N_FFT * bins // 2 + bins * mel_bins)
    size = arguments.get("dtype", torch.float32).itemsize
    written = size * batch * mel_bins * frames
    return Work(batch * frames * per_frame, batch * frames * products, "float32", written=written)


def _conv_stem(arguments: Arguments, context: int) -> Work:
    mel, width = arguments["mel"], len(arguments["weight1"])
    batch, mel_bins, frames = mel.shape
    positions = conv_length(frames)
    flops = 2 * batch * (frames * 3 * mel_bins * width + positions * 3 * width * width)
    touched = {"positions": positions * width * mel.element_size()}
    return Work(flops, flops, _dtype(mel), touched, written=batch * positions * width * mel.element_size())


def _norm(flops_per_element: int, results: int) -> Callable[[Arguments, int], Work]:
    def work(arguments: Arguments, context: int) -> Work:
        x = arguments["x"]
        return Work(flops_per_element * x.numel(), 0, _dtype(x), written=results * _bytes(x))

    return work


def _activation(arguments: Arguments, context: int) -> Work:
    x = next(iter(arguments.values()))
    return Work(5 * x.numel(), 0, _dtype(x), written=_bytes(x))


def _pool_norm_rotate(arguments: Arguments, context: int) -> Work:
    x, angles = arguments["x"], arguments.get("angles")
    batch, positions, channels = x.shape
    tokens = batch * pooled_length(positions)
    pairs, touched = 0, {}
    if angles is not None:
        pairs = angles.shape[-1]
        touched = {"angles": tokens * pairs * angles.element_size()}  # of the table, its windows
    flops = tokens * (10 * channels + 6 * pairs)
    return Work(flops, 0, _dtype(x), touched, written=tokens * channels * x.element_size())


def _outputs(weight: Tensor | Packed) -> int:
    return len(weight.codes) if isinstance(weight, Packed) else len(weight)


def _linear(arguments: Arguments, context: int) -> Work:
    x = arguments["x"]
    outputs = _outputs(arguments["weight"])
    flops = 2 * x.numel() * outputs
    return Work(flops, flops, _dtype(x), written=x.numel() // x.shape[-1] * outputs * x.element_size())


def _linear_swiglu(arguments: Arguments, context: int) -> Work:
    x, outputs = arguments["x"], _outputs(arguments["gate"])
    rows = x.numel() // x.shape[-1]
    products = 4 * x.numel() * outputs
    return Work(products + 5 * rows * outputs, products, _dtype(x), written=rows * outputs * x.element_size())


def _linear_norm(arguments: Arguments, context: int) -> Work:
    x, outputs = arguments["x"], _outputs(arguments["weight"])
    sums = x.numel() // x.shape[-1] * outputs
    products = 2 * x.numel() * outputs
    return Work(products + 5 * sums, products, _dtype(x), written=2 * sums * x.element_size())


def _linear_int8_inputs(arguments: Arguments, context: int) -> Work:
    work = _linear(arguments, context)
    return work if has_few_rows(arguments["x"]) else replace(work, dtype="int8")


def _linear_int8_inputs_swiglu(arguments: Arguments, context: int) -> Work:
    work = _linear_swiglu(arguments, context)
    if has_few_rows(arguments["x"]):
        return work
    return replace(work, products=work.products / 2, dtype="int8")  # a launch for each of the pair


def _linear_fp8(arguments: Arguments, context: int) -> Work:
    work = _linear(arguments, context)
    return replace(work, dtype="fp8") if rounds_inputs(arguments["x"]) else work


def _linear_fp8_swiglu(arguments: Arguments, context: int) -> Work:
    work = _linear_swiglu(arguments, context)
    if not rounds_inputs(arguments["x"]):
        return work
    return replace(work, products=work.products / 2, dtype="fp8")  # a launch for each of the pair


def _quantize_rows(arguments: Arguments, context: int) -> Work:
    x = arguments["x"]
    return Work(2 * x.numel(), 0, _dtype(x), written=x.numel() + 4 * (x.numel() // x.shape[-1]))


def _penalize(arguments: Arguments, context: int) -> Work:
    logits = arguments["logits"]
    return Work(logits.numel(), 0, "float32", written=_bytes(logits))


def _choice(flops_per_logit: int) -> Callable[[Arguments, int], Work]:
    def work(arguments: Arguments, context: int) -> Work:
        logits = arguments["logits"]
        return Work(flops_per_logit * logits.numel(), 0, _dtype(logits), written=8 * len(logits))

    return work


def _pool_bytes(arguments: Arguments, names: tuple[str, ...], tokens: int) -> dict[str, int]:
    pools = {name: arguments[name] for name in names if arguments.get(name) is not None}
    return {name: tokens * pool.element_size() * pool.shape[2:].numel() for name, pool in pools.items()}


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


_FORMULAS: dict[str, Callable[[Arguments, int], Work]] = {
    "log_mel": _log_mel,
    "conv_stem": _conv_stem,
    "layer_norm": _norm(7, results=1),
    "add_layer_norm": _norm(8, results=2),
    "rms_norm": _norm(4, results=1),
    "add_rms_norm": _norm(5, results=2),
    "gelu": _activation,
    "swiglu": _activation,
    "pool_norm_rotate": _pool_norm_rotate,
    "rotary": _rotary,
    "kv_write": _kv_write,
    "attention": _attention,
    "decode_attention": _attention,
    "linear": _linear,
    "linear_swiglu": _linear_swiglu,
    "linear_norm": _linear_norm,
    "linear_int8": _linear,
    "linear_int8_swiglu": _linear_swiglu,
    "linear_w8a8": _linear_int8_inputs,
    "linear_w8a8_swiglu": _linear_int8_inputs_swiglu,
    "linear_fp8": _linear_fp8,
    "linear_fp8_swiglu": _linear_fp8_swiglu,
    "linear_int8_groups": _linear,
    "linear_int8_groups_swiglu": _linear_swiglu,
    "linear_int4": _linear,
    "linear_int4_swiglu": _linear_swiglu,
    "linear_w4a8": _linear_int8_inputs,
    "linear_w4a8_swiglu": _linear_int8_inputs_swiglu,
    "linear_int3": _linear,
    "linear_int3_swiglu": _linear_swiglu,
    "linear_nf4": _linear,
    "linear_nf4_swiglu": _linear_swiglu,
    "linear_nvfp4": _linear,
    "linear_nvfp4_swiglu": _linear_swiglu,
    "quantize_rows": _quantize_rows,
    "penalize": _penalize,
    "greedy": _choice(1),
    "sample": _choice(4),
}
