"""Every operation of `kernels/` over the shapes of the real model, with its work counted.

Operations and bytes follow the docstrings of the kernels: bytes are the least that memory must carry (inputs read once,
outputs written once, keys and values once per call), a transcendental counts as one operation, a comparison or a sort
as none. So a kernel's share of the ceiling falls when it moves more than it must.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..kernels.activation import gelu, swiglu
from ..kernels.log_mel import N_FFT
from ..kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from . import kernel_subjects as make
from .kernel_subjects import FULL, Sizes, Subjects

TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Case:
    """One operation on one shape. label: how people would call it; flops: operations; bytes: moved at least; subjects:
    makes the inputs on a device and what to time on them, "afnext", "torch" and others."""

    operation: str
    label: str
    shape: dict[str, int]
    dtype: str
    flops: float
    bytes: float
    subjects: Callable[[torch.device], Subjects]
    tolerance: float


def cases(sizes: Sizes = FULL, dtype: torch.dtype = torch.bfloat16) -> list[Case]:
    """All cases, in the order in which the data walks through the model. dtype: of weights and activations."""
    return [
        *_encoder_cases(sizes, dtype),
        *_decoder_cases(sizes, dtype),
        *_cache_cases(sizes, dtype),
        *_sampling_cases(sizes),
    ]


def _encoder_cases(s: Sizes, dtype: torch.dtype) -> Iterator[Case]:
    width, t, size = s.encoder_width, s.positions, dtype.itemsize
    # A real FFT of N points takes about 2.5 N log2 N operations; magnitudes and the mel product come on top.
    bins = N_FFT // 2 + 1
    per_frame = 2.5 * N_FFT * math.log2(N_FFT) + 3 * bins + 2 * bins * s.mel_bins + 4 * s.mel_bins
    yield _case(
        "log_mel",
        f"window of {s.window_samples / 16_000:g} s",
        {"samples": s.window_samples, "mel_bins": s.mel_bins},
        torch.float32,
        flops=per_frame * s.frames,
        bytes=4 * (s.window_samples + s.mel_bins * s.frames),
        subjects=partial(make.log_mel_subjects, s),
    )
    taps1, taps2 = 3 * s.mel_bins * width, 3 * width * width
    yield _case(
        "conv_stem",
        f"{s.frames} frames",
        {"frames": s.frames, "mel_bins": s.mel_bins, "hidden": width},
        dtype,
        flops=2 * s.frames * taps1 + 2 * t * taps2,
        bytes=size * (s.mel_bins * s.frames + taps1 + taps2 + 2 * t * width),
        subjects=partial(make.conv_stem_subjects, s, dtype),
    )
    yield _case(
        "attention",
        f"encoder {t} x {t}",
        {"queries": t, "keys": t, "heads": s.encoder_heads, "head_dim": s.encoder_head_dim},
        dtype,
        flops=4 * width * t * t,
        bytes=4 * size * t * width,
        subjects=partial(make.encoder_attention_subjects, s, dtype),
    )
    yield _norm_case(layer_norm, "encoder", t, width, dtype)
    yield _norm_case(add_layer_norm, "encoder", t, width, dtype)
    yield _activation_case(gelu, "encoder", t, s.encoder_inner, dtype)
    rotated = 2 * s.rote_dim
    yield _case(
        "pool_norm_rotate",
        f"{t} positions",
        {"positions": t, "channels": width, "rotated": rotated},
        dtype,
        flops=t // 2 * (10 * width + 3 * rotated),
        bytes=size * (t + t // 2) * width + 4 * (t // 2) * s.rote_dim,
        subjects=partial(make.pool_norm_rotate_subjects, s, dtype),
    )
    yield _linear_case("encoder fc1", t, width, s.encoder_inner, dtype)


def _decoder_cases(s: Sizes, dtype: torch.dtype) -> Iterator[Case]:
    for rows in (1, s.chunk):
        yield _norm_case(rms_norm, "decoder", rows, s.hidden, dtype)
        yield _norm_case(add_rms_norm, "decoder", rows, s.hidden, dtype)
        yield _activation_case(swiglu, "decoder", rows, s.inner, dtype)
    for pairing in ("half", "interleaved"):
        elements = s.chunk * s.heads * s.head_dim
        yield _case(
            "rotary",
            f"{pairing}, {s.chunk} tokens",
            {"tokens": s.chunk, "heads": s.heads, "head_dim": s.head_dim},
            dtype,
            flops=3 * elements,
            bytes=2 * dtype.itemsize * elements + 4 * s.chunk * s.head_dim,
            subjects=partial(make.rotary_subjects, s, dtype, pairing),
        )
    for rows in (*s.batches, s.chunk):
        yield _linear_case("decoder gate", rows, s.hidden, s.inner, dtype)
    yield _linear_case("lm_head", 1, s.hidden, s.vocab, dtype)


def _cache_cases(s: Sizes, dtype: torch.dtype) -> Iterator[Case]:
    size, cached = dtype.itemsize, 2 * s.kv_heads * s.head_dim
    for batch, tokens in ((1, s.chunk), (max(s.batches), 1)):
        yield _case(
            "kv_write",
            f"{batch} x {tokens} tokens",
            {"batch": batch, "tokens": tokens, "heads": s.heads, "kv_heads": s.kv_heads, "head_dim": s.head_dim},
            dtype,
            flops=3 * batch * tokens * (s.heads + s.kv_heads) * s.head_dim,
            bytes=2 * size * batch * tokens * (s.heads * s.head_dim + cached),
            subjects=partial(make.kv_write_subjects, s, dtype, batch, tokens),
        )
    shape = {"heads": s.heads, "kv_heads": s.kv_heads, "head_dim": s.head_dim}
    for prefix in s.prefixes:
        keys = prefix + s.chunk
        yield _case(
            "attention",
            f"prefill {s.chunk} after {prefix}",
            {"queries": s.chunk, "keys": keys, **shape},
            dtype,
            flops=4 * s.head_dim * s.heads * (s.chunk * prefix + s.chunk * (s.chunk + 1) // 2),
            bytes=size * (2 * s.chunk * s.heads * s.head_dim + keys * cached),
            subjects=partial(make.prefill_attention_subjects, s, dtype, keys),
        )
    for context in s.contexts:
        for batch in s.batches:
            yield _case(
                "decode_attention",
                f"decode {batch} x {context}",
                {"batch": batch, "keys": context, **shape},
                dtype,
                flops=4 * s.head_dim * s.heads * batch * context,
                bytes=size * batch * (context * cached + 2 * s.heads * s.head_dim),
                subjects=partial(make.decode_attention_subjects, s, dtype, batch, context),
            )


def _sampling_cases(s: Sizes) -> Iterator[Case]:
    for batch in s.batches:
        shape, logits = {"batch": batch, "vocab": s.vocab}, batch * s.vocab
        case = partial(
            _case, label=f"{batch} x {s.vocab}", shape=shape, dtype=torch.float32, bytes=4 * logits, flops=logits
        )
        yield case("penalize", bytes=9 * logits, subjects=partial(make.penalize_subjects, s, batch))
        yield case("greedy", subjects=partial(make.greedy_subjects, s, batch))
        for top_k, label in ((0, "top-p"), (50, "top-k 50")):
            yield case(
                "sample",
                label=f"{label}, {batch} x {s.vocab}",
                shape={**shape, "top_k": top_k},
                flops=4 * logits,
                subjects=partial(make.sample_subjects, s, batch, top_k),
            )


def _case(
    operation: str,
    label: str,
    shape: dict[str, int],
    dtype: torch.dtype,
    *,
    flops: float,
    bytes: float,
    subjects: Callable[[torch.device], Subjects],
) -> Case:
    name = str(dtype).removeprefix("torch.")
    return Case(operation, label, shape, name, flops, bytes, subjects, TOLERANCES[dtype])


def _norm_case(norm: Callable[..., Any], where: str, rows: int, channels: int, dtype: torch.dtype) -> Case:
    adds = norm in (add_layer_norm, add_rms_norm)
    centers = norm in (layer_norm, add_layer_norm)
    elements = rows * channels
    return _case(
        norm.__name__,
        f"{where} {rows} x {channels}",
        {"rows": rows, "channels": channels},
        dtype,
        flops=elements * ((7 if centers else 4) + adds),
        bytes=dtype.itemsize * (elements * (4 if adds else 2) + channels * (2 if centers else 1)),
        subjects=partial(make.norm_subjects, norm, adds, centers, rows, channels, dtype),
    )


def _activation_case(function: Callable[..., Any], where: str, rows: int, channels: int, dtype: torch.dtype) -> Case:
    inputs = 2 if function is swiglu else 1
    return _case(
        function.__name__,
        f"{where} {rows} x {channels}",
        {"rows": rows, "channels": channels},
        dtype,
        flops=5 * rows * channels,
        bytes=dtype.itemsize * rows * channels * (inputs + 1),
        subjects=partial(make.activation_subjects, function, inputs, rows, channels, dtype),
    )


def _linear_case(label: str, rows: int, in_features: int, out_features: int, dtype: torch.dtype) -> Case:
    return _case(
        "linear",
        f"{label}, {rows} rows",
        {"rows": rows, "in_features": in_features, "out_features": out_features},
        dtype,
        flops=2 * rows * in_features * out_features,
        bytes=dtype.itemsize * (rows * in_features + in_features * out_features + rows * out_features),
        subjects=partial(make.linear_subjects, rows, in_features, out_features, dtype),
    )
