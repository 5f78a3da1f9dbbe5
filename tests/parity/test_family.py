"""The rest of the family and its spellings: tied embeddings, Audio Flamingo 3, model types, layouts, full width."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from afnext.runtime.model.audio_flamingo import AudioFlamingo
from support.audio import speech_like
from support.checkpoints import SavedCheckpoint, save_checkpoint
from support.layouts import LAYOUTS

import afnext


def audio_tokens(network: AudioFlamingo, audio: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return network.encode(network.log_mel([audio]), [audio.numel()], [1])[0]


def rewritten(source: SavedCheckpoint, folder: Path, change: Callable[[dict], None]) -> SavedCheckpoint:
    """A copy of a checkpoint with its config.json changed."""
    shutil.copytree(source.folder, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return SavedCheckpoint(folder)


def test_tied_embeddings(tmp_path: Path, seed: int) -> None:
    checkpoint = save_checkpoint(tmp_path, decoder={"tie_word_embeddings": True}, scale=2.0, seed=seed)
    audio = speech_like(3.0, seed)
    answer = afnext.load(tmp_path, dtype="float32").ask((audio, 16_000), "?", max_new_tokens=24)
    checkpoint.assert_same_answer(answer, checkpoint.inputs([audio], ["?"]))


@pytest.mark.parametrize(
    ("top", "encoder"),
    [
        ("audioflamingonext", "audioflamingo3_encoder"),
        ("audioflamingonext", "musicflamingo_encoder"),
        ("musicflamingo", "musicflamingo_encoder"),
    ],
)
def test_every_spelling_of_the_model_type(
    one_checkpoint: SavedCheckpoint, tmp_path: Path, top: str, encoder: str, seed: int
) -> None:
    def change(config: dict) -> None:
        config["model_type"] = top
        config["audio_config"]["model_type"] = encoder

    other = rewritten(one_checkpoint, tmp_path / "other", change)
    audio = (speech_like(2.0, seed), 16_000)
    expected = afnext.load(one_checkpoint.folder, dtype="float32").ask(audio, "?", max_new_tokens=8)
    assert afnext.load(other.folder, dtype="float32").ask(audio, "?", max_new_tokens=8).token_ids == expected.token_ids


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_answer(
    one_checkpoint: SavedCheckpoint, tmp_path: Path, layout: str, seed: int
) -> None:
    folder = LAYOUTS[layout](one_checkpoint.folder, tmp_path / "layout")
    audio = (speech_like(2.0, seed), 16_000)
    expected = afnext.load(one_checkpoint.folder, dtype="float32").ask(audio, "?", max_new_tokens=8)
    assert afnext.load(folder, dtype="float32").ask(audio, "?", max_new_tokens=8).token_ids == expected.token_ids
