"""The names and shapes of the parameters: canonical names, and those of each stored layout.

The runtime's modules use only canonical names, such as `encoder.layers.0.fc1.weight`, `adaptor.linear_1.bias`,
`decoder.layers.0.self_attn.q_proj.weight`, `decoder.lm_head.weight`. Checkpoint layouts differ only in prefixes:
`audio_tower` or `sound_tower`, with or without a leading `model.`, and so on. A separate Qwen2 backbone has only
`model.`.
"""

import re

from .config import DecoderConfig, EncoderConfig, ModelConfig

Shapes = dict[str, tuple[int, ...]]
PARTS = ("encoder", "adaptor", "embeddings", "decoder layers", "lm_head")
ENCODER_LAYERS = "encoder.layers."

_LAYOUTS = (
    (re.compile(r"(model\.)?audio_tower\.|sound_tower\."), "encoder."),
    (re.compile(r"(model\.)?multi_modal_projector\."), "adaptor."),
    (re.compile(r"sound_mm_projector\.layers\.0\."), "adaptor.linear_1."),
    (re.compile(r"sound_mm_projector\.layers\.2\."), "adaptor.linear_2."),
    (re.compile(r"((language_model|llm)\.)?lm_head\."), "decoder.lm_head."),
    (re.compile(r"llm\.model\.|model\.language_model\.(model\.)?|language_model\.(model\.){0,2}"), "decoder."),
    (re.compile(r"model\.(?=layers\.|embed_tokens\.|norm\.)"), "decoder."),
)
# RoTE's frequencies, which follow from the config; the first conversions stored them.
_IGNORED = re.compile(r"((model\.)?audio_tower|sound_tower(\.sound_tower)?)\.pos_emb\.freqs")


def canonical_name(stored: str) -> str | None:
    """The canonical name of the tensor called `stored` in any known layout; None for a buffer that is not needed.

    A name of an unknown layout, or one that is already canonical, is returned unchanged.
    """
    if _IGNORED.fullmatch(stored):
        return None
    for prefix, canonical in _LAYOUTS:
        match = prefix.match(stored)
        if match:
            return canonical + stored[match.end() :]
    return stored


def part_of(name: str) -> str:
    """The one of PARTS that the parameter with this canonical name belongs to."""
    if name.startswith("decoder."):
        return {"embed_tokens": "embeddings", "lm_head": "lm_head"}.get(name.split(".")[1], "decoder layers")
    return name.split(".")[0]


def expected_shapes(config: ModelConfig) -> Shapes:
    """Canonical name and shape of every parameter of the model; `decoder.lm_head.weight` only when it is not tied."""
    return {
        **_under("encoder.", _encoder(config.encoder)),
        **_under("adaptor.", _adaptor(config)),
        **_under("decoder.", _decoder(config.decoder)),
    }


def _encoder(config: EncoderConfig) -> Shapes:
    width, inner = config.hidden_size, config.intermediate_size
    layer = {
        **_linear("self_attn.q_proj", width, width),
        **_linear("self_attn.k_proj", width, width, bias=False),
        **_linear("self_attn.v_proj", width, width),
        **_linear("self_attn.out_proj", width, width),
        **_layer_norm("self_attn_layer_norm", width),
        **_linear("fc1", inner, width),
        **_linear("fc2", width, inner),
        **_layer_norm("final_layer_norm", width),
    }
    shapes: Shapes = {
        "conv1.weight": (width, config.mel_bins, 3),
        "conv1.bias": (width,),
        "conv2.weight": (width, width, 3),
        "conv2.bias": (width,),
        "embed_positions.weight": (config.max_positions, width),
        **_layer_norm("layer_norm", width),
    }
    for index in range(config.layers):
        shapes |= _under(f"layers.{index}.", layer)
    return shapes


def _adaptor(config: ModelConfig) -> Shapes:
    width = config.decoder.hidden_size
    return {
        **_linear("linear_1", width, config.encoder.hidden_size, bias=config.projector_bias),
        **_linear("linear_2", width, width, bias=config.projector_bias),
    }


def _decoder(config: DecoderConfig) -> Shapes:
    width, inner = config.hidden_size, config.intermediate_size
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    layer = {
        "input_layernorm.weight": (width,),
        **_linear("self_attn.q_proj", query, width),
        **_linear("self_attn.k_proj", key, width),
        **_linear("self_attn.v_proj", key, width),
        **_linear("self_attn.o_proj", width, query, bias=False),
        "post_attention_layernorm.weight": (width,),
        **_linear("mlp.gate_proj", inner, width, bias=False),
        **_linear("mlp.up_proj", inner, width, bias=False),
        **_linear("mlp.down_proj", width, inner, bias=False),
    }
    shapes: Shapes = {"embed_tokens.weight": (config.vocab_size, width), "norm.weight": (width,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, width)
    for index in range(config.layers):
        shapes |= _under(f"layers.{index}.", layer)
    return shapes


def _linear(name: str, out_features: int, in_features: int, *, bias: bool = True) -> Shapes:
    weight: Shapes = {f"{name}.weight": (out_features, in_features)}
    return weight | {f"{name}.bias": (out_features,)} if bias else weight


def _layer_norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _under(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}
