"""Loads a network, whole or one rank's part, from a checkpoint folder within the available memory."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ...kernels.device_state import free_memory, has_bfloat16
from ...kernels.errors import AfnextError
from ...quant.recipe import Recipe, recipe
from ..engine.memory import DENSE, MemoryPlan, shown_bytes, weight_bytes
from ..engine.options import EngineOptions
from ..model.audio_flamingo import AudioFlamingo
from ..model.group import Group
from ..model.opened import OpenCheckpoint
from ..model.quantized import to_quantize
from ..model.sharding import column_bytes, shard_config
from .responder import DEFAULT_NEW_TOKENS

_log = logging.getLogger("afnext")


@dataclass(frozen=True)
class NetworkSettings:
    """The settings of `load` for the network. memory: bytes available on each device, None for its free memory.
    sequence: whether ranks also hold the whole weights."""

    dtype: str
    quant: Recipe | None
    memory: int | None
    options: EngineOptions
    sequence: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        quant = None if self.quant is None else self.quant.to_dict()
        return {
            "dtype": self.dtype,
            "quant": quant,
            "memory": self.memory,
            "options": asdict(self.options),
            "sequence": self.sequence,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "NetworkSettings":
        """The inverse of `to_dict`."""
        quant = None if values["quant"] is None else Recipe.from_dict(values["quant"])
        options = EngineOptions(**values["options"])
        return cls(values["dtype"], quant, values["memory"], options, values["sequence"])

    def within(self, checkpoint: OpenCheckpoint, device: torch.device, ranks: int = 1) -> EngineOptions:
        """The options with the KV cache limited to the device's memory beside the weights.

        ranks: number of ranks that share the checkpoint. Raises MemoryPlanError if it does not fit.
        """
        plan = self._plan(checkpoint, device, ranks)
        room = plan.largest()
        _log.info(
            "%s of %s on %s: room for %d tokens",
            *(shown_bytes(room.weights), shown_bytes(plan.memory), device, room.kv_room),
        )
        return replace(self.options, max_kv_tokens=room.kv_room)

    def fitted(self, checkpoint: OpenCheckpoint, device: torch.device, seconds: float | None) -> "NetworkSettings":
        """These settings with the mildest changes that make a recording of `seconds` fit into the memory of `device`.

        seconds: None for the model's longest audio. Logs the changes. Raises MemoryPlanError with advice if no changes
        suffice.
        """
        plan = self._plan(checkpoint, device, 1)
        plan = replace(plan, audio_seconds=plan.most_seconds() if seconds is None else seconds, text_tokens=256)
        changes = plan.changes_to_fit()
        fitting = plan.changed(changes)
        _log.warning(
            "%g s of audio fit into %s %s",
            *(plan.audio_seconds, shown_bytes(plan.memory), f"with {', '.join(changes)}" if changes else "as it is"),
        )
        options = replace(
            self.options,
            kv=fitting.kv,
            chunk_size=fitting.chunk_size,
            encode_batch=fitting.encode_batch,
            release_encoder=fitting.release_encoder,
            encode_ahead=fitting.encode_ahead,
        )
        return replace(self, options=options, quant=self.quant if fitting.scheme == DENSE else recipe(fitting.scheme))

    def _plan(self, checkpoint: OpenCheckpoint, device: torch.device, ranks: int) -> MemoryPlan:
        """The plan for a short question."""
        memory = self.memory
        if memory is None:  # ranks on a CPU share its memory
            memory = free_memory(device) // (ranks if device.type == "cpu" else 1)
        stored = checkpoint.config
        config = to_quantize(stored, self.quant)
        computed = compute_dtype(self.dtype, config.dtype, device)
        as_stored = config == stored and (config.quantization is not None or str(computed) == f"torch.{config.dtype}")
        options = self.options
        part = config if ranks == 1 else shard_config(config, ranks)
        if self.sequence:  # the whole weights, and those of the part that do not share their memory
            whole, divided = (sum(n for n, _ in weight_bytes(one, computed).values()) for one in (config, part))
            memory -= whole - divided + column_bytes(part, computed)
        return MemoryPlan(
            part,
            memory,
            gpu=device.type != "cpu",
            dtype=computed,
            audio_seconds=0,
            text_tokens=0,
            new_tokens=min(DEFAULT_NEW_TOKENS, config.decoder.max_positions - 2),
            kv=options.kv,
            page_size=options.page_size,
            chunk_size=options.chunk_size,
            encode_batch=options.encode_batch,
            release_encoder=options.release_encoder,
            encode_ahead=options.encode_ahead,
            mapped=device.type == "cpu" and as_stored and checkpoint.weights.is_mapped,
        )


def load_network(
    checkpoint: OpenCheckpoint,
    settings: NetworkSettings,
    device: torch.device,
    *,
    group: Group | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> AudioFlamingo:
    """Load the network, or with a group this rank's part of it; see `AudioFlamingo.from_checkpoint`."""
    return AudioFlamingo.from_checkpoint(
        checkpoint,
        device=device,
        dtype=lambda stored: compute_dtype(settings.dtype, stored, device),
        release_encoder=settings.options.release_encoder,
        quant=settings.quant,
        group=group,
        sequence=settings.sequence,
        progress=progress,
    )


def compute_dtype(dtype: str | torch.dtype, stored: str, device: torch.device) -> torch.dtype:
    """The dtype to compute in: "auto" is the stored one, float16 on GPUs without bfloat16. Raises AfnextError."""
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        name = stored
        if name == "bfloat16" and not has_bfloat16(device):
            _log.info("this GPU has no bfloat16; computing in float16")
            name = "float16"
    if name not in ("bfloat16", "float16", "float32"):
        raise AfnextError(f'the dtype {name!r} is not supported; choose "auto", "bfloat16", "float16" or "float32"')
    if name == "bfloat16" and not has_bfloat16(device):
        raise AfnextError('this GPU has no bfloat16; load with dtype="float16", or "auto"')
    return getattr(torch, name)
