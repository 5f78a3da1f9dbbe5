"""Whole models on GPUs that are not there: every launch is checked (`support/fake_cuda.py`), on either GPU, through
growing caches, recorded steps and captures that fail."""

import logging
from pathlib import Path
from threading import Thread

import pytest
import torch
from support.audio import speech_like
from support.fake_cuda import CudaFaultError, FakeCuda

import afnext
from afnext.bench.core.random_checkpoint import write_random_checkpoint
from afnext.kernels import dispatch
from afnext.kernels.attention import attention
from afnext.runtime.engine import graphs
from afnext.runtime.engine.decode_steps import DecodeSteps
from afnext.runtime.engine.graphs import GraphMemory

QUESTION = "What is said?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("random"))


def load(folder: Path, gpu: int, **options: object) -> afnext.Model:
    small = {"page_size": 16, "chunk_size": 64, "prefix_cache_bytes": 0, "encoder_cache_bytes": 0, "draft_tokens": 0}
    return afnext.load(folder, device=f"cuda:{gpu}", dtype="bfloat16", **{**small, **options})  # type: ignore[arg-type]


def ask(model: afnext.Model, seconds: float = 1.0, tokens: int = 6, **options: object) -> int:
    """The number of tokens of an answer. What they are is decided by kernels that have not run."""
    audio = (speech_like(seconds, 0), 16_000) if seconds else None
    answer = model.ask(audio, QUESTION, max_new_tokens=tokens, **options)  # type: ignore[arg-type]
    return answer.usage.new_tokens


@pytest.mark.parametrize(
    ("gpu", "quant", "kv"),
    [
        *((0, None, "auto"), (1, None, "auto"), (1, "int4-g32", "int8")),
        *((1, scheme, "auto") for scheme in ("int8-w8a8", "fp8", "nvfp4")),
    ],
)
def test_every_launch_of_a_model_goes_to_its_gpu(
    folder: Path, cuda: FakeCuda, gpu: int, quant: str | None, kv: str
) -> None:
    with load(folder, gpu, quant=quant, kv=kv) as model:
        assert ask(model) == 6
        assert ask(model, 0, temperature=0.8, top_p=0.9, repetition_penalty=1.1) == 6
    assert {launch.device for launch in cuda.launches} == {gpu}
    used = {launch.kernel.partition(".")[0] for launch in cuda.launches}
    assert {"log_mel", "conv_stem", "attention", "rote", "decode_attention", "kv_write", "norm", "sampling"} <= used
    assert cuda.graphs
    assert cuda.replays
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("options", [{"release_encoder": True, "draft_tokens": 3}, {"batch_invariant": True}], ids=str)
def test_contexts_stay_on_their_gpu(folder: Path, cuda: FakeCuda, tmp_path: Path, options: dict[str, object]) -> None:
    with load(folder, 1, **options) as model:
        with model.listen((speech_like(1.0, 0), 16_000)) as context:
            assert context.ask(QUESTION, max_new_tokens=3).usage.new_tokens == 3
            context.save(tmp_path / "context.safetensors")
        with model.resume(tmp_path / "context.safetensors") as resumed:
            assert resumed.ask(QUESTION, max_new_tokens=3).usage.new_tokens == 3
    assert {launch.device for launch in cuda.launches} == {1}


def test_models_on_two_gpus_capture_on_streams_of_their_own(folder: Path, cuda: FakeCuda) -> None:
    models = [load(folder, gpu) for gpu in (0, 1)]
    for model in models:
        assert ask(model, 0) == 6
    streams = {graph.recorded.stream.device_index for graph in cuda.graphs if graph.recorded}
    assert streams == {0, 1}
    threads = [Thread(target=ask, args=(model, 0, 12)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for model in models:
        model.close()


def test_the_same_question_again_neither_resizes_nor_records(folder: Path, cuda: FakeCuda) -> None:
    with load(folder, 1) as model:
        ask(model)
        captured, resizes = len(cuda.graphs), model.engine.stats().resizes
        assert captured == 1
        ask(model)
        assert (len(cuda.graphs), model.engine.stats().resizes) == (captured, resizes)
        ask(model, 9)  # needs more pages: the recorded step refers to tensors that are replaced
        assert model.engine.stats().resizes > resizes
        assert len(cuda.graphs) > captured


def test_the_host_goes_on_while_a_prompt_is_computed(folder: Path, cuda: FakeCuda) -> None:
    """Waiting does not grow with the chunks and windows of a prompt."""
    waits = []
    with load(folder, 1, max_batch=1, chunk_size=200) as model:
        for seconds in (65, 2, 65):
            cuda.waits.clear()
            ask(model, seconds, tokens=1)
            waits.append(list(cuda.waits))
    assert waits[2] == waits[1]
    assert 0 < len(waits[1]) < 8


def test_a_failed_capture_is_noticed_and_tried_again(
    folder: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(graphs, "_RETRY_CALLS", 4)
    cuda.fail_captures = 1
    with load(folder, 1) as model, caplog.at_level(logging.WARNING, "afnext.engine"):
        assert ask(model, tokens=10) == 10
    assert "without a CUDA graph, as capture failed" in caplog.text
    assert len(cuda.graphs) == 1
    assert 1 <= cuda.replays < 9
    assert not cuda.capturing


def test_wide_heads_are_fetched_by_descriptors(cuda: FakeCuda) -> None:
    def gpu(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16, device="cuda:1")

    table = torch.zeros(1, 3, dtype=torch.int32, device="cuda:1")
    lengths = torch.tensor([600], device="cuda:1")
    pools = gpu(3, 256, 4, 128), gpu(3, 256, 4, 128)
    out = attention(gpu(1, 300, 28, 128), *pools, causal=True, key_lengths=lengths, page_table=table)
    assert out.device == torch.device("cuda", 1)
    assert [(launch.kernel, launch.device) for launch in cuda.launches] == [("attention._kernel", 1)]


def ask_in_turn(first: afnext.Model, second: afnext.Model) -> None:
    for seconds in (0, 3, 0):
        ask(first, 0)
        ask(second, seconds)


def without_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "launching", lambda function, device: function)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)


def with_torchs_own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GraphMemory, "stream", lambda memory, device: None)


def with_steps_that_outlive_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DecodeSteps, "clear", lambda steps: None)


@pytest.mark.parametrize(
    ("mistake", "fault"),
    [
        (without_guard, "is launched on cuda:0 with a tensor on cuda:1"),
        (with_torchs_own_stream, "is not captured, as the capture is on cuda:0"),
        (with_steps_that_outlive_the_cache, "uses memory that was freed"),
    ],
)
def test_mistakes_are_found(folder: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, mistake, fault: str) -> None:  # type: ignore[no-untyped-def]
    mistake(monkeypatch)
    with load(folder, 0) as first, load(folder, 1) as second, pytest.raises((CudaFaultError, afnext.AfnextError)):
        ask_in_turn(first, second)
    assert fault in cuda.faults[0]
    cuda.faults.clear()
