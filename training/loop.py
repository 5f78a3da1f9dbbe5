"""A resumable training loop: AdamW, warm-up and cosine schedule, batches made by another process."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

_WARMUP = 100
_SAVE_EVERY = 200
_TELL_EVERY = 50


@dataclass(frozen=True)
class Group:
    """Parameters with one learning rate. rate: its maximum."""

    parameters: list[nn.Parameter]
    rate: float


def run_training(
    state: Path,
    modules: nn.ModuleDict,
    groups: list[Group],
    batches: Dataset[Any],
    losses: Callable[[Any], tuple[Tensor, dict[str, Tensor]]],
    console: Console,
) -> None:
    """Train on every batch once, or continue from the file `state`.

    modules: saved in the file; losses: for a batch, the loss to minimize, and values to log as running averages.
    """
    steps = len(batches)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW([{"params": g.parameters} for g in groups], betas=(0.9, 0.98), weight_decay=0.02)
    done = 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        modules.load_state_dict(saved["modules"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["step"]
    loader = DataLoader(Subset(batches, range(done, steps)), batch_size=None, num_workers=1, prefetch_factor=4)
    started, averages = time.monotonic(), dict[str, Tensor]()
    for step, batch in enumerate(loader, start=done):
        share = min(1.0, (step + 1) / _WARMUP) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group, settings in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = settings.rate * max(0.01, share)
        with torch.autocast("cpu", torch.bfloat16):
            total, parts = losses(batch)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_([p for g in groups for p in g.parameters], 1.0)
        optimizer.step()
        for name, value in parts.items():
            averages[name] = torch.lerp(averages.get(name, value.detach()), value.detach(), 0.05)
        if step % _TELL_EVERY == 0 or step + 1 == steps:
            told = "  ".join(f"{name} {float(value):.3f}" for name, value in averages.items())
            console.print(f"step {step} of {steps}  {told}  {time.monotonic() - started:.0f} s", highlight=False)
        if (step + 1) % _SAVE_EVERY == 0 or step + 1 == steps:
            saved = {"modules": modules.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(saved, state)
