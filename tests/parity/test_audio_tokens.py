"""Log-mel, encoder, RoTE and adaptor against the reference."""

import numpy as np
import pytest
import torch
from support.audio import speech_like
from support.checkpoints import SavedCheckpoint, relative_rms

import afnext
from afnext.runtime.io.audio import windows
from afnext.runtime.model.audio_flamingo import AudioFlamingo


def encode(network: AudioFlamingo, audio: np.ndarray, indices: list[int] | None = None) -> torch.Tensor:
    cut = [torch.from_numpy(window) for window in windows(audio)]
    indices = list(range(len(cut))) if indices is None else indices
    with torch.inference_mode():
        return torch.cat(network.encode(network.log_mel(cut), [len(window) for window in cut], indices))


@torch.inference_mode()
def reference_tokens(reference: torch.nn.Module, inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    features = inputs["input_features"].to(dtype)
    return reference.model.get_audio_features(
        features, inputs["input_features_mask"], inputs["input_ids"]
    ).pooler_output


@pytest.mark.parametrize("seconds", [0.5, 11.3, 30.0, 61.37])
def test_audio_tokens_equal_the_reference_in_float32(checkpoint: SavedCheckpoint, seconds: float, seed: int) -> None:
    audio = speech_like(seconds, seed)
    inputs = checkpoint.inputs([audio], ["?"])
    network = afnext.load(checkpoint.folder, dtype="float32").network
    expected = reference_tokens(checkpoint.reference(), inputs, torch.float32)
    tokens = encode(network, audio)
    assert tokens.shape == expected.shape
    assert relative_rms(tokens, expected) <= 1e-5


def test_audio_tokens_in_bfloat16_are_as_accurate_as_the_reference(checkpoint: SavedCheckpoint, seed: int) -> None:
    audio = speech_like(41.2, seed)
    inputs = checkpoint.inputs([audio], ["?"])
    exact = reference_tokens(checkpoint.reference(), inputs, torch.float32)
    rounded = reference_tokens(checkpoint.reference(torch.bfloat16), inputs, torch.bfloat16)
    tokens = encode(afnext.load(checkpoint.folder, dtype="bfloat16").network, audio)
    assert relative_rms(tokens, exact) <= 2 * relative_rms(rounded, exact)


def test_log_mel_equals_the_feature_extractor(one_checkpoint: SavedCheckpoint, seed: int) -> None:
    audio = speech_like(47.0, seed)
    expected = one_checkpoint.inputs([audio], ["?"])["input_features"]
    network = afnext.load(one_checkpoint.folder, dtype="float32").network
    features = network.log_mel([torch.from_numpy(window) for window in windows(audio)])
    torch.testing.assert_close(features, expected[:, :, : features.shape[-1]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["gqa 4:2, theta 1200", "gqa 6:1, theta 1800, other ids"])
def test_rote_of_all_windows_of_half_an_hour(saved, name: str, seed: int) -> None:
    """The same 30 s as every one of 60 windows: only RoTE tells them apart."""
    checkpoint = saved(name)
    audio = speech_like(30.0, seed)
    reference = checkpoint.reference()
    network = afnext.load(checkpoint.folder, dtype="float32").network
    inputs = checkpoint.inputs([audio], ["?"])
    with torch.inference_mode():
        hidden = reference.model.audio_tower(
            inputs["input_features"], input_features_mask=inputs["input_features_mask"]
        ).last_hidden_state.expand(60, -1, -1)
        placeholders = torch.full((1, 60 * 750), reference.config.audio_token_id)
        timestamps = reference.model._build_audio_timestamps(placeholders, torch.full((60,), 750), 750)
        cos, sin = reference.model.pos_emb(timestamps, seq_len=750)
        rotated = hidden[..., : cos.shape[-1]]
        turned = torch.stack((-rotated[..., 1::2], rotated[..., 0::2]), -1).flatten(-2)
        rotated = (rotated.double() * cos + turned.double() * sin).float()
        expected = reference.model.multi_modal_projector(torch.cat((rotated, hidden[..., cos.shape[-1] :]), -1))
    window = [torch.from_numpy(audio)]
    with torch.inference_mode():
        mel = network.log_mel(window)
        for index in range(60):
            (tokens,) = network.encode(mel, [480_000], [index])
            assert relative_rms(tokens, expected[index]) <= 1e-5, f"window {index}"


def test_windows_encoded_together_equal_windows_encoded_alone(one_checkpoint: SavedCheckpoint, seed: int) -> None:
    network = afnext.load(one_checkpoint.folder, dtype="float32").network
    audio = speech_like(75.0, seed)
    together = encode(network, audio)
    alone = [encode(network, window, [index]) for index, window in enumerate(windows(audio))]
    assert relative_rms(torch.cat(alone), together) <= 1e-6
