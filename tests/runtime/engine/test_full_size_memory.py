"""Thirty minutes of audio on a card of 6.0 GB: the plan says what a full-size model takes, 45 000 tokens deep."""

from pathlib import Path

import pytest
import torch
from support.memory import allocated_at_most

from afnext.bench.core.random_checkpoint import write_random_checkpoint
from afnext.quant.recipe import recipe
from afnext.runtime.engine.kv_cache import KVCache, page_table
from afnext.runtime.engine.memory import MemoryPlan
from afnext.runtime.model.audio_flamingo import AudioFlamingo
from afnext.runtime.model.config import ModelConfig

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thirty_minutes_take_what_is_planned(tmp_path: Path) -> None:
    """Weights from a checkpoint, keys, values and every stage's workspace by torch's allocator."""
    folder = write_random_checkpoint(tmp_path, "full", quant=recipe("small"))
    plan = MemoryPlan(
        ModelConfig.from_folder(folder),
        6 * 10**9,
        gpu=True,
        dtype=torch.bfloat16,
        audio_seconds=1800,
        kv="int4",
        chunk_size=64,
        encode_batch=1,
        reserve=0,
    )
    model = AudioFlamingo.from_folder(folder, device=CPU, dtype=lambda stored: torch.bfloat16)
    parts = {part.name: part.nbytes for part in plan.parts}
    assert sum(buffer.nbytes for buffer in model.buffers()) == plan.weights

    def made() -> KVCache:
        return KVCache(model.decoder.config, pages=plan.pages, page_size=256, device=CPU, dtype=plan.kv_dtype)

    cache = made()
    assert cache.nbytes == parts["KV pages"]
    assert sum(turn.nbytes for turn in cache.key_turns or ()) == parts["key angles"]
    for pool in cache.pools:
        pool.fill_(1e-4) if pool.is_floating_point() else pool.random_()
    table = page_table([list(range(plan.pages))], CPU)

    def run(tokens: int) -> torch.Tensor:
        positions = torch.arange(plan.tokens - tokens, plan.tokens)[None]
        hidden = model.decoder(model.decoder.embed(positions % 1000), positions, cache.view(table, positions))
        return model.decoder.logits(hidden[:, -1])

    def encode() -> list[torch.Tensor]:
        return model.encode(model.log_mel([torch.zeros(480_000)]), [480_000], [59])

    assert model.encoder.time_embedding is not None
    model.encoder.time_embedding.table(60, CPU)  # a part of its own
    scores: list[torch.Tensor] = []
    measured = [
        allocated_at_most(encode),
        allocated_at_most(lambda: run(64)),
        allocated_at_most(lambda: scores.append(run(1))),
    ]
    encoding, prefilling, *_ = plan.stages.values()
    assert measured[0] <= encoding
    assert max(measured[1:]) <= prefilling
    assert torch.isfinite(scores[0]).all()
    assert plan.weights + parts["KV pages"] + parts["key angles"] + parts["RoTE table"] + max(measured) <= 5.7e9
    assert plan.fits
