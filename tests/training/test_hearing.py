"""What the encoder is taught of a recording is where its items are."""

import torch

from training.hearing import CLASSES, HearingHeads, Scenes
from training.model import TinyModel
from training.voices import VoiceBank


def test_marks_tell_when_the_items_sound(bank: VoiceBank, seed: int) -> None:
    batch = Scenes(bank, 1, seed)[0]
    loud = batch["mel"].amax(1)  # [rows, frames of 10 ms]
    marked, unmarked = [], []
    for row, classes in enumerate(batch["classes"]):
        frames = loud[row, : 4 * len(classes)].view(-1, 4).amax(1)
        marked += frames[classes > 0].tolist()
        unmarked += frames[classes == 0].tolist()
    assert sum(marked) / len(marked) > sum(unmarked) / len(unmarked) + 0.2


def test_items_are_the_stretches_of_their_class(bank: VoiceBank, seed: int) -> None:
    batch = Scenes(bank, 1, seed)[0]
    covered = torch.zeros_like(batch["classes"])
    for row, first, after, label in batch["items"].tolist():
        assert CLASSES[label]
        assert batch["classes"][row, first] == label
        assert batch["onsets"][row, first] == 1
        covered[row, first:after] = 1
    assert torch.equal(covered > 0, batch["classes"] > 0)


def test_an_item_is_scored_by_the_mean_over_its_tokens(bank: VoiceBank, seed: int) -> None:
    batch = Scenes(bank, 1, seed)[0]
    model, heads = TinyModel(300), HearingHeads()
    with torch.no_grad():
        heads.item.load_state_dict(heads.token.state_dict())
        heard = heads(model, batch)
    row, first, after, _ = batch["items"][0].tolist()
    torch.testing.assert_close(heard.items[0], heard.tokens[row, first:after].mean(0), atol=1e-3, rtol=1e-3)
