"""Logits and greedy tokens against the reference's forward pass and `generate`."""

import json
from pathlib import Path

import pytest
import torch
from support.audio import speech_like
from support.checkpoints import SavedCheckpoint, relative_rms
from support.logits import QUESTIONS, last_logits, question, reference_logits

import afnext
import afnext.bench


@pytest.mark.parametrize("seconds", [3.21, 45.0])
def test_logits_equal_the_reference_in_float32(checkpoint: SavedCheckpoint, seconds: float, seed: int) -> None:
    audio = speech_like(seconds, seed)
    expected = reference_logits(checkpoint.reference(), checkpoint.inputs([audio], [QUESTIONS[0]]))
    model = afnext.load(checkpoint.folder, dtype="float32")
    assert relative_rms(last_logits(model, question(audio, QUESTIONS[0])), expected) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_logits_are_as_accurate_as_the_reference(
    checkpoint: SavedCheckpoint, dtype: torch.dtype, seed: int
) -> None:
    """Over several recordings at once, since a single one's rounding errors can happen to cancel."""
    exact, rounded, ours = [], [], []
    reference, rounding_reference = checkpoint.reference(), checkpoint.reference(dtype)
    model = afnext.load(checkpoint.folder, dtype=dtype)
    for offset in range(6):
        audio = speech_like(2.0 + 3 * offset, seed + offset)
        inputs = checkpoint.inputs([audio], [QUESTIONS[1]])
        exact.append(reference_logits(reference, inputs))
        rounded.append(reference_logits(rounding_reference, inputs))
        ours.append(last_logits(model, question(audio, QUESTIONS[1])))
    assert relative_rms(torch.cat(ours), torch.cat(exact)) <= 2 * relative_rms(torch.cat(rounded), torch.cat(exact))


RECORDINGS = [
    "speech/jfk.flac",
    "speech/libri_198-209-0000.ogg",
    "music/vibeace.ogg",
    "sound/esc50_dog_1-100032-A-0.wav",
]


@pytest.mark.parametrize("name", RECORDINGS)
def test_real_recordings_equal_the_reference(one_checkpoint: SavedCheckpoint, shared_data: Path, name: str) -> None:
    check_file(one_checkpoint, shared_data / name)


def test_the_bundled_recording_equals_the_reference(one_checkpoint: SavedCheckpoint) -> None:
    check_file(one_checkpoint, Path(afnext.bench.__path__[0]) / "data" / "jfk.flac")


def check_file(checkpoint: SavedCheckpoint, path: Path) -> None:
    inputs = checkpoint.inputs([afnext.load_audio(path).samples], [QUESTIONS[0]])
    answer = afnext.load(checkpoint.folder, dtype="float32").ask(path, QUESTIONS[0], max_new_tokens=24)
    checkpoint.assert_same_answer(answer, inputs)


@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_greedy_tokens_equal_the_reference(checkpoint: SavedCheckpoint, penalty: float, seed: int) -> None:
    audio = speech_like(33.3, seed)
    inputs = checkpoint.inputs([audio], [QUESTIONS[0]])
    model = afnext.load(checkpoint.folder, dtype="float32")
    answer = model.ask((audio, 16_000), QUESTIONS[0], max_new_tokens=64, repetition_penalty=penalty)
    checkpoint.assert_same_answer(answer, inputs, repetition_penalty=penalty)
    end = json.loads((checkpoint.folder / "generation_config.json").read_text())["eos_token_id"]
    assert answer.finish_reason == ("stop" if answer.token_ids[-1] == end else "length")


def test_greedy_tokens_of_a_ragged_batch_equal_the_reference(checkpoint: SavedCheckpoint, seed: int) -> None:
    recordings = [speech_like(seconds, seed + i) for i, seconds in enumerate((2.0, 31.0, 7.77))]
    inputs = checkpoint.inputs(recordings, list(QUESTIONS))
    model = afnext.load(checkpoint.folder, dtype="float32")
    conversations = [question(audio, text) for audio, text in zip(recordings, QUESTIONS, strict=True)]
    for row, answer in enumerate(model.chat(conversations, max_new_tokens=64)):
        checkpoint.assert_same_answer(answer, inputs, row)


def test_text_without_audio_equals_the_reference(checkpoint: SavedCheckpoint, seed: int) -> None:
    text = checkpoint.processor.apply_chat_template(
        question(None, QUESTIONS[1]), add_generation_prompt=True, tokenize=False
    )
    inputs = checkpoint.processor.tokenizer(text, return_tensors="pt")
    answer = afnext.load(checkpoint.folder, dtype="float32").ask(None, QUESTIONS[1], max_new_tokens=32)
    checkpoint.assert_same_answer(answer, dict(inputs))
    assert answer.usage.audio_seconds == answer.usage.audio_tokens == 0


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 333, 5000])
def test_prefill_in_chunks_equals_prefill_at_once(one_checkpoint: SavedCheckpoint, chunk_size: int, seed: int) -> None:
    model = afnext.load(one_checkpoint.folder, dtype="float32")
    messages = question(speech_like(10.0 if chunk_size < 8 else 70.0, seed), QUESTIONS[0])
    at_once = last_logits(model, messages, chunk_size=100_000)
    assert relative_rms(last_logits(model, messages, chunk_size=chunk_size), at_once) <= 1e-5


@pytest.mark.parametrize(("page_size", "chunk_size", "encode_batch"), [(16, 1024, 4), (256, 100, 1), (1, 333, 3)])
def test_sizes_never_change_an_answer(
    one_checkpoint: SavedCheckpoint, page_size: int, chunk_size: int, encode_batch: int, seed: int
) -> None:
    sizes = {"page_size": page_size, "chunk_size": chunk_size, "encode_batch": encode_batch}
    recordings = [speech_like(seconds, seed + i) for i, seconds in enumerate((61.0, 4.0))]
    conversations = [question(audio, text) for audio, text in zip(recordings, QUESTIONS, strict=False)]
    default = afnext.load(one_checkpoint.folder, dtype="float32").chat(conversations, max_new_tokens=32)
    other = afnext.load(one_checkpoint.folder, dtype="float32", **sizes).chat(conversations, max_new_tokens=32)
    assert [answer.token_ids for answer in other] == [answer.token_ids for answer in default]
