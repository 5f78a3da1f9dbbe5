"""Makes the bundled recording `bench/data/scene.flac`: sounds, and words by voices that are not in training.

    python -m training.example BANK [--out bench/data/scene.flac]

BANK is the folder `bank` that `train` made.
"""

import random
from pathlib import Path

import numpy as np
import soundfile
import typer

from .scenes import Item, lines
from .sounds import make_sound
from .vocabulary import WORDS
from .voices import RATE, VoiceBank

SCRIPT = ("hello", "beep", "seven", "March", "siren", "beep", "green", "window", "knock", "beep", "goodbye")
_SECONDS = 13.0


def make_example(bank: VoiceBank) -> tuple[np.ndarray, list[Item]]:
    """The recording at 16 kHz, and its items."""
    rng = random.Random(2)
    samples = np.random.default_rng(2).standard_normal(round(_SECONDS * RATE)).astype(np.float32) * 5e-4
    items, position = [], 0.4
    for label in SCRIPT:
        is_word = label in WORDS
        clip = bank.clip(label, rng) if is_word else make_sound(label, rng)[0]
        start = round(position * RATE)
        samples[start : start + len(clip)] += 0.4 * clip
        items.append(Item(label, is_word, position, position + len(clip) / RATE))
        position = items[-1].end + rng.uniform(0.3, 0.8)
    return samples, items


def main(bank: Path, out: Path = Path("bench/data/scene.flac")) -> None:
    """Write the recording and print what is in it; see the module."""
    samples, items = make_example(VoiceBank(bank, "held_out"))
    soundfile.write(out, samples, RATE, subtype="PCM_16")
    print(lines(items, quoted=True))


if __name__ == "__main__":
    typer.run(main)
