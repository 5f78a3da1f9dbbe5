"""Seeded inputs of every operation for a shape: keyword arguments for the operation's public function.

The same seed, shape and dtype give the same numbers on every device. On the `meta` device tensors have no numbers.
`odd` inputs are for correctness: pages are shuffled, memory that must not be read holds NaN, page-table entries past
the end are invalid.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.conv_stem import conv_length
from ...kernels.linear_nf4 import BLOCK_SIZE
from ...kernels.linear_nvfp4 import MXFP4_BLOCK
from ...kernels.packed_weight import Packed
from ...kernels.pages import page_slots
from ...kernels.quantize_rows import E4M3
from ...kernels.rotary import Pairing, Rotation, rope_frequencies
from ...kernels.rote import TimeEmbedding, pooled_length
from ...kernels.sampling import SamplingRows

Shape = Mapping[str, int]
Arguments = dict[str, Any]

UNREAD_PAGE = 2**30  # the entry past the end of a sequence in odd page tables: reading it fails
_BLOCK = 4_000_037  # most random numbers made, then repeated: a prime, so that no two rows of a tensor are equal
_ROPE_THETA, _ROTE_THETA = 15_300_000.0, 1200.0


@dataclass(frozen=True)
class Draw:
    """Device and floating dtype of inputs, the generator, and whether they are odd."""

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator
    odd: bool = False

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal random numbers; large tensors repeat one block of them."""
        return self._made(shape, dtype or self.dtype, lambda n: torch.randn(n, generator=self.generator) * scale)

    def uniform(self, *shape: int, high: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform random numbers in [0, high)."""
        return self._made(shape, dtype, lambda n: torch.rand(n, generator=self.generator) * high)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype) -> Tensor:
        """Random integers, low to high - 1."""
        return self._made(
            shape, dtype, lambda n: torch.randint(low, high, (n,), generator=self.generator, dtype=torch.int16)
        )

    def placed(self, tensor: Tensor) -> Tensor:
        """`tensor` on the device."""
        return tensor.to(self.device)

    def filled(self, value: float, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor of one value."""
        return torch.full(shape, value, dtype=dtype, device=self.device)

    def _made(self, shape: tuple[int, ...], dtype: torch.dtype, numbers: Callable[[int], Tensor]) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        count = math.prod(shape)
        block = numbers(min(count, _BLOCK)).to(device=self.device, dtype=dtype)
        return block.repeat(-(-count // max(1, block.numel())))[:count].view(shape)


def parts_of(argument: Any) -> list[Tensor]:
    """The tensors of an argument: itself, or those of a packed weight."""
    return [part for part in (argument if isinstance(argument, Packed) else (argument,)) if isinstance(part, Tensor)]


def log_mel(s: Shape, new: Draw) -> Arguments:
    """shape: batch, samples, mel_bins."""
    waveforms = new.normal(s["batch"], s["samples"], scale=0.1, dtype=torch.float32)
    return {"waveforms": waveforms, "mel_bins": s["mel_bins"], "window_samples": s["samples"], "dtype": new.dtype}


def conv_stem(s: Shape, new: Draw) -> Arguments:
    """shape: batch, frames, mel_bins, hidden."""
    width, mel_bins = s["hidden"], s["mel_bins"]
    return {
        "mel": new.normal(s["batch"], mel_bins, s["frames"]),
        "weight1": new.normal(width, mel_bins, 3, scale=(3 * mel_bins) ** -0.5),
        "bias1": new.normal(width),
        "weight2": new.normal(width, width, 3, scale=(3 * width) ** -0.5),
        "bias2": new.normal(width),
        "positions": new.normal(conv_length(s["frames"]), width),
    }


def norm(s: Shape, new: Draw, *, centers: bool, adds: bool) -> Arguments:
    """shape: rows, channels. x is not centered, as activations are not."""
    rows, channels = s["rows"], s["channels"]
    arguments = {"x": 2 * new.normal(rows, channels) + 1}
    arguments |= {"residual": new.normal(rows, channels)} if adds else {}
    arguments |= {"weight": 1 + 0.3 * new.normal(channels)}
    return {**arguments, "bias": new.normal(channels)} if centers else arguments


def gelu(s: Shape, new: Draw) -> Arguments:
    """shape: rows, channels."""
    return {"x": 2 * new.normal(s["rows"], s["channels"])}


def swiglu(s: Shape, new: Draw) -> Arguments:
    """shape: rows, channels."""
    return {name: 2 * new.normal(s["rows"], s["channels"]) for name in ("gate", "up")}


def pool_norm_rotate(s: Shape, new: Draw) -> Arguments:
    """shape: batch, positions, channels, pairs, windows (rows of the table of angles)."""
    length = pooled_length(s["positions"])
    table = TimeEmbedding(theta=_ROTE_THETA, dim=s["pairs"], frames=length, frame_seconds=0.04)
    angles = table.angles(torch.arange(s["windows"]), length)
    indices = torch.arange(s["batch"]).flip(0) % s["windows"]
    return {
        "x": new.normal(s["batch"], s["positions"], s["channels"]),
        "weight": 1 + 0.3 * new.normal(s["channels"]),
        "bias": new.normal(s["channels"]),
        "angles": new.placed(angles),
        "windows": new.placed(indices),
    }


def _rotation(positions: Tensor, head_dim: int, pairing: Pairing, device: torch.device) -> Rotation:
    return Rotation(positions.float().to(device), rope_frequencies(head_dim, _ROPE_THETA, device), pairing)


def rotary(s: Shape, new: Draw) -> Arguments:
    """shape: tokens, heads, head_dim, interleaved (0 or 1)."""
    pairing: Pairing = "interleaved" if s["interleaved"] else "half"
    rotation = _rotation(torch.arange(s["tokens"])[None], s["head_dim"], pairing, new.device)
    return {"x": new.normal(1, s["tokens"], s["heads"], s["head_dim"]), "rotation": rotation}


def kv_write(s: Shape, new: Draw) -> Arguments:
    """shape: batch, tokens, before (tokens that are there), heads, kv_heads, head_dim, page_size, kv8 (0 or 1)."""
    batch, tokens, kv_heads, head_dim = s["batch"], s["tokens"], s["kv_heads"], s["head_dim"]
    positions = torch.arange(s["before"], s["before"] + tokens).expand(batch, -1).contiguous()
    table, pages = _page_table([s["before"] + tokens] * batch, s["page_size"], new)
    pool = (pages, s["page_size"], kv_heads, head_dim)
    dtype = torch.int8 if s["kv8"] else new.dtype
    arguments: Arguments = {
        "q": new.normal(batch, tokens, s["heads"], head_dim),
        "k": new.normal(batch, tokens, kv_heads, head_dim),
        "v": new.normal(batch, tokens, kv_heads, head_dim),
        "k_cache": new.filled(3, *pool, dtype=dtype),
        "v_cache": new.filled(3, *pool, dtype=dtype),
        "slots": new.placed(page_slots(table, positions, s["page_size"])),
        "rotation": _rotation(positions, head_dim, "half", new.device),
    }
    if s["kv8"]:
        arguments |= {name: new.filled(3, *pool[:3]) for name in ("k_scales", "v_scales")}
    return arguments


def encoder_attention(s: Shape, new: Draw) -> Arguments:
    """shape: batch, queries, heads, head_dim. The last sequence of odd inputs is a third shorter."""
    shape = (s["batch"], s["queries"], s["heads"], s["head_dim"])
    lengths = torch.full((s["batch"],), s["queries"])
    if new.odd:
        lengths[-1] -= s["queries"] // 3
    arguments = {name: new.normal(*shape) for name in ("q", "k", "v")}
    return {**arguments, "causal": False, "key_lengths": new.placed(lengths)}


def paged_attention(s: Shape, new: Draw, *, causal: bool) -> Arguments:
    """shape: batch, queries, keys, heads, kv_heads, head_dim, page_size, kv8 (0 or 1). Queries are the last ones.

    Each sequence of odd inputs has one key less than the one before it, and the pools have NaN where there is no token.
    """
    batch, kv_heads, head_dim = s["batch"], s["kv_heads"], s["head_dim"]
    lengths = [max(s["keys"] - b, s["queries"]) if new.odd else s["keys"] for b in range(batch)]
    table, pages = _page_table(lengths, s["page_size"], new)
    shape = (pages, s["page_size"], kv_heads, head_dim)
    arguments: Arguments = {"q": new.normal(batch, s["queries"], s["heads"], head_dim)}
    if s["kv8"]:
        arguments |= {name: new.integers(-127, 128, *shape, dtype=torch.int8) for name in ("k", "v")}
        arguments |= {name: new.uniform(*shape[:3], high=2 / 127) for name in ("k_scales", "v_scales")}
    else:
        arguments |= {name: new.normal(*shape) for name in ("k", "v")}
    if new.odd and new.device.type != "meta":
        free = _free_slots(table, lengths, pages, s["page_size"])
        for name in ("k_scales", "v_scales") if s["kv8"] else ("k", "v"):
            arguments[name].flatten(0, 1)[free.to(new.device)] = torch.nan
    arguments |= {"key_lengths": new.placed(torch.tensor(lengths)), "page_table": new.placed(table)}
    return {**arguments, "causal": True} if causal else arguments


def _page_table(lengths: list[int], page_size: int, new: Draw) -> tuple[Tensor, int]:
    """A page table [batch, pages] int32 on the CPU for sequences of these lengths, and the pages of the pool.

    Pages are consecutive, as for a sequence that is allocated at once; odd ones are shuffled, with some unused ones.
    """
    counts = [-(-length // page_size) for length in lengths]
    total, width = sum(counts) + 2 * new.odd, max(counts) + new.odd
    order = torch.randperm(total, generator=new.generator) if new.odd else torch.arange(total)
    table = torch.full((len(lengths), width), UNREAD_PAGE if new.odd else 0, dtype=torch.int32)
    first = 0
    for row, count in enumerate(counts):
        table[row, :count] = order[first : first + count]
        first += count
    return table, total


def _free_slots(table: Tensor, lengths: list[int], pages: int, page_size: int) -> Tensor:
    """[pages * page_size] bool: slots without a token."""
    free = torch.ones(pages * page_size, dtype=torch.bool)
    for row, length in enumerate(lengths):
        free[page_slots(table[row : row + 1], torch.arange(length)[None], page_size)[0]] = False
    return free


def linear(s: Shape, new: Draw) -> Arguments:
    """shape: rows, in_features, out_features, bias (0 or 1)."""
    arguments = {"x": new.normal(s["rows"], s["in_features"]), "weight": _dense(s, new)}
    return _with_bias(arguments, s, new)


def linear_swiglu(s: Shape, new: Draw) -> Arguments:
    """shape: rows, in_features, out_features, bias (0)."""
    return {"x": new.normal(s["rows"], s["in_features"]), "gate": _dense(s, new), "up": _dense(s, new)}


def packed_linear(s: Shape, new: Draw, *, kind: str) -> Arguments:
    """shape: as `linear`, and group for int4, int3, int8_groups and nvfp4 (16) or mxfp4
    (32). kind: a key of the table of packed weights."""
    weight = _PACKED[kind](s, new)
    return _with_bias({"x": new.normal(s["rows"], s["in_features"]), "weight": weight}, s, new)


def packed_swiglu(s: Shape, new: Draw, *, kind: str) -> Arguments:
    """shape: as `packed_linear`."""
    gate, up = _PACKED[kind](s, new), _PACKED[kind](s, new)
    return {"x": new.normal(s["rows"], s["in_features"]), "gate": gate, "up": up}


def linear_norm(s: Shape, new: Draw) -> Arguments:
    """shape: as `packed_linear` of int4."""
    weight = _int4(s, new)
    x, residual = new.normal(s["rows"], s["in_features"]), new.normal(s["rows"], s["out_features"])
    norm = 1 + 0.3 * new.normal(s["out_features"])
    return {"product": "linear_int4", "x": x, "weight": weight, "residual": residual, "norm": norm}


def _dense(s: Shape, new: Draw) -> Tensor:
    return new.normal(s["out_features"], s["in_features"], scale=s["in_features"] ** -0.5)


def _with_bias(arguments: Arguments, s: Shape, new: Draw) -> Arguments:
    return {**arguments, "bias": new.normal(s["out_features"])} if s["bias"] else arguments


def _int8(s: Shape, new: Draw) -> Packed:
    outputs, inputs = s["out_features"], s["in_features"]
    codes = new.integers(-127, 128, outputs, inputs, dtype=torch.int8)
    return Packed(codes, new.uniform(outputs, high=1 / 127 / inputs**0.5))


def _fp8(s: Shape, new: Draw) -> Packed:
    outputs, inputs = s["out_features"], s["in_features"]
    codes = new.normal(outputs, inputs, scale=150, dtype=torch.float32).clamp(-448, 448).to(E4M3)
    return Packed(codes, new.uniform(outputs, high=1 / 448 / inputs**0.5))


def _int8_groups(s: Shape, new: Draw) -> Packed:
    outputs, inputs = s["out_features"], s["in_features"]
    codes, *_ = _int8(s, new)
    return Packed(codes, new.uniform(outputs, inputs // s["group"], high=1 / 127 / inputs**0.5, dtype=torch.float16))


def _int4(s: Shape, new: Draw) -> Packed:
    outputs, inputs = s["out_features"], s["in_features"]
    codes = new.integers(0, 256, outputs, inputs // 2, dtype=torch.uint8)
    return Packed(codes, new.uniform(outputs, inputs // s["group"], high=1 / 8 / inputs**0.5, dtype=torch.bfloat16))


def _nf4(s: Shape, new: Draw) -> Packed:
    outputs, inputs = s["out_features"], s["in_features"]
    codes = new.integers(0, 256, outputs, inputs // 2, dtype=torch.uint8)
    return Packed(codes, new.uniform(outputs, inputs // BLOCK_SIZE, high=2 / inputs**0.5))


def _int3(s: Shape, new: Draw) -> Packed:
    outputs, inputs = s["out_features"], s["in_features"]
    codes = new.integers(0, 256, outputs, 3 * inputs // 8, dtype=torch.uint8)
    return Packed(codes, new.uniform(outputs, inputs // s["group"], high=1 / 8 / inputs**0.5, dtype=torch.bfloat16))


def _nvfp4(s: Shape, new: Draw) -> Packed:
    outputs, inputs, block = s["out_features"], s["in_features"], s["group"]
    codes = new.integers(0, 256, outputs, inputs // 2, dtype=torch.uint8)
    if block == MXFP4_BLOCK:
        return Packed(codes, new.integers(116, 122, outputs, inputs // block, dtype=torch.uint8))
    scales = new.uniform(outputs, inputs // block, high=448, dtype=torch.float32).to(E4M3)
    return Packed(codes, scales, new.uniform(outputs, high=1 / 1500 / inputs**0.5))


_PACKED = {
    "int8": _int8,
    "fp8": _fp8,
    "int8_groups": _int8_groups,
    "int4": _int4,
    "int3": _int3,
    "nf4": _nf4,
    "nvfp4": _nvfp4,
}


def quantize_rows(s: Shape, new: Draw) -> Arguments:
    """shape: rows, channels."""
    return {"x": new.normal(s["rows"], s["channels"])}


def _logits(s: Shape, new: Draw) -> Tensor:
    """As peaked as a language model's: a few dozen tokens have almost all of the probability, so that a draw does not
    depend on the last bit of a sum over the whole vocabulary."""
    logits = new.normal(s["batch"], s["vocab"], dtype=torch.float32)
    favoured = torch.arange(0, s["vocab"], -(-s["vocab"] // 32))
    logits[:, favoured.to(new.device)] = new.placed(20 - 0.3 * torch.arange(len(favoured), dtype=torch.float32))
    return logits


def penalize(s: Shape, new: Draw) -> Arguments:
    """shape: batch, vocab. About a thousand tokens were seen."""
    seen = torch.zeros(s["batch"], s["vocab"], dtype=torch.bool)
    seen[:, :: max(1, s["vocab"] // 1000)] = True
    return {"logits": _logits(s, new), "seen": new.placed(seen), "penalty": new.filled(1.2, s["batch"])}


def greedy(s: Shape, new: Draw) -> Arguments:
    """shape: batch, vocab."""
    return {"logits": _logits(s, new)}


def sample(s: Shape, new: Draw) -> Arguments:
    """shape: batch, vocab, top_k (0: none). Top-p 0.95 at temperature 0.8."""
    batch = s["batch"]
    counts = new.filled(s["top_k"], batch, dtype=torch.int64)
    rows = SamplingRows(new.filled(0.8, batch), counts, new.filled(0.95, batch), new.filled(0.0, batch))
    return {"logits": _logits(s, new), "rows": rows, "uniform": new.placed(torch.linspace(0.05, 0.95, batch))}
