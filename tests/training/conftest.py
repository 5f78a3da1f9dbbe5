"""A voice bank without speech synthesizers: every word is a chord of its own."""

import json
import random
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from training.features import LONG, SHORT, Crop
from training.model import ENCODER, ROTE
from training.scenes import Item
from training.vocabulary import SOUNDS, WORDS
from training.voices import RATE, VoiceBank


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPUs without instructions for bfloat16 emulate it, ten times slower; no test is about its rounding."""
    monkeypatch.setattr(torch, "autocast", lambda *given, **options: nullcontext())


@pytest.fixture(scope="session")
def bank_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `build_bank` leaves it, with the split "train"."""
    folder = tmp_path_factory.mktemp("bank")
    time = np.arange(RATE // 4) / RATE
    index, clips = [], []
    for number, word in enumerate(WORDS):
        chord = np.sin(2 * np.pi * (200 + 20 * number) * time) + np.sin(2 * np.pi * (3000 - 20 * number) * time)
        index.append(("chord", word, number * len(time), (number + 1) * len(time)))
        clips.append((chord * 16_000).astype(np.int16))
    np.save(folder / "train.npy", np.concatenate(clips))
    (folder / "train.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def bank(bank_folder: Path) -> VoiceBank:
    return VoiceBank(bank_folder, "train")


def items_within(rng: random.Random, seconds: float) -> list[Item]:
    """Items that lie within `seconds`, few kinds of them, so that some come again."""
    known, items, position = rng.sample([*WORDS, *SOUNDS], 4), list[Item](), rng.uniform(0.1, 1.0)
    while position < seconds - 0.5:
        label = rng.choice(known)
        items.append(Item(label, label in WORDS, position, position + 0.3, None if label in WORDS else "high"))
        position += 0.4 + rng.expovariate(1.0)
    return items


@pytest.fixture
def crops(seed: int) -> tuple[list[Crop], list[Crop]]:
    """Crops as `features` makes them, short and long ones, of random tokens: each the number of its item and noise."""
    rng = random.Random(seed)

    def crop(start: int, seconds: float, silent: bool = False) -> Crop:
        tokens = torch.randn(round(seconds / ROTE.frame_seconds), ENCODER["hidden_size"]).half()
        begin = start * ROTE.frame_seconds
        items = [] if silent else items_within(rng, seconds)
        moved = [Item(i.label, i.is_word, i.onset + begin, i.end + begin, i.pitch) for i in items]
        return Crop(tokens, start, moved)

    last = round((LONG - 6.0) / ROTE.frame_seconds)
    long = [crop(rng.randrange(last), 6.0, silent=number > 4) for number in range(7)]
    return [crop(0, SHORT) for _ in range(6)], long
