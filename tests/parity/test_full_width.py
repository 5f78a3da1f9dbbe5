"""The true width of Audio Flamingo Next, with 2 + 2 layers: head counts, head sizes and rotary width as released."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.audio import speech_like
from support.checkpoints import SavedCheckpoint, relative_rms, save_checkpoint
from support.logits import QUESTIONS, last_logits, question, reference_logits

import afnext

ENCODER = {"num_hidden_layers": 2, "num_attention_heads": 20, "hidden_size": 1280, "intermediate_size": 5120}
DECODER = {
    "num_hidden_layers": 2,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "hidden_size": 3584,
    "intermediate_size": 18944,
}


@pytest.fixture(scope="module")
def full_width(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SavedCheckpoint]:
    """About a gigabyte on disk, so it goes as soon as its tests have ended."""
    folder = tmp_path_factory.mktemp("full-width")
    yield save_checkpoint(folder, encoder=ENCODER, decoder=DECODER, dtype=torch.bfloat16)
    for file in Path(folder).glob("*.safetensors"):
        file.unlink()


@pytest.mark.slow
def test_logits_and_tokens_equal_the_reference(full_width: SavedCheckpoint, seed: int) -> None:
    audio = speech_like(33.0, seed)
    inputs = full_width.inputs([audio], [QUESTIONS[0]])
    exact = reference_logits(full_width.reference(), inputs)
    model = afnext.load(full_width.folder, dtype="float32")
    assert relative_rms(last_logits(model, question(audio, QUESTIONS[0])), exact) <= 1e-5
    full_width.assert_same_answer(model.ask((audio, 16_000), QUESTIONS[0], max_new_tokens=8), inputs)

    rounded = reference_logits(full_width.reference(torch.bfloat16), inputs)
    ours = last_logits(afnext.load(full_width.folder), question(audio, QUESTIONS[0]))
    assert relative_rms(ours, exact) <= 2 * relative_rms(rounded, exact)
