"""Options of the engine: memory, speed and precision."""

import math
from dataclasses import dataclass

import torch

from ...kernels.decode_attention import MAX_NEW_TOKENS
from ..errors import ConfigError
from .kv_cache import KV_STORAGE, QUANTIZED

ATTENTION = ("auto", "int8")
"""Values of `EngineOptions.attention`."""


def default_chunk_size(memory: int, gpu: bool) -> int:
    """Tokens per step on a device with `memory` bytes. GPUs with more memory also have more multiprocessors to fill: at
    full size a chunk of 1024 tokens is 224 blocks of attention, and GPUs of 40 GB and more run about 100 at once."""
    if not gpu or memory < 20 * 10**9:
        return 1024
    return 4096 if memory >= 40 * 10**9 else 2048


def encodes_ahead(wish: bool | None, memory: int, gpu: bool, ranks: int) -> bool:
    """Whether to encode ahead on a device with `memory` bytes. By default (None) on GPUs with memory to spare.

    Raises ConfigError if it is wished for a model on several devices.
    """
    if wish and ranks > 1:
        raise ConfigError("encode_ahead is for a model on one device; leave it out with tp or sp.")
    return gpu and ranks == 1 and memory >= 20 * 10**9 if wish is None else wish


@dataclass(frozen=True)
class EngineOptions:
    """Options that trade memory, speed and precision.

    page_size: tokens per KV page; chunk_size: tokens per step, prompts and answers together; encode_batch: audio
    windows encoded at once; max_batch: requests in progress at once, further ones wait; cuda_graphs: record a
    decode step once and repeat it, on a GPU as one CUDA graph, on a CPU as a list of native calls. None of these
    changes an answer.
    max_kv_tokens: largest size of the cache in tokens, None for as many as requests need. release_encoder: on a GPU,
    keep the encoder's layers in host memory and copy each to the GPU when it is used. encode_ahead: on a GPU that
    holds the whole model, encode the audio of the next chunk while the decoder computes a chunk, which needs the
    working memory of both at once.
    prefix_cache_bytes: size limit of the prefix cache, within max_kv_tokens; encoder_cache_bytes: size limit of the
    cache of encoder outputs, in host memory. 0 for none.
    draft_tokens: most speculative tokens that a step verifies per answer, 0 to 7; see `speculation.py`.
    batch_invariant: give each request the same tokens and scores, bit for bit, as if it ran alone; see docs/python.md
    for what that covers and costs. kv: format of keys and values, "auto" (the model's dtype), "int8", "fp8" or "int4":
    half, half or a quarter of the memory of 16 bits, and rounded. attention: how prompts attend, "auto" (in the model's
    dtype) or, with kv "int8", "int8": faster, and rounded; see docs/long-audio.md.
    Raises ValueError for values out of range.
    """

    page_size: int = 256
    chunk_size: int = 1024
    encode_batch: int = 4
    max_batch: int = 32
    cuda_graphs: bool = True
    draft_tokens: int = 4
    batch_invariant: bool = False
    kv: str = "auto"
    attention: str = "auto"
    max_kv_tokens: int | None = None
    release_encoder: bool = False
    encode_ahead: bool = False
    prefix_cache_bytes: int = 1 << 30
    encoder_cache_bytes: int = 1 << 28

    def __post_init__(self) -> None:
        for name in ("page_size", "chunk_size", "encode_batch", "max_batch", "max_kv_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.draft_tokens < MAX_NEW_TOKENS:
            raise ValueError(f"draft_tokens must be 0 to {MAX_NEW_TOKENS - 1}, got {self.draft_tokens}")
        for name in ("prefix_cache_bytes", "encoder_cache_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.kv not in KV_STORAGE:
            raise ValueError(f"kv must be one of {', '.join(KV_STORAGE)}, got {self.kv!r}")
        if self.attention not in ATTENTION:
            raise ValueError(f"attention must be one of {', '.join(ATTENTION)}, got {self.attention!r}")
        if self.attention == "int8" and self.kv != "int8":
            raise ValueError(f'attention="int8" reads keys and values in int8: use kv="int8", not kv="{self.kv}"')

    @property
    def windows_at_once(self) -> int:
        """Audio windows encoded at once: 1 with batch_invariant, as caching makes batches depend on other requests."""
        return 1 if self.batch_invariant else self.encode_batch

    @property
    def page_multiple(self) -> int:
        """The prefix cache shares multiples of this many pages: with batch_invariant, those of whole chunks."""
        return self.chunk_size // math.gcd(self.chunk_size, self.page_size) if self.batch_invariant else 1

    def cache_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The dtype of the KV cache of a model that computes in `model_dtype`."""
        return QUANTIZED.get(self.kv, model_dtype)
