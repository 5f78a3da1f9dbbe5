"""Writes the trained model as a checkpoint folder that afnext and `transformers` load.

    python -m training.export FOLDER

FOLDER is that of `train`; the checkpoint goes to FOLDER/checkpoint. Weights are stored as
`model.storage_dtype` says and computed in float32.
"""

import json
from pathlib import Path
from typing import Any

import torch
import typer
from safetensors.torch import save_file

from .model import DECODER, ENCODER, MELS, ROPE_THETA, ROTE, TinyModel, storage_dtype
from .tokenizer import build_tokenizer

CHAT_TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% if message['content'] | selectattr('type', 'equalto', 'audio') | list %}<sound>{% endif %}\
{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def export(model: TinyModel, folder: Path) -> Path:
    """Write weights, config, tokenizer and templates into `folder`; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    ids = tokenizer.get_vocab()
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "[PAD]",
        "bos_token": "[BOS]",
        "clean_up_tokenization_spaces": False,
    }
    _write(folder / "tokenizer_config.json", settings)
    _write(folder / "config.json", _config(ids, tokenizer.get_vocab_size()))
    generation = {"eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["[PAD]"], "max_new_tokens": 512}
    _write(folder / "generation_config.json", generation)
    processor = {
        "processor_class": "MusicFlamingoProcessor",
        "audio_token": "<sound>",
        "audio_bos_token": "<|sound_bos|>",
        "audio_eos_token": "<|sound_eos|>",
        "max_audio_len": 1800,
        "feature_extractor": {
            "feature_extractor_type": "WhisperFeatureExtractor",
            "feature_size": MELS,
            "sampling_rate": 16_000,
            "hop_length": 160,
            "n_fft": 400,
            "chunk_length": 30,
            "padding_side": "right",
            "padding_value": 0.0,
            "return_attention_mask": True,
        },
    }
    _write(folder / "processor_config.json", processor)
    weights = {name: value.to(storage_dtype(name, value)) for name, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _config(ids: dict[str, int], vocabulary: int) -> dict[str, Any]:
    rope = {"rope_theta": ROTE.theta, "rope_type": "default", "partial_rotary_factor": 0.2}
    return {
        "architectures": ["MusicFlamingoForConditionalGeneration"],
        "model_type": "musicflamingo",
        "dtype": "float32",
        "audio_token_id": ids["<sound>"],
        "audio_bos_token_id": ids["<|sound_bos|>"],
        "audio_eos_token_id": ids["<|sound_eos|>"],
        "rope_parameters": rope,
        "audio_config": {
            "model_type": "audioflamingo3_encoder",
            "num_mel_bins": MELS,
            "max_source_positions": 1500,
            **ENCODER,
        },
        "text_config": {
            "model_type": "qwen2",
            "vocab_size": vocabulary,
            "max_position_embeddings": 65_536,
            "rope_parameters": {"rope_theta": ROPE_THETA, "rope_type": "default"},
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "eos_token_id": ids["<|im_end|>"],
            **DECODER,
        },
    }


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main(folder: Path) -> None:
    """Write the state of training in FOLDER as a checkpoint; see the module."""
    model = TinyModel(build_tokenizer().get_vocab_size())
    saved = torch.load(folder / "training.pt", weights_only=True)["modules"]
    model.load_state_dict({n.removeprefix("model."): w for n, w in saved.items() if n.startswith("model.")})
    print(export(model, folder / "checkpoint"))


if __name__ == "__main__":
    typer.run(main)
