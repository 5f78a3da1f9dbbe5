"""GGUF files divided among ranks: the tokens and scores of the whole file."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("gguf", reason="GGUF files are written with the package gguf")
from support.checkpoints import SavedCheckpoint, save_checkpoint
from support.gguf_files import Kinds, audiocpp_kinds, kinds_by_part, write_package
from support.ranks import CPU, thread_ranks

import afnext
from afnext.runtime.engine import decode_runner
from afnext.runtime.engine.engine import Engine
from afnext.runtime.engine.options import EngineOptions
from afnext.runtime.engine.request import Request
from afnext.runtime.engine.sampler import SamplingParams
from afnext.runtime.model.audio_flamingo import AudioFlamingo
from afnext.runtime.model.opened import open_checkpoint

OPTIONS = EngineOptions(page_size=16, chunk_size=24)
MIXED = [
    *(("embed_tokens", "Q6_K"), ("lm_head", "Q6_K"), ("v_proj", "Q6_K"), ("down_proj", "Q5_K"), ("q_proj", "Q5_K")),
    *(("k_proj", "Q5_0"), ("up_proj", "Q4_1"), ("gate_proj", "Q4_0"), ("o_proj", "Q5_1")),
]
KINDS: dict[str, Kinds] = {
    "BF16": audiocpp_kinds("BF16"),
    "Q8_0": audiocpp_kinds("Q8_0"),
    "Q4_K": audiocpp_kinds("Q4_K"),
    "mixed": kinds_by_part(MIXED),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> SavedCheckpoint:
    """A checkpoint whose rows, and half of whose columns, are whole blocks of 256."""
    encoder = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    decoder = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 2}
    folder = tmp_path_factory.mktemp("saved")
    return save_checkpoint(folder, encoder=encoder, decoder=decoder, partial_rotary_factor=0.25)


def answered(engine: Engine, seed: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[torch.Tensor]]:
    """The tokens that follow a random prompt, and the scores that they were chosen by."""
    generator, scores = torch.Generator().manual_seed(seed), []
    ids = torch.randint(5, 100, (40,), generator=generator).tolist()
    choose = decode_runner.choose
    with monkeypatch.context() as patch:
        patch.setattr(decode_runner, "choose", lambda x, *a: (scores.append(x.clone()), choose(x, *a))[1])
        sequence = engine.submit(Request(ids, (), SamplingParams(max_new_tokens=6)))
        for _ in engine.follow([sequence]):
            pass
    engine.stop()
    return sequence.tokens, scores


@pytest.mark.parametrize(
    "kind", ["mixed", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "mixed")]
)
def test_ranks_compute_the_tokens_and_scores_of_the_file(
    kind: str, saved: SavedCheckpoint, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.gguf"
    write_package(file, saved.folder, KINDS[kind], np.random.default_rng(seed))
    model = AudioFlamingo.from_checkpoint(open_checkpoint(file), device=CPU, dtype=lambda stored: torch.float32)
    tokens, scores = answered(Engine(model, OPTIONS), seed, monkeypatch)
    with thread_ranks(file, 2, OPTIONS) as executor:
        found, found_scores = answered(Engine(executor.model, OPTIONS, executor), seed, monkeypatch)
    assert found == tokens
    for ours, expected in zip(found_scores, scores, strict=True):
        assert float((ours - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="ranks need socket pairs that a process inherits")
def test_processes_load_their_parts_of_the_file(saved: SavedCheckpoint, tmp_path: Path, seed: int) -> None:
    file = tmp_path / "model.gguf"
    write_package(file, saved.folder, KINDS["Q4_K"], np.random.default_rng(seed))
    with afnext.load(file, dtype="float32") as one, afnext.load(file, dtype="float32", tp=2) as two:
        asked = [model.ask(None, "What is said?", max_new_tokens=8, ignore_eos=True) for model in (one, two)]
    assert asked[0].token_ids == asked[1].token_ids
