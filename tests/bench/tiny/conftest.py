"""A voice bank without speech synthesizers: every word is a chord of its own."""

import json
from pathlib import Path

import numpy as np
import pytest

from afnext.bench.tiny.vocabulary import WORDS
from afnext.bench.tiny.voices import RATE, VoiceBank


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
