"""Trains afnext-tiny from Whisper tiny.en's first encoder layers and synthetic recordings.

    python -m afnext.bench.tiny.train FOLDER [--threads 2] [--start CHECKPOINT]

FOLDER keeps the voice bank and the state of training; the same command goes on where it stopped. With --start training
begins at an exported checkpoint. Needs the `bench`
extra and the Debian packages named in `voices.py`.

Besides the answers, five auxiliary losses teach what an answer is made of: which word or sound every audio token lies
in and where one begins (read from the adaptor's output), the token's minute, second and tenth, and what came last
before it and when (read from the second decoder layer). An item of a list is followed by the one that comes after it,
the last one by the end of the audio: so the last of these losses teaches the decoder to find its way along a list. For
words listed without their times it also has to know, two layers deep, when the word was spoken. The heads are not part
of the checkpoint.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from . import whisper
from .batches import BEFORE, CLASSES, IGNORED, Batches, Stage
from .model import DECODER, ENCODER, TinyModel
from .scenes import clock
from .tokenizer import build_tokenizer
from .voices import VoiceBank, build_bank


@dataclass(frozen=True)
class Phase:
    """Stages under one learning rate schedule: up for a while, then down along a cosine.

    encoder_rate: peak for the encoder, 0 leaves it as it is, which halves a step. rate: peak for everything else.
    restored: how far the encoder moves towards Whisper's weights before the phase begins; averaged: how far, when the
    phase is over, towards what it was before it. Both hear new voices better than what training alone arrives at
    (Wortsman et al. 2022, averaging weights of fine-tuned models).
    """

    stages: list[Stage]
    encoder_rate: float = 0.0
    rate: float = 1e-3
    restored: float = 0.0
    averaged: float = 0.0

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)


PHASES = [
    # Everything learns, on short crops: what words and sounds are, and how answers look.
    Phase(
        [
            Stage(steps=2650, seconds=4.0, crops=1, batch=16, questions=2),
            Stage(steps=150, seconds=5.0, crops=2, batch=8, questions=4),
        ],
        encoder_rate=6e-4,
    ),
    Phase([Stage(steps=1600, seconds=10.0, crops=1, batch=8, questions=4)]),
    # Above all the encoder, again: words by voices that it has not met.
    Phase(
        [Stage(steps=1200, seconds=3.0, crops=1, batch=24, questions=1)], encoder_rate=3e-4, restored=0.4, averaged=0.5
    ),
    # Then the decoder learns to find its way in long recordings.
    Phase(
        [
            Stage(steps=600, seconds=5.0, crops=1, batch=14, questions=6),
            Stage(steps=800, seconds=10.0, crops=1, batch=8, questions=8),
        ]
    ),
    Phase(
        [
            Stage(steps=500, seconds=10.0, crops=1, batch=8, questions=8),
            Stage(steps=100, seconds=5.0, crops=2, batch=8, questions=8),
            Stage(steps=80, seconds=10.0, crops=2, batch=4, questions=8),
            Stage(steps=40, seconds=30.0, crops=2, batch=2, questions=8),
        ]
    ),
    Phase(
        [
            Stage(steps=800, seconds=10.0, crops=1, batch=8, questions=6),
            Stage(steps=120, seconds=5.0, crops=2, batch=8, questions=6),
            Stage(steps=80, seconds=10.0, crops=2, batch=4, questions=6),
        ]
    ),
]
_WARMUP = 100
_UNTIMED = 3.0  # by how much more tokens of answers without times count
_SAVE_EVERY = 200


class Auxiliary(nn.Module):
    """Linear heads for what the audio tokens should know."""

    def __init__(self) -> None:
        super().__init__()
        width = DECODER["hidden_size"]
        self.classes, self.onset = nn.Linear(width, len(CLASSES)), nn.Linear(width, 1)
        self.minute, self.second, self.tenth = nn.Linear(width, 30), nn.Linear(width, 60), nn.Linear(width, 10)
        self.before = nn.Linear(width, sum(BEFORE))

    def loss(self, tokens: Tensor, middle: Tensor, asked: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        """tokens: adaptor output, [batch, audio, hidden]; middle: the same tokens after the second decoder layer;
        asked: those of the questions there."""
        onset = F.binary_cross_entropy_with_logits(
            self.onset(tokens).squeeze(-1).float(), batch["onsets"], pos_weight=torch.tensor(5.0)
        )
        return {
            "class": F.cross_entropy(self.classes(tokens).flatten(0, 1).float(), batch["classes"].flatten()),
            "onset": onset,
            "time": self._time(middle.flatten(0, 1), batch["tenths"].flatten()),
            "spoken": self._time(asked.flatten(0, 1), batch["spoken"].flatten()),
            "before": self._before(middle, asked, batch),
        }

    def _time(self, hidden: Tensor, tenths: Tensor) -> Tensor:
        """Of tokens whose time is known."""
        known = tenths != IGNORED
        hidden, tenths = hidden[known], tenths[known]
        heads = zip((self.minute, self.second, self.tenth), clock(tenths), strict=True)
        losses = [F.cross_entropy(head(hidden).float(), wanted, reduction="sum") for head, wanted in heads]
        return torch.stack(losses).mean() / max(1, len(tenths))

    def _before(self, middle: Tensor, asked: Tensor, batch: dict[str, Any]) -> Tensor:
        """Of the audio tokens, and of the end of the audio, with which every question begins."""
        ends = (batch["place"] == 0) & (batch["question"] > 0)
        rows = torch.arange(len(asked))[:, None].expand(ends.shape)[ends]
        hidden = torch.cat((middle.flatten(0, 1), asked[ends]))
        wanted = torch.cat((batch["before"][:, :-1].flatten(0, 1), batch["before"][rows, -1]))
        parts = self.before(hidden).float().split(BEFORE, -1)
        losses = [
            F.cross_entropy(part, right, reduction="sum") / (right != IGNORED).sum().clamp_min(1)
            for part, right in zip(parts, wanted.unbind(-1), strict=True)
        ]
        return torch.stack(losses).mean()


def step_losses(model: TinyModel, auxiliary: Auxiliary, batch: dict[str, Any]) -> dict[str, Tensor]:
    """All losses of a batch, to be weighted and summed."""
    audio = model.audio(batch["mel"], batch["starts"], batch["windows"], batch["margin"])
    audio = audio.unflatten(0, (-1, batch["crops"])).flatten(1, 2)
    embed, size = model.decoder.embed_tokens, audio.shape[0]
    prefix, asked = embed(batch["prefix"]).expand(size, -1, -1), embed(batch["inputs"])
    x = torch.cat((prefix.to(audio.dtype), audio, asked.to(audio.dtype)), 1)
    hidden, middle = model.decode(x, batch["positions"], batch["bias"])
    start = prefix.shape[1]
    targets = batch["targets"]
    answered = targets != IGNORED
    logits = model.language_model["lm_head"](hidden[:, start + audio.shape[1] :][answered])
    audio_end = start + audio.shape[1]
    losses = auxiliary.loss(audio, middle[:, start:audio_end], middle[:, audio_end:], batch)
    # Few tokens are answers without times, which are the hardest.
    untimed = _untimed(batch)[answered]
    each, weights = F.cross_entropy(logits.float(), targets[answered], reduction="none"), 1.0 + _UNTIMED * untimed
    right = (logits.argmax(-1) == targets[answered]).float()
    return {
        "answer": (each * weights).sum() / weights.sum(),
        **losses,
        "accuracy": right.mean(),
        "untimed": (right * untimed).sum() / max(1, int(untimed.sum())),
    }


def _untimed(batch: dict[str, Any]) -> Tensor:
    """Which tokens belong to answers with words and without times: [batch, time] bool."""
    question, spoken = batch["question"], batch["spoken"] != IGNORED
    return torch.stack([torch.isin(q, q[s]) for q, s in zip(question, spoken, strict=True)])


def total(losses: dict[str, Tensor]) -> Tensor:
    """The weighted sum that is minimized."""
    auxiliary = 0.3 * losses["onset"] + 0.3 * losses["time"] + 0.3 * losses["spoken"] + 0.5 * losses["before"]
    return losses["answer"] + losses["class"] + auxiliary


def build_model(folder: Path, vocabulary: int, seed: int, start: Path | None = None) -> TinyModel:
    """The model before training: that of the checkpoint `start`, or Whisper's layers and the rest random."""
    torch.manual_seed(seed)
    model = TinyModel(vocabulary)
    if start is not None:
        model.load_state_dict({name: value.float() for name, value in load_file(start / "model.safetensors").items()})
        return model
    weights = whisper.encoder_weights(whisper.fetch(folder / "whisper"), ENCODER["num_hidden_layers"])
    missing, unexpected = model.audio_tower.load_state_dict(weights, strict=False)
    assert (set(missing), unexpected) == ({"layer_norm.weight", "layer_norm.bias"}, []), (missing, unexpected)
    return model


def train(folder: Path, seed: int, console: Console, start: Path | None = None) -> TinyModel:
    """Train, or go on with training, until the last step; returns the model. start: see `build_model`."""
    build_bank(folder / "bank", seed, lambda split, done, of: console.print(f"voices, {split}: {done} of {of} clips"))
    tokenizer = build_tokenizer()
    model = build_model(folder, tokenizer.get_vocab_size(), seed, start)
    auxiliary = Auxiliary()
    groups = [
        {"params": list(model.audio_tower.parameters())},
        {"params": [p for n, p in model.named_parameters() if not n.startswith("audio_tower")]},
        {"params": list(auxiliary.parameters())},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.02)
    stages = [stage for phase in PHASES for stage in phase.stages]
    batches = Batches(VoiceBank(folder / "bank", "train"), tokenizer, stages, seed)
    state, done = folder / "training.pt", 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        auxiliary.load_state_dict(saved["auxiliary"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["step"]
    loader = DataLoader(Subset(batches, range(done, len(batches))), batch_size=None, num_workers=1, prefetch_factor=4)
    started, averages = time.monotonic(), dict[str, float]()
    for step, batch in enumerate(loader, start=done):
        _enter(step, model, optimizer, folder)
        with torch.autocast("cpu", torch.bfloat16):
            losses = step_losses(model, auxiliary, batch)
        optimizer.zero_grad(set_to_none=True)
        total(losses).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for name, loss in losses.items():
            averages[name] = 0.97 * averages.get(name, loss.item()) + 0.03 * loss.item()
        if step % 50 == 0 or step + 1 == len(batches):
            text = "  ".join(f"{name} {value:.3f}" for name, value in averages.items())
            console.print(f"step {step} of {len(batches)}  {text}  {time.monotonic() - started:.0f} s", highlight=False)
        if (step + 1) % _SAVE_EVERY == 0 or step + 1 == len(batches):
            saved = {"model": model.state_dict(), "auxiliary": auxiliary.state_dict(), "step": step + 1}
            torch.save({**saved, "optimizer": optimizer.state_dict()}, state)
    return model


def _enter(step: int, model: TinyModel, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Set what learns in this step, and how fast; where a phase begins, average the encoder as the phases say."""
    done, before, phase = 0, None, PHASES[0]
    for phase in PHASES:
        if step < done + phase.steps:
            break
        done, before = done + phase.steps, phase
    if step == done:
        kept = folder / "encoder.pt"
        if before is not None and before.averaged:
            _move(model.audio_tower, torch.load(kept, weights_only=True), before.averaged)
        torch.save(model.audio_tower.state_dict(), kept)
        if phase.restored:
            path = whisper.fetch(folder / "whisper")
            _move(model.audio_tower, whisper.encoder_weights(path, ENCODER["num_hidden_layers"]), phase.restored)
    model.audio_tower.requires_grad_(phase.encoder_rate > 0)
    share = min(1.0, (step - done + 1) / _WARMUP) * (0.5 + 0.5 * math.cos(math.pi * (step - done) / phase.steps))
    for group, peak in zip(optimizer.param_groups, (phase.encoder_rate, phase.rate, phase.rate), strict=True):
        group["lr"] = peak * max(0.01, share)


def _move(encoder: nn.Module, towards: dict[str, Tensor], share: float) -> None:
    """Move those of the weights that `towards` has by a share of the way."""
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name in towards:
                parameter.lerp_(towards[name], share)


def main(folder: Path, seed: int = 0, threads: int = 2, start: Path | None = None) -> None:
    """Train in FOLDER; see the module."""
    torch.set_num_threads(threads)
    train(folder, seed, Console(), start)


if __name__ == "__main__":
    typer.run(main)
