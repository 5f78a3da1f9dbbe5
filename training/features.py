"""Encoder outputs of many recordings, computed once: training the decoder on them needs no audio and no encoder.

A crop has a fixed place in its window, because of the encoder's positions. It can be used in any window, because RoTE
adds the window's time later.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from afnext.kernels.log_mel import log_mel

from .model import MELS, ROTE, Encoder
from .scenes import Item, make_scene, random_conditions
from .voices import RATE, VoiceBank

SHORT, LONG = 10.0, 30.0
"""Seconds of a whole recording of one window, and of a window within a longer recording."""
_CROP = 6.0  # seconds kept of a window


@dataclass(frozen=True)
class Crop:
    """Tokens of one window before RoTE, [tokens, width] float16, the first of them, and the items, in seconds of the
    window."""

    tokens: Tensor
    start: int
    items: list[Item]


def load_crops(path: Path, make: Callable[[], list[Crop]]) -> list[Crop]:
    """The crops stored at `path`, created if the file does not exist."""
    if not path.exists():
        rows = [(crop.tokens, crop.start, [vars(item) for item in crop.items]) for crop in make()]
        torch.save(rows, path)
    saved = torch.load(path, weights_only=True)
    return [Crop(tokens, start, [Item(**item) for item in items]) for tokens, start, items in saved]


def short_crops(bank: VoiceBank, encoder: Encoder, seed: int, count: int) -> list[Crop]:
    """Whole recordings of 10 s."""
    return [_short(bank, encoder, random.Random(f"{seed}/short/{number}")) for number in range(count)]


def long_crops(bank: VoiceBank, encoder: Encoder, seed: int, count: int) -> list[Crop]:
    """Scenes within windows of 30 s that are silent or faint elsewhere; a sixth have no scene."""
    return [_long(bank, encoder, random.Random(f"{seed}/long/{number}")) for number in range(count)]


def _short(bank: VoiceBank, encoder: Encoder, rng: random.Random) -> Crop:
    # A third only speech, a third mostly sounds: otherwise long lists of one kind would be rare.
    density = rng.choice((None, 1.0, 0.2))
    samples, items = make_scene(bank, rng, SHORT, random_conditions(rng), density=density, respeak=True)
    return Crop(_heard(encoder, samples), 0, items)


def _long(bank: VoiceBank, encoder: Encoder, rng: random.Random) -> Crop:
    level = rng.choice((0.0, 1e-4, 1e-4, 1e-3))
    noise = np.random.default_rng(rng.getrandbits(32)).standard_normal(round(LONG * RATE))
    samples, items = np.asarray(noise * level, np.float32), list[Item]()
    first = rng.randrange(ROTE.frames - round(_CROP / ROTE.frame_seconds))
    begin = first * ROTE.frame_seconds + rng.uniform(0, 0.9)
    if rng.random() > 0.16:
        density = rng.choice((0.5, 0.5, None))
        scene, items = make_scene(bank, rng, 5.0, random_conditions(rng), density=density, respeak=True)
        place = round(begin * RATE)
        samples[place : place + len(scene)] += scene
    last = first + round(_CROP / ROTE.frame_seconds)
    moved = [Item(i.label, i.is_word, i.onset + begin, i.end + begin, i.pitch) for i in items]
    return Crop(_heard(encoder, samples)[first:last].clone(), first, moved)


@torch.inference_mode()
def _heard(encoder: Encoder, samples: np.ndarray) -> Tensor:
    mel = log_mel(torch.from_numpy(samples)[None], mel_bins=MELS, window_samples=len(samples))
    with torch.autocast("cpu", torch.bfloat16):
        return encoder.heard(mel)[0].half()
