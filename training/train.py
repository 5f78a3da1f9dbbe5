"""Trains afnext-tiny from Whisper tiny.en's first encoder layers and synthetic recordings.

    python -m training.train FOLDER

FOLDER has the voice bank, the encoder's outputs and the state of training; the same command continues a stopped run.
Needs the `bench` extra and the Debian packages named in `voices.py`.

First the encoder learns to recognize single items (`hearing.py`). Then it is frozen, and the decoder learns to answer
from its outputs (`features.py`). Besides the answers, this second part supervises the attention of designated heads
(see `attention.py`), without which the decoder learns to point at items of a list late or never, and linear heads
predict what tokens should encode:

- the adaptor's output: the word or sound that a token belongs to, whether an item begins there, and the token's time;
- after the second layer: the time again, which takes more than the adaptor, the preceding items and their times, and
  for an answer's tokens the subject of the question and the item written last;
- after the third layer, for an answer's tokens: the time to write, which comes from the item that they attend to.

The linear heads are not part of the checkpoint.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from afnext.bench.quality import whisper

from .batches import IGNORED, MOST_WORDS, Batches, Stage
from .features import load_crops, long_crops, short_crops
from .hearing import CLASSES, HearingHeads, Scenes, hearing_losses, hearing_total
from .loop import Group, run_training
from .model import DECODER, ENCODER, TinyModel, Watched, rotated
from .scenes import clock
from .tokenizer import build_tokenizer
from .voices import VoiceBank, build_bank

STAGES = [
    Stage(steps=1000, batch=12, questions=4, long=0.1),
    Stage(steps=2200, batch=12, questions=5, long=0.5),
    Stage(steps=2500, batch=12, questions=4, long=0.6, crops=10, long_batch=4, moments=8, sounds=2),
]
SHORT, LONG = 3000, 1400  # recordings of 10 s, and windows of long ones
HEARING, HEARING_RATES = 2400, (1.5e-4, 1e-3)  # steps; rates of the encoder and of all else
# The encoder's weights are a mean of the initial and the trained ones, because the initial ones generalize better to
# unseen voices. Source: Wortsman et al. 2022, "Robust fine-tuning of zero-shot models".
_LEARNED = 0.85
RATE = 1.5e-3
_CLOCK = (30, 60, 10)


class Auxiliary(nn.Module):
    """Linear heads that predict what tokens should encode."""

    def __init__(self) -> None:
        super().__init__()
        width = DECODER["hidden_size"]
        self.classes, self.onset = nn.Linear(width, len(CLASSES)), nn.Linear(width, 1)
        self.time, self.clock, self.written, self.writing = (nn.Linear(width, sum(_CLOCK)) for _ in range(4))
        self.before = nn.ModuleList(nn.Linear(width, sum(_CLOCK)) for _ in range(4))
        self.words, self.ordinal = nn.Linear(width, MOST_WORDS + 1), nn.Linear(width, MOST_WORDS + 1)
        # One head for the subject of a question and for the matching audio tokens, so that both have the same encoding.
        self.label, self.follows = nn.Linear(width, len(CLASSES)), nn.Linear(width, len(CLASSES))

    def loss(
        self, adapted: Tensor, audio: Tensor, asked: Tensor, pointed: Tensor, batch: dict[str, Any]
    ) -> dict[str, Tensor]:
        """adapted: adaptor's output, [batch, audio, hidden]; audio: the same tokens after the second decoder layer;
        asked: those of the questions there; pointed: the same after the third."""
        begun = batch["onsets"] > 0
        positive = torch.tensor(5.0)
        onset = self.onset(adapted).squeeze(-1).float()
        time, written = torch.stack(clock(batch["tenths"]), -1), batch["written"]
        told, writing = written != IGNORED, batch["writing"]
        telling = writing != IGNORED
        before = torch.stack(
            [_clock_loss(head(audio[begun]), batch["before"][begun][:, kind]) for kind, head in enumerate(self.before)]
        )
        return {
            "class": _cross_entropy(self.classes(adapted), batch["classes"])
            + _cross_entropy(self.classes(adapted[begun]), batch["classes"][begun]),
            "onset": F.binary_cross_entropy_with_logits(onset, batch["onsets"], pos_weight=positive),
            "label": _cross_entropy(self.label(audio[begun]), batch["classes"][begun])
            + _cross_entropy(self.label(asked), batch["named"]),
            "follows": _cross_entropy(self.follows(audio[begun]), batch["follows"][begun])
            + _cross_entropy(self.follows(asked), batch["last"]),
            "time": _clock_loss(self.time(adapted), time),
            "clock": _clock_loss(self.clock(audio), time) + _clock_loss(self.clock(audio[begun]), time[begun]),
            "written": _clock_loss(self.written(asked[told]), torch.stack(clock(written[told]), -1)),
            "writing": _clock_loss(self.writing(pointed[telling]), torch.stack(clock(writing[telling]), -1)),
            "before": before.mean(),
            "ordinal": _cross_entropy(self.words(audio[begun]), batch["words"][begun])
            + _cross_entropy(self.ordinal(asked), batch["ordinal"]),
        }


def _clock_loss(scores: Tensor, wanted: Tensor) -> Tensor:
    parts = zip(scores.split(_CLOCK, -1), wanted.unbind(-1), strict=True)
    return torch.stack([_cross_entropy(part, right) for part, right in parts]).mean()


def _cross_entropy(scores: Tensor, wanted: Tensor) -> Tensor:
    """Mean over the tokens with a target; 0 if there are none."""
    total = F.cross_entropy(scores.flatten(0, -2).float(), wanted.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (wanted != IGNORED).sum().clamp_min(1)


def looking_losses(told: Watched, looks: dict[tuple[int, int], tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """For every supervised head, the loss of its attention against the target, above the smallest possible loss."""
    losses = {}
    for (layer, head), (_, shares) in looks.items():
        losses[f"{layer}.{head}"] = ((shares.log() - told[layer, head]) * shares).sum() / shares.sum()
    return losses


def step_losses(model: TinyModel, auxiliary: Auxiliary, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, its parts, and the share of right tokens."""
    adapted = model.adapted(rotated(batch["audio"].float(), batch["windows"], batch["tokens"]))
    embed, size = model.decoder.embed_tokens, adapted.shape[0]
    prefix, asked = embed(batch["prefix"]).expand(size, -1, -1), embed(batch["inputs"])
    x = torch.cat((prefix, adapted.float(), asked), 1)
    watched = {head: places for head, (places, _) in batch["looks"].items()}
    hidden, told, (_, second, third, _) = model.decode(x, batch["positions"], batch["bias"], watched)
    start = prefix.shape[1]
    end = start + adapted.shape[1]
    targets = batch["targets"]
    answered = targets != IGNORED
    logits = model.language_model["lm_head"](hidden[:, end:][answered]).float()
    losses = auxiliary.loss(adapted, second[:, start:end], second[:, end:], third[:, end:], batch)
    looking = looking_losses(told, batch["looks"])
    weights = batch["weights"][answered]
    answer = (F.cross_entropy(logits, targets[answered], reduction="none") * weights).sum() / weights.sum()
    right = (logits.argmax(-1) == targets[answered]).float()
    auxiliaries = (
        losses["class"] + 0.3 * losses["onset"] + 0.5 * (losses["time"] + losses["written"]) + 2 * losses["clock"]
    )
    auxiliaries = auxiliaries + losses["writing"]
    auxiliaries = auxiliaries + 0.5 * (losses["before"] + losses["ordinal"] + losses["label"] + losses["follows"])
    total = 2 * answer + 0.5 * auxiliaries + torch.stack(list(looking.values())).sum() * 0.3
    return total, {"answer": answer, "accuracy": right.mean(), **losses, **looking}


def hear(folder: Path, seed: int, console: Console, model: TinyModel) -> None:
    """Train the encoder and the adaptor; see `hearing.py`."""
    heads, bank = HearingHeads(), VoiceBank(folder / "bank", "train")
    begun = {name: parameter.detach().clone() for name, parameter in model.audio_tower.named_parameters()}
    # The channels that RoTE rotates have to stay constant, see `TinyModel`.
    fixed = ("layer_norm.weight", "layer_norm.bias")

    def losses(batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        parts = hearing_losses(heads(model, batch), batch)
        return hearing_total(parts), parts

    encoder = [p for name, p in model.audio_tower.named_parameters() if name not in fixed]
    rest = [*model.multi_modal_projector.parameters(), *heads.parameters()]
    modules = nn.ModuleDict({"encoder": model.audio_tower, "adaptor": model.multi_modal_projector, "heads": heads})
    groups = [Group(encoder, HEARING_RATES[0]), Group(rest, HEARING_RATES[1])]
    run_training(folder / "hearing.pt", modules, groups, Scenes(bank, HEARING, seed), losses, console)
    with torch.no_grad():
        for name, parameter in model.audio_tower.named_parameters():
            parameter.copy_(torch.lerp(begun[name], parameter, _LEARNED))
    # The decoder has to be trained on the outputs of the checkpoint's encoder.
    model.round_as_stored("audio_tower.")


def answer(folder: Path, seed: int, console: Console, model: TinyModel, tokenizer: Tokenizer) -> None:
    """Train the adaptor and the decoder on the encoder's outputs."""
    auxiliary, bank, encoder = Auxiliary(), VoiceBank(folder / "bank", "train"), model.audio_tower.requires_grad_(False)
    short = load_crops(folder / "short.pt", lambda: short_crops(bank, encoder, seed, SHORT))
    long = load_crops(folder / "long.pt", lambda: long_crops(bank, encoder, seed, LONG))
    modules = nn.ModuleDict({"model": model, "auxiliary": auxiliary})
    groups = [Group([p for p in modules.parameters() if p.requires_grad], RATE)]
    batches = Batches(short, long, tokenizer, STAGES, seed)
    run_training(folder / "training.pt", modules, groups, batches, partial(step_losses, model, auxiliary), console)


def build_model(folder: Path, vocabulary: int, seed: int) -> TinyModel:
    """The model before training: Whisper's layers, all else random."""
    torch.manual_seed(seed)
    model = TinyModel(vocabulary)
    weights = whisper.encoder_weights(whisper.fetch(folder / "whisper"), ENCODER["num_hidden_layers"])
    missing, unexpected = model.audio_tower.load_state_dict(weights, strict=False)
    assert (set(missing), unexpected) == ({"layer_norm.weight", "layer_norm.bias"}, []), (missing, unexpected)
    return model


def train(folder: Path, seed: int, console: Console) -> TinyModel:
    """Train, or continue training, until the last step; returns the model."""
    build_bank(folder / "bank", seed, lambda split, done, of: console.print(f"voices, {split}: {done} of {of} clips"))
    tokenizer = build_tokenizer()
    model = build_model(folder, tokenizer.get_vocab_size(), seed)
    hear(folder, seed, console, model)
    answer(folder, seed, console, model, tokenizer)
    return model


def main(folder: Path, seed: int = 0, threads: int = 2) -> None:
    """Train in FOLDER; see the module."""
    torch.set_num_threads(threads)
    train(folder, seed, Console(width=1000))


if __name__ == "__main__":
    typer.run(main)
