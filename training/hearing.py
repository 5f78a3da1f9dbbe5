"""Trains the encoder and the adaptor to recognize single words and sounds, before the decoder is trained.

The encoder starts from Whisper's first layers. Linear heads on the adaptor's output predict, for every token, the word
or sound that it belongs to and whether an item begins there and, for the mean over an item's tokens, which the decoder
will read (see `attention.py`), the item's class. The heads are not part of the checkpoint.
"""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from afnext.kernels.log_mel import log_mel

from .model import DECODER, MELS, ROTE, TinyModel
from .scenes import Item, make_scene, random_conditions
from .vocabulary import SOUNDS, WORDS
from .voices import VoiceBank

CLASSES = ["", *WORDS, *SOUNDS]
SECONDS = 5.0
BATCH = 16


class Scenes(Dataset[dict[str, Any]]):
    """Recordings of SECONDS at random windows. Batch i of a seed is always the same."""

    def __init__(self, bank: VoiceBank, steps: int, seed: int) -> None:
        self._bank, self._steps, self._seed = bank, steps, seed

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> dict[str, Any]:
        torch.set_num_threads(1)
        rng = random.Random(f"{self._seed}/hearing/{step}")
        made = [self._scene(rng) for _ in range(BATCH)]
        samples = torch.stack([torch.from_numpy(samples) for samples, _ in made])
        windows = torch.tensor([rng.randrange(60) for _ in made])
        batch = heard_batch(samples, [items for _, items in made])
        return {**batch, "windows": windows, "mel": torch.stack([varied(mel, rng) for mel in batch["mel"]])}

    def _scene(self, rng: random.Random) -> tuple[Any, list[Item]]:
        density = rng.choice((1.0, 1.0, 0.7, 0.3))
        return make_scene(self._bank, rng, SECONDS, random_conditions(rng), density=density, respeak=True)


def heard_batch(samples: Tensor, scenes: list[list[Item]]) -> dict[str, Tensor]:
    """Log-mel, [batch, mels, frames], of samples, [batch, samples]; for every token its class and whether an item
    begins there, [batch, tokens]; the items as row, first token, token after the last, class: [items, 4]."""
    mel = torch.cat([log_mel(row[None], mel_bins=MELS, window_samples=len(row)) for row in samples])
    marks = [marked(items, mel.shape[-1] // 4) for items in scenes]
    items = [
        (row, first, after, int(classes[first]))
        for row, (classes, _, spans) in enumerate(marks)
        for first, after in spans
    ]
    classes, onsets = torch.stack([mark[0] for mark in marks]), torch.stack([mark[1] for mark in marks])
    return {"mel": mel, "classes": classes, "onsets": onsets, "items": torch.tensor(items).view(-1, 4)}


def marked(items: list[Item], tokens: int, start: int = 0) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """For `tokens` tokens of a window from index `start` on, the class of each and whether an item begins there; for
    every item, its first token and the one after its last."""
    classes, onsets, spans = torch.zeros(tokens, dtype=torch.long), torch.zeros(tokens), []
    for item in items:
        first, last = (int(time / ROTE.frame_seconds) - start for time in (item.onset, item.end))
        after = min(last + 1, tokens)
        classes[first:after] = CLASSES.index(item.label)
        onsets[first] = 1.0
        spans.append((first, after))
    return classes, onsets, spans


def varied(mel: Tensor, rng: random.Random) -> Tensor:
    """An augmented log-mel spectrogram, [mels, frames], for generalization to unseen voices and microphones: the mel
    axis is stretched, the loudness is curved, and some bands and frames are masked. Source: Jaitly and Hinton 2013
    (vocal tract length perturbation); Park et al. 2019 (SpecAugment)."""
    bands, frames = mel.shape
    places = (torch.arange(bands) * rng.uniform(0.86, 1.16)).clamp(max=bands - 1)
    below = places.floor().long().clamp(max=bands - 2)
    mel = torch.lerp(mel[below], mel[below + 1], (places - below)[:, None])
    knots = torch.tensor([rng.gauss(0, 0.12) for _ in range(6)])
    mel = mel + F.interpolate(knots[None, None], bands, mode="linear", align_corners=True)[0, 0, :, None]
    floor = mel.min()
    for _ in range(2):
        width = rng.randrange(12)
        first = rng.randrange(bands - width)
        mel[first : first + width] = floor
        width = rng.randrange(12)
        first = rng.randrange(frames - width)
        mel[:, first : first + width] = floor
    return mel


@dataclass
class Heard:
    """Outputs of the heads for a batch: scores of the tokens' classes, of item beginnings, and of whole items."""

    tokens: Tensor
    onsets: Tensor
    items: Tensor


class HearingHeads(nn.Module):
    """Linear heads that predict items from the adaptor's tokens."""

    def __init__(self) -> None:
        super().__init__()
        width = DECODER["hidden_size"]
        self.token, self.item = (nn.Linear(width, len(CLASSES)) for _ in range(2))
        self.onset = nn.Linear(width, 1)

    def forward(self, model: TinyModel, batch: dict[str, Any]) -> Heard:
        """Encoder, adaptor and heads on a batch of `Scenes`."""
        adapted = model.adapted(model.audio_tower(batch["mel"], batch["windows"]))
        sums = F.pad(adapted.float().cumsum(1), (0, 0, 1, 0))
        rows, first, after, _ = batch["items"].T
        means = (sums[rows, after] - sums[rows, first]) / (after - first)[:, None]
        return Heard(self.token(adapted).float(), self.onset(adapted).squeeze(-1).float(), self.item(means).float())


def hearing_losses(heard: Heard, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Losses of tokens, beginnings and items, and the share of correctly recognized items."""
    labels = batch["items"][:, 3]
    onset = F.binary_cross_entropy_with_logits(heard.onsets, batch["onsets"], pos_weight=torch.tensor(5.0))
    return {
        "token": F.cross_entropy(heard.tokens.flatten(0, 1), batch["classes"].flatten()),
        "onset": onset,
        "item": F.cross_entropy(heard.items, labels),
        "right": (heard.items.argmax(-1) == labels).float().mean(),
    }


def hearing_total(losses: dict[str, Tensor]) -> Tensor:
    """The weighted sum that is minimized."""
    return losses["token"] + losses["item"] + 0.3 * losses["onset"]
