"""Random weights as GGUF files, to compare the speed of llama.cpp with afnext's. Needs the package `gguf`.

    bf16    the weights of `random_checkpoint.py` themselves, so that outputs can be compared
    q8_0    32 weights of 8 bits share a scale: 8.5 bits per weight
    q4_0    32 weights of 4 bits share a scale: 4.5 bits per weight; the lm_head is Q6_K, 6.6 bits, the mix that
            llama.cpp itself uses for Q4_0
    q4_k_m  llama.cpp's mix: Q4_K, 4.5 bits, with Q6_K for the lm_head and, in half of the layers, for the values'
            projection and the down projection

Packed weights are random codes: packing dense ones would take minutes and not change the speed. The layers repeat the
same blocks, so the disk bounds writing, and one layer is in memory.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch

from ...runtime.model.config import DecoderConfig, EncoderConfig, ModelConfig
from ..core.random_checkpoint import flat_shapes, random_tensors

# The layout of a block in ggml-common.h, its number of weights, and the standard deviation of its random codes.
_BLOCKS = {
    "q4_0": (np.dtype([("scale", "<f2"), ("codes", "u1", 16)]), 32, 4.6),
    "q4_k": (np.dtype([("scale", "<f2"), ("least", "<f2"), ("scales", "u1", 12), ("codes", "u1", 128)]), 256, 4.6),
    "q6_k": (np.dtype([("codes", "u1", 192), ("scales", "i1", 16), ("scale", "<f2")]), 256, 18.5),
    "q8_0": (np.dtype([("scale", "<f2"), ("codes", "i1", 32)]), 32, 73.9),
}
KINDS = ("bf16", "q8_0", "q4_0", "q4_k_m")
_ONES = np.array([1] * 8 + [0x11] * 4, np.uint8)  # Q4_K's eight scales and eight minimums, of 6 bits, all 1
_BACKBONE = "language_model."
_HEAD = f"{_BACKBONE}lm_head.weight"
_LAYER_NORM_EPS = 1e-5  # Whisper's; no config has it


def write_random_backbone(path: Path, config: ModelConfig, kind: str = "q4_0", seed: int = 0) -> Path:
    """Write the decoder of `config` as a Qwen2 of one of KINDS, with a vocabulary of bytes; return `path`.

    Raises ValueError for "q4_k_m" if a row is no multiple of 256 weights.
    """
    decoder = config.decoder
    writer = gguf.GGUFWriter(path, "qwen2")
    _describe_backbone(writer, decoder)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, decoder.layers)
    shapes = {name: shape for name, shape in flat_shapes(config).items() if name.startswith(_BACKBONE)}
    packed = {name: kind for name, shape in shapes.items() if len(shape) == 2 and kind != "bf16"}
    if kind == "q4_k_m":
        if any(shapes[name][1] % 256 for name in packed):
            raise ValueError("q4_k_m takes rows of a multiple of 256 weights")
        packed = {name: "q6_k" if _has_more_bits(name, decoder.layers) else "q4_k" for name in packed}
    if kind == "q4_0":
        # llama.cpp's choice: Q6_K, or Q8_0 if Q6_K's blocks do not fill the rows.
        packed[_HEAD] = "q6_k" if decoder.hidden_size % _BLOCKS["q6_k"][1] == 0 else "q8_0"
    called = {name: _called(names, name.removeprefix(_BACKBONE)) for name in shapes}
    _write(writer, shapes, called, packed, seed)
    return path


def write_random_encoder(path: Path, config: ModelConfig, kind: str = "bf16", seed: int = 0) -> Path:
    """Write the encoder and the adaptor of `config`, in "bf16" or "q8_0", as llama.cpp's projector for Music Flamingo.

    Its convolutions and positions are float32, as in llama.cpp's conversion. The format has no RoTE.
    """
    writer = gguf.GGUFWriter(path, "clip")
    _describe_encoder(writer, config.encoder, config.decoder.hidden_size)
    # The second convolution and linear layer are numbered as if they were blocks.
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, max(config.encoder.layers, 3))
    shapes = {name: shape for name, shape in flat_shapes(config).items() if not name.startswith(_BACKBONE)}
    packed = {name: kind for name, shape in shapes.items() if kind != "bf16" and not _is_float32(name, shape)}
    called = {name: _called(names, name.replace("multi_modal", "audio.multi_modal")) for name in shapes}
    _write(writer, shapes, called, packed, seed)
    return path


def _has_more_bits(name: str, layers: int) -> bool:
    """Whether llama.cpp's Q4_K_M stores a matrix in Q6_K."""
    if not name.endswith(("v_proj.weight", "down_proj.weight")):
        return name == _HEAD
    layer, edge = int(name.partition(".layers.")[2].partition(".")[0]), layers // 8
    return layer < edge or layer >= 7 * layers // 8 or (layer - edge) % 3 == 2


def _called(names: gguf.TensorNameMap, name: str) -> str:
    found = names.get_name(name, (".weight", ".bias"))
    assert found is not None, name
    return found


def _describe_backbone(writer: gguf.GGUFWriter, config: DecoderConfig) -> None:
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    # llama.cpp's audio input tokenizes <sound>, and needs nothing else from the vocabulary.
    tokens = ["<sound>", *(f"[{i}]" for i in range(1, config.vocab_size))]
    kinds = [gguf.TokenType.CONTROL, *[gguf.TokenType.UNUSED] * (config.vocab_size - 1)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["[ 1]"])  # llama.cpp requires at least one


def _describe_encoder(writer: gguf.GGUFWriter, config: EncoderConfig, width: int) -> None:
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_clip_has_audio_encoder(True)
    writer.add_clip_projector_type(gguf.VisionProjectorType.MUSIC_FLAMINGO)
    writer.add_audio_projection_dim(width)
    writer.add_audio_embedding_length(config.hidden_size)
    writer.add_audio_feed_forward_length(config.intermediate_size)
    writer.add_audio_block_count(config.layers)
    writer.add_audio_head_count(config.heads)
    writer.add_audio_num_mel_bins(config.mel_bins)
    writer.add_audio_attention_layernorm_eps(_LAYER_NORM_EPS)


def _write(
    writer: gguf.GGUFWriter,
    shapes: Mapping[str, tuple[int, ...]],
    called: Mapping[str, str],
    packed: Mapping[str, str],
    seed: int,
) -> None:
    """packed: the kind of each tensor that is stored in blocks; the others are bfloat16 or float32."""
    dense = {name: shape for name, shape in shapes.items() if name not in packed}
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        if name in packed:
            block, weights, _ = _BLOCKS[packed[name]]
            stored, nbytes = gguf.GGMLQuantizationType[packed[name].upper()], size // weights * block.itemsize
        elif _is_float32(name, shape):
            stored, nbytes = gguf.GGMLQuantizationType.F32, 4 * size
        else:
            stored, nbytes = gguf.GGMLQuantizationType.BF16, 2 * size
        turned = (*shape, 1) if "conv" in name and len(shape) == 1 else shape
        writer.add_tensor_info(called[name], turned, np.dtype(np.float32), nbytes, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random_dense = random_tensors(dense, seed)
    random_packed = _random_blocks({name: shapes[name] for name in packed}, packed, seed)
    for name, shape in shapes.items():
        if name in packed:
            writer.write_tensor_data(next(random_packed))
        else:
            _, tensor = next(random_dense)
            data = tensor.float().numpy() if _is_float32(name, shape) else tensor.view(torch.int16).numpy()
            writer.write_tensor_data(data)
    writer.close()


def _is_float32(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 1 or "conv" in name or "positions" in name


def _random_blocks(shapes: Mapping[str, tuple[int, ...]], kinds: Mapping[str, str], seed: int) -> Iterator[np.ndarray]:
    """Blocks of random codes whose weights have the standard deviation of a random checkpoint's."""
    made: dict[tuple[str, str, tuple[int, ...]], np.ndarray] = {}
    generator = np.random.default_rng(seed)
    for name, shape in shapes.items():
        kind = ".".join(part for part in name.split(".") if not part.isdigit()), kinds[name], shape
        if kind not in made:
            made = made if ".layers." in name else {}
            packed_as = kinds[name]
            block, weights, deviation = _BLOCKS[packed_as]
            blocks = np.frombuffer(generator.bytes(int(np.prod(shape)) // weights * block.itemsize), block).copy()
            blocks["scale"] = shape[1] ** -0.5 / deviation
            if packed_as == "q6_k":
                blocks["scales"] = 1
            if packed_as == "q4_k":  # codes of 0 to 15, times the scale, less the minimum
                blocks["least"], blocks["scales"] = 7.5 * blocks["scale"], _ONES
            made[kind] = blocks
        yield made[kind]
