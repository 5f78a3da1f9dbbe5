"""GGUF files of a checkpoint that transformers saved, in the layouts of audio.cpp and of llama.cpp.

Both take weights in random blocks where a type has them, so that every bit of a block matters; what these blocks stand
for is written beside them as a dense checkpoint, decoded by the package `gguf`.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from support.ggml import random_blocks, weights_of

TEXTS = (
    *("config.json", "generation_config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json"),
    "chat_template.jinja",
)
Kinds = Callable[[str, tuple[int, ...]], str]
"""The type that a tensor of this name and shape is stored in."""


def audiocpp_kinds(weight_type: str) -> Kinds:
    """audio.cpp's choice: matrices whose rows are whole blocks in the type, embeddings in F16, all else F32."""
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[weight_type]][0]

    def kind(name: str, shape: tuple[int, ...]) -> str:
        if len(shape) != 2 or not name.endswith(".weight") or shape[1] % block:
            return "F32"
        return "F16" if "embed_tokens" in name and block > 1 else weight_type

    return kind


def write_package(
    path: Path,
    source: Path,
    kinds: Kinds,
    rng: np.random.Generator,
    *,
    namespace: str = "",
    old_files: bool = False,
    change: Callable[[dict[str, Any]], None] = lambda values: None,
) -> Path:
    """Write the checkpoint in `source` as audio.cpp packs it, and what it stands for in a folder, which is returned.

    change: of the values under audiocpp, before they are written.
    """
    weights = load_file(source / "model.safetensors")
    names = [namespace + name for name in weights]
    stored = [name if len(name.encode()) < 64 else f"_audiocpp.{i}" for i, name in enumerate(names)]
    files = {name: (source / name).read_bytes() for name in TEXTS if (source / name).exists()}
    offsets = np.cumsum([0, *map(len, files.values())]).tolist()
    values: dict[str, Any] = {
        "tensor_names": names,
        "tensor_ranks": np.array([tensor.ndim for tensor in weights.values()], np.int32),
        "tensor_shapes": np.array([size for tensor in weights.values() for size in tensor.shape], np.int64),
        "embedded_files.names": list(files),
        "model_spec.version": 1,
        "model_spec.family": "audio_flamingo",
        "tensor_name_format": "native",
    }
    if old_files:
        values["embedded_files.contents"] = [data.decode() for data in files.values()]
    else:
        values["embedded_files.offsets"] = np.array(offsets, np.uint64)
        values["embedded_files.data"] = np.frombuffer(b"".join(files.values()), np.uint8)
    change(values)
    writer = gguf.GGUFWriter(path, "audiocpp")
    for key, value in values.items():
        _add_value(writer, f"audiocpp.{key}", value)
    dense = _add_tensors(writer, dict(zip(stored, weights.items(), strict=True)), kinds, rng)
    return _write_dense(path.with_suffix(".dense"), source, dense)


def write_pair(folder: Path, source: Path, kinds: Kinds, rng: np.random.Generator, template: str | None = None) -> Path:
    """Write the checkpoint in `source` as llama.cpp's two files in `folder`, and what they stand for in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    text = {name: tensor for name, tensor in weights.items() if name.startswith("language_model.")}
    audio = {name: tensor for name, tensor in weights.items() if name not in text}
    decoder, encoder = config["text_config"], config["audio_config"]

    writer = gguf.GGUFWriter(folder / "model-Q4_K_M.gguf", "qwen2")
    writer.add_context_length(decoder["max_position_embeddings"])
    writer.add_embedding_length(decoder["hidden_size"])
    writer.add_block_count(decoder["num_hidden_layers"])
    writer.add_feed_forward_length(decoder["intermediate_size"])
    writer.add_head_count(decoder["num_attention_heads"])
    writer.add_head_count_kv(decoder["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(decoder["rms_norm_eps"])
    writer.add_rope_freq_base(decoder["rope_parameters"]["rope_theta"])
    _add_vocabulary(writer, source, template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, decoder["num_hidden_layers"])
    called = {_called(names, name.removeprefix("language_model.")): (name, tensor) for name, tensor in text.items()}
    dense = _add_tensors(writer, called, kinds, rng)

    writer = gguf.GGUFWriter(folder / "mmproj-model.gguf", "clip")
    writer.add_clip_has_audio_encoder(True)
    writer.add_clip_projector_type(gguf.VisionProjectorType.MUSIC_FLAMINGO)
    writer.add_audio_projection_dim(decoder["hidden_size"])
    writer.add_audio_embedding_length(encoder["hidden_size"])
    writer.add_audio_feed_forward_length(encoder["intermediate_size"])
    writer.add_audio_block_count(encoder["num_hidden_layers"])
    writer.add_audio_head_count(encoder["num_attention_heads"])
    writer.add_audio_num_mel_bins(encoder["num_mel_bins"])
    writer.add_audio_attention_layernorm_eps(1e-5)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, max(encoder["num_hidden_layers"], 3))
    called = {
        _called(names, name.replace("multi_modal", "audio.multi_modal")): (
            name,
            tensor[:, None] if "conv" in name and tensor.ndim == 1 else tensor,
        )
        for name, tensor in audio.items()
    }

    def encoder_kinds(name: str, shape: tuple[int, ...]) -> str:
        return "F32" if len(shape) == 1 or "conv" in name or "embed_positions" in name else "F16"

    dense |= _add_tensors(writer, called, encoder_kinds, rng)
    dense = {name: tensor.view(weights[name].shape) for name, tensor in dense.items()}
    return _write_dense(folder / "dense", source, dense)


def _add_vocabulary(writer: gguf.GGUFWriter, source: Path, template: str | None) -> None:
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    vocabulary, added = tokenizer["model"]["vocab"], tokenizer["added_tokens"]
    count = 1 + max(token["id"] for token in added)
    tokens = [f"[PAD{i}]" for i in range(count + 3)]  # llama.cpp fills up to the rows of the embeddings
    kinds = [gguf.TokenType.UNUSED] * len(tokens)
    for token, i in vocabulary.items():
        tokens[i], kinds[i] = token, gguf.TokenType.NORMAL
    for token in added:
        special = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
        tokens[token["id"]], kinds[token["id"]] = token["content"], special
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_pad_token_id(tokens.index("[PAD]"))
    if template is not None:
        writer.add_chat_template(template)


def _add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """A value; arrays of numbers with the type that they have."""
    if isinstance(value, np.ndarray):
        kind = gguf.GGUFValueType[value.dtype.name.upper()]
        writer.add_key_value(key, value.tolist(), gguf.GGUFValueType.ARRAY, kind)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_string(key, value)


def _add_tensors(
    writer: gguf.GGUFWriter, tensors: Mapping[str, tuple[str, torch.Tensor]], kinds: Kinds, rng: np.random.Generator
) -> dict[str, torch.Tensor]:
    """Add tensors, by stored name, and write the file; return what they stand for by their own names."""
    dense = {}
    for stored, (name, tensor) in tensors.items():
        kind = gguf.GGMLQuantizationType[kinds(name, tuple(tensor.shape))]
        if kind.name in ("F32", "F16"):
            data = tensor.float().numpy().astype(np.float32 if kind.name == "F32" else np.float16)
            dense[name] = torch.from_numpy(data.astype(np.float32))
        elif kind.name == "BF16":
            data = tensor.bfloat16().view(torch.int16).numpy().view(np.uint8)
            dense[name] = tensor.bfloat16().float()
        else:
            data = random_blocks(kind.name, *tensor.shape, rng, size=2 * tensor.shape[1] ** -0.5)
            dense[name] = torch.from_numpy(weights_of(kind.name, data).copy())
        writer.add_tensor(stored, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dense


def _write_dense(folder: Path, source: Path, weights: Mapping[str, torch.Tensor]) -> Path:
    folder.mkdir()
    for name in TEXTS:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _called(names: gguf.TensorNameMap, name: str) -> str:
    found: str | None = names.get_name(name, (".weight", ".bias"))
    assert found is not None, name
    return found


def kinds_by_part(rules: Iterable[tuple[str, str]], otherwise: str = "F32") -> Kinds:
    """The type of the first rule whose text is part of a matrix's name."""

    def kind(name: str, shape: tuple[int, ...]) -> str:
        if len(shape) != 2:
            return "F32"
        return next((kind for part, kind in rules if part in name), otherwise)

    return kind
