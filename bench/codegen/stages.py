"""The stages of a request of the full-size model, run on meta tensors by the runtime's own host code.

    encode               four 30 s windows, from waveforms to audio tokens
    prefill              a chunk of the prompt, at its start and behind 45 000 tokens
    decode               one step at 45 000 tokens, one and four sequences
    choose               the next token from the scores
    W8A16, W8A8, FP8, W4A16, W4A8, W3A16, NF4, NVFP4, MXFP4
                         the decoder's matrix products with weights of that scheme and the norms after them, at the rows
                         of decode and prefill

each that touches the KV cache with a cache in bfloat16, in int8, in fp8 and in int4.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor

from ...kernels.audio_format import WINDOW_SAMPLES
from ...kernels.linear_nf4 import BLOCK_SIZE
from ...kernels.linear_norm import PRODUCTS, linear_norm
from ...kernels.linear_nvfp4 import E8M0, MXFP4_BLOCK, NVFP4_BLOCK
from ...kernels.packed_product import FEW_ROWS
from ...kernels.packed_weight import Packed
from ...kernels.quantize_rows import E4M3
from ...kernels.sampling import SamplingRows, greedy, penalize, sample
from ...quant.linear import Linear
from ...runtime.engine.decode_graph import DecodeStep
from ...runtime.engine.kv_cache import QUANTIZED, KVCache, page_table
from ...runtime.engine.options import EngineOptions
from ...runtime.model.audio_flamingo import AudioFlamingo
from ...runtime.model.config import ModelConfig
from ...runtime.model.decoder import DecoderLayer
from ..core.random_checkpoint import byte_tokenizer, checkpoint_config

CONTEXT = 45_000
NEW_TOKENS = 4096
ROWS = (1, 4)  # sequences decoded at once
PRODUCT_ROWS = (1, 2, 4, 8, 32, 1024, 4096)
GROUP = 64  # inputs that share a scale of int4 weights, as in the scheme int4
_META = torch.device("meta")
_OPTIONS = EngineOptions()
_KV = {torch.bfloat16: "", **{dtype: f", {name} KV" for name, dtype in QUANTIZED.items()}}


@dataclass(frozen=True)
class Stage:
    """name: for display; context: tokens in each sequence of the KV cache at its end; run: runs it on meta tensors."""

    name: str
    context: int
    run: Callable[[], object]


def full_size_model(*, joined: bool = True) -> AudioFlamingo:
    """The network of the released checkpoints in bfloat16, without a byte of weights.

    joined: merge products of the same input, as on a GPU.
    """
    model = AudioFlamingo(ModelConfig.from_dict(checkpoint_config("full", byte_tokenizer()))).to(torch.bfloat16)
    if joined:
        model.decoder.join()
    return model


def stages(model: AudioFlamingo) -> Iterator[Stage]:
    """All stages, in the order of a request."""
    yield Stage(f"encode {_OPTIONS.encode_batch} windows", 0, partial(_encode, model, _OPTIONS.encode_batch))
    for dtype, suffix in _KV.items():
        for start in (0, CONTEXT):
            name, end = f"prefill {_OPTIONS.chunk_size} at {start}{suffix}", start + _OPTIONS.chunk_size
            yield Stage(name, end, partial(_prefill, model, start, end, dtype))
        for rows in ROWS:
            name = f"decode {rows} at {CONTEXT}{suffix}"
            yield Stage(name, CONTEXT + 1, partial(_decode, model, rows, dtype))
    for start in (0, CONTEXT):
        name, end = f"prefill {_OPTIONS.chunk_size} at {start}, int8 attention", start + _OPTIONS.chunk_size
        yield Stage(name, end, partial(_prefill, model, start, end, torch.int8, rounds=True))
    for rows in ROWS:
        yield Stage(f"choose {rows}", 0, partial(_choose, rows, model.config.decoder.vocab_size))
    for name, scheme in _SCHEMES.items():
        for rows in PRODUCT_ROWS:
            yield Stage(f"{name} products, {rows} rows", 0, partial(_products, model, rows, scheme))


def _encode(model: AudioFlamingo, windows: int) -> None:
    mel = model.log_mel([_float(WINDOW_SAMPLES) for _ in range(windows)])
    model.encode(mel, [WINDOW_SAMPLES] * windows, list(range(windows)))


def _prefill(model: AudioFlamingo, start: int, end: int, dtype: torch.dtype, *, rounds: bool = False) -> None:
    cache = _cache(model, 1, dtype, rounds=rounds)
    table = page_table([cache.allocate(CONTEXT + NEW_TOKENS)], _META)
    positions = torch.arange(start, end, device=_META)[None]
    hidden = model.decoder(model.decoder.embed(positions), positions, cache.view(table, positions))
    model.decoder.logits(hidden[:, -1])


def _decode(model: AudioFlamingo, rows: int, dtype: torch.dtype) -> None:
    cache = _cache(model, rows, dtype)
    pages = [cache.allocate(CONTEXT + NEW_TOKENS) for _ in range(rows)]
    step = DecodeStep(model, cache, rows=rows, width=len(pages[0]), cuda_graph=False)
    step([[0]] * rows, [CONTEXT] * rows, pages)


def _choose(rows: int, vocabulary: int) -> None:
    logits = _float(rows, vocabulary)
    penalize(logits, torch.empty(rows, vocabulary, dtype=torch.bool, device=_META), _float(rows))
    greedy(logits)
    top_k = torch.empty(rows, dtype=torch.int64, device=_META)
    sample(logits, SamplingRows(_float(rows), top_k, _float(rows), _float(rows)), _float(rows))


@dataclass(frozen=True)
class _Scheme:
    """product: the operation, a key of `PRODUCTS`; weight: a packed weight for a layer."""

    product: str
    weight: Callable[[Linear], Packed]


def _products(model: AudioFlamingo, rows: int, scheme: _Scheme) -> None:
    """All products of the decoder's forward pass over `rows` tokens, and the norms after those that write to the
    residual stream. Only the last token's scores are computed."""
    product = PRODUCTS[scheme.product]
    for layer in model.decoder.layers:
        attention, mlp = cast(DecoderLayer, layer).self_attn, cast(DecoderLayer, layer).mlp
        for linear in attention.projections:
            product.linear(_inputs(linear, rows), scheme.weight(linear), linear.bias, None)
        for linear in (attention.o_proj, mlp.down_proj):
            x, residual = (_bfloat16(rows, size) for size in reversed(linear.weight.shape))
            linear_norm(scheme.product, x, scheme.weight(linear), residual, _bfloat16(len(linear.weight)))
        product.swiglu(_inputs(mlp.gate_proj, rows), scheme.weight(mlp.gate_proj), scheme.weight(mlp.up_proj))
    if (head := model.decoder.lm_head) is not None:
        product.linear(_inputs(head, rows if rows <= FEW_ROWS else 1), scheme.weight(head), head.bias, None)


def _inputs(linear: Linear, rows: int) -> Tensor:
    return _bfloat16(rows, linear.weight.shape[1])


def _int8(linear: Linear) -> Packed:
    return Packed(torch.empty_like(linear.weight, dtype=torch.int8), _float(len(linear.weight)))


def _fp8(linear: Linear) -> Packed:
    return Packed(torch.empty_like(linear.weight, dtype=E4M3), _float(len(linear.weight)))


def _int4(linear: Linear) -> Packed:
    outputs, inputs = linear.weight.shape
    return Packed(_bytes(outputs, inputs // 2), _bfloat16(outputs, inputs // GROUP))


def _int3(linear: Linear) -> Packed:
    outputs, inputs = linear.weight.shape
    return Packed(_bytes(outputs, inputs // 8 * 3), _bfloat16(outputs, inputs // GROUP))


def _nf4(linear: Linear) -> Packed:
    outputs, inputs = linear.weight.shape
    return Packed(_bytes(outputs, inputs // 2), _float(outputs, inputs // BLOCK_SIZE))


def _nvfp4(linear: Linear) -> Packed:
    outputs, inputs = linear.weight.shape
    scales = torch.empty(outputs, inputs // NVFP4_BLOCK, dtype=E4M3, device=_META)
    return Packed(_bytes(outputs, inputs // 2), scales, _float(outputs))


def _mxfp4(linear: Linear) -> Packed:
    outputs, inputs = linear.weight.shape
    scales = torch.empty(outputs, inputs // MXFP4_BLOCK, dtype=E8M0, device=_META)
    return Packed(_bytes(outputs, inputs // 2), scales)


_SCHEMES = {
    "W8A16": _Scheme("linear_int8", _int8),
    "W8A8": _Scheme("linear_w8a8", _int8),
    "FP8": _Scheme("linear_fp8", _fp8),
    "W4A16": _Scheme("linear_int4", _int4),
    "W4A8": _Scheme("linear_w4a8", _int4),
    "W3A16": _Scheme("linear_int3", _int3),
    "NF4": _Scheme("linear_nf4", _nf4),
    "NVFP4": _Scheme("linear_nvfp4", _nvfp4),
    "MXFP4": _Scheme("linear_nvfp4", _mxfp4),
}


def _cache(model: AudioFlamingo, sequences: int, dtype: torch.dtype, *, rounds: bool = False) -> KVCache:
    pages = sequences * -(-(CONTEXT + NEW_TOKENS) // _OPTIONS.page_size)
    return KVCache(
        model.config.decoder,
        pages=pages,
        page_size=_OPTIONS.page_size,
        device=_META,
        dtype=dtype,
        rounds_attention=rounds,
    )


def _float(*shape: int) -> Tensor:
    return torch.empty(shape, device=_META)


def _bfloat16(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=_META)


def _bytes(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.uint8, device=_META)
