"""Crops: the encoder's tokens stand where the recording's items are, and are made once."""

from pathlib import Path

import torch

from training.features import load_crops, long_crops, short_crops
from training.model import ROTE, Encoder
from training.voices import VoiceBank


def test_a_short_crop_is_a_whole_recording(bank: VoiceBank, seed: int) -> None:
    crops = short_crops(bank, Encoder(), seed, 2)
    for crop in crops:
        assert (len(crop.tokens), crop.start) == (250, 0)
        assert all(0 <= item.onset < item.end <= 10 for item in crop.items)


def test_items_of_a_long_crop_lie_within_it(bank: VoiceBank, seed: int) -> None:
    for crop in long_crops(bank, Encoder(), seed, 3):
        begin, end = (ROTE.frame_seconds * place for place in (crop.start, crop.start + len(crop.tokens)))
        assert 0 <= begin < end <= 30
        assert all(begin <= item.onset < item.end <= end for item in crop.items)


def test_crops_are_made_once(bank: VoiceBank, seed: int, tmp_path: Path) -> None:
    made = load_crops(tmp_path / "crops.pt", lambda: short_crops(bank, Encoder(), seed, 2))

    def never() -> list[object]:
        raise AssertionError

    kept = load_crops(tmp_path / "crops.pt", never)  # type: ignore[arg-type]
    assert [crop.items for crop in kept] == [crop.items for crop in made]
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(kept, made, strict=True))
