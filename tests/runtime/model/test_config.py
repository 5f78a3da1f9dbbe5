"""ModelConfig against the configs that transformers writes and reads, the older dialects, and hostile input."""

import copy
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afnext.runtime.errors import ConfigError
from afnext.runtime.model.config import ModelConfig, RoteConfig

SIZES = 1200.0, 1800.0


def small_config(**top: Any) -> dict[str, Any]:
    """A valid config.json of a small model, with `top` set on its top level."""
    return {
        "model_type": "musicflamingo",
        "audio_token_id": 5,
        "audio_bos_token_id": 6,
        "audio_eos_token_id": 7,
        "dtype": "bfloat16",
        "audio_config": {
            "model_type": "audioflamingo3_encoder",
            "num_mel_bins": 16,
            "hidden_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
        },
        "text_config": {
            "model_type": "qwen2",
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 56,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "eos_token_id": 2,
        },
        **top,
    }


def with_values(*changes: tuple[str, Any]) -> dict[str, Any]:
    """The small config with each dotted key set; the value `...` removes the key."""
    config = small_config()
    for path, value in changes:
        *parents, key = path.split(".")
        section = config
        for parent in parents:
            section = section[parent]
        if value is ...:
            section.pop(key)
        else:
            section[key] = value
    return config


def test_full_size_af_next(shared_data: Path) -> None:
    config = ModelConfig.from_folder(shared_data / "tokenizer" / "afnextA")
    encoder, decoder = config.encoder, config.decoder
    assert (encoder.mel_bins, encoder.hidden_size, encoder.layers, encoder.heads) == (128, 1280, 32, 20)
    assert (encoder.head_dim, encoder.intermediate_size, encoder.max_positions) == (64, 5120, 1500)
    assert (decoder.hidden_size, decoder.layers, decoder.heads, decoder.kv_heads) == (3584, 28, 28, 4)
    assert (decoder.head_dim, decoder.intermediate_size, decoder.vocab_size) == (128, 18944, 151_672)
    assert (decoder.rope_theta, decoder.rms_norm_eps, decoder.max_positions) == (15_300_000.0, 1e-6, 131_072)
    assert not decoder.tie_word_embeddings
    assert config.rote == RoteConfig(theta=1200.0, dim=256, frame_seconds=0.04)
    assert (config.audio_token_id, config.audio_bos_token_id, config.audio_eos_token_id) == (151_667, 151_670, 151_671)
    assert config.eos_token_ids == (151_645,)
    assert (config.dtype, config.max_audio_seconds, config.projector_bias) == ("bfloat16", 1800, True)


def test_class_default_ids_of_the_other_variant(shared_data: Path) -> None:
    assert ModelConfig.from_folder(shared_data / "tokenizer" / "mfdefaultB").audio_token_id == 151_669


@pytest.mark.parametrize("model_type", ["musicflamingo", "audioflamingo3"])
def test_agrees_with_transformers_on_what_it_saves(model_type: str, tmp_path: Path, seed: int) -> None:
    import transformers

    rng = random.Random(seed)
    heads, kv_heads, layers = (*rng.choice([(4, 2), (6, 3), (8, 1)]), rng.randint(1, 40))
    text: Any = transformers.Qwen2Config(
        vocab_size=rng.randint(100, 900),
        hidden_size=heads * rng.choice([4, 8, 10]),
        intermediate_size=rng.randint(1, 200),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=rng.randint(10, 10_000),
        rms_norm_eps=rng.choice([1e-5, 1e-6]),
        rope_parameters={"rope_theta": rng.choice([1e4, 15.3e6]), "rope_type": "default"},
        eos_token_id=[3, 9],
    )
    audio: Any = transformers.AudioFlamingo3EncoderConfig(
        num_mel_bins=rng.randint(1, 200),
        hidden_size=rng.choice([40, 80, 1280]),
        num_hidden_layers=rng.randint(1, 40),
        num_attention_heads=rng.choice([2, 4, 8]),
        intermediate_size=rng.randint(1, 300),
        max_source_positions=rng.randint(10, 1500),
    )
    make: dict[str, Any] = {
        "musicflamingo": transformers.MusicFlamingoConfig,
        "audioflamingo3": transformers.AudioFlamingo3Config,
    }
    extra = {"audio_bos_token_id": 51, "audio_eos_token_id": 52} if model_type == "musicflamingo" else {}
    reference = make[model_type](audio_config=audio, text_config=text, audio_token_id=50, **extra)
    reference.save_pretrained(tmp_path)
    config = ModelConfig.from_folder(tmp_path)

    encoder, decoder = config.encoder, config.decoder
    assert (encoder.mel_bins, encoder.hidden_size, encoder.layers) == (
        audio.num_mel_bins,
        audio.hidden_size,
        audio.num_hidden_layers,
    )
    assert (encoder.heads, encoder.intermediate_size, encoder.max_positions) == (
        audio.num_attention_heads,
        audio.intermediate_size,
        audio.max_source_positions,
    )
    assert (decoder.hidden_size, decoder.layers, decoder.heads, decoder.kv_heads) == (
        text.hidden_size,
        layers,
        heads,
        kv_heads,
    )
    assert (decoder.vocab_size, decoder.intermediate_size, decoder.max_positions) == (
        text.vocab_size,
        text.intermediate_size,
        text.max_position_embeddings,
    )
    assert (decoder.rope_theta, decoder.rms_norm_eps) == (text.rope_parameters["rope_theta"], text.rms_norm_eps)
    assert decoder.head_dim == text.hidden_size // heads
    assert config.eos_token_ids == (3, 9)
    if model_type == "audioflamingo3":
        assert (config.rote, config.audio_bos_token_id, config.audio_eos_token_id) == (None, None, None)
    else:
        assert (config.audio_token_id, config.audio_bos_token_id, config.audio_eos_token_id) == (50, 51, 52)
        from transformers.models.musicflamingo.modeling_musicflamingo import MusicFlamingoRotaryEmbedding

        assert config.rote is not None
        assert config.rote.dim == 2 * len(MusicFlamingoRotaryEmbedding(reference).inv_freq)
        assert config.rote.theta == reference.rope_parameters["rope_theta"]
        assert config.rote.frame_seconds == reference.audio_frame_step * 4


def test_omitted_keys_have_the_defaults_of_transformers() -> None:
    import transformers

    reference: Any = transformers.MusicFlamingoConfig()
    audio, text = reference.audio_config, reference.text_config
    config = ModelConfig.from_dict(
        {"model_type": "musicflamingo", "audio_config": {}, "text_config": {"model_type": "qwen2"}}
    )
    encoder, decoder = config.encoder, config.decoder
    assert (encoder.mel_bins, encoder.hidden_size, encoder.layers, encoder.heads) == (
        audio.num_mel_bins,
        audio.hidden_size,
        audio.num_hidden_layers,
        audio.num_attention_heads,
    )
    assert (encoder.intermediate_size, encoder.max_positions) == (audio.intermediate_size, audio.max_source_positions)
    assert (decoder.vocab_size, decoder.hidden_size, decoder.intermediate_size, decoder.layers) == (
        text.vocab_size,
        text.hidden_size,
        text.intermediate_size,
        text.num_hidden_layers,
    )
    assert (decoder.heads, decoder.kv_heads, decoder.rms_norm_eps, decoder.max_positions) == (
        text.num_attention_heads,
        text.num_key_value_heads,
        text.rms_norm_eps,
        text.max_position_embeddings,
    )
    assert decoder.rope_theta == text.rope_parameters["rope_theta"]
    assert config.rote is not None
    assert config.rote.theta == reference.rope_parameters["rope_theta"]
    assert config.rote.dim == int(reference.head_dim * reference.rope_parameters["partial_rotary_factor"])
    assert (config.audio_token_id, config.audio_bos_token_id, config.audio_eos_token_id) == (
        reference.audio_token_id,
        reference.audio_bos_token_id,
        reference.audio_eos_token_id,
    )
    assert config.projector_bias == reference.projector_bias


def test_whisper_spelling_of_the_encoder() -> None:
    modern = ModelConfig.from_dict(small_config())
    whisper = small_config()
    whisper["audio_config"] = {
        "model_type": "musicflamingo_encoder",
        "num_mel_bins": 16,
        "d_model": 40,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "scale_embedding": False,
        "activation_function": "gelu",
    }
    assert ModelConfig.from_dict(whisper) == modern


@pytest.mark.parametrize("theta", SIZES)
@pytest.mark.parametrize(
    "dialect",
    [
        {
            "rope_parameters": {"rope_theta": ..., "rope_type": "default", "partial_rotary_factor": 0.2},
            "head_dim": 1280,
        },
        {
            "rope_parameters": {"rope_theta": ..., "rope_type": "default"},
            "head_dim": 1280,
            "partial_rotary_factor": 0.2,
        },
        {"rope_theta": ..., "max_position_embeddings": ...},
        {"rope_theta": ..., "head_dim": 256, "partial_rotary_factor": 1.0},
        {"rope_theta": ..., "head_dim": 256},
        {"rope_parameters": {"rope_theta": ..., "type": "default", "partial_rotary_factor": 1}, "head_dim": 256},
        {"rope_parameters": {"rope_theta": ...}, "head_dim": 256, "partial_rotary_factor": 0.2},
    ],
)
@pytest.mark.parametrize("model_type", ["musicflamingo", "audioflamingonext"])
def test_every_spelling_of_rote_is_the_same_rotation(theta: float, dialect: dict[str, Any], model_type: str) -> None:
    text = json.dumps(dialect, default=lambda _: theta)
    config = small_config(model_type=model_type, **json.loads(text))
    config["audio_config"] |= {"hidden_size": 1280, "num_attention_heads": 20}
    assert ModelConfig.from_dict(config).rote == RoteConfig(theta=theta, dim=256, frame_seconds=0.04)


@pytest.mark.parametrize(
    "settings_",
    [{"rope_parameters": {"rope_theta": 5e6, "rope_type": "default"}}, {"rope_theta": 5e6, "rope_scaling": None}],
)
def test_rope_theta_of_the_decoder(settings_: dict[str, Any]) -> None:
    config = small_config()
    config["text_config"] |= settings_
    assert ModelConfig.from_dict(config).decoder.rope_theta == 5e6


def test_head_dim_may_differ_from_the_width_share() -> None:
    config = ModelConfig.from_dict(with_values(("text_config.head_dim", 6), ("text_config.hidden_size", 30)))
    assert (config.decoder.head_dim, config.decoder.hidden_size) == (6, 30)


@pytest.mark.parametrize(
    ("top", "text", "tied"),
    [(..., ..., False), (True, ..., True), (..., True, True), (True, False, False), (False, True, True)],
)
def test_tie_word_embeddings_of_the_decoder_goes_first(top: Any, text: Any, tied: bool) -> None:
    stated = [("tie_word_embeddings", top), ("text_config.tie_word_embeddings", text)]
    config = ModelConfig.from_dict(with_values(*[change for change in stated if change[1] is not ...]))
    assert config.decoder.tie_word_embeddings is tied


@pytest.mark.parametrize(
    ("generation", "text", "expected"),
    [(None, 2, (2,)), ({"eos_token_id": 4}, 2, (4,)), ({"eos_token_id": [4, 8]}, 2, (4, 8)), ({}, None, ())],
)
def test_eos_of_the_generation_config_goes_first(generation: Any, text: Any, expected: tuple[int, ...]) -> None:
    config = ModelConfig.from_dict(with_values(("text_config.eos_token_id", text)), generation=generation)
    assert config.eos_token_ids == expected


@pytest.mark.parametrize(
    ("model_type", "processor", "seconds"),
    [
        ("musicflamingo", {"max_audio_len": 1200}, 1200),
        ("musicflamingo", None, 1800),
        ("audioflamingonext", {}, 1800),
        ("audioflamingo3", None, 600),
        ("audioflamingo3", {"max_audio_len": 900}, 900),
    ],
)
def test_longest_audio(model_type: str, processor: dict[str, Any] | None, seconds: int) -> None:
    config = ModelConfig.from_dict(small_config(model_type=model_type), processor=processor)
    assert config.max_audio_seconds == seconds


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ([("dtype", ...), ("torch_dtype", "float16")], "float16"),
        ([("dtype", ...), ("text_config.torch_dtype", "float32")], "float32"),
        ([("dtype", ...)], "bfloat16"),
    ],
)
def test_dtype_spellings(changes: list[tuple[str, Any]], dtype: str) -> None:
    assert ModelConfig.from_dict(with_values(*changes)).dtype == dtype


def test_full_attention_in_spite_of_window_settings() -> None:
    window = ("text_config.use_sliding_window", True), ("text_config.sliding_window", 8)
    ModelConfig.from_dict(with_values(*window, ("text_config.max_window_layers", 3)))
    ModelConfig.from_dict(with_values(*window, ("text_config.layer_types", ["full_attention"] * 3)))
    ModelConfig.from_dict(with_values(("text_config.sliding_window", 8)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([("model_type", ...)], "config.json: model_type is missing"),
        ([("model_type", "llava")], "model_type is 'llava'; this runtime knows musicflamingo"),
        ([("audio_config", ...)], "config.json: audio_config is missing"),
        ([("text_config", [1])], "text_config is a list; expected a JSON object"),
        ([("text_config.model_type", "llama")], "text_config.model_type is 'llama'"),
        ([("text_config.model_type", ...)], "text_config.model_type is missing"),
        ([("audio_config.model_type", "whisper")], "audio_config.model_type is 'whisper'"),
        ([("audio_config.activation_function", "relu")], "audio_config.activation_function is 'relu'"),
        ([("audio_config.scale_embedding", True)], "audio_config.scale_embedding is true"),
        ([("audio_config.num_attention_heads", 3)], "audio_config.num_attention_heads is 3, which does not divide"),
        ([("audio_config.d_model", 80)], "audio_config.d_model is 80 but hidden_size is 40"),
        ([("audio_config.num_hidden_layers", 0)], "audio_config.num_hidden_layers is 0; expected an integer from 1"),
        ([("audio_config.num_mel_bins", 128.0)], "audio_config.num_mel_bins is 128.0; expected an integer"),
        ([("audio_config.num_mel_bins", True)], "audio_config.num_mel_bins is True; expected an integer"),
        ([("audio_config.hidden_size", "40")], "audio_config.hidden_size is '40'; expected an integer"),
        ([("audio_config.hidden_size", 1 << 40)], "audio_config.hidden_size is 1099511627776; expected an integer"),
        ([("text_config.hidden_size", -32)], "text_config.hidden_size is -32"),
        ([("text_config.vocab_size", 10**12)], "text_config.vocab_size is 1000000000000"),
        ([("text_config.num_hidden_layers", 10**6)], "text_config.num_hidden_layers is 1000000"),
        ([("text_config.num_key_value_heads", 3)], "text_config.num_key_value_heads is 3, which does not divide"),
        ([("text_config.num_attention_heads", 6)], "text_config.num_attention_heads is 6, which does not divide"),
        ([("text_config.head_dim", 7)], "text_config.head_dim is 7"),
        ([("text_config.hidden_act", "gelu")], "text_config.hidden_act is 'gelu'"),
        ([("text_config.rms_norm_eps", 0)], "text_config.rms_norm_eps is 0; expected a number above 0"),
        ([("text_config.rms_norm_eps", float("nan"))], "text_config.rms_norm_eps is nan"),
        ([("text_config.rope_theta", float("inf"))], "text_config.rope_theta is inf"),
        ([("text_config.rope_scaling", {"type": "yarn", "factor": 4.0})], "text_config.rope_scaling.type is 'yarn'"),
        ([("text_config.rope_parameters", {"rope_type": "yarn"})], "text_config.rope_parameters.rope_type is 'yarn'"),
        ([("text_config.rope_parameters", {"mrope_section": [1]})], "'mrope_section' is not a setting of plain rotary"),
        (
            [("text_config.rope_parameters", {"rope_theta": 5.0}), ("text_config.rope_theta", 6.0)],
            "text_config.rope_parameters.rope_theta is 5 but text_config.rope_theta is 6",
        ),
        ([("text_config.partial_rotary_factor", 0.5)], "text_config.partial_rotary_factor is 0.5"),
        ([("text_config.use_sliding_window", True), ("text_config.max_window_layers", 1)], "sliding_window is 4096"),
        ([("text_config.layer_types", ["full_attention", "sliding_attention", "full_attention"])], "layer_types"),
        ([("text_config.quantization_config", {"bits": 4})], "text_config.quantization_config is set"),
        ([("rope_parameters", {"rope_type": "linear"})], "config.json: rope_parameters.rope_type is 'linear'"),
        ([("rope_theta", 1800), ("max_position_embeddings", 1200)], "max_position_embeddings is 1200, but RoTE's 1800"),
        ([("head_dim", 16)], "head_dim is 16, but partial_rotary_factor 0.2 of the encoder's width is 8"),
        ([("partial_rotary_factor", 0.9)], "RoTE would rotate 2 x 36 of the encoder's 40 channels"),
        ([("partial_rotary_factor", 1.0)], "RoTE would rotate 2 x 40 of the encoder's 40 channels"),
        ([("partial_rotary_factor", 0.23)], "RoTE would rotate 2 x 9 "),
        ([("audio_token_id", 64)], "audio_token_id is 64; expected an integer from 0 to 63"),
        ([("audio_bos_token_id", -1)], "audio_bos_token_id is -1"),
        ([("text_config.eos_token_id", [2, 64])], "text_config.eos_token_id is 64"),
        ([("dtype", "int8")], "dtype is 'int8'; this runtime knows bfloat16, float16, float32"),
        ([("torch_dtype", "float16")], "torch_dtype is 'float16' but dtype is 'bfloat16'"),
        ([("projector_bias", 1)], "projector_bias is 1; expected true or false"),
        ([("projector_hidden_act", "relu")], "projector_hidden_act is 'relu'"),
        ([("audio_frame_step", -0.01)], "audio_frame_step is -0.01"),
    ],
)
def test_refusals_name_file_and_key(changes: list[tuple[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(with_values(*changes))
    assert str(caught.value).startswith("config.json: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0"), (-1, "-1"), (10**400, "a huge integer"), (math.nan, "nan"), (math.inf, "inf"), ("60", "'60'")],
)
def test_an_impossible_limit_of_seconds_is_refused(seconds: object, shown: str) -> None:
    with pytest.raises(ConfigError, match=rf"^processor_config\.json: max_audio_len is {shown}; expected"):
        ModelConfig.from_dict(small_config(), processor={"max_audio_len": seconds})


def test_refusals_name_the_other_files() -> None:
    with pytest.raises(ConfigError, match=r"^generation_config\.json: eos_token_id is 'stop'"):
        ModelConfig.from_dict(small_config(), generation={"eos_token_id": "stop"})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "config.json is not valid JSON"),
        (b"\xff\xfe{}", "config.json is not valid JSON"),
        (b"[1]", "config.json holds a JSON list, not an object"),
        (b'{"model_type": "a", "model_type": "b"}', "config.json: the key 'model_type' occurs twice"),
        (b"[" * 200_000, "config.json is not valid JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "config.json is not valid JSON"),
        (b" " * ((1 << 22) + 1), "config.json is longer than 4,194,304 bytes"),
    ],
)
def test_damaged_files(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_folder(tmp_path)
    assert message in str(caught.value)


def test_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        ModelConfig.from_folder(tmp_path)
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        ModelConfig.from_folder(tmp_path / "absent")


def write_components(folder: Path, tokens: dict[str, int], top: dict[str, Any] | None = None) -> dict[str, Any]:
    """A folder in NVIDIA's component layout with the sizes of `small_config`, which is returned."""
    config = small_config()
    parts = {"llm": config["text_config"], "sound_tower": config["audio_config"], "sound_mm_projector": {}}
    for name, values in parts.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(values))
    added = {str(index): {"content": token} for token, index in tokens.items()}
    (folder / "llm" / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    if top is not None:
        (folder / "config.json").write_text(json.dumps(top))
    return config


@pytest.mark.parametrize("top", [None, {"model_type": "llava_llama", "llm_cfg": "llm"}])
def test_component_layout(top: dict[str, Any] | None, tmp_path: Path) -> None:
    config = write_components(tmp_path, {"<sound>": 5, "<|sound_bos|>": 6, "<|sound_eos|>": 7}, top)
    assert ModelConfig.from_folder(tmp_path) == ModelConfig.from_dict(config)


def test_component_layout_of_af3(tmp_path: Path) -> None:
    config = write_components(tmp_path, {"<sound>": 5})
    tower = config["audio_config"] | {"model_type": "qwen2_audio_encoder"}
    (tmp_path / "sound_tower" / "config.json").write_text(json.dumps(tower))
    assert ModelConfig.from_folder(tmp_path) == ModelConfig.from_dict(config | {"model_type": "audioflamingo3"})


def test_component_layout_with_the_parts_inside_the_top_config(tmp_path: Path) -> None:
    config = small_config()
    top = {"llm_cfg": config["text_config"], "sound_tower_cfg": config["audio_config"], "audio_token_id": 5}
    (tmp_path / "llm").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(top | {"model_type": "audioflamingo3"}))
    assert ModelConfig.from_folder(tmp_path) == ModelConfig.from_dict(config | {"model_type": "audioflamingo3"})


def test_component_layout_refusals(tmp_path: Path) -> None:
    write_components(tmp_path, {})
    with pytest.raises(ConfigError, match=r"give the id of <sound>"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "llm" / "added_tokens.json").write_text('{"<sound>": 5}')
    (tmp_path / "llm" / "tokenizer.json").write_text('{"added_tokens": [{"content": "<sound>", "id": 9}]}')
    with pytest.raises(ConfigError, match=r"disagree about the id of <sound>"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "llm" / "tokenizer.json").unlink()
    (tmp_path / "llm" / "config.json").write_text('{"model_type": "qwen2", "hidden_size": 0}')
    with pytest.raises(ConfigError, match=r"^llm/config\.json: hidden_size is 0"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "sound_tower" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"has no sound_tower/config\.json"):
        ModelConfig.from_folder(tmp_path)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**400, -(2**63)]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
KEYS = [
    *small_config(),
    *[f"audio_config.{key}" for key in (*small_config()["audio_config"], "d_model", "activation_function")],
    *[f"text_config.{key}" for key in (*small_config()["text_config"], "rope_parameters", "rope_theta", "layer_types")],
    "rope_parameters",
    "head_dim",
    "partial_rotary_factor",
    "text_config.head_dim",
    "text_config.tie_word_embeddings",
]


@settings(max_examples=300)
@given(st.lists(st.tuples(st.sampled_from(KEYS), JSON), min_size=1, max_size=4))
def test_any_json_value_is_understood_or_refused(changes: list[tuple[str, Any]]) -> None:
    config = small_config()
    for path, value in changes:
        section, _, key = path.rpartition(".")
        target = config.get(section, config) if section else config
        if isinstance(target, dict):
            target[key] = copy.deepcopy(value)
    try:
        understood = ModelConfig.from_dict(config)
    except ConfigError:
        return
    assert understood.decoder.heads % understood.decoder.kv_heads == 0
    assert understood.encoder.head_dim * understood.encoder.heads == understood.encoder.hidden_size <= 1 << 16


@settings(max_examples=100)
@given(JSON, JSON, JSON)
def test_any_json_document_is_refused(config: Any, processor: Any, generation: Any) -> None:
    with pytest.raises(ConfigError):
        ModelConfig.from_dict(config, processor, generation)
