"""Batches of whole windows that are recorded, against batches that are computed as they are."""

import logging
from pathlib import Path

import pytest
import torch
from support.audio import speech_like
from support.fake_cuda import CudaFaultError, FakeCuda
from support.fake_graphs import FakeGraphs

import afnext
from afnext.bench.core.random_checkpoint import write_random_checkpoint
from afnext.runtime.engine import encode_steps, graphs
from afnext.runtime.engine.encode_steps import EncodeSteps
from afnext.runtime.engine.graphs import GraphMemory
from afnext.runtime.engine.prefill import PlacedWindow, encode_windows
from afnext.runtime.engine.timings import Timings
from afnext.runtime.model.audio_flamingo import AudioFlamingo
from afnext.runtime.model.encoder import token_count

WHOLE = 480_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("random"))


def load(folder: Path, **options: object) -> afnext.Model:
    small = {"page_size": 16, "chunk_size": 750, "encode_batch": 2, "prefix_cache_bytes": 0, "encoder_cache_bytes": 0}
    return afnext.load(folder, device="cuda:1", dtype="bfloat16", draft_tokens=0, **{**small, **options})  # type: ignore[arg-type]


def ask(model: afnext.Model, seconds: float) -> int:
    return model.ask((speech_like(seconds, 0), 16_000), "What?", max_new_tokens=4).usage.new_tokens


def windows(first: int, *samples: int) -> list[PlacedWindow]:
    return [PlacedWindow(0, token_count(n), torch.randn(n), first + index) for index, n in enumerate(samples)]


def encodings(cuda: FakeCuda, captured: bool) -> int:
    return sum(launch.kernel.startswith("conv_stem") and launch.captured == captured for launch in cuda.launches)


@torch.inference_mode()
def test_recorded_batches_are_the_same_bit_for_bit(
    network: AudioFlamingo, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Batches of other windows each time, at places for which the table of RoTE's angles is replaced."""
    fake = FakeGraphs(monkeypatch)
    steps = EncodeSteps(network, cuda_graphs=True, most_windows=2)
    kept = []
    for first, *others in ((0, [WHOLE, 200_000]), (40, [WHOLE] * 3), (7,)):
        for samples in ([WHOLE, WHOLE], [WHOLE], *others):
            batch = windows(first, *samples)
            expected = encode_windows(network, batch, Timings())
            actual = steps(batch, Timings())
            kept += zip(actual, expected, strict=True)
    assert len(set(fake.pools)) == 1
    assert len(fake.pools) == 2
    assert fake.replays == 2 * 2
    assert all(torch.equal(*pair) for pair in kept), "a result was overwritten by a later one, or differs"


def test_the_batches_of_a_long_recording_replay_one_graph(folder: Path, cuda: FakeCuda) -> None:
    counted = []
    for seconds in (125, 245):
        cuda.launches.clear()
        with load(folder) as model:
            assert ask(model, seconds) == 4
        counted.append((encodings(cuda, captured=False), encodings(cuda, captured=True)))
    eager, recorded = counted[0]
    assert counted[1] == (eager, recorded)
    assert 0 < recorded < eager, "one batch was computed before, one after with a shorter window"


def test_windows_in_turn_or_from_host_memory_are_not_recorded(folder: Path, cuda: FakeCuda) -> None:
    for options in ({"encode_ahead": False}, {"release_encoder": True}):
        with load(folder, **options) as model:
            assert ask(model, 121) == 4
    assert encodings(cuda, captured=True) == 0


def test_nothing_is_recorded_after_warming_up(folder: Path, cuda: FakeCuda) -> None:
    reports: list[tuple[str, int, int]] = []
    options = {"max_batch": 1, "memory": "24GB", "progress": lambda *report: reports.append(report)}
    with load(folder, warmup=True, **options) as model:
        captured = len(cuda.graphs)
        assert encodings(cuda, captured=True) > 0
        assert ask(model, 155) == 4
        assert len(cuda.graphs) == captured
    recording = [report[1:] for report in reports if report[0] == "recording CUDA graphs"]
    assert recording == [(done, captured) for done in range(captured + 1)]


def test_a_failed_capture_is_told_once_and_windows_are_computed_without(
    folder: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(graphs, "_RETRY_CALLS", 1)
    cuda.fail_captures = 2
    with load(folder) as model, caplog.at_level(logging.WARNING, "afnext.engine"):
        assert ask(model, 245) == 4
    told = [record.message for record in caplog.records if "capture failed" in record.message]
    assert len(told) == 1
    assert told[0].startswith("encoding 2 whole windows without a CUDA graph, as capture failed: CUDA error")
    assert encodings(cuda, captured=True) > 0, "tried again"
    assert not cuda.capturing


def test_graphs_that_run_together_may_not_share_memory(
    folder: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = GraphMemory()
    monkeypatch.setattr(encode_steps, "GraphMemory", lambda: shared)
    monkeypatch.setattr("afnext.runtime.engine.decode_steps.GraphMemory", lambda: shared)
    with load(folder, encode_batch=1, warmup=True, max_batch=2) as model:
        questions = [
            [{"role": "user", "content": [{"type": "audio", "audio": (speech_like(seconds, 0), 16_000)}]}]
            for seconds in (2, 121)
        ]
        with pytest.raises((CudaFaultError, afnext.AfnextError)):
            model.chat(questions, max_new_tokens=20)
    assert "a graph on stream" in cuda.faults[0]
    cuda.faults.clear()
