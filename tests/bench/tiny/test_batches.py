"""Training batches: what sees what, where everything stands, and that batch i is always the same."""

from pathlib import Path

import torch

from afnext.bench.tiny.batches import CLASSES, IGNORED, PREFIX, Batches, Stage
from afnext.bench.tiny.tokenizer import build_tokenizer
from afnext.bench.tiny.vocabulary import WORDS
from afnext.bench.tiny.voices import VoiceBank

TOKENIZER = build_tokenizer()


def batches(bank: VoiceBank, seed: int, **options: int) -> Batches:
    stage = Stage(steps=4, **{"seconds": 2.0, "crops": 2, "batch": 3, "questions": 3, **options})
    return Batches(bank, TOKENIZER, [stage], seed)


def test_a_batch_depends_on_seed_and_number_alone(bank: VoiceBank, seed: int) -> None:
    first, again, other = (batches(bank, s)[2] for s in (seed, seed, seed + 1))
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, again[name]), name
    assert not torch.equal(first["inputs"], other["inputs"])


def test_a_question_sees_the_audio_before_it_and_itself(bank: VoiceBank, seed: int) -> None:
    batch = batches(bank, seed)[0]
    shared = len(TOKENIZER.encode(PREFIX).ids) + batch["classes"].shape[1]
    visible = batch["bias"][:, 0] > -torch.inf
    question = torch.cat((torch.zeros(3, shared, dtype=torch.long), batch["question"]), 1)
    for row in range(3):
        for i in range(0, visible.shape[1], 7):
            for j in range(0, visible.shape[1], 5):
                same = bool(question[row, j] == 0 or question[row, j] == question[row, i])
                assert bool(visible[row, i, j]) == (j <= i and same), (row, i, j)


def test_positions_are_those_in_the_whole_recording(bank: VoiceBank, seed: int) -> None:
    batch = batches(bank, seed)[0]
    prefix, audio = len(TOKENIZER.encode(PREFIX).ids), batch["classes"].shape[1]
    positions = batch["positions"]
    assert positions[0, :prefix].tolist() == list(range(prefix))
    first = prefix + 750 * batch["windows"] + batch["starts"]
    assert positions[:, prefix : prefix + audio].reshape(6, -1)[:, 0].tolist() == first.tolist()
    asked = positions[:, prefix + audio :] - batch["place"]
    assert (asked == asked[:, :1]).all()
    assert (asked[:, 0] > positions[:, prefix + audio - 1]).all()


def test_targets_are_the_answers(bank: VoiceBank, seed: int) -> None:
    batch = batches(bank, seed)[1]
    end = TOKENIZER.token_to_id("<|im_end|>")
    for row in range(3):
        for number in range(1, 4):
            own = batch["question"][row] == number
            inputs, targets = batch["inputs"][row][own], batch["targets"][row][own]
            answered = targets != IGNORED
            assert targets[answered][-1] == end
            assert (targets[:-1] == inputs[1:])[answered[:-1]].all()
            start = int(answered.nonzero()[0])
            assert TOKENIZER.decode(inputs[: start + 1].tolist()).endswith("assistant\n")


def test_marks_tell_when_the_words_sound(bank: VoiceBank, seed: int) -> None:
    batch = batches(bank, seed, crops=1, batch=8)[3]
    loud = batch["mel"].amax(1)  # [crops, frames of 10 ms]
    offset = 2 * batch["margin"]
    marked, unmarked = [], []
    for row, classes in enumerate(batch["classes"]):
        frames = loud[row, offset : offset + 4 * len(classes)].view(-1, 4).amax(1)
        marked += frames[classes > 0].tolist()
        unmarked += frames[classes == 0].tolist()
    assert sum(marked) / len(marked) > sum(unmarked) / len(unmarked) + 0.2
    assert int(batch["classes"].max()) < len(CLASSES)


def test_a_silent_token_counts_as_many(bank_folder: Path) -> None:
    """What the bias rests on: attention with log(n) added to a key equals attention with n copies of it."""
    q, k, v = torch.randn(1, 1, 3, 16), torch.randn(1, 1, 5, 16), torch.randn(1, 1, 5, 16)
    bias = torch.zeros(3, 5)
    bias[:, 2] = torch.tensor(4.0).log()
    attention = torch.nn.functional.scaled_dot_product_attention
    copies = [0, 1, 2, 2, 2, 2, 3, 4]
    torch.testing.assert_close(attention(q, k, v, attn_mask=bias), attention(q, k[:, :, copies], v[:, :, copies]))


def test_each_token_knows_what_came_last_before_it(bank: VoiceBank, seed: int) -> None:
    """Between items, the last word and sound are those of the last stretches of tokens that lie in one."""
    batch = batches(bank, seed, crops=1, batch=8, seconds=6.0)[0]
    checked = 0
    for classes, before in zip(batch["classes"].tolist(), batch["before"], strict=True):
        last, quiet = {"word": 0, "sound": 0}, 0
        for place, label in enumerate(classes):
            quiet = 0 if label else quiet + 1
            if label:
                last["word" if CLASSES[label] in WORDS else "sound"] = label
            elif quiet > 1:
                assert before[place, :2].tolist() == [last["word"], last["sound"]]
                checked += any(last.values())
        assert before[-1, :2].tolist() == [last["word"], last["sound"]]
        times = before[-1, 2:].view(3, 3)
        assert (times[:, 0] == IGNORED).tolist() == [not last["word"], not last["sound"], not any(last.values())]
        if last["word"] and last["sound"]:
            assert int(times[2] @ torch.tensor([600, 10, 1])) == int((times[:2] @ torch.tensor([600, 10, 1])).max())
    assert checked
