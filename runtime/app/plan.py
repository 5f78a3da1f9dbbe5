"""What `afnext plan` answers: a memory plan for a device that may or may not be there."""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from ...kernels.devices import device_named
from ...kernels.dispatch import free_memory
from ..engine.memory import MemoryPlan, parse_bytes, shown_bytes
from ..files import read_settings
from ..model.config import ModelConfig
from ..model.hub import resolve
from ..model.published import AUDIO_FLAMINGO_NEXT

_PLACES = {"device": "GPU", "host": "host", "file": "file"}


@dataclass(frozen=True)
class Target:
    """Where a model is planned to run: a name for people, bytes, and whether it is a GPU."""

    name: str
    memory: int
    gpu: bool

    @classmethod
    def parse(cls, text: str) -> "Target":
        """From an amount ("8GB"), the name of a known GPU ("rtx3060"), "cpu" for this machine, or a device of it that
        torch knows ("cuda", "cuda:1"). Raises DeviceError or MemoryPlanError for anything else."""
        if text[:1].isdigit():
            return cls(f"a GPU with {text}", parse_bytes(text), True)
        if text == "cpu":
            return cls("this machine's free memory", free_memory(torch.device("cpu")), False)
        if text.split(":")[0] == "cuda" and torch.cuda.is_available():
            device = torch.device(text)
            return cls(f"what {torch.cuda.get_device_name(device)} has free", free_memory(device), True)
        device_entry = device_named(text)
        return cls(device_entry.name, device_entry.memory, True)


def model_config(model: str | PathLike[str] | None) -> ModelConfig:
    """The config of a checkpoint folder, of a config.json, of a name on the Hub (whose weights stay there), or, for
    None, of the published Audio Flamingo Next. Raises CheckpointError or ConfigError."""
    if model is None:
        return ModelConfig.from_dict(AUDIO_FLAMINGO_NEXT, {"max_audio_len": 1800})
    if Path(model).is_file():
        return ModelConfig.from_dict(read_settings(Path(model)))
    return ModelConfig.from_folder(resolve(model, files=("*.json",)))


def view(plan: MemoryPlan, target: Target) -> RenderableType:
    """The plan for people."""
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
    return Group(rows, "", settings, escape(_verdict(plan)), *_savings(plan))


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
