"""Checkpoints with random weights, for everything that does not depend on the meaning of answers.

    tiny                   a model of a few hundred thousand parameters, for demonstrations
    full-width:ENC,DEC     the true width with ENC encoder and DEC decoder layers
    full                   the true shape, 8.3 B parameters, 16.5 GB on disk

The layers of one kind repeat the same random numbers, so writing is bound by the disk. The tokenizer is a small
byte-level one with the special tokens of Audio Flamingo Next.
"""

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ...kernels.errors import AfnextError
from ...kernels.linear_nvfp4 import E8M0
from ...quant.convert import CheckpointWriter
from ...quant.recipe import Recipe
from ...quant.scheme import Stored
from ...runtime.model.config import ModelConfig
from ...runtime.model.parameters import expected_shapes
from ...runtime.model.published import AUDIO_FLAMINGO_NEXT
from ...runtime.model.quantized import expected_tensors, quantization_metadata

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<sound>",
    "[BOS]",
    "[PAD]",
    "<|sound_bos|>",
    "<|sound_eos|>",
)
_E2M1_SIZE, _NVFP4_SCALE = 2.93, 32.0  # root mean square of e2m1 codes, and the scale of each of their blocks
PRINTABLE_IDS = 94  # ids 0 .. 93 are the bytes ! to ~, which byte-level BPE spells as themselves
CHAT_TEMPLATE = """\
{% if messages[0]['role'] != 'system' %}<|im_start|>system
You listen to audio and answer questions about it.<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% if message['content'] | selectattr('type', 'equalto', 'audio') | list %}<sound>{% endif %}\
{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
_WORD_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TINY_ENCODER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
_TINY_DECODER = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}


def write_random_checkpoint(
    folder: Path,
    shape: str = "tiny",
    *,
    seed: int = 0,
    quant: Recipe | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a checkpoint of the given shape (see the module) in bfloat16, in the flat layout; return its folder.

    quant: write packed weights instead, of random codes. `progress` is called with (bytes written, total bytes).
    Raises AfnextError for an unknown shape.
    """
    tokenizer = byte_tokenizer()
    config = checkpoint_config(shape, tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    eos = tokenizer.token_to_id("<|im_end|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos, "max_new_tokens": 64}))
    (folder / "processor_config.json").write_text(json.dumps({"max_audio_len": 1800}))
    if quant is not None:
        stated = config | {"quantization_config": quant.to_dict()}
        (folder / "config.json").write_text(json.dumps(stated, indent=2), encoding="utf-8")
        _write_packed(folder, ModelConfig.from_dict(stated), quant, seed, progress or (lambda done, total: None))
        return folder
    shapes = flat_shapes(ModelConfig.from_dict(config))
    _write_safetensors(folder / "model.safetensors", shapes, seed, progress or (lambda done, total: None))
    return folder


def flat_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The names of the flat layout, which `transformers` uses, and their shapes."""
    return {_flat_name(name): size for name, size in expected_shapes(config).items()}


def random_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a random checkpoint in bfloat16, one by one in the order of `shapes` (see `flat_shapes`)."""
    made: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
    for name, shape in shapes.items():
        kind = ".".join(part for part in name.split(".") if not part.isdigit()), shape
        if kind not in made:
            made = made if ".layers." in name else {}
            made[kind] = _random_tensor(name, shape, torch.Generator().manual_seed(seed + len(name)))
        yield name, made[kind]


def byte_tokenizer(texts: Iterable[str] = (), split: str = _WORD_SPLIT) -> Tokenizer:
    """A byte-level BPE tokenizer without merges: 256 bytes, the pieces of `texts`, then `SPECIAL_TOKENS`.

    split: the expression that splits text into pieces; a piece of `texts` is one token, other pieces become bytes.
    """
    pieces = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = {piece for text in texts for piece, _ in pieces.pre_tokenize_str(text)}
    words = [*alphabet, *sorted(known - set(alphabet))]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=bool(known)))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pieces
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def checkpoint_config(shape: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """The config.json of a checkpoint of `shape` (see the module). Raises AfnextError for an unknown shape."""
    kind, _, layers = shape.partition(":")
    encoder, decoder = dict(AUDIO_FLAMINGO_NEXT["audio_config"]), dict(AUDIO_FLAMINGO_NEXT["text_config"])
    if kind == "tiny" and not layers:
        encoder |= _TINY_ENCODER
        decoder |= {**_TINY_DECODER, "vocab_size": tokenizer.get_vocab_size()}
    elif kind in ("full", "full-width") and bool(layers) == (kind == "full-width"):
        if layers:
            encoder["num_hidden_layers"], decoder["num_hidden_layers"] = _layer_counts(shape, layers)
    else:
        raise AfnextError(f"unknown shape {shape!r}; choose tiny, full or full-width:ENC,DEC (as in full-width:2,4)")
    ids = tokenizer.get_vocab()
    return {
        **AUDIO_FLAMINGO_NEXT,
        "audio_token_id": ids["<sound>"],
        "audio_bos_token_id": ids["<|sound_bos|>"],
        "audio_eos_token_id": ids["<|sound_eos|>"],
        "audio_config": encoder,
        "text_config": {**decoder, "eos_token_id": ids["<|im_end|>"]},
    }


def _layer_counts(shape: str, layers: str) -> tuple[int, int]:
    try:
        encoder, decoder = (int(count) for count in layers.split(","))
    except ValueError:
        raise AfnextError(f"{shape!r} should name two layer counts, as in full-width:2,4") from None
    return encoder, decoder


def _flat_name(name: str) -> str:
    floor, _, rest = name.partition(".")
    if name.startswith("decoder.lm_head"):
        return f"language_model.{rest}"
    prefixes = {"encoder": "audio_tower", "adaptor": "multi_modal_projector", "decoder": "language_model.model"}
    return f"{prefixes[floor]}.{rest}"


def _write_safetensors(
    path: Path, shapes: dict[str, tuple[int, ...]], seed: int, progress: Callable[[int, int], None]
) -> None:
    """Stream the tensors to disk one by one, with only one in memory."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(torch.tensor(shape).prod())
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for _, tensor in random_tensors(shapes, seed):
            tensor.view(torch.int16).numpy().tofile(file)
            progress(file.tell(), offset + 8 + len(encoded))


def _write_packed(
    folder: Path, config: ModelConfig, quant: Recipe, seed: int, progress: Callable[[int, int], None]
) -> None:
    """Random tensors in the format of `quant`, made without dense weights."""
    expected = {name: Stored(one.shape, one.dtypes[:1]) for name, one in expected_tensors(config).items()}
    total = sum(math.prod(one.shape) * one.dtypes[0].itemsize for one in expected.values())
    writer = CheckpointWriter(folder, expected, quantization_metadata(quant))
    generator, done = torch.Generator().manual_seed(seed), 0
    made: dict[tuple[str, Stored], torch.Tensor] = {}
    for name, one in expected.items():
        layer, _, part = name.rpartition(".")
        codes = expected.get(f"{layer}.weight_codes")
        kind = ".".join(piece for piece in name.split(".") if not piece.isdigit()), one
        if kind not in made:
            made = made if ".layers." in name else {}
            if codes is not None and part != "bias":
                made[kind] = _random_part(name, part, one, codes, generator)
            else:
                made[kind] = _random_tensor(name, one.shape, generator).to(one.dtypes[0])
        writer.write(name, made[kind])
        done += made[kind].nbytes
        progress(done, total)
    writer.finish(quantization_metadata(quant))


def _random_part(name: str, part: str, one: Stored, codes: Stored, generator: torch.Generator) -> torch.Tensor:
    """Uniform codes, and scales that give the weights the same magnitude as `_random_tensor`."""
    signed, floating = codes.dtypes[0] == torch.int8, codes.dtypes[0].is_floating_point
    if part == "weight_codes":
        if floating:
            return torch.empty(one.shape).uniform_(-448, 448, generator=generator).to(one.dtypes[0])
        low, high = (-127, 128) if signed else (0, 256)
        return torch.randint(low, high, one.shape, dtype=one.dtypes[0], generator=generator)
    inner = codes.shape[1] * (1 if signed or floating else 2)
    if part == "weight_zeros" and len(one.shape) == 1:  # the channels' scales of nvfp4
        return torch.full(one.shape, inner**-0.5 / _E2M1_SIZE / _NVFP4_SCALE, dtype=one.dtypes[0])
    if part == "weight_zeros":
        return torch.full(one.shape, 8.0, dtype=one.dtypes[0])
    size = 258.7 if floating else 73.3 if signed else 4.6  # root mean square of the codes
    value = inner**-0.5 / size
    if one.dtypes[0].itemsize == 1:
        value = round(math.log2(inner**-0.5 / _E2M1_SIZE)) + 127 if one.dtypes[0] == E8M0 else _NVFP4_SCALE
    scales = torch.full(one.shape, value, dtype=one.dtypes[0])
    if "lm_head" in name:
        scales[PRINTABLE_IDS:] = 0
    return scales


def _random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Norm weights near 1; the rest normal with a standard deviation that keeps activations at normal magnitudes."""
    values = torch.empty(shape, dtype=torch.bfloat16)
    if "norm" in name and name.endswith("weight"):
        return values.normal_(1.0, 0.02, generator=generator)
    values.normal_(0.0, 0.02 if len(shape) < 2 else shape[1] ** -0.5, generator=generator)
    if name.endswith("lm_head.weight"):
        values[PRINTABLE_IDS:] = 0  # other bytes would be invalid UTF-8 in every answer
    return values
