"""What is timed for each case: inputs of the right shape, our operation on them, and its rivals on the same numbers.

Each function makes the inputs on a device and returns the subjects by name: "afnext", `BASELINE`, and the libraries
that can be imported. Everything that a model makes once, tables of angles and the layout of caches, is made here and
not timed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from ..kernels.attention import attention, visible_keys
from ..kernels.conv_stem import conv_length, conv_stem
from ..kernels.decode_attention import decode_attention
from ..kernels.kv_write import kv_write
from ..kernels.log_mel import HOP_LENGTH, N_FFT, log_mel, mel_filters
from ..kernels.pages import page_slots
from ..kernels.rotary import Pairing, Rotation, rope_frequencies, rotary
from ..kernels.rote import TimeEmbedding, pool_norm_rotate
from ..kernels.sampling import SamplingRows, greedy, penalize, sample
from ..quant.linear import Linear
from . import baselines

BASELINE = "torch"
_BLOCK = 4_000_037  # random numbers made at most, then repeated: a prime, so that no two rows of a tensor are alike
_ROPE_THETA, _ROTE_THETA = 15_300_000.0, 1200.0


@dataclass(frozen=True)
class Sizes:
    """The model's sizes; the defaults are Audio Flamingo Next's. prefixes: tokens before a prefill chunk; contexts:
    tokens in the cache of each row that decodes."""

    window_samples: int = 480_000
    mel_bins: int = 128
    encoder_heads: int = 20
    encoder_head_dim: int = 64
    encoder_inner: int = 5120
    rote_dim: int = 256
    hidden: int = 3584
    heads: int = 28
    kv_heads: int = 4
    head_dim: int = 128
    inner: int = 18_944
    vocab: int = 151_672
    page_size: int = 256
    chunk: int = 1024
    prefixes: tuple[int, ...] = (0, 16_384, 45_000)
    batches: tuple[int, ...] = (1, 8)
    contexts: tuple[int, ...] = (512, 8192, 45_000)

    @property
    def frames(self) -> int:
        """Mel frames of a window."""
        return self.window_samples // HOP_LENGTH

    @property
    def positions(self) -> int:
        """Encoder positions of a window."""
        return conv_length(self.frames)

    @property
    def encoder_width(self) -> int:
        """Channels of the encoder."""
        return self.encoder_heads * self.encoder_head_dim


FULL = Sizes()
QUICK = Sizes(
    window_samples=19_200,
    mel_bins=16,
    encoder_heads=2,
    encoder_head_dim=16,
    encoder_inner=64,
    rote_dim=8,
    hidden=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    inner=96,
    vocab=512,
    page_size=16,
    chunk=32,
    prefixes=(0, 48),
    batches=(1, 2),
    contexts=(40,),
)


@dataclass(frozen=True)
class Subject:
    """One way to do it. output: what to compare of what the call returned, where that is not all."""

    call: Callable[[], Any]
    output: Callable[[Any], Any] = lambda returned: returned


Subjects = dict[str, Subject]


def _normal(device: torch.device, dtype: torch.dtype, *shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Normal random numbers, the same for the same seed and shape; big tensors repeat one block of them."""
    count = math.prod(shape)
    generator = torch.Generator().manual_seed(seed + count)
    block = (torch.randn(min(count, _BLOCK), generator=generator) * scale).to(device=device, dtype=dtype)
    return block.repeat(-(-count // block.numel()))[:count].view(shape)


def _pair(ours: Callable[[], Any], torchs: Callable[[], Any]) -> Subjects:
    return {"afnext": Subject(ours), BASELINE: Subject(torchs)}


def log_mel_subjects(s: Sizes, device: torch.device) -> Subjects:
    """Features of one full window."""
    waveforms = _normal(device, torch.float32, 1, s.window_samples, scale=0.1)
    filters, hann = mel_filters(s.mel_bins, device, torch.float32), torch.hann_window(N_FFT, device=device)
    return _pair(
        lambda: log_mel(waveforms, mel_bins=s.mel_bins, window_samples=s.window_samples),
        lambda: baselines.log_mel(waveforms, filters, hann, s.window_samples),
    )


def conv_stem_subjects(s: Sizes, dtype: torch.dtype, device: torch.device) -> Subjects:
    """The convolution stem on one full window."""
    width = s.encoder_width
    new = partial(_normal, device, dtype)
    arguments = (
        new(1, s.mel_bins, s.frames),
        *(new(width, s.mel_bins, 3, scale=(3 * s.mel_bins) ** -0.5), new(width)),
        *(new(width, width, 3, scale=(3 * width) ** -0.5), new(width)),
        new(s.positions, width),
    )
    return _pair(lambda: conv_stem(*arguments), lambda: baselines.conv_stem(*arguments))


def encoder_attention_subjects(s: Sizes, dtype: torch.dtype, device: torch.device) -> Subjects:
    """Bidirectional attention within one full window."""
    shape = (1, s.positions, s.encoder_heads, s.encoder_head_dim)
    q, k, v = (_normal(device, dtype, *shape, seed=seed) for seed in range(3))
    lengths = torch.tensor([s.positions], device=device)
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    subjects = _pair(lambda: attention(q, k, v, key_lengths=lengths), lambda: baselines.sdpa(q, keys, values))
    return subjects | _flash_subject(device, "flash_attention", q, k, v, causal=False)


def norm_subjects(
    norm: Callable[..., Any],
    adds: bool,
    centers: bool,
    rows: int,
    channels: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Subjects:
    """One of the four norms: with `adds` after adding to the residual stream, with `centers` a LayerNorm."""
    x, residual = (_normal(device, dtype, rows, channels, seed=seed) for seed in range(2))
    weight, bias = (_normal(device, dtype, channels, seed=seed) for seed in range(2))
    parameters = (weight, bias) if centers else (weight,)

    def torch_norm(values: Tensor) -> Tensor:
        if centers:
            return F.layer_norm(values, weight.shape, weight, bias, 1e-5)
        return F.rms_norm(values, weight.shape, weight, 1e-6)

    def torch_add_norm() -> tuple[Tensor, Tensor]:
        hidden = residual + x
        return torch_norm(hidden), hidden

    if adds:
        return _pair(lambda: norm(x, residual, *parameters), torch_add_norm)
    return _pair(lambda: norm(x, *parameters), lambda: torch_norm(x))


def activation_subjects(
    function: Callable[..., Any], inputs: int, rows: int, channels: int, dtype: torch.dtype, device: torch.device
) -> Subjects:
    """GELU of one input, or SwiGLU of two."""
    x = [_normal(device, dtype, rows, channels, seed=seed) for seed in range(inputs)]
    return _pair(lambda: function(*x), lambda: F.gelu(x[0]) if inputs == 1 else F.silu(x[0]) * x[1])


def pool_norm_rotate_subjects(s: Sizes, dtype: torch.dtype, device: torch.device) -> Subjects:
    """What follows the encoder's layers, on one full window."""
    x = _normal(device, dtype, 1, s.positions, s.encoder_width)
    weight, bias = (_normal(device, dtype, s.encoder_width, seed=seed) for seed in range(2))
    embedding = TimeEmbedding(theta=_ROTE_THETA, dim=s.rote_dim, frames=s.positions // 2, frame_seconds=0.04)
    angles = embedding.angles(torch.tensor([3], device=device), s.positions // 2)
    cos, sin = (turn(angles.double()).repeat_interleave(2, -1) for turn in (torch.cos, torch.sin))
    return _pair(
        lambda: pool_norm_rotate(x, weight, bias, angles=angles),
        lambda: baselines.pool_norm_rotate(x, weight, bias, cos, sin),
    )


def _rotation(
    s: Sizes, positions: Tensor, pairing: Pairing, dtype: torch.dtype
) -> tuple[Rotation, tuple[Tensor, Tensor]]:
    """The rotation, with its angles' cos and sin made as they are once for all layers; and what the baseline takes."""
    rotation = Rotation(positions.float(), rope_frequencies(s.head_dim, _ROPE_THETA, positions.device), pairing)
    cos, sin = rotation.cos_sin
    if pairing == "half":
        return rotation, (torch.cat((cos, cos), -1).to(dtype), torch.cat((sin, sin), -1).to(dtype))
    return rotation, (cos.repeat_interleave(2, -1).to(dtype), sin.repeat_interleave(2, -1).to(dtype))


def rotary_subjects(s: Sizes, dtype: torch.dtype, pairing: Pairing, device: torch.device) -> Subjects:
    """Rotation of the queries of one prefill chunk."""
    x = _normal(device, dtype, 1, s.chunk, s.heads, s.head_dim)
    rotation, tables = _rotation(s, torch.arange(s.chunk, device=device)[None], pairing, dtype)
    rotate = baselines.rotate_half if pairing == "half" else baselines.rotate_pairs
    return _pair(lambda: rotary(x, rotation), lambda: rotate(x, *tables))


def kv_write_subjects(s: Sizes, dtype: torch.dtype, batch: int, tokens: int, device: torch.device) -> Subjects:
    """Rotation of queries and keys, and the write into the cache, of `tokens` new tokens of `batch` rows."""
    q = _normal(device, dtype, batch, tokens, s.heads, s.head_dim)
    k, v = (_normal(device, dtype, batch, tokens, s.kv_heads, s.head_dim, seed=seed) for seed in range(2))
    pages = -(-tokens // s.page_size)
    positions = torch.arange(tokens, device=device).expand(batch, tokens).contiguous()
    table = torch.arange(batch * pages, dtype=torch.int32, device=device).view(batch, pages)
    slots = page_slots(table, positions, s.page_size)
    rotation, tables = _rotation(s, positions, "half", dtype)
    pools = [torch.zeros(batch * pages, s.page_size, s.kv_heads, s.head_dim, dtype=dtype, device=device) for _ in "kv"]
    static = [torch.zeros(batch, s.kv_heads, pages * s.page_size, s.head_dim, dtype=dtype, device=device) for _ in "kv"]

    def torch_kv_write() -> Tensor:
        static[0].index_copy_(2, positions[0], baselines.rotate_half(k, *tables).transpose(1, 2))
        static[1].index_copy_(2, positions[0], v.transpose(1, 2))
        return baselines.rotate_half(q, *tables)

    return {
        "afnext": Subject(
            lambda: kv_write(q, k, v, k_cache=pools[0], v_cache=pools[1], slots=slots, rotation=rotation),
            lambda rotated: (rotated, *(pool.flatten(0, 1)[slots] for pool in pools)),
        ),
        BASELINE: Subject(
            torch_kv_write, lambda rotated: (rotated, *(cache[:, :, :tokens].transpose(1, 2) for cache in static))
        ),
    }


def _cache(s: Sizes, dtype: torch.dtype, batch: int, keys: int, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Pools of keys and values with `keys` tokens a row in pages one after another, and the page table."""
    pages = -(-keys // s.page_size)
    shape = (batch * pages, s.page_size, s.kv_heads, s.head_dim)
    pools = [_normal(device, dtype, *shape, seed=seed) for seed in range(2)]
    return pools, torch.arange(batch * pages, dtype=torch.int32, device=device).view(batch, pages)


def _dense(pool: Tensor, batch: int, keys: int) -> Tensor:
    """What `_cache` put into a pool as [batch, keys, kv_heads, head_dim], a view."""
    return pool.view(batch, -1, *pool.shape[2:])[:, :keys]


def prefill_attention_subjects(s: Sizes, dtype: torch.dtype, keys: int, device: torch.device) -> Subjects:
    """Causal attention of the last chunk of `keys` tokens."""
    q = _normal(device, dtype, 1, s.chunk, s.heads, s.head_dim, seed=2)
    pools, table = _cache(s, dtype, 1, keys, device)
    lengths = torch.tensor([keys], device=device)
    dense = [_dense(pool, 1, keys) for pool in pools]
    static_keys, static_values = (x.transpose(1, 2).contiguous() for x in dense)
    mask = visible_keys(s.chunk, keys, True, device)
    subjects = _pair(
        lambda: attention(q, *pools, causal=True, key_lengths=lengths, page_table=table),
        lambda: baselines.sdpa(q, static_keys, static_values, mask),
    )
    if device.type == "cuda":
        bias = causal_lower_right(s.chunk, keys)
        subjects["torch-causal-bias"] = Subject(lambda: baselines.sdpa(q, static_keys, static_values, bias))
    return subjects | _flash_subject(device, "flash_attention", q, *dense, causal=True)


def decode_attention_subjects(s: Sizes, dtype: torch.dtype, batch: int, context: int, device: torch.device) -> Subjects:
    """Attention of one new token a row over `context` tokens of each of `batch` rows."""
    q = _normal(device, dtype, batch, 1, s.heads, s.head_dim, seed=2)
    pools, table = _cache(s, dtype, batch, context, device)
    lengths = torch.full((batch,), context, device=device)
    dense = [_dense(pool, batch, context) for pool in pools]
    static_keys, static_values = (x.transpose(1, 2).contiguous() for x in dense)
    subjects = _pair(
        lambda: decode_attention(q, *pools, key_lengths=lengths, page_table=table),
        lambda: baselines.sdpa(q, static_keys, static_values),
    )
    return subjects | _flash_subject(device, "flash_decoding", q, *dense)


def _flash_subject(device: torch.device, function: str, *tensors: Tensor, **options: bool) -> Subjects:
    if device.type != "cuda" or tensors[0].dtype == torch.float32 or not baselines.available("flash_attn"):
        return {}
    return {"flash-attn": Subject(getattr(baselines, function)(*tensors, **options))}


def linear_subjects(
    rows: int, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device
) -> Subjects:
    """x W^T, dense, and bitsandbytes' quantized versions of the weight, which do not claim to agree."""
    x = _normal(device, dtype, rows, in_features)
    weight = _normal(device, dtype, out_features, in_features, scale=in_features**-0.5)
    linear = Linear(in_features, out_features, bias=False)
    linear.weight = weight
    subjects = _pair(lambda: linear(x), lambda: F.linear(x, weight))
    if device.type == "cuda" and baselines.available("bitsandbytes"):
        rivals = baselines.bitsandbytes_linears(x, weight)
        subjects |= {name: Subject(call) for name, call in rivals.items()}
    return subjects


def _logits(s: Sizes, batch: int, device: torch.device) -> Tensor:
    """As peaked as a language model's: a few dozen tokens hold almost all of the probability, so that a draw among them
    does not hang on the last bit of a sum over the whole vocabulary."""
    logits = _normal(device, torch.float32, batch, s.vocab)
    favoured = torch.arange(0, s.vocab, -(-s.vocab // 32), device=device)
    logits[:, favoured] = 20 - 0.3 * torch.arange(len(favoured), device=device, dtype=torch.float32)
    return logits


def penalize_subjects(s: Sizes, batch: int, device: torch.device) -> Subjects:
    """Repetition penalty on about a thousand tokens seen."""
    logits, penalty = _logits(s, batch, device), torch.full((batch,), 1.2, device=device)
    ids = torch.arange(0, s.vocab, max(1, s.vocab // 1000), device=device).expand(batch, -1).contiguous()
    seen = torch.zeros(batch, s.vocab, dtype=torch.bool, device=device).scatter_(1, ids, True)
    return _pair(lambda: penalize(logits, seen, penalty), lambda: baselines.repetition_penalty(logits, ids, penalty))


def greedy_subjects(s: Sizes, batch: int, device: torch.device) -> Subjects:
    """The most likely token."""
    logits = _logits(s, batch, device)
    return _pair(lambda: greedy(logits), lambda: logits.max(-1).indices)


def sample_subjects(s: Sizes, batch: int, top_k: int, device: torch.device) -> Subjects:
    """A draw with top-p, behind top-k unless that is 0."""
    logits = _logits(s, batch, device)
    temperature, top_p = torch.full((batch,), 0.8, device=device), torch.full((batch,), 0.95, device=device)
    uniform = torch.linspace(0.05, 0.95, batch, device=device)
    counts = torch.full((batch,), top_k, device=device)
    rows = SamplingRows(temperature, counts, top_p, min_p=torch.zeros(batch, device=device))
    if top_k:
        rival = partial(baselines.draw_top_k, logits, temperature, top_k, top_p, uniform)
    else:
        rival = partial(baselines.draw_nucleus, logits, temperature, top_p, uniform)
    return _pair(lambda: sample(logits, rows, uniform), rival)
