"""Recordings whose length lies at a boundary: token counts, masks and timestamps against the reference."""

import numpy as np
import pytest
import torch
from support.audio import speech_like
from support.checkpoints import SavedCheckpoint, relative_rms

import afnext
from afnext.kernels.conv_stem import conv_length
from afnext.kernels.log_mel import valid_frames
from afnext.runtime.io.audio import windows
from afnext.runtime.model.encoder import audio_token_count, token_count

SECONDS = [0.03, 0.5, 29.9, 29.99, 30.0, 30.01, 60.0, 61.37, 1800.0]


@pytest.mark.parametrize("seconds", SECONDS)
def test_token_counts_masks_and_timestamps(one_checkpoint: SavedCheckpoint, seconds: float) -> None:
    audio = np.zeros(round(seconds * 16_000), dtype=np.float32)
    inputs = one_checkpoint.inputs([audio], ["?"])
    frames = inputs["input_features_mask"].sum(-1)
    cut = windows(audio)
    assert [valid_frames(len(window)) for window in cut] == frames.tolist()

    reference = one_checkpoint.reference()
    placeholders = inputs["input_ids"] == reference.config.audio_token_id
    conv, tokens = reference.model.audio_tower._get_feat_extract_output_lengths(frames)
    assert [conv_length(valid_frames(len(window))) for window in cut] == conv.tolist()
    assert [token_count(len(window)) for window in cut] == tokens.tolist()
    assert audio_token_count(len(audio)) == int(placeholders.sum()) == int(tokens.sum())

    heard = tokens > 0
    expected = reference.model._build_audio_timestamps(inputs["input_ids"], tokens[heard], 750)
    network = afnext.load(one_checkpoint.folder, dtype="float32").network
    embedding = network.encoder.time_embedding
    assert embedding is not None
    cos, sin = reference.model.pos_emb(expected, seq_len=750)
    angles = embedding.angles(torch.arange(len(expected)), 750)
    torch.testing.assert_close(angles.cos().repeat_interleave(2, -1), cos, rtol=0, atol=0)
    torch.testing.assert_close(angles.sin().repeat_interleave(2, -1), sin, rtol=0, atol=0)


@pytest.mark.parametrize("seconds", [0.03, 0.5, 29.9, 29.99, 30.0, 60.0, 61.37])
def test_answers_at_boundaries_equal_the_reference(one_checkpoint: SavedCheckpoint, seconds: float, seed: int) -> None:
    audio = speech_like(seconds, seed)
    inputs = one_checkpoint.inputs([audio], ["?"])
    one_checkpoint.assert_same_answer(
        afnext.load(one_checkpoint.folder, dtype="float32").ask((audio, 16_000), "?", max_new_tokens=16), inputs
    )


def test_a_last_window_without_tokens_changes_nothing(one_checkpoint: SavedCheckpoint, seed: int) -> None:
    """30.01 s has a second window of one frame and no token. The reference cannot run it, so 30 s stands in."""
    audio = speech_like(30.01, seed)
    model = afnext.load(one_checkpoint.folder, dtype="float32")
    longer = model.ask((audio, 16_000), "?", max_new_tokens=16)
    assert longer.token_ids == model.ask((audio[:480_000], 16_000), "?", max_new_tokens=16).token_ids
    assert (longer.usage.windows, longer.usage.audio_tokens) == (2, 750)


@pytest.mark.slow
def test_half_an_hour_equals_the_reference(one_checkpoint: SavedCheckpoint, seed: int) -> None:
    """60 windows, 45 000 tokens: the logits after the whole prompt."""
    audio = np.tile(speech_like(200.0, seed), 9)
    inputs = one_checkpoint.inputs([audio], ["What is said at the end?"])
    answer = afnext.load(one_checkpoint.folder, dtype="float32").ask(
        (audio, 16_000), "What is said at the end?", max_new_tokens=4
    )
    assert (answer.usage.windows, answer.usage.audio_tokens, answer.usage.audio_seconds) == (60, 45_000, 1800.0)
    one_checkpoint.assert_same_answer(answer, inputs)


def test_longer_audio_is_refused_unless_truncation_is_asked_for(one_checkpoint: SavedCheckpoint) -> None:
    audio = np.zeros(round(1800.5 * 16_000), dtype=np.float32)
    model = afnext.load(one_checkpoint.folder, dtype="float32")
    with pytest.raises(afnext.AfnextError, match=r"1800"):
        model.ask((audio, 16_000), "?", max_new_tokens=1)
    short = afnext.load_audio((audio, 16_000), max_seconds=1800, truncate=True)
    assert (short.duration, short.truncated) == (1800.0, True)
    answer = model.ask((audio[: 480_000 * 2], 16_000), "?", max_new_tokens=1)
    assert not answer.usage.truncated


@pytest.mark.parametrize("seconds", [0.0, 0.02])
def test_audio_too_short_for_a_token_is_refused(one_checkpoint: SavedCheckpoint, seconds: float) -> None:
    audio = np.zeros(round(seconds * 16_000), dtype=np.float32)
    with pytest.raises(afnext.AfnextError, match=r"(?i)no samples|empty|longer"):
        afnext.load(one_checkpoint.folder).ask((audio, 16_000), "?")


def test_encoder_positions_past_the_end_of_a_window_are_never_computed(
    one_checkpoint: SavedCheckpoint, seed: int
) -> None:
    """A short window costs by its length, and still equals the reference, which always computes 30 s."""
    network = afnext.load(one_checkpoint.folder, dtype="float32").network
    audio = torch.from_numpy(speech_like(1.0, seed))
    short = network.log_mel([audio])
    padded = network.log_mel([torch.nn.functional.pad(audio, (0, 479_999 - 16_000))])
    assert short.shape[-1] == 102 < padded.shape[-1]
    with torch.inference_mode():
        (trimmed,), (full,) = network.encode(short, [16_000], [3]), network.encode(padded, [16_000], [3])
    assert relative_rms(trimmed, full) <= 1e-5
