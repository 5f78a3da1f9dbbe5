"""The configuration of NVIDIA's component layout: folders llm, sound_tower, sound_mm_projector, each with config.json.

The top config.json, if there is one, has neither token ids nor RoTE. The ids are read from the tokenizer in the
decoder's or the top folder; other missing values have the defaults of the `-hf` conversions of those checkpoints.
"""

from collections.abc import Mapping
from typing import Any

from ..checkpoint_folder import DECODER_FOLDER, MAX_TOKENIZER_BYTES, CheckpointFolder
from ..errors import ConfigError
from .config_section import Section

COMPONENTS = (DECODER_FOLDER, "sound_tower", "sound_mm_projector")

_ID_KEYS = {
    "audio_token_id": "<sound>",
    "audio_bos_token_id": "<|sound_bos|>",
    "audio_eos_token_id": "<|sound_eos|>",
}


def component_sections(
    files: CheckpointFolder, top: Section | None, model_types: tuple[str, ...], encoder_types: tuple[str, ...]
) -> tuple[Section, Section, Section]:
    """The sections that the config of a converted checkpoint would have: top level, encoder, decoder.

    The model type is that of `top` if it is one of `model_types`, else Music Flamingo if the tokenizer has
    <|sound_bos|>, else AF3. Raises ConfigError naming the file that is missing or wrong.
    """
    text = _component(files, DECODER_FOLDER, top, "llm_cfg")
    audio = _component(files, "sound_tower", top, "sound_tower_cfg")
    if audio.values.get("model_type") in ("qwen2_audio_encoder", "whisper"):
        audio = Section({**audio.values, "model_type": encoder_types[0]}, audio.file)
    tokens = _added_tokens(files)
    values = dict(top.values) if top else {}
    if values.get("model_type") not in model_types:
        values["model_type"] = "musicflamingo" if "<|sound_bos|>" in tokens else "audioflamingo3"
    for key, token in _ID_KEYS.items():
        if key not in values and token in tokens:
            values[key] = tokens[token]
    if "audio_token_id" not in values:
        raise ConfigError(f"{files.path}: neither config.json nor the tokenizer files give the id of <sound>.")
    return Section(values, "config.json"), audio, text


def _component(files: CheckpointFolder, name: str, top: Section | None, key: str) -> Section:
    file = f"{name}/config.json"
    if files.has(file):
        return Section(files.settings(file), file)
    if top is not None and isinstance(top.values.get(key), dict):
        return top.section(key, required=True)
    raise ConfigError(f"{files.path} has no {file}; the component layout needs one for each of its parts.")


def _added_tokens(files: CheckpointFolder) -> dict[str, int]:
    """Ids of the tokens added to the base vocabulary, by spelling, from any tokenizer file that lists them."""

    def read(name: str) -> Mapping[str, Any]:
        return files.settings(files.find(name), MAX_TOKENIZER_BYTES)

    pairs: list[tuple[Any, Any]] = list(read("added_tokens.json").items())
    decoder = read("tokenizer_config.json").get("added_tokens_decoder")
    for index, token in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(token, dict) and index.isdecimal() and len(index) < 10:
            pairs.append((token.get("content"), int(index)))
    listed = read("tokenizer.json").get("added_tokens")
    for token in listed if isinstance(listed, list) else ():
        if isinstance(token, dict):
            pairs.append((token.get("content"), token.get("id")))
    found: dict[str, int] = {}
    for spelling, index in pairs:
        if not isinstance(spelling, str) or not isinstance(index, int):
            continue
        if found.setdefault(spelling, index) != index and spelling in _ID_KEYS.values():
            raise ConfigError(f"the tokenizer files disagree about the id of {spelling}; save the tokenizer again.")
    return found
