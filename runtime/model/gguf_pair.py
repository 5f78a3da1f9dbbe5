"""llama.cpp's pairs: a qwen2 text model with its vocabulary, and an mmproj file with the audio encoder and adaptor.

Config, tokenizer and settings are made from the metadata, in the form of a checkpoint's text files. Values that the
pair lacks have the defaults of the `-hf` checkpoints: the parameters of RoTE and, if the text model has no template
that writes <sound>, a ChatML template.
"""

import json
import logging
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import CheckpointError, ConfigError
from ..files import shown
from .gguf_file import GgufFile, GgufTensor

TEXT, ENCODER, PROJECTOR = "qwen2", "clip", "musicflamingo"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% if message['content'] | selectattr('type', 'equalto', 'audio') | list %}<sound>{% endif %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML with the audio first, for text models whose own template writes no <sound>."""

_BLOCK = re.compile(r"(a\.)?blk\.(\d{1,4})\.([a-z0-9_]+)\.(weight|bias)")
_TEXT_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_AUDIO_LAYER = {
    "ln1": "self_attn_layer_norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.out_proj",
    "ln2": "final_layer_norm",
    "ffn_up": "fc1",
    "ffn_down": "fc2",
}
_OTHERS = {
    "token_embd": "decoder.embed_tokens",
    "output_norm": "decoder.norm",
    "output": "decoder.lm_head",
    "a.conv1d.1": "encoder.conv1",
    "a.conv1d.2": "encoder.conv2",
    "a.position_embd": "encoder.embed_positions",
    "a.post_ln": "encoder.layer_norm",
    "mm.a.mlp.1": "adaptor.linear_1",
    "mm.a.mlp.2": "adaptor.linear_2",
}
_NORMAL, _CONTROL, _USER, _UNUSED = 1, 3, 4, 5
_NORM_EPS = 1e-5
_log = logging.getLogger("afnext")


def is_text_model(file: GgufFile) -> bool:
    """Whether the file holds the text model of a pair."""
    return file.metadata.get("general.architecture") == TEXT


def is_encoder(file: GgufFile) -> bool:
    """Whether the file holds the encoder of a pair."""
    return file.metadata.get("general.architecture") == ENCODER


def pair_tensors(file: GgufFile) -> list[tuple[str, str | None, tuple[int, ...], GgufTensor]]:
    """Name in the table, canonical name, shape and place of each tensor; unknown names stay as they are.

    The bias of a convolution has a second dimension of 1 in these files; the returned shape omits it.
    """
    return [(stored, _canonical(stored), _shape(stored, tensor), tensor) for stored, tensor in file.tensors.items()]


def pair_contents(text: GgufFile, encoder: GgufFile) -> dict[str, bytes]:
    """The pair's metadata as the text files of a checkpoint, by name.

    Raises ConfigError for metadata that is missing, of another type, or describes what this runtime does not compute.
    """
    tokens, kinds, merges = (_array(text, f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "merges"))
    for key, expected in (("model", "gpt2"), ("pre", "qwen2")):
        found = text.metadata.get(f"tokenizer.ggml.{key}")
        if found != expected:
            raise ConfigError(f"{text.label}: tokenizer.ggml.{key} is {shown(found)}; this runtime reads {expected!r}.")
    if len(kinds) != len(tokens) or len(set(tokens)) != len(tokens):
        raise ConfigError(f"{text.label}: the vocabulary has duplicate tokens, or not one type per token.")
    normal = next((i for i, kind in enumerate(kinds) if kind != _NORMAL), len(tokens))
    used = [i for i, kind in enumerate(kinds) if kind not in (_NORMAL, _UNUSED)]
    if any(kind not in (_CONTROL, _USER, _UNUSED) for kind in kinds[normal:]):
        raise ConfigError(f"{text.label}: the vocabulary has ordinary tokens after added ones, which is not supported.")
    added = {tokens[i]: i for i in range(normal, 1 + max(used, default=-1))}
    listed = {
        str(i): {"content": token, "special": int(kinds[i]) != _USER, "lstrip": False, "rstrip": False}
        for token, i in added.items()
    }
    template = text.metadata.get("tokenizer.chat_template")
    if not isinstance(template, str) or "<sound>" not in template:
        _log.warning("%s has no chat template that writes <sound>; using ChatML with the audio first", text.label)
        template = TEMPLATE
    ids = {"eos_token_id": _number(text, "tokenizer.ggml.eos_token_id")}
    if "tokenizer.ggml.padding_token_id" in text.metadata:
        ids["pad_token_id"] = _number(text, "tokenizer.ggml.padding_token_id")
    values: dict[str, Any] = {
        "config.json": _config(text, encoder, added),
        "generation_config.json": ids,
        "tokenizer_config.json": {"added_tokens_decoder": listed},
        "vocab.json": {token: i for i, token in enumerate(tokens[:normal])},
    }
    contents = {name: json.dumps(value).encode() for name, value in values.items()}
    return {**contents, "merges.txt": "\n".join(merges).encode(), "chat_template.jinja": template.encode()}


def _config(text: GgufFile, encoder: GgufFile, added: Mapping[str, int]) -> dict[str, Any]:
    if "<sound>" not in added:
        raise ConfigError(f"{text.label} has no token <sound>; it is not an Audio Flamingo.")
    projector = encoder.metadata.get("clip.audio.projector_type", encoder.metadata.get("clip.projector_type"))
    if projector != PROJECTOR:
        raise ConfigError(f"{encoder.label} has the projector {shown(projector)}; this runtime reads {PROJECTOR!r}.")
    has_rote = "<|sound_bos|>" in added
    config: dict[str, Any] = {
        "model_type": "musicflamingo" if has_rote else "audioflamingo3",
        "dtype": "bfloat16",
        "audio_token_id": added["<sound>"],
        "audio_config": _audio_config(encoder),
        "text_config": _text_config(text),
    }
    if has_rote:
        if "<|sound_eos|>" not in added:
            raise ConfigError(f"{text.label} has a token <|sound_bos|> and none <|sound_eos|>; it is damaged.")
        config |= {"audio_bos_token_id": added["<|sound_bos|>"], "audio_eos_token_id": added["<|sound_eos|>"]}
        _log.warning("%s does not state how times are rotated; using theta 1200, as Music Flamingo does", encoder.label)
    return config


def _audio_config(encoder: GgufFile) -> dict[str, Any]:
    eps = _number(encoder, "clip.audio.attention.layer_norm_epsilon")
    if not 0.99 * _NORM_EPS < eps < 1.01 * _NORM_EPS:
        raise ConfigError(f"{encoder.label} has a norm with epsilon {eps:g}; this runtime computes {_NORM_EPS:g}.")
    return {
        "num_mel_bins": _number(encoder, "clip.audio.num_mel_bins"),
        "hidden_size": _number(encoder, "clip.audio.embedding_length"),
        "intermediate_size": _number(encoder, "clip.audio.feed_forward_length"),
        "num_hidden_layers": _number(encoder, "clip.audio.block_count"),
        "num_attention_heads": _number(encoder, "clip.audio.attention.head_count"),
        "max_source_positions": _rows(encoder, "a.position_embd.weight"),
    }


def _text_config(text: GgufFile) -> dict[str, Any]:
    def number(key: str) -> Any:
        return _number(text, f"{TEXT}.{key}")

    scaling = text.metadata.get(f"{TEXT}.rope.scaling.type", "none")
    if scaling != "none":
        raise ConfigError(f"{text.label} scales rotary positions ({shown(scaling)}), which is not supported.")
    config = {
        "model_type": "qwen2",
        "vocab_size": _rows(text, "token_embd.weight"),
        "hidden_size": number("embedding_length"),
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": number("attention.head_count"),
        "num_key_value_heads": number("attention.head_count_kv"),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": number("context_length"),
        "rope_parameters": {"rope_type": "default", "rope_theta": number("rope.freq_base")},
        "tie_word_embeddings": "output.weight" not in text.tensors,
    }
    if f"{TEXT}.attention.key_length" in text.metadata:
        config["head_dim"] = number("attention.key_length")
    return config


def _canonical(stored: str) -> str:
    found = _BLOCK.fullmatch(stored)
    if found:
        audio, index, kind, leaf = found.groups()
        layer = (_AUDIO_LAYER if audio else _TEXT_LAYER).get(kind)
        return stored if layer is None else f"{'encoder' if audio else 'decoder'}.layers.{index}.{layer}.{leaf}"
    place, _, leaf = stored.rpartition(".")
    return f"{_OTHERS[place]}.{leaf}" if place in _OTHERS else stored


def _shape(stored: str, tensor: GgufTensor) -> tuple[int, ...]:
    is_conv_bias = stored.startswith("a.conv1d.") and stored.endswith(".bias") and tensor.shape[1:] == (1,)
    return tensor.shape[:1] if is_conv_bias else tensor.shape


def _rows(file: GgufFile, name: str) -> int:
    if name not in file.tensors or not file.tensors[name].shape:
        raise CheckpointError(f"{file.label} has no tensor {name}; it is incomplete.")
    return file.tensors[name].shape[0]


def _number(file: GgufFile, key: str) -> Any:
    """An int, or the shortest decimal of a float32."""
    value = file.metadata.get(key)
    if type(value) is int:
        return value
    if not isinstance(value, float) or not np.isfinite(np.float32(value)):
        raise ConfigError(f"{file.label}: {key} is {shown(value)} where a number was expected; it is damaged.")
    return float(str(np.float32(value)))


def _array(file: GgufFile, key: str) -> Any:
    value = file.metadata.get(key)
    wanted = np.ndarray if key.endswith("token_type") else list
    if not isinstance(value, wanted):
        raise ConfigError(f"{file.label}: {key} is missing or not a list; the file is damaged.")
    return value
