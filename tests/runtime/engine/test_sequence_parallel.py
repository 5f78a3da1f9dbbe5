"""Long chunks divided by tokens: the keys, values and scores of one process, with decoding divided by heads."""

import dataclasses
from pathlib import Path

import pytest
import torch
from support.ranks import CPU, add_in_parts, thread_ranks

from afnext.kernels import native
from afnext.quant.recipe import recipe
from afnext.runtime.engine import decode_runner
from afnext.runtime.engine.engine import Engine
from afnext.runtime.engine.executor import LocalExecutor
from afnext.runtime.engine.options import EngineOptions
from afnext.runtime.engine.request import Request
from afnext.runtime.engine.sampler import SamplingParams
from afnext.runtime.model import sequence_parallel
from afnext.runtime.model.audio_flamingo import AudioFlamingo
from afnext.runtime.model.hub import resolve
from afnext.runtime.model.opened import open_checkpoint

CHUNK = 47  # which no number of ranks divides
LENGTH = 2 * CHUNK + 16
OPTIONS = EngineOptions(page_size=16, chunk_size=CHUNK, draft_tokens=0)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Path:
    """afnext-tiny, of whose prompts all chunks but the last are long."""
    monkeypatch.setattr(sequence_parallel, "LONG", CHUNK)
    return resolve("afnext-tiny", revision=None)


def prompt(seed: int, length: int = LENGTH) -> Request:
    ids = torch.randint(5, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Request(ids, (), SamplingParams(max_new_tokens=5))


def run(engine: Engine, asked: Request) -> list[int]:
    (sequence,) = [engine.submit(dataclasses.replace(asked))]
    for _ in engine.follow([sequence]):
        pass
    engine.stop()
    return sequence.tokens


@pytest.mark.parametrize(
    ("scheme", "kv", "size"),
    [("dense", "auto", 4), ("dense", "auto", 2), ("dense", "int8", 2)]
    + [("int4-g32-zeros", "auto", 2), ("int8-w8a8", "auto", 2)]
    + [pytest.param(scheme, "auto", 2, marks=pytest.mark.slow) for scheme in ("int8", "nf4")]
    + [pytest.param(scheme, "int8", 2, marks=pytest.mark.slow) for scheme in ("int8-w8a8", "int4-w4a8")],
)
def test_tokens_and_scores_are_those_of_one_process(
    tiny: Path, scheme: str, kv: str, size: int, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Where inputs, keys or values are rounded: of one that adds as the ranks do; see test_parallel_executor.py."""
    scores: list[torch.Tensor] = []
    choose = decode_runner.choose
    monkeypatch.setattr(decode_runner, "choose", lambda x, *a: (scores.append(x.clone()), choose(x, *a))[1])
    chunks: list[int] = []
    long = sequence_parallel.SequenceParallel.__call__
    monkeypatch.setattr(
        sequence_parallel.SequenceParallel,
        "__call__",
        lambda self, x, *a: (chunks.append(x.shape[1]), long(self, x, *a))[1],
    )
    options, quant = dataclasses.replace(OPTIONS, kv=kv), None if scheme == "dense" else recipe(scheme)
    asked = prompt(seed)
    whole = AudioFlamingo.from_checkpoint(
        open_checkpoint(tiny), device=CPU, dtype=lambda stored: torch.float32, quant=quant
    )
    if kv != "auto" or scheme.endswith("a8"):
        if not native.AVAILABLE:
            pytest.skip("torch's product of a part of the columns may round otherwise")
        monkeypatch.setenv("AFNEXT_BACKEND", "linear=native,linear_swiglu=native")
        add_in_parts(whole, size, long=CHUNK)
    expected, expected_scores = run(Engine(whole, options), asked), list(scores)
    scores.clear()
    with thread_ranks(tiny, size, options, quant=quant, sequence=True) as executor:
        found = run(Engine(executor.model, options, executor), asked)
    assert chunks == [CHUNK] * 2 * size
    for ours, theirs in zip(scores, expected_scores, strict=True):
        assert float((ours - theirs).abs().max() / theirs.abs().max()) <= 1e-5
    assert found == expected


def test_keys_and_values_are_those_of_tensor_parallelism(tiny: Path, seed: int) -> None:
    """Chunks of either kind may follow each other."""
    caches = []
    for sequence in (False, True):
        with thread_ranks(tiny, 2, OPTIONS, sequence=sequence) as executor:
            engine = Engine(executor.model, OPTIONS, executor)
            prefix = engine.listen(dataclasses.replace(prompt(seed), sampling=None))
            pages, pools = prefix.pages, range(len(executor.cache.pools))
            caches.append([engine._together(lambda i=i, e=executor, p=pages: e.read(i, p)[:LENGTH]) for i in pools])
            engine.stop()
    for ours, theirs in zip(*caches, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_parts_lie_in_the_memory_of_the_whole(tiny: Path) -> None:
    """Except for o and down, which are cut by columns."""
    with thread_ranks(tiny, 2, OPTIONS, sequence=True) as executor:
        local = executor._local
        assert isinstance(local, LocalExecutor)
        several = local.model.sequence_parallel
        assert several is not None
        whole = several._decoder
        for part, other in zip(local.model.decoder.layers, whole.layers, strict=True):
            attention = other.self_attn.attention
            for ours, theirs in (
                (part.self_attn.q_proj, attention.q_proj),
                (part.self_attn.v_proj, attention.v_proj),
                (part.mlp.gate_proj, other.mlp.gate_proj),
            ):
                assert ours.weight.untyped_storage().data_ptr() == theirs.weight.untyped_storage().data_ptr()
                assert len(ours.weight) == len(theirs.weight) // 2
