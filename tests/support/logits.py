"""The scores that follow a prompt, ours and the reference's."""

from typing import Any

import numpy as np
import torch

import afnext
from afnext.runtime.app.conversation import Conversation
from afnext.runtime.engine.kv_cache import KVCache
from afnext.runtime.engine.prefill import PromptEmbeddings, prefill
from afnext.runtime.engine.sampler import SamplingParams
from afnext.runtime.engine.timings import Timings

QUESTIONS = ("What is said?", "When does the music begin, and who speaks first after it?", "?")


def question(audio: np.ndarray | None, text: str) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [] if audio is None else [{"type": "audio", "audio": (audio, 16_000)}]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@torch.inference_mode()
def last_logits(model: afnext.Model, messages: list[dict[str, Any]], chunk_size: int = 1024) -> torch.Tensor:
    conversation = Conversation.load(messages, model.tokenizer, model.template, max_audio_seconds=1800, truncate=False)
    request = conversation.request(SamplingParams(max_new_tokens=1))
    network, length = model.network, len(request.token_ids)
    cache = KVCache(
        network.config.decoder, pages=length // 16 + 1, page_size=16, device=network.device, dtype=network.dtype
    )
    embeddings = PromptEmbeddings(network, request.token_ids, request.audio, encode_batch=2, timings=Timings())
    return prefill(
        network,
        cache,
        cache.allocate(length),
        embeddings,
        length,
        chunk_size=chunk_size,
        timings=Timings(),
    )


@torch.inference_mode()
def reference_logits(reference: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    cast = inputs | {"input_features": inputs["input_features"].to(reference.dtype)}
    return reference(**cast).logits[:, -1].float()
