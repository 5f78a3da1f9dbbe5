"""The rest of the family and its spellings: tied embeddings, Audio Flamingo 3, model types, layouts, full width."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.audio import speech_like
from support.checkpoints import (
    SMALL_DECODER,
    SMALL_ENCODER,
    SavedCheckpoint,
    randomize,
    relative_rms,
    save_checkpoint,
)
from support.layouts import LAYOUTS, write, write_components
from support.logits import last_logits, question
from support.tokenizers import AF3_ORDER, unpack_shared, write_checkpoint_texts
from tokenizers import Tokenizer

import afnext
from afnext.runtime.app.conversation import Conversation


def rewritten(source: SavedCheckpoint, folder: Path, change: Callable[[dict], None]) -> SavedCheckpoint:
    """A copy of a checkpoint with its config.json changed."""
    shutil.copytree(source.folder, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return SavedCheckpoint(folder)


def test_a_tied_config_with_a_head_of_its_own(tmp_path: Path, seed: int) -> None:
    checkpoint = save_checkpoint(tmp_path, decoder={"tie_word_embeddings": True}, scale=2.0, seed=seed)
    audio = speech_like(3.0, seed)
    answer = afnext.load(tmp_path, dtype="float32").ask((audio, 16_000), "?", max_new_tokens=24)
    checkpoint.assert_same_answer(answer, checkpoint.inputs([audio], ["?"]))


def test_tied_embeddings_without_a_stored_head(one_checkpoint: SavedCheckpoint, tmp_path: Path, seed: int) -> None:
    """The embeddings serve as the head: as if they were stored a second time."""
    flat = load_file(one_checkpoint.folder / "model.safetensors")
    head, embeddings = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
    stored_twice = rewritten(one_checkpoint, tmp_path / "twice", lambda config: None)
    write(stored_twice.folder, {**flat, head: flat[embeddings].clone()})
    tied = rewritten(one_checkpoint, tmp_path / "tied", lambda c: c["text_config"].update(tie_word_embeddings=True))
    write(tied.folder, {name: tensor for name, tensor in flat.items() if name != head})
    messages = question(speech_like(1.0, seed), "?")
    expected = last_logits(afnext.load(stored_twice.folder, dtype="float32"), messages)
    # Equal to rounding only: on some CPUs torch's products depend on where in a file its mapped weights begin.
    actual = last_logits(afnext.load(tied.folder, dtype="float32"), messages)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("layout", [*LAYOUTS, "stored RoTE frequencies", "components"])
def test_every_layout_gives_the_same_logits(
    one_checkpoint: SavedCheckpoint, tmp_path: Path, layout: str, shards: int, seed: int
) -> None:
    flat = load_file(one_checkpoint.folder / "model.safetensors")
    folder = tmp_path / "layout"
    shutil.copytree(one_checkpoint.folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    if layout == "components":
        write_components(folder, flat, shards)
    elif layout == "stored RoTE frequencies":
        write(folder, {**flat, "audio_tower.pos_emb.freqs": torch.zeros(128)}, shards)
    else:
        write(folder, {LAYOUTS[layout](name): tensor for name, tensor in flat.items()}, shards)
    messages = question(speech_like(2.0, seed), "?")
    expected, model = afnext.load(one_checkpoint.folder, dtype="float32"), afnext.load(folder, dtype="float32")
    tensors = model.network.state_dict()
    for name, tensor in expected.network.state_dict().items():
        assert torch.equal(tensors.pop(name), tensor), name
    assert not tensors
    torch.testing.assert_close(last_logits(model, messages), last_logits(expected, messages), rtol=1e-5, atol=1e-5)


def test_audio_flamingo_3(tmp_path: Path, seed: int) -> None:
    """No RoTE, no tokens around the audio, other ids."""
    torch.manual_seed(seed)
    write_checkpoint_texts(tmp_path, AF3_ORDER)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = tokenizer.get_vocab()
    config = transformers.AudioFlamingo3Config(
        audio_config=transformers.AudioFlamingo3EncoderConfig(**SMALL_ENCODER),
        text_config=transformers.Qwen2Config(
            vocab_size=tokenizer.get_vocab_size(), eos_token_id=ids["<|im_end|>"], bos_token_id=None, **SMALL_DECODER
        ),
        audio_token_id=ids["<sound>"],
    )
    reference = transformers.AudioFlamingo3ForConditionalGeneration(config)
    randomize(reference, 2.0)
    reference.save_pretrained(tmp_path)
    audio = speech_like(31.5, seed)
    model = afnext.load(tmp_path, dtype="float32")
    conversation = Conversation.load(
        question(audio, "?"), model.tokenizer, model.template, max_audio_seconds=600, truncate=False
    )
    prompt = conversation.prompt.token_ids
    assert prompt.count(ids["<sound>"]) == conversation.prompt.audio_tokens == 787
    extractor = transformers.WhisperFeatureExtractor(feature_size=128)
    features = extractor(
        [audio[:480_000], audio[480_000:]], sampling_rate=16_000, return_attention_mask=True, return_tensors="pt"
    )
    with torch.inference_mode():
        expected = reference.eval()(
            input_ids=torch.tensor([prompt]),
            input_features=features["input_features"],
            input_features_mask=features["attention_mask"],
        ).logits[:, -1]
    assert relative_rms(last_logits(model, question(audio, "?")), expected) <= 1e-5


def test_both_real_tokenizers(shared_data: Path, tmp_path: Path, seed: int) -> None:
    """The same recording and question under the two numberings of the special tokens seen in the wild."""
    for name, sound in (("afnextA", 151_667), ("mfdefaultB", 151_669)):
        folder = tmp_path / name
        save_checkpoint(folder, decoder={"vocab_size": 151_672}, scale=2.0, seed=seed)
        config = json.loads((folder / "config.json").read_text())
        unpack_shared(shared_data, name, folder)
        ids = json.loads((shared_data / "tokenizer" / name / "config.json").read_text())
        for key in ("audio_token_id", "audio_bos_token_id", "audio_eos_token_id"):
            config[key] = ids[key]
        config["text_config"]["eos_token_id"] = 151_645
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 151_645, "pad_token_id": 151_643}))
        model = afnext.load(folder, dtype="float32")
        audio = speech_like(2.0, seed)
        answer = model.ask((audio, 16_000), "When does it rain?", max_new_tokens=16)
        assert (model.tokenizer.audio_token_id, answer.usage.audio_tokens) == (sound, 50)
        checkpoint = SavedCheckpoint(folder)
        checkpoint.assert_same_answer(answer, checkpoint.inputs([audio], ["When does it rain?"]))
