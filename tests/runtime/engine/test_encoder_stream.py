"""Encoding ahead of the decoder: the order of work on a GPU's two streams, and the same answers as in turn."""

import dataclasses
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import pytest
import torch
from support.audio import speech_like, wav_bytes
from support.fake_cuda import CudaFaultError, FakeCuda
from support.simple_path import request
from torch import Tensor

import afnext
from afnext.bench.core.random_checkpoint import write_random_checkpoint
from afnext.runtime.engine.encode_steps import EncodeSteps
from afnext.runtime.engine.encoder_stream import EncoderStream, Queued
from afnext.runtime.engine.engine import Engine
from afnext.runtime.engine.executor import LocalExecutor
from afnext.runtime.engine.options import EngineOptions
from afnext.runtime.engine.request import Request, SequenceState
from afnext.runtime.errors import ConfigError
from afnext.runtime.model.audio_flamingo import AudioFlamingo

CHUNK = 400
OPTIONS = EngineOptions(page_size=16, chunk_size=CHUNK, encode_batch=2, prefix_cache_bytes=0, encoder_cache_bytes=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("random"))


def load(folder: Path, **options: object) -> afnext.Model:
    given = {"page_size": 16, "chunk_size": CHUNK, "encode_batch": 1, "prefix_cache_bytes": 0, **options}
    return afnext.load(folder, device="cuda:1", dtype="bfloat16", **given)  # type: ignore[arg-type]


def ask(model: afnext.Model, seconds: float = 100.0) -> int:
    return model.ask((speech_like(seconds, 0), 16_000), "What?", max_new_tokens=3).usage.new_tokens


def work(cuda: FakeCuda) -> list[tuple[str, int]]:
    """What was launched in turn, each with its stream: windows by the encoder, chunks by the decoder."""
    part = {"log_mel": "window", "conv_stem": "window", "rote": "window", "kv_write": "chunk"}
    launched = [(launch.kernel.partition(".")[0], launch.stream) for launch in cuda.launches if not launch.captured]
    return [key for key, _ in groupby((part[kernel], stream) for kernel, stream in launched if kernel in part)]


@pytest.mark.parametrize("encoder_cache_bytes", [0, 1 << 28])
def test_the_windows_of_the_next_chunk_are_encoded_on_a_stream_of_their_own(
    folder: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, encoder_cache_bytes: int
) -> None:
    """100 s: windows of 750, 750, 750 and 250 tokens, which begin in chunks 0, 1, 3 and 5 of 400 tokens."""
    monkeypatch.setattr(EncodeSteps, "recordable", False)  # what graphs launch is not listed
    with load(folder, encode_ahead=True, encoder_cache_bytes=encoder_cache_bytes) as model:
        assert ask(model) == 3
    parts = work(cuda)
    streams = {part: {stream for other, stream in parts if other == part} for part, _ in parts}
    assert len(streams["window"]) == len(streams["chunk"]) == 1
    assert streams["window"].isdisjoint(streams["chunk"])
    encoded = [part for part, _ in parts]
    assert encoded == ["window", "chunk"] * 4
    used = {launch.stream for launch in cuda.launches if launch.kernel.startswith("attention.")}
    assert used == streams["window"] | streams["chunk"]


def test_a_file_is_computed_in_parts_while_it_is_decoded(
    folder: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts leave no page behind, and nothing is read or freed before the streams allow it (see `cuda`)."""
    parts: list[Request] = []
    submit = Engine.submit
    monkeypatch.setattr(Engine, "submit", lambda self, part: parts.append(part) or submit(self, part))
    with load(folder, encode_ahead=True, page_size=200) as model:
        whole = model.ask((speech_like(100.0, 0), 16_000), "What?", max_new_tokens=3)
        answer = model.ask(wav_bytes(speech_like(100.0, 1)), "What?", max_new_tokens=3)
        assert answer.usage == whole.usage
        assert parts
        stats = model.engine.stats()
    assert (stats.prefix_pages, stats.private_pages) == (0, 0)


def test_in_turn_there_is_one_stream(folder: Path, cuda: FakeCuda) -> None:
    with load(folder, encode_ahead=False) as model:
        assert ask(model) == 3
    assert {stream for _, stream in work(cuda)} == {0}


def test_requests_in_turns_with_lent_layers_and_in_batches(folder: Path, cuda: FakeCuda) -> None:
    with load(folder, encode_ahead=True, release_encoder=True, encode_batch=3) as model:
        audio = [{"type": "audio", "audio": (speech_like(70, content), 16_000)} for content in range(3)]
        answers = model.chat([[{"role": "user", "content": [one]}] for one in audio], max_new_tokens=3)
    assert [answer.usage.new_tokens for answer in answers] == [3, 3, 3]


def without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EncoderStream, "read", lambda stream, queued: queued.tokens)


def without_keeping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)


@pytest.mark.parametrize(
    ("mistake", "fault"), [(without_waiting, "does not wait for stream"), (without_keeping, "is freed while stream")]
)
def test_mistakes_are_found(
    folder: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, mistake: Callable[..., None], fault: str
) -> None:
    mistake(monkeypatch)
    with load(folder, encode_ahead=True) as model, pytest.raises((CudaFaultError, afnext.AfnextError)):
        ask(model)
    assert fault in cuda.faults[0]
    cuda.faults.clear()


def test_large_gpus_encode_ahead_by_default(folder: Path, cuda: FakeCuda) -> None:
    assert load(folder).options.encode_ahead
    assert not load(folder, encode_ahead=False).options.encode_ahead
    assert not load(folder, memory="8GB").options.encode_ahead
    with pytest.raises(ConfigError, match="encode_ahead is for a model on one device"):
        load(folder, encode_ahead=True, tp=2)
    assert not afnext.load(folder, device="cpu").options.encode_ahead


class InOrder(EncoderStream):
    """A stream of its own in name: what is queued in it is computed at once. Notes what is queued and read."""

    apart = True  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"), apart=False)
        self.queued = 0

    def queue(self, encode: Callable[[], list[Tensor]]) -> Queued:
        self.queued += 1
        return super().queue(encode)


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_answers_are_the_same_bit_for_bit(network: AudioFlamingo, batch_invariant: bool, seed: int) -> None:
    """Requests whose prompts take turns, in chunks of many sizes."""
    options = dataclasses.replace(OPTIONS, batch_invariant=batch_invariant)

    def answers(executor: LocalExecutor) -> list[SequenceState]:
        engine = Engine(network, options, executor)
        asked = [
            dataclasses.replace(request(network, 8, seconds, seed + content), logprobs=True)
            for content, seconds in enumerate((64.0, 31.0, 0.0))
        ]
        sequences = [engine.submit(one) for one in asked]
        while engine.step():
            pass
        return sequences

    in_turn = answers(LocalExecutor(network, options))
    executor = LocalExecutor(network, options)
    executor.encoder_stream = stream = InOrder()
    ahead = answers(executor)
    assert stream.queued >= 3
    assert [(one.tokens, one.logprob_sum) for one in ahead] == [(one.tokens, one.logprob_sum) for one in in_turn]


def test_no_more_than_a_chunk_is_encoded_ahead(network: AudioFlamingo, seed: int) -> None:
    executor = LocalExecutor(network, OPTIONS)
    executor.encoder_stream = stream = InOrder()
    seen: list[tuple[int, int]] = []
    asked = dataclasses.replace(
        request(network, 1, 120.0, seed), progress=lambda done, total: seen.append((done, stream.queued))
    )
    engine = Engine(network, OPTIONS, executor)
    engine.submit(asked)
    while engine.step():
        pass
    assert stream.queued == 2
    for done, batches in seen:  # after a chunk, before its successor's windows are queued
        assert (batches - 1) * OPTIONS.encode_batch * 750 <= done + 4
