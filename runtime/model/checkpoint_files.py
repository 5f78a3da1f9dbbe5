"""Which files hold the weights of a checkpoint: one file or shards with an index, in one folder or NVIDIA's three."""

import re
from pathlib import Path
from typing import NoReturn

from ...quant.convert import INDEX_FILE
from ..checkpoint_folder import DECODER_FOLDER
from ..errors import CheckpointError
from ..files import read_json_object, shown
from .component_config import COMPONENTS
from .safetensors_header import MAX_HEADER_BYTES, MAX_TENSORS

MAX_SHARDS = 1024
SINGLE_FILE = "model.safetensors"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# A plain file name: no separator, no drive and no leading dot that could lead out of the folder.
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")


def refuse_adapter(folder: Path) -> None:
    """Raise CheckpointError if there is a PEFT adapter beside the weights, which would not be applied."""
    for place in (folder, folder / DECODER_FOLDER):
        found = [name for name in ADAPTER_FILES if (place / name).exists()]
        if found:
            raise CheckpointError(
                f"{place} holds a PEFT adapter ({found[0]}), which this runtime does not apply. Merge it into the "
                "weights (peft's merge_and_unload, then save_pretrained), or remove its files to go without it."
            )


def weight_parts(folder: Path) -> tuple[str, ...]:
    """The subfolders of `folder` that hold weights: "" for itself, or NVIDIA's components.

    Raises CheckpointError if some of the components are missing.
    """
    if _has_safetensors(folder):
        return ("",)
    present = [name for name in COMPONENTS if (folder / name).is_dir()]
    if not present:
        return ("",)
    if len(present) < len(COMPONENTS):
        missing = ", ".join(name for name in COMPONENTS if name not in present)
        raise CheckpointError(f"{folder} has {', '.join(present)} but lacks {missing}; download the whole checkpoint.")
    return COMPONENTS


def _has_safetensors(folder: Path) -> bool:
    return (folder / SINGLE_FILE).exists() or (folder / INDEX_FILE).exists()


def part_files(folder: Path, part: str) -> dict[Path, set[str] | None]:
    """The safetensors files of one part, each with its tensor names by the index (None: there is no index).

    `part` is "" or a folder within `folder`. Raises CheckpointError for pickle, for a missing file or index, and for an
    index that is damaged or refers to files outside the folder.
    """
    place = folder / part if part else folder
    label = f"{part}/" if part else ""
    single, index = place / SINGLE_FILE, place / INDEX_FILE
    if single.exists() and index.exists():
        raise CheckpointError(f"{place} has both {SINGLE_FILE} and {INDEX_FILE}; remove the one that is out of date.")
    if single.exists():
        return {single: None}
    if not index.exists():
        _raise_nothing_to_load(place)
    weight_map = read_json_object(index, label + INDEX_FILE, CheckpointError, MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{label}{INDEX_FILE} has no weight_map of names to files; download it again.")
    if len(weight_map) > MAX_TENSORS:
        raise CheckpointError(
            f"{label}{INDEX_FILE} names {len(weight_map):,} tensors; at most {MAX_TENSORS:,} are accepted."
        )
    shards: dict[Path, set[str] | None] = {}
    listed: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise CheckpointError(
                f"{label}{INDEX_FILE} puts tensor {shown(name)} into {shown(shard)}; "
                "only .safetensors files that lie beside it are read."
            )
        listed.setdefault(shard, set()).add(name)
    if len(listed) > MAX_SHARDS:
        raise CheckpointError(f"{label}{INDEX_FILE} names {len(listed):,} files; at most {MAX_SHARDS:,} are accepted.")
    for shard, names in sorted(listed.items()):
        if not (place / shard).is_file():
            raise CheckpointError(f"{label}{shard} is missing, though {label}{INDEX_FILE} names it; download it again.")
        shards[place / shard] = names
    return shards


def _raise_nothing_to_load(place: Path) -> NoReturn:
    files = sorted(path.name for path in place.iterdir() if path.is_file())
    pickles = [name for name in files if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        raise CheckpointError(
            f"{place} holds its weights as pickle ({first_five(pickles)}), which is refused, since reading it can run "
            "code; convert it to safetensors first."
        )
    shards = [name for name in files if name.endswith(".safetensors")]
    hint = f" It has {first_five(shards)}, but no index." if shards else ""
    raise CheckpointError(f"{place} has neither {SINGLE_FILE} nor {INDEX_FILE}.{hint} Download the whole checkpoint.")


def first_five(items: list[str]) -> str:
    """The first five items, each shortened to 200 characters, for an error message."""
    names = ", ".join(item if len(item) <= 200 else f"{item[:197]}..." for item in items[:5])
    return names + (", ..." if len(items) > 5 else "")
