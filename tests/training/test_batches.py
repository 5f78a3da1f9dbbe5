"""Training batches: what sees what, where everything stands, and that batch i is always the same."""

from itertools import pairwise, product

import pytest
import torch

from training.batches import IGNORED, PREFIX, Batches, Stage
from training.features import Crop
from training.hearing import CLASSES
from training.scenes import clock
from training.tokenizer import build_tokenizer
from training.vocabulary import SOUNDS

TOKENIZER = build_tokenizer()
Crops = tuple[list[Crop], list[Crop]]


def batches(crops: Crops, seed: int, long: float = 0.0, questions: int = 3) -> Batches:
    return Batches(*crops, TOKENIZER, [Stage(steps=4, batch=3, questions=questions, long=long)], seed)


def test_a_batch_depends_on_seed_and_number_alone(crops: Crops, seed: int) -> None:
    first, again, other = (batches(crops, s)[2] for s in (seed, seed, seed + 1))
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, again[name]), name
    assert not torch.equal(first["inputs"], other["inputs"])
    assert first["looks"].keys() == again["looks"].keys()


@pytest.mark.parametrize("long", [0.0, 1.0])
def test_a_question_sees_the_audio_before_it_and_itself(crops: Crops, seed: int, long: float) -> None:
    batch = batches(crops, seed, long)[0]
    shared = len(TOKENIZER.encode(PREFIX).ids) + batch["classes"].shape[1]
    visible = batch["bias"][:, 0] > -torch.inf
    question = torch.cat((torch.zeros(3, shared, dtype=torch.long), batch["question"]), 1)
    for row in range(3):
        for i in range(0, visible.shape[1], 7):
            for j in range(0, visible.shape[1], 5):
                same = bool(question[row, j] == 0 or question[row, j] == question[row, i])
                assert bool(visible[row, i, j]) == (j <= i and same), (row, i, j)


@pytest.mark.parametrize("long", [0.0, 1.0])
def test_positions_are_those_in_the_whole_recording(crops: Crops, seed: int, long: float) -> None:
    batch = batches(crops, seed, long)[0]
    prefix, audio = len(TOKENIZER.encode(PREFIX).ids), batch["classes"].shape[1]
    positions = batch["positions"]
    assert positions[0, :prefix].tolist() == list(range(prefix))
    placed = prefix + 750 * batch["windows"] + batch["tokens"]
    assert torch.equal(positions[:, prefix : prefix + audio], placed)
    assert (placed.diff() > 0).all()
    asked = positions[:, prefix + audio :] - batch["place"]
    assert (asked == asked[:, :1]).all()
    assert (asked[:, 0] > positions[:, prefix + audio - 1]).all()


def test_targets_are_the_answers(crops: Crops, seed: int) -> None:
    batch = batches(crops, seed)[1]
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


def test_a_silent_token_counts_as_many(seed: int) -> None:
    """What the bias rests on: attention with log(n) added to a key equals attention with n copies of it."""
    q, k, v = torch.randn(1, 1, 3, 16), torch.randn(1, 1, 5, 16), torch.randn(1, 1, 5, 16)
    bias = torch.zeros(3, 5)
    bias[:, 2] = torch.tensor(4.0).log()
    attention = torch.nn.functional.scaled_dot_product_attention
    copies = [0, 1, 2, 2, 2, 2, 3, 4]
    torch.testing.assert_close(attention(q, k, v, attn_mask=bias), attention(q, k[:, :, copies], v[:, :, copies]))


def test_in_long_recordings_silence_weighs_and_items_do_not(crops: Crops, seed: int) -> None:
    batch = batches(crops, seed, long=1.0)[0]
    prefix, audio = len(TOKENIZER.encode(PREFIX).ids), batch["classes"].shape[1]
    bias = batch["bias"][:, 0, -1, prefix : prefix + audio]
    silent = batch["classes"] == 0
    assert (bias[~silent] == 0).all()
    assert (bias[silent] > 0).any()


def test_long_recordings_have_silence_from_everywhere(crops: Crops, seed: int) -> None:
    """Besides the three crops, silent tokens of other windows, all in order of time."""
    batch = batches(crops, seed, long=1.0)[0]
    for windows, tokens, classes in zip(batch["windows"], batch["tokens"], batch["classes"], strict=True):
        assert ((750 * windows + tokens).diff() > 0).all()
        counts = windows.bincount()
        whole = (counts == 150).nonzero().flatten()
        assert len(whole) == 3
        elsewhere = ~torch.isin(windows, whole)
        assert (classes[elsewhere] == 0).all()
        assert elsewhere.sum() == len(windows) - 450 > 0


def test_long_recordings_are_fewer_and_asked_about_moments(crops: Crops, seed: int) -> None:
    """In a stage of both, a batch has as many recordings as its kind; the long ones are asked up to three more
    questions, the short ones two more about sounds."""
    stage = Stage(steps=8, batch=3, questions=2, long=0.5, crops=4, long_batch=2, moments=3, sounds=2)
    for number in range(8):
        batch = Batches(*crops, TOKENIZER, [stage], seed)[number]
        rows, asked = len(batch["windows"]), int(batch["question"].max())
        if (batch["windows"] != batch["windows"][:, :1]).any():
            assert rows == 2
            assert 2 <= asked <= 5
            continue
        assert (rows, asked) == (3, 4)
        for row, last in product(range(3), (3, 4)):
            text = TOKENIZER.decode(batch["inputs"][row][batch["question"][row] == last].tolist())
            prompt = text.partition("<|im_end|>")[0]
            assert any(sound in prompt for sound in SOUNDS), prompt


def test_answers_know_what_is_asked_and_what_was_written_last(crops: Crops, seed: int) -> None:
    """Told again from the texts: the label stands in the prompt; the word written last is the token before."""
    named, followed = 0, 0
    for number in range(3):
        batch = batches(crops, seed, questions=8)[number]
        for row in range(3):
            for question in range(1, 9):
                own = batch["question"][row] == question
                text = TOKENIZER.decode(batch["inputs"][row][own].tolist())
                prompt = text.partition("assistant\n")[0]
                asked = batch["named"][row][own]
                labels = {CLASSES[label] for label in asked.tolist() if label != IGNORED}
                if labels:
                    assert len(labels) == 1
                    assert labels.pop() in prompt
                    named += 1
                place = batch["last"][row][own]
                for before, label in zip(batch["inputs"][row][own].tolist(), place.tolist(), strict=True):
                    if label > 0:
                        assert TOKENIZER.decode([before]).strip() == CLASSES[label]
                        followed += 1
    assert named
    assert followed


def test_answers_know_the_time_that_they_are_about_to_write(crops: Crops, seed: int) -> None:
    """Told again from the answers: minutes, seconds and tenths are a token each."""
    checked = 0
    for number in range(3):
        batch = batches(crops, seed, questions=8)[number]
        for row in range(3):
            own = batch["targets"][row] != IGNORED
            tokens = [TOKENIZER.decode([token]).strip() for token in batch["targets"][row][own].tolist()]
            writing = batch["writing"][row][own].tolist()
            for at, (minute, second, tenth) in enumerate(zip(tokens, tokens[1:], tokens[2:], strict=False)):
                if minute.endswith(":") and minute[:-1].isdecimal():
                    said = 600 * int(minute[:-1]) + 10 * int(second) + int(tenth[1:])
                    assert writing[at : at + 3] == [said] * 3
                    checked += 1
    assert checked


def test_an_answer_weighs_as_the_square_root_of_its_length(crops: Crops, seed: int) -> None:
    batch = batches(crops, seed)[0]
    for row in range(3):
        for question in range(1, 4):
            own = (batch["question"][row] == question) & (batch["targets"][row] != IGNORED)
            assert float(batch["weights"][row][own].sum()) == pytest.approx(float(own.sum()) ** 0.5)
    assert (batch["weights"][batch["targets"] == IGNORED] == 0).all()


def test_the_token_in_which_an_item_begins_knows_what_came_before(crops: Crops, seed: int) -> None:
    """Told again from classes and beginnings alone: the time of the last item of any kind, if it is near."""
    batch, checked = batches(crops, seed)[0], 0
    for row in range(3):
        begun = batch["onsets"][row].nonzero().flatten().tolist()
        tenths = batch["tenths"][row]
        for last, this in pairwise(begun):
            told = batch["before"][row, this, 0]
            # An item's time is cut to a tenth, its token's to 0.04 s and then to a tenth.
            near = [list(clock(int(tenths[last]) + more)) for more in (0, 1)]
            assert told.tolist() in near
            checked += 1
        if begun:
            assert (batch["before"][row, begun[0]] == IGNORED).all()
    assert checked


def test_looks_point_at_where_items_begin(crops: Crops, seed: int) -> None:
    """Pointers of answers lie on audio tokens that begin an item, on <|sound_bos|>, or on the end of the audio."""
    batch = batches(crops, seed, questions=6)[0]
    prefix, audio = len(TOKENIZER.encode(PREFIX).ids), batch["classes"].shape[1]
    positions, looked = batch["positions"], 0
    for (layer, _), (places, shares) in batch["looks"].items():
        rows, queries, keys = places
        assert (batch["bias"][rows, 0, queries, keys] > -torch.inf).all()
        totals = torch.zeros(3, positions.shape[1]).index_put((rows, queries), shares, accumulate=True)
        assert torch.isin(totals.round(decimals=4), torch.tensor([0.0, 1.0])).all()
        inside = (keys >= prefix) & (keys < prefix + audio)
        if layer == 2:
            assert (batch["onsets"][rows[inside], keys[inside] - prefix] == 1).all()
            looked += int(inside.sum())
        if layer == 3:
            assert inside.all()
            assert (batch["classes"][rows, keys - prefix] > 0).float().mean() > 0.9
    assert looked
    assert int(batch["classes"].max()) < len(CLASSES)
