"""The layouts in which checkpoints of this family are stored: renamings of the flat one, files and shards."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

COMPONENTS = {"language_model": "llm", "audio_tower": "sound_tower", "multi_modal_projector": "sound_mm_projector"}
Weights = dict[str, torch.Tensor]


def rename(old: str, new: str) -> Callable[[str], str]:
    return lambda name: re.sub(old, new, name)


def nested(name: str) -> str:
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    return "model." + re.sub(r"^language_model\.model\.", "language_model.", name)


def duplicate(name: str) -> str:
    return nested(name).replace("model.language_model.", "model.language_model.model.", 1)


def merged_components(name: str) -> str:
    part, rest = name.split(".", 1)
    return f"{COMPONENTS[part]}." + rest.replace("linear_1", "layers.0").replace("linear_2", "layers.2")


LAYOUTS: dict[str, Callable[[str], str]] = {
    "flat": lambda name: name,
    "nested": nested,
    "duplicate nested": duplicate,
    "duplicate flat": rename(r"^language_model\.model\.", "language_model.model.model."),
    "duplicate flat, head at the top": lambda name: rename(r"^language_model\.model\.", "language_model.model.model.")(
        name
    ).replace("language_model.lm_head", "lm_head"),
    "short": rename(r"^language_model\.model\.", "language_model."),
    "merged components": merged_components,
}


def write(folder: Path, weights: Weights, shards: int = 1) -> None:
    """Write the weights as one file, or dealt out to shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(weights.items())[shard::shards])
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_components(folder: Path, weights: Weights, shards: int) -> None:
    parts: dict[str, Weights] = {name: {} for name in COMPONENTS.values()}
    for name, tensor in weights.items():
        part, rest = merged_components(name).split(".", 1)
        parts[part][rest] = tensor
    parts["sound_tower"]["sound_tower.pos_emb.freqs"] = torch.zeros(4)
    for part, tensors in parts.items():
        write(folder / part, tensors, shards)
