"""Kernels are compiled once for all lengths of recordings and prompts, not for each anew."""

import random
from collections.abc import Callable, Iterable

import pytest
import torch

pytest.importorskip("triton")

from afnext.bench.codegen.trace import recorded_launches
from afnext.bench.core.random_checkpoint import byte_tokenizer, checkpoint_config
from afnext.kernels.audio_format import WINDOW_SAMPLES
from afnext.runtime.engine.kv_cache import KVCache, page_table
from afnext.runtime.model.audio_flamingo import AudioFlamingo
from afnext.runtime.model.config import ModelConfig

META = torch.device("meta")


@pytest.fixture(scope="module")
def model() -> AudioFlamingo:
    """Two layers each of the encoder and the decoder at full width, without weights."""
    config = ModelConfig.from_dict(checkpoint_config("full-width:2,2", byte_tokenizer()))
    return AudioFlamingo(config).to(META, torch.bfloat16)


def compiled(runs: Iterable[Callable[[], object]]) -> dict[str, set[str]]:
    """The specializations that runs launch, by kernel."""
    found: dict[str, set[str]] = {}
    for run in runs:
        with recorded_launches(2048) as recording, torch.inference_mode():
            run()
        for launch in recording.launches:
            found.setdefault(launch.kernel, set()).add(launch.specialization.digest)
    return found


def assert_compiled_once(runs: list[Callable[[], object]]) -> None:
    first, every = compiled(runs[:1]), compiled(runs)
    counts = {kernel: len(digests) for kernel, digests in every.items()}
    assert counts == {kernel: len(digests) for kernel, digests in first.items()}


def test_clips_of_any_length(model: AudioFlamingo, seed: int) -> None:
    def encode(samples: int) -> None:
        model.encode(model.log_mel([torch.empty(samples, device=META)]), [samples], [0])

    lengths = [WINDOW_SAMPLES, 16_000, 25_600, *random.sample(range(1600, WINDOW_SAMPLES), 47)]
    assert_compiled_once([lambda samples=samples: encode(samples) for samples in lengths])


def test_chunks_of_any_length(model: AudioFlamingo, seed: int) -> None:
    cache = KVCache(model.config.decoder, pages=20, page_size=256, device=META, dtype=torch.bfloat16)

    def prefill(start: int, tokens: int) -> None:
        positions = torch.arange(start, start + tokens, device=META)[None]
        view = cache.view(page_table([list(range(20))], META), positions)
        model.decoder(model.decoder.embed(positions), positions, view)

    # Chunks of up to 16 tokens have a tile of their own in kv_write.
    chunks = [(0, 1024), (1024, 1024), *((random.randrange(2000), random.randrange(17, 1024)) for _ in range(20))]
    assert_compiled_once([lambda chunk=chunk: prefill(*chunk) for chunk in chunks])
