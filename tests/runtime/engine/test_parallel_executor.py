"""The engine over several ranks, here threads: the same tokens and scores as over one model."""

import dataclasses
import io
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fake_cuda import FakeCuda
from support.ranks import CPU, add_in_parts, thread_ranks

from afnext.kernels import native
from afnext.kernels.compilation import collecting
from afnext.kernels.sampling import greedy
from afnext.quant.recipe import recipe
from afnext.runtime.engine import decode_runner
from afnext.runtime.engine.engine import Engine
from afnext.runtime.engine.executor import LocalExecutor
from afnext.runtime.engine.options import EngineOptions
from afnext.runtime.engine.prefill import AudioInput
from afnext.runtime.engine.rank import Op, decoded, encoded, receive
from afnext.runtime.engine.request import Request
from afnext.runtime.engine.sampler import SamplingParams
from afnext.runtime.errors import EngineDeadError, OutOfPagesError
from afnext.runtime.model.audio_flamingo import AudioFlamingo
from afnext.runtime.model.encoder import audio_token_count
from afnext.runtime.model.hub import resolve
from afnext.runtime.model.opened import open_checkpoint

OPTIONS = EngineOptions(page_size=16, chunk_size=24, encode_batch=3)
EXACT = ("dense", "int8", "int4-g32-zeros", "nf4")
TOKENS = 6


@pytest.fixture(scope="module")
def tiny() -> Path:
    return resolve("afnext-tiny", revision=None)


def questions(seed: int, count: int = 1) -> list[Request]:
    """Prompts about three recordings of less than a second, so that two ranks encode unequal numbers of windows."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        ids, audio = [], []
        for samples in (12_000, 9_000, 5_000):
            ids += torch.randint(5, 300, (2,), generator=generator).tolist()
            audio.append(AudioInput(len(ids), (0.1 * torch.randn(samples, generator=generator),)))
            ids += [703] * audio_token_count(samples)
        ids += torch.randint(5, 300, (6,), generator=generator).tolist()
        made.append(Request(ids, tuple(audio), SamplingParams(max_new_tokens=TOKENS + index)))
    return made


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The scores that tokens are chosen by, step by step."""
    seen: list[torch.Tensor] = []
    choose = decode_runner.choose
    monkeypatch.setattr(decode_runner, "choose", lambda x, *a: (seen.append(x.clone()), choose(x, *a))[1])
    return seen


def answers(engine: Engine, requests: list[Request]) -> list[list[int]]:
    sequences = [engine.submit(dataclasses.replace(request)) for request in requests]
    for _ in engine.follow(sequences):
        pass
    return [sequence.tokens for sequence in sequences]


def whole(folder: Path, options: EngineOptions, scheme: str = "dense") -> Engine:
    quant = None if scheme == "dense" else recipe(scheme)
    model = AudioFlamingo.from_checkpoint(
        open_checkpoint(folder), device=CPU, dtype=lambda stored: torch.float32, quant=quant
    )
    return Engine(model, options)


@contextmanager
def divided(folder: Path, size: int, options: EngineOptions, scheme: str = "dense") -> Iterator[Engine]:
    with thread_ranks(folder, size, options, quant=None if scheme == "dense" else recipe(scheme)) as executor:
        engine = Engine(executor.model, options, executor)
        yield engine
        engine.stop()


@pytest.mark.parametrize(("scheme", "size"), [("dense", 4), *((scheme, 2) for scheme in EXACT)])
def test_ranks_compute_the_tokens_and_scores_of_the_whole(
    tiny: Path, scheme: str, size: int, scores: list[torch.Tensor], seed: int
) -> None:
    asked = questions(seed)
    engine = whole(tiny, OPTIONS, scheme)
    expected, expected_scores = answers(engine, asked), list(scores)
    engine.stop()
    scores.clear()
    with divided(tiny, size, OPTIONS, scheme) as engine:
        assert answers(engine, asked) == expected
    assert max(map(largest_error, scores, expected_scores)) <= 1e-5


@pytest.mark.skipif(not native.AVAILABLE, reason="torch's product of a part of the columns may round otherwise")
@pytest.mark.parametrize(
    ("scheme", "kv"),
    [
        ("dense", "int8"),
        ("dense", "int4"),
        ("int4-g32-zeros", "int8"),
        ("int8-w8a8", "auto"),
        ("int4-w4a8", "int8"),
        pytest.param("int8-w8a8", "int8", marks=pytest.mark.slow),
        pytest.param("int4-w4a8", "auto", marks=pytest.mark.slow),
        pytest.param("nf4", "int8", marks=pytest.mark.slow),
    ],
)
def test_what_is_rounded_is_that_of_one_process_that_adds_the_same_parts(
    tiny: Path, scheme: str, kv: str, scores: list[torch.Tensor], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums in another order change the last bits of scores, which can move an input over the edge between two int8
    values. Where inputs, keys or values are rounded, tokens and scores are those of one process that adds the products
    of each rank's columns, by kernels that add in one order. The others' scores agree as far as such a step goes."""
    monkeypatch.setenv("AFNEXT_BACKEND", "linear=native,linear_swiglu=native")
    options = dataclasses.replace(OPTIONS, kv=kv, encode_batch=1)
    asked = questions(seed)
    engine = whole(tiny, options, scheme)
    answers(engine, asked)
    engine.stop()
    unchanged = scores[0]
    scores.clear()
    engine = whole(tiny, options, scheme)
    add_in_parts(engine._executor.model, 2)
    expected, expected_scores = answers(engine, asked), list(scores)
    engine.stop()
    scores.clear()
    with divided(tiny, 2, options, scheme) as engine:
        assert answers(engine, asked) == expected
    assert max(map(largest_error, scores, expected_scores)) <= 1e-5
    assert largest_error(scores[0], unchanged) <= 0.1


def largest_error(scores: torch.Tensor, expected: torch.Tensor) -> float:
    """As a share of the largest score."""
    return float((scores - expected).abs().max() / expected.abs().max())


def test_requests_together_preempted_and_repeated(tiny: Path, seed: int) -> None:
    """Pages that are shared, copied, evicted and moved are the same on all ranks."""
    options = dataclasses.replace(OPTIONS, max_kv_tokens=128)
    asked = questions(seed, 4)
    engine = whole(tiny, options)
    expected = answers(engine, asked)
    engine.stop()
    with divided(tiny, 2, options) as engine:
        urgent = [dataclasses.replace(request, priority=index) for index, request in enumerate(asked)]
        assert answers(engine, urgent) == expected
        assert answers(engine, asked) == expected
        engine.release_memory()
        assert answers(engine, asked[1:]) == expected[1:]


@pytest.mark.parametrize("size", [2, 4])
def test_batch_invariance_holds_for_a_number_of_ranks(tiny: Path, size: int, seed: int) -> None:
    """Bit for bit: also sums over ranks do not depend on where a row stands in its batch."""
    options = dataclasses.replace(OPTIONS, batch_invariant=True, prefix_cache_bytes=0)
    asked = [dataclasses.replace(request, logprobs=True) for request in questions(seed, 3)]
    with divided(tiny, size, options) as engine:
        found = []
        for requests in (asked[1:2], asked):
            sequences = [engine.submit(dataclasses.replace(request)) for request in requests]
            for _ in engine.follow(sequences):
                pass
            found.append(sequences[len(sequences) // 2])
    alone, together = found
    assert alone.tokens == together.tokens
    assert alone.logprob_sum == together.logprob_sum


@pytest.mark.parametrize("kv", ["auto", "int8", "fp8", "int4"])
def test_contexts_go_from_any_number_of_ranks_to_any_other(tiny: Path, tmp_path: Path, kv: str, seed: int) -> None:
    """The file holds all heads, and the fingerprint of the whole model."""
    options = dataclasses.replace(OPTIONS, kv=kv)
    (asked,) = questions(seed)
    heard = dataclasses.replace(asked, token_ids=asked.token_ids[:-4], sampling=None)

    def saved(engine: Engine) -> bytes:
        file = io.BytesIO()
        engine.save(engine.listen(heard), file, {})
        return file.getvalue()

    def resumed(engine: Engine, contents: bytes) -> list[int]:
        (tmp_path / "context").write_bytes(contents)
        prefix = engine.load(engine.saved(tmp_path / "context"))
        return answers(engine, [dataclasses.replace(asked, prefix=prefix)])[0]

    engine = whole(tiny, options)
    (expected,), of_one = answers(engine, [asked]), saved(engine)
    with divided(tiny, 2, options) as several:
        of_two = saved(several)
        assert len(of_two) == len(of_one)
        assert resumed(several, of_one) == expected
        assert resumed(several, of_two) == expected
    assert resumed(engine, of_two) == expected
    engine.stop()


@pytest.mark.parametrize("without", [0, 1])
def test_a_rank_without_memory_for_more_pages_stops_no_other(
    tiny: Path, without: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache has the same size on all ranks, whichever of them could not grow."""
    asked = questions(3)
    resize, refused = LocalExecutor.resize, []
    with thread_ranks(tiny, 2, OPTIONS) as executor:
        engine = Engine(executor.model, OPTIONS, executor)

        def failing(self: LocalExecutor, pages: int) -> None:
            if not refused and without == (self is not executor._local):
                refused.append(pages)
                raise MemoryError("no more")
            resize(self, pages)

        monkeypatch.setattr(LocalExecutor, "resize", failing)
        with pytest.raises(OutOfPagesError, match="memory for 0 now"):
            answers(engine, asked)
        assert len(refused) == 1
        found = answers(engine, asked)
        engine.stop()
    engine = whole(tiny, OPTIONS)
    assert answers(engine, asked) == found
    engine.stop()


def test_an_error_of_a_rank_ends_the_engine(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one rank could not do, the others may have done: nothing can go on."""
    asked = questions(3)
    with thread_ranks(tiny, 2, OPTIONS) as executor:
        engine = Engine(executor.model, OPTIONS, executor)
        answers(engine, asked)

        def failing(*_: Any) -> torch.Tensor:
            raise RuntimeError("no product")

        with monkeypatch.context() as patch:
            patch.setattr(executor._local, "decode", failing)
            with pytest.raises(EngineDeadError, match="no product"):
                answers(engine, asked)
        assert not engine.stats().alive
        with pytest.raises(EngineDeadError, match="no product"):
            engine.submit(asked[0])


def test_every_rank_compiles_the_kernels_that_were_collected(
    tiny: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One operation of two ranks stands for all; its kernels run on a GPU that is not there."""

    def embed(executor: LocalExecutor, tokens: torch.Tensor) -> None:
        with cuda.in_this_thread():
            greedy(torch.zeros(3, 5000, device=f"cuda:{int(threading.current_thread() is not main)}"))

    main, reports = threading.current_thread(), []
    monkeypatch.setattr(LocalExecutor, "embed", embed)
    with thread_ranks(tiny, 2, OPTIONS) as executor:
        with collecting() as kernels:
            executor.embed(torch.zeros(1, dtype=torch.int64))
        executor.compile(kernels, lambda *report: reports.append(report))
        executor.embed(torch.zeros(1, dtype=torch.int64))
    assert reports == [(0, 2), (1, 2), (2, 2)]
    assert len(cuda.compiled) == 4
    assert sorted(launch.device for launch in cuda.launches) == [0, 0, 1, 1]


@pytest.mark.parametrize("unread", [b"", b"a message that nobody has read"])
def test_an_end_that_is_closed_is_no_message(unread: bytes) -> None:
    """Also one that resets the connection, as a process does that is killed before it has read everything."""
    ours, theirs = socket.socketpair()
    with ours:
        ours.sendall(unread)
        theirs.close()
        assert receive(ours) is None


def test_messages_are_lists_of_integers() -> None:
    lists = [[1, -5, 2**40], [], [7]]
    assert decoded(encoded(Op.DECODE, lists)) == (Op.DECODE, [-1, 0, 0], lists)
    with collecting():
        assert decoded(encoded(Op.DECODE, lists)) == (Op.DECODE, [-1, 0, 1], lists)
