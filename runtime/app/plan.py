"""The command `afnext plan`: a memory plan for a device, which need not be present."""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from rich.console import Group, RenderableType
from rich.table import Table

from ...kernels.device_state import free_memory
from ...kernels.devices import Device, DeviceError, device_named
from ..checkpoint_folder import CheckpointFolder
from ..engine.memory import MemoryPlan, parse_bytes, shown_bytes
from ..model.config import ModelConfig
from ..model.download import GGUF_SUFFIX
from ..model.hub import resolve
from ..model.opened import stored_config
from ..model.published import AUDIO_FLAMINGO_NEXT

_AMOUNT = re.compile(r"[\d.]+\s*[kmgt](ib?|b)?")
_GIVE = "give an amount of memory, such as 8GB, or a known GPU, such as rtx3060."
_PLACES = {"device": "GPU", "host": "host", "file": "file"}


@dataclass(frozen=True)
class Target:
    """The target device of a plan: display name, bytes, and whether it is a GPU."""

    name: str
    memory: int
    gpu: bool

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Parse an amount ("8GB"), the name of a known GPU ("rtx3060", "RTX 3060", "3060"), "cpu" for this machine, or
        one of its torch devices ("cuda", "cuda:1"). Raises DeviceError or MemoryPlanError for anything else."""
        name = text.strip().lower()
        if _AMOUNT.fullmatch(name):
            return cls(f"a GPU with {text}", parse_bytes(text), True)
        if name == "cpu":
            return cls("this machine's free memory", free_memory(torch.device("cpu")), False)
        if name.split(":")[0] == "cuda":
            device = _cuda_device(name)
            return cls(f"what {torch.cuda.get_device_name(device)} has free", free_memory(device), True)
        known = _known_gpu(text)
        return cls(known.name, known.memory, True)


def _cuda_device(name: str) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = name.removeprefix("cuda").removeprefix(":") or "0"
    if not count:
        raise DeviceError(f"this machine has no GPU that torch can use; {_GIVE}")
    if not index.isdigit() or int(index) >= count:
        raise DeviceError(f"{name!r} is not a GPU of this machine, which has cuda:0 to cuda:{count - 1}; {_GIVE}")
    return torch.device("cuda", int(index))


def _known_gpu(text: str) -> Device:
    """The known GPU called `text`, with or without its maker and series. Raises DeviceError with advice."""
    name = re.sub(r"nvidia|geforce|[\s_-]", "", text.lower())
    for spelling in (name, f"rtx{name}"):
        with suppress(DeviceError):
            return device_named(spelling)
    if name.isdigit() and len(name) < 4:
        raise DeviceError(f"{text!r} has no unit; write {name}GB for a GPU with that much memory.")
    try:
        return device_named(text)
    except DeviceError as error:
        raise DeviceError(f"{error}, or give an amount of memory, such as 16GB.") from None


def model_config(model: str | PathLike[str] | None) -> ModelConfig:
    """The config of a checkpoint folder, a GGUF file, a config.json, or a name on the Hub (its weights are not
    downloaded).

    None is the published Audio Flamingo Next. Raises CheckpointError or ConfigError.
    """
    if model is None:
        return ModelConfig.from_dict(AUDIO_FLAMINGO_NEXT, {"max_audio_len": 1800})
    path = Path(model)
    if path.is_file() and path.suffix.lower() != GGUF_SUFFIX:
        return ModelConfig.from_dict(CheckpointFolder(path.parent).settings(path.name))
    return stored_config(resolve(model, weights=False))


def view(plan: MemoryPlan, target: Target, changes: Sequence[str] = ()) -> RenderableType:
    """The plan as a table. changes: changes to the requested settings that make it fit."""
    rows = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("part", "where", "bytes", ""):
        rows.add_column(column, justify="right" if column == "bytes" else "left")
    place = _PLACES if target.gpu else {**_PLACES, "device": "memory"}
    for part in plan.parts:
        rows.add_row(part.name, place[part.place], f"{'' if part.exact else '<= '}{part.nbytes:,}", part.detail)
    rows.add_row("total", place["device"], f"{plan.total:,}", f"of {plan.memory:,}, {target.name}", style="bold")
    settings = (
        f"KV pages of {plan.page_size} tokens ({plan.page_bytes:,} bytes), prefill chunks of {plan.chunk_size} tokens, "
        f"windows encoded {plan.encode_batch} at a time. Projected from the config, not measured."
    )
    chosen = [f"Chosen so that it fits: {', '.join(changes)}."] if changes else []
    return Group(rows, "", settings, *chosen, _verdict(plan), *_savings(plan))


def _verdict(plan: MemoryPlan) -> str:
    longest = plan.longest_audio()
    if plan.fits:
        return f"It fits, {shown_bytes(plan.spare)} to spare. Longest recording with these settings: {longest} s."
    shorter = "" if longest is None else f" These settings hold {longest} s of audio."
    return f"It does not fit: {shown_bytes(-plan.spare)} too much. {plan.advice()}{shorter}"


def _savings(plan: MemoryPlan) -> list[str]:
    savings = plan.savings()
    if not savings:
        return []
    return ["What would free memory:", *(f"  {change}: {shown_bytes(nbytes)}" for change, nbytes in savings.items())]
