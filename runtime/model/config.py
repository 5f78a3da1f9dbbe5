"""The configuration of a model: every size, id and constant that the runtime needs, read from config.json.

Three generations of configs are understood: model_type `musicflamingo` (Music Flamingo, and AF-Next today),
`audioflamingonext` (AF-Next's first upload) and `audioflamingo3` (no RoTE, no tokens around the audio). Keys may have
the Whisper spelling (`d_model`) or the current one (`hidden_size`); a key that the config omits has the default of
transformers, which such configs assume. Features that this runtime does not compute (sliding windows, YaRN, other
activations) are refused by name. Sizes are bounded, so that a forged config cannot request absurd amounts of memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

from ...quant.recipe import Recipe
from ...quant.scheme import SchemeError
from ..checkpoint_folder import DECODER_FOLDER, CheckpointFolder
from ..errors import ConfigError
from ..files import shown
from .component_config import component_sections
from .config_section import Section

MODEL_TYPES = ("musicflamingo", "audioflamingonext", "audioflamingo3")
ENCODER_TYPES = ("audioflamingo3_encoder", "musicflamingo_encoder")
DTYPES = ("bfloat16", "float16", "float32")

# AF-Next (1800 s) has the model type musicflamingo, too; Music Flamingo's 1200 s are in processor_config.json.
DEFAULT_MAX_AUDIO_SECONDS = {"musicflamingo": 1800, "audioflamingonext": 1800, "audioflamingo3": 600}

MAX_LAYERS = 512
MAX_WIDTH = 1 << 16
MAX_INTERMEDIATE = 1 << 18
MAX_VOCABULARY = 1 << 22
MAX_POSITIONS = 1 << 24
MAX_THETA = 1e12


@dataclass(frozen=True)
class EncoderConfig:
    """The audio encoder: a Whisper encoder with exact GELU and unscaled embeddings."""

    mel_bins: int
    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    max_positions: int

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.heads


@dataclass(frozen=True)
class DecoderConfig:
    """The Qwen2 decoder: RMSNorm, grouped-query attention, SwiGLU, plain RoPE."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_positions: int
    tie_word_embeddings: bool


@dataclass(frozen=True)
class RoteConfig:
    """The rotary time embedding: `dim` rotary channels on each of two axes, one frame every `frame_seconds` s."""

    theta: float
    dim: int
    frame_seconds: float


@dataclass(frozen=True)
class ModelConfig:
    """Everything about a model except its weights. `rote` and the ids around the audio are None for AF3.

    `quantization` is the recipe of its stored weights, None for dense ones.
    """

    encoder: EncoderConfig
    decoder: DecoderConfig
    rote: RoteConfig | None
    audio_token_id: int
    audio_bos_token_id: int | None
    audio_eos_token_id: int | None
    projector_bias: bool
    dtype: str
    max_audio_seconds: int
    eos_token_ids: tuple[int, ...]
    model_type: str
    quantization: Recipe | None = None

    @classmethod
    def from_folder(cls, folder: str | PathLike[str] | CheckpointFolder) -> "ModelConfig":
        """Read config.json, and processor_config.json and generation_config.json where present, in `folder`.

        NVIDIA's component layout (folders llm, sound_tower, sound_mm_projector) is read too.
        Raises ConfigError naming the file and the key.
        """
        files = CheckpointFolder.of(folder)
        top = Section(files.settings("config.json"), "config.json") if files.has("config.json") else None
        if (top is None or "text_config" not in top.values) and (files.path / DECODER_FOLDER).is_dir():
            top, audio, text = component_sections(files, top, MODEL_TYPES, ENCODER_TYPES)
        elif top is None:
            raise ConfigError(
                f"{files.path} has no config.json; give the folder of a checkpoint, or its name on the Hub."
            )
        else:
            audio, text = top.section("audio_config", required=True), top.section("text_config", required=True)
        generation, processor = files.find("generation_config.json"), "processor_config.json"
        return _model_config(
            top,
            audio,
            text,
            Section(files.settings(processor), processor),
            Section(files.settings(generation), generation),
        )

    @classmethod
    def from_dict(
        cls,
        config: Mapping[str, Any],
        processor: Mapping[str, Any] | None = None,
        generation: Mapping[str, Any] | None = None,
    ) -> "ModelConfig":
        """The same from parsed config.json, processor_config.json and generation_config.json. Raises ConfigError."""
        top = Section(config, "config.json")
        return _model_config(
            top,
            top.section("audio_config", required=True),
            top.section("text_config", required=True),
            Section({} if processor is None else processor, "processor_config.json"),
            Section({} if generation is None else generation, "generation_config.json"),
        )


def _model_config(top: Section, audio: Section, text: Section, processor: Section, generation: Section) -> ModelConfig:
    model_type = top.choice("model_type", among=MODEL_TYPES)
    top.choice("projector_hidden_act", among=("gelu",), default="gelu")
    if text.values.get("quantization_config"):
        text.error("quantization_config", "is set: the weights are quantized by another library; use the dense ones.")
    encoder = _encoder(audio)
    decoder = _decoder(text, top)
    has_rote = model_type != "audioflamingo3"
    last_id = decoder.vocab_size - 1
    return ModelConfig(
        encoder=encoder,
        decoder=decoder,
        rote=_rote(top, encoder.hidden_size) if has_rote else None,
        audio_token_id=top.integer("audio_token_id", default=151669, low=0, high=last_id),
        audio_bos_token_id=(
            top.optional_integer("audio_bos_token_id", default=151670, high=last_id) if has_rote else None
        ),
        audio_eos_token_id=(
            top.optional_integer("audio_eos_token_id", default=151671, high=last_id) if has_rote else None
        ),
        projector_bias=top.flag("projector_bias", default=True),
        dtype=_dtype(top, text),
        max_audio_seconds=processor.integer(
            "max_audio_len", default=DEFAULT_MAX_AUDIO_SECONDS[model_type], high=24 * 3600
        ),
        eos_token_ids=_eos_token_ids((generation, text, top), last_id),
        model_type=model_type,
        quantization=_quantization(top),
    )


def _quantization(top: Section) -> Recipe | None:
    stated = top.values.get("quantization_config")
    if not stated:
        return None
    try:
        return Recipe.from_dict(stated)
    except SchemeError as problem:
        top.error("quantization_config", f"is set: {problem}.")


def _encoder(audio: Section) -> EncoderConfig:
    audio.choice("model_type", among=ENCODER_TYPES, default=ENCODER_TYPES[0])
    audio.choice("activation_function", among=("gelu",), default="gelu")
    if audio.flag("scale_embedding", default=False):
        audio.error("scale_embedding", "is true; this runtime computes encoders without scaled embeddings only.")
    hidden_size = audio.integer("hidden_size", "d_model", default=1280, high=MAX_WIDTH)
    heads = audio.integer("num_attention_heads", "encoder_attention_heads", default=20, high=MAX_WIDTH)
    if hidden_size % heads:
        audio.error("num_attention_heads", f"is {heads}, which does not divide the width {hidden_size}.")
    return EncoderConfig(
        mel_bins=audio.integer("num_mel_bins", default=128, high=1024),
        hidden_size=hidden_size,
        layers=audio.integer("num_hidden_layers", "encoder_layers", default=32, high=MAX_LAYERS),
        heads=heads,
        intermediate_size=audio.integer("intermediate_size", "encoder_ffn_dim", default=5120, high=MAX_INTERMEDIATE),
        max_positions=audio.integer("max_source_positions", default=1500, high=1 << 16),
    )


def _decoder(text: Section, top: Section) -> DecoderConfig:
    text.choice("model_type", among=("qwen2",))
    text.choice("hidden_act", among=("silu",), default="silu")
    hidden_size = text.integer("hidden_size", default=4096, high=MAX_WIDTH)
    heads = text.integer("num_attention_heads", default=32, high=MAX_WIDTH)
    kv_heads = text.optional_integer("num_key_value_heads", default=32, low=1, high=MAX_WIDTH) or heads
    if heads % kv_heads:
        text.error("num_key_value_heads", f"is {kv_heads}, which does not divide the {heads} attention heads.")
    head_dim = text.optional_integer("head_dim", default=None, low=1, high=4096)
    if head_dim is None and hidden_size % heads:
        text.error("num_attention_heads", f"is {heads}, which does not divide the width {hidden_size}.")
    head_dim = head_dim or hidden_size // heads
    if head_dim % 2 or head_dim * heads > MAX_INTERMEDIATE:
        text.error(
            "head_dim", f"is {head_dim} for {heads} heads; expected an even one, {MAX_INTERMEDIATE} in all at most."
        )
    layers = text.integer("num_hidden_layers", default=32, high=MAX_LAYERS)
    _refuse_sliding_window(text, layers)
    rope_theta, factor = _rope(text, default_theta=10_000.0)
    if factor not in (None, 1.0):
        text.error("partial_rotary_factor", f"is {factor:g}; this runtime rotates the decoder's whole heads.")
    # transformers reads neither flag and always has a separate head; the loader compares them with the stored tensors.
    tied_by = text if text.values.get("tie_word_embeddings") is not None else top
    return DecoderConfig(
        vocab_size=text.integer("vocab_size", default=151_936, high=MAX_VOCABULARY),
        hidden_size=hidden_size,
        intermediate_size=text.integer("intermediate_size", default=22_016, high=MAX_INTERMEDIATE),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=text.number("rms_norm_eps", default=1e-6, high=1.0),
        rope_theta=rope_theta,
        max_positions=text.integer("max_position_embeddings", default=32_768, high=MAX_POSITIONS),
        tie_word_embeddings=tied_by.flag("tie_word_embeddings", default=False),
    )


def _refuse_sliding_window(text: Section, layers: int) -> None:
    types = text.values.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != layers or any(kind != "full_attention" for kind in types):
            text.error("layer_types", f"must list full_attention {layers} times; this runtime has no other attention.")
    elif text.flag("use_sliding_window", default=False):
        window = text.optional_integer("sliding_window", default=4096, low=1, high=MAX_POSITIONS)
        first_layer = text.integer("max_window_layers", default=28, low=0, high=MAX_POSITIONS)
        if window is not None and first_layer < layers:
            text.error(
                "sliding_window", f"is {window} from layer {first_layer} on; this runtime has full attention only."
            )


def _rope(section: Section, default_theta: float) -> tuple[float, float | None]:
    """Theta and the partial rotary factor (None: not stated), from `rope_parameters` or the older flat keys."""
    spellings = [key for key in ("rope_parameters", "rope_scaling") if section.values.get(key)]
    settings = {key: section.section(key, required=True) for key in spellings}
    for settings_section in settings.values():
        settings_section.choice("rope_type", "type", among=("default",), default="default")
        unknown = settings_section.values.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        if unknown:
            settings_section.error(
                shown(min(unknown)), "is not a setting of plain rotary embeddings; others are not supported."
            )
    theta = _agreed([section, *settings.values()], "rope_theta", MAX_THETA)
    return theta or default_theta, _agreed([section, *settings.values()], "partial_rotary_factor", 1.0)


def _agreed(sections: list[Section], key: str, high: float) -> float | None:
    """The number under `key` in the sections that have it. Raises ConfigError if they differ."""
    stated = [(section, section.number(key, high=high)) for section in sections if section.values.get(key) is not None]
    for section, value in stated[1:]:
        if value != stated[0][1]:
            section.error(key, f"is {value:g} but {stated[0][0].prefix}{key} is {stated[0][1]:g}; keep one of them.")
    return stated[0][1] if stated else None


def _rote(top: Section, encoder_width: int) -> RoteConfig:
    """RoTE rotates `factor` of the encoder's width; older configs give the rotated width as head_dim, with factor 1."""
    theta, factor = _rope(top, default_theta=1200.0)
    head_dim = top.integer("head_dim", default=encoder_width, high=MAX_WIDTH)
    factor = factor or 0.2
    dim = head_dim if factor == 1.0 else int(encoder_width * factor)
    if head_dim not in (encoder_width, dim):
        top.error("head_dim", f"is {head_dim}, but partial_rotary_factor {factor:g} of the encoder's width is {dim}.")
    if dim % 2 or not 0 < 2 * dim <= encoder_width:
        top.error(
            "partial_rotary_factor",
            f"is {factor:g} with head_dim {head_dim}, so RoTE would rotate 2 x {dim} of the encoder's {encoder_width} "
            "channels; expected an even number of them on each axis, and no more than there are.",
        )
    positions = top.number("max_position_embeddings", default=theta, high=MAX_THETA)
    if positions != theta:
        top.error("max_position_embeddings", f"is {positions:g}, but RoTE's {theta:g} (rope_theta) must be the same.")
    return RoteConfig(theta, dim, top.number("audio_frame_step", default=0.01, high=1.0) * 4)


def _dtype(top: Section, text: Section) -> str:
    section = text if top.find("dtype", "torch_dtype")[1] is None else top
    return section.choice("dtype", "torch_dtype", among=DTYPES, default="bfloat16")


def _eos_token_ids(sections: tuple[Section, ...], last_id: int) -> tuple[int, ...]:
    """The ids that end an answer, from the first of `sections` that has them; otherwise an empty tuple."""
    for section in sections:
        stated = section.values.get("eos_token_id")
        if stated is not None:
            each = stated if isinstance(stated, list) else [stated]
            ids = [Section({"eos_token_id": value}, section.file, section.prefix) for value in each]
            return tuple(one.integer("eos_token_id", low=0, high=last_id) for one in ids)
    return ()
