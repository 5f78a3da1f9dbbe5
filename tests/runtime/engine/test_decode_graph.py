"""The decode step through static buffers, and recorded in a CUDA graph, against plain calls of the decoder."""

import logging

import pytest
import torch
from torch import Tensor

from afnext import kernels
from afnext.bench.core.random_checkpoint import write_random_checkpoint
from afnext.runtime.engine import decode_graph, graphs
from afnext.runtime.engine.decode_graph import DecodeStep
from afnext.runtime.engine.graphs import capturable
from afnext.runtime.engine.kv_cache import QUANTIZED, KVCache, page_table, pages_for
from afnext.runtime.model.audio_flamingo import AudioFlamingo

PAGE_SIZE = 16
LENGTHS = [15, 1, 37]  # tokens in the cache before the first step: the first sequence enters its next page at once
STEPS = 5
WIDTH = 4  # pages of the longest sequence that a step is made for


@pytest.fixture
def model(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> AudioFlamingo:
    folder = write_random_checkpoint(tmp_path_factory.mktemp("random"))
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return AudioFlamingo.from_folder(folder, device=device, dtype=lambda stored: dtype)


def filled_cache(model: AudioFlamingo, dtype: torch.dtype) -> tuple[KVCache, list[list[int]]]:
    """A cache with random tokens of LENGTHS, and room for STEPS more each."""
    budget = [length + STEPS for length in LENGTHS]
    pages = sum(pages_for(tokens, PAGE_SIZE) for tokens in budget)
    cache = KVCache(model.config.decoder, pages=pages, page_size=PAGE_SIZE, device=model.device, dtype=dtype)
    for pool in cache.pools:
        pool.copy_(torch.rand(pool.shape) / 64 if pool.is_floating_point() else torch.randint(0, 128, pool.shape))
    return cache, [cache.allocate(tokens) for tokens in budget]


def eager(model: AudioFlamingo, cache: KVCache, pages: list[list[int]], tokens: Tensor) -> Tensor:
    """Scores of all steps by plain calls, every input made anew: [steps, batch, vocab]."""
    decoder, rows = model.decoder, []
    for step, newest in enumerate(tokens):
        positions = torch.tensor(LENGTHS, device=model.device)[:, None] + step
        view = cache.view(page_table(pages, model.device), positions)
        hidden = decoder(decoder.embed(newest[:, None].to(model.device)), positions, view)
        rows.append(decoder.logits(hidden[:, -1]))
    return torch.stack(rows)


def copies(cache: KVCache) -> list[Tensor]:
    return [pool.clone() for pool in cache.pools]


@pytest.mark.parametrize("kv", ["dense", "int8", "fp8", "int4"])
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.gpu)])
@torch.inference_mode()
def test_step_equals_plain_calls(backend: str, kv: str, model: AudioFlamingo, seed: int) -> None:
    """On the CPU through the buffers alone; on a GPU recorded from the second step on."""
    cache, pages = filled_cache(model, QUANTIZED.get(kv, model.dtype))
    before = copies(cache)
    tokens = torch.randint(0, 256, (STEPS, len(LENGTHS)))
    with kernels.backend(backend):
        expected, written = eager(model, cache, pages, tokens), copies(cache)
        for pool, earlier in zip(cache.pools, before, strict=True):
            pool.copy_(earlier)
        step = DecodeStep(model, cache, rows=len(LENGTHS), width=WIDTH, cuda_graph=True)
        actual = torch.stack(
            [
                step(newest[:, None].tolist(), [n + i for n in LENGTHS], pages)[:, 0].clone()
                for i, newest in enumerate(tokens)
            ]
        )
        assert (step.recorded) == (backend == "triton")
    assert torch.equal(actual, expected)
    assert all(torch.equal(*pair) for pair in zip(copies(cache), written, strict=True))


@torch.inference_mode()
def test_one_step_serves_whatever_sequences_come(model: AudioFlamingo, seed: int) -> None:
    """What a recorded step reads is where it was when it was recorded, whose tokens and pages it may be."""
    cache, pages = filled_cache(model, model.dtype)
    before = copies(cache)
    step = DecodeStep(model, cache, rows=len(LENGTHS), width=WIDTH, cuda_graph=False)
    buffers = [step._inputs, step._table, model.decoder.frequencies, *cache.pools]
    addresses = [buffer.data_ptr() for buffer in buffers]
    forwards = step([[1], [2], [3]], LENGTHS, pages).clone()
    for pool, earlier in zip(cache.pools, before, strict=True):
        pool.copy_(earlier)
    backwards = step([[3], [2], [1]], LENGTHS[::-1], pages[::-1])
    torch.testing.assert_close(backwards.flip(0), forwards, rtol=1e-4, atol=1e-4)
    after = [step._inputs, step._table, model.decoder.frequencies, *cache.pools]
    assert [buffer.data_ptr() for buffer in after] == addresses


@pytest.mark.gpu
@torch.inference_mode()
def test_graphs_can_be_switched_off_and_say_when_they_are_on(
    model: AudioFlamingo, caplog: pytest.LogCaptureFixture
) -> None:
    cache, pages = filled_cache(model, model.dtype)
    for cuda_graph in (False, True):
        with caplog.at_level(logging.INFO, "afnext.engine"):
            step = DecodeStep(model, cache, rows=3, width=WIDTH, cuda_graph=cuda_graph)
            for _ in range(3):
                step([[1], [2], [3]], LENGTHS, pages)
        assert [record.message for record in caplog.records] == [
            "decoding 3 sequences a step in a CUDA graph"
        ] * cuda_graph


@pytest.mark.gpu
@torch.inference_mode()
def test_a_step_waits_for_nothing(model: AudioFlamingo) -> None:
    cache, pages = filled_cache(model, model.dtype)
    step = DecodeStep(model, cache, rows=3, width=WIDTH, cuda_graph=False)
    step([[1], [2], [3]], LENGTHS, pages)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step([[3], [2], [1]], LENGTHS[::-1], pages[::-1])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_only_triton_on_a_gpu_is_recorded() -> None:
    assert not capturable(torch.device("cpu"))
    with kernels.backend("torch"):
        assert not capturable(torch.device("cuda"))
    with kernels.backend("triton"):
        assert capturable(torch.device("cuda"))


@torch.inference_mode()
def test_a_failed_capture_leaves_eager_steps_and_is_tried_again(
    model: AudioFlamingo, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache, pages = filled_cache(model, model.dtype)
    tokens = torch.randint(0, 256, (STEPS, len(LENGTHS)))
    expected = eager(model, cache, pages, tokens)
    attempts: list[int] = []

    def failing(run: object, device: torch.device, memory: object) -> None:
        attempts.append(at)
        raise torch.OutOfMemoryError("no memory for the graph")

    monkeypatch.setattr(graphs, "captured", failing)
    monkeypatch.setattr(decode_graph, "capturable", lambda device: True)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(graphs, "_RETRY_CALLS", 3)
    step = DecodeStep(model, cache, rows=len(LENGTHS), width=WIDTH, cuda_graph=True)
    for at, newest in enumerate(tokens):
        actual = step(newest[:, None].tolist(), [n + at for n in LENGTHS], pages)[:, 0]
        torch.testing.assert_close(actual, expected[at], rtol=1e-4, atol=1e-4)
    assert attempts == [1, 4]
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["decoding 3 sequences a step without a CUDA graph, as capture failed: no memory for the graph"]
