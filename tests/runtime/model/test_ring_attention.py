"""Ring attention over ranks that are threads: the scores of one process."""

import copy

import numpy as np
import pytest
import torch
from support.logits import last_logits, question
from support.ranks import thread_groups

import afnext
from afnext.runtime.app.conversation import Conversation
from afnext.runtime.engine.sampler import SamplingParams
from afnext.runtime.model.group import Group
from afnext.runtime.model.ring_attention import RingParallel, ring_attention


@pytest.fixture(scope="module")
def model() -> afnext.Model:
    return afnext.load("afnext-tiny", dtype="float32")


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_scores_are_those_of_one_process(model: afnext.Model, size: int, seed: int) -> None:
    words = np.random.default_rng(seed).choice(["hello", "beep", "who", "speaks", "green", "when"], 50 + seed % 7)
    messages = question(None, " ".join(words))
    expected = last_logits(model, messages).flatten()
    conversation = Conversation.load(messages, model.tokenizer, model.template, max_audio_seconds=1800, truncate=False)
    ids = torch.tensor([conversation.request(SamplingParams(max_new_tokens=1)).token_ids])

    @torch.inference_mode()
    def rank(group: Group) -> torch.Tensor:
        decoder = copy.deepcopy(model.network.decoder)
        x = decoder.embed_tokens(ids, torch.float32)
        return decoder.logits(RingParallel(decoder, group)(x, torch.arange(ids.shape[1])[None]))[0, -1]

    for found in thread_groups(size, rank):
        assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_that_of_torch(size: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    time, heads, kv_heads, head_dim = 7 * size, 6, 2, 16
    q, k, v = (torch.randn(time, count, head_dim, generator=generator) for count in (heads, kv_heads, kv_heads))
    q, k, v = (part.to(dtype) for part in (3 * q, k, v))
    by_head = (part.double().transpose(0, 1)[None] for part in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*by_head, is_causal=True, enable_gqa=True)[0]

    def rank(group: Group) -> torch.Tensor:
        own = (part[group.rank :: size].contiguous() for part in (q, k, v))
        return ring_attention(*own, group)

    found = torch.stack(thread_groups(size, rank), 1).flatten(0, 1).transpose(0, 1)
    bound = 1e-5 if dtype == torch.float32 else 2**-8
    assert float((found.double() - expected).abs().max()) <= bound * float(v.abs().max())
