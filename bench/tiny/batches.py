"""Training batches: crops of recordings, questions about them, and the targets of all losses, as tensors."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from ...kernels.log_mel import log_mel
from .model import MARGIN, MELS, ROTE
from .scenes import Item, Question, clock, make_scene, random_conditions, random_questions, tenths_of
from .vocabulary import SOUNDS, WORDS
from .voices import RATE, VoiceBank

PREFIX = "<|im_start|>user\n<|sound_bos|>"
CLASSES = ["", *WORDS, *SOUNDS]
WINDOW_SECONDS = 30.0
BEFORE = (len(CLASSES), len(CLASSES), *3 * (30, 60, 10))
"""How many values each column of `_before` has."""
_LAST_TOKEN = 45_000
IGNORED = -100


@dataclass(frozen=True)
class Stage:
    """A stretch of the curriculum: crops of `seconds`, `crops` of them a recording, `batch` recordings a step."""

    steps: int
    seconds: float
    crops: int
    batch: int
    questions: int = 4


class Batches(Dataset[dict[str, Any]]):
    """Batch number i of a seed is always the same, so that training can stop and go on anywhere."""

    def __init__(self, bank: VoiceBank, tokenizer: Tokenizer, stages: list[Stage], seed: int):
        self._bank, self._tokenizer, self._seed = bank, tokenizer, seed
        self._stages = [stage for stage in stages for _ in range(stage.steps)]
        self._prefix = tokenizer.encode(PREFIX).ids

    def __len__(self) -> int:
        return len(self._stages)

    def __getitem__(self, step: int) -> dict[str, Any]:
        torch.set_num_threads(1)
        stage, rng = self._stages[step], random.Random(f"{self._seed}/{step}")
        # Short recordings are the everyday case: they start at 0, where the convolutions see zero padding.
        from_start = stage.crops == 1 and rng.random() < 0.35
        recordings = [self._recording(stage, rng, from_start) for _ in range(stage.batch)]
        margin = 0 if from_start else MARGIN
        tensors = _questions_batch([r["questions"] for r in recordings], self._tokenizer)
        tensors |= {
            "mel": _disturbed(crop_log_mel(np.stack([crop for r in recordings for crop in r["samples"]])), rng),
            "starts": torch.tensor([start for r in recordings for start in r["starts"]]),
            "windows": torch.tensor([window for r in recordings for window in r["windows"]]),
            "classes": torch.stack([r["classes"] for r in recordings]),
            "onsets": torch.stack([r["onsets"] for r in recordings]),
            "tenths": torch.stack([r["tenths"] for r in recordings]),
            "before": torch.stack([r["before"] for r in recordings]),
            "prefix": torch.tensor(self._prefix),
        }
        tensors |= _layout(tensors, recordings, rng)
        return {**tensors, "margin": margin, "crops": stage.crops}

    def _recording(self, stage: Stage, rng: random.Random, from_start: bool) -> dict[str, Any]:
        tokens = round(stage.seconds / ROTE.frame_seconds)
        places = _places(rng, stage.crops, tokens, from_start)
        conditions, density = random_conditions(rng), rng.choice((None, 0.5, 0.5))
        samples, items, classes, onsets = [], [], [], []
        margin = (0 if from_start else MARGIN) * RATE // 50
        for window, start in places:
            empty = rng.random() < (0.04 if stage.crops == 1 else 0.15)
            crop, inside = make_scene(self._bank, rng, stage.seconds, conditions, density=density, respeak=True)
            if empty:
                crop, inside = _silence(len(crop), rng), []
            samples.append(np.pad(crop, (margin, MARGIN * RATE // 50)))
            offset = window * WINDOW_SECONDS + start * ROTE.frame_seconds
            items += [Item(i.label, i.is_word, i.onset + offset, i.end + offset, i.pitch) for i in inside]
            marks = _marks(inside, tokens)
            classes.append(marks[0])
            onsets.append(marks[1])
        windows, starts = zip(*places, strict=True)
        first = torch.tensor([750 * w + s for w, s in places])[:, None] + torch.arange(tokens)
        return {
            "samples": samples,
            "windows": windows,
            "starts": starts,
            "classes": torch.cat(classes),
            "onsets": torch.cat(onsets),
            "tenths": (first.flatten() * 4 // 10),
            "before": _before(items, [*first.flatten().tolist(), _LAST_TOKEN]),
            "questions": random_questions(items, rng, stage.questions),
            "end": int(first[-1, -1]) + 1 + (0 if rng.random() < 0.5 else rng.randrange(1, 750)),
        }


def _places(rng: random.Random, crops: int, tokens: int, from_start: bool) -> list[tuple[int, int]]:
    """Where the crops lie: (window, first token in it), ascending, at most one a window."""
    if from_start:
        return [(0, 0)]
    last = rng.choice((1, 2, 4, 10, 30, 60, 60))
    windows = sorted(rng.sample(range(max(last, crops)), crops))
    return [(window, rng.randrange(ROTE.frames - tokens + 1)) for window in windows]


def _silence(length: int, rng: random.Random) -> np.ndarray:
    level = rng.choice((0.0, 1e-4, 1e-3, 1e-2))
    noise = np.random.default_rng(rng.getrandbits(32)).standard_normal(length)
    return np.asarray(noise * level, np.float32)


def _marks(items: list[Item], tokens: int) -> tuple[Tensor, Tensor]:
    """For each token the class of the item it lies in, 0 for none, and whether an item begins in it."""
    classes, onsets = torch.zeros(tokens, dtype=torch.long), torch.zeros(tokens)
    for item in items:
        first, last = int(item.onset / ROTE.frame_seconds), int(item.end / ROTE.frame_seconds)
        classes[first : last + 1] = CLASSES.index(item.label)
        onsets[first] = 1.0
    return classes, onsets


def crop_log_mel(samples: np.ndarray) -> Tensor:
    """[crops, samples] float32 to [crops, mels, frames], each crop normalized as a window of its own."""
    return log_mel(torch.from_numpy(samples), mel_bins=MELS, window_samples=samples.shape[1])


def _before(items: list[Item], places: list[int]) -> Tensor:
    """What each token, given by its place in the recording, comes after: [tokens, 11], labels of the last word and the
    last sound, then minute, second and tenth where the last word, sound and either began; no label or time for none."""
    rows, last, following = [], dict[bool, Item](), iter([*items, None])
    item = next(following)
    for place in places:
        while item is not None and item.end <= place * ROTE.frame_seconds:
            last[item.is_word] = item
            item = next(following)
        either = max(last.values(), key=lambda each: each.onset, default=None)
        labels = [CLASSES.index(last[word].label) if word in last else 0 for word in (True, False)]
        begun = (last.get(True), last.get(False), either)
        times = [3 * (IGNORED,) if each is None else clock(tenths_of(each.onset)) for each in begun]
        rows.append([*labels, *times[0], *times[1], *times[2]])
    return torch.tensor(rows)


def _disturbed(mel: Tensor, rng: random.Random) -> Tensor:
    """Each crop as a longer or shorter throat would have it (Jaitly and Hinton 2013, the frequency axis stretched),
    through a microphone that favours some frequencies, with a band of frequencies and a moment missing (Park et al.
    2019, SpecAugment); a fifth stay as they are."""
    mel = mel.clone()
    floor = mel.amin((1, 2))
    for row in range(len(mel)):
        if rng.random() < 0.2:
            continue
        source = (torch.arange(MELS) * rng.uniform(0.88, 1.14)).clamp_max(MELS - 1)
        low, share = source.long(), (source % 1)[:, None]
        mel[row] = mel[row][low] * (1 - share) + mel[row][(low + 1).clamp_max(MELS - 1)] * share
        favours = torch.tensor([[[rng.gauss(0.0, 0.12) for _ in range(6)]]])  # 1 is 40 dB
        mel[row] += F.interpolate(favours, MELS, mode="linear", align_corners=True)[0, 0, :, None]
        band, first = rng.randrange(12), rng.randrange(MELS)
        mel[row, first : first + band] = floor[row]
        if rng.random() < 0.5:
            moment, start = rng.randrange(8), rng.randrange(mel.shape[2])
            mel[row, :, start : start + moment] = floor[row]
    return mel


def _questions_batch(questions: list[list[Question]], tokenizer: Tokenizer) -> dict[str, Tensor]:
    """The questions of each recording one after another, each [batch, time]: token ids, targets (none in padding and
    prompts), which question a token belongs to (from 1), its place in it, and, of words whose time the answer does not
    tell, the tenth of a second at which they are spoken."""
    rows = []
    for recording in questions:
        row: dict[str, list[int]] = {"inputs": [], "targets": [], "question": [], "place": [], "spoken": []}
        for number, question in enumerate(recording, start=1):
            prompt = tokenizer.encode(f"<|sound_eos|>{question.prompt}<|im_end|>\n<|im_start|>assistant\n").ids
            answer = tokenizer.encode(question.answer + "<|im_end|>").ids
            row["inputs"] += prompt + answer
            row["targets"] += [IGNORED] * (len(prompt) - 1) + answer + [IGNORED]
            row["question"] += [number] * len(prompt + answer)
            row["place"] += range(len(prompt + answer))
            spoken = [tenths_of(onset) for onset in question.onsets]
            row["spoken"] += [IGNORED] * len(prompt) + spoken + [IGNORED] * (len(answer) - len(spoken))
        rows.append(row)
    padding = {"inputs": tokenizer.token_to_id("[PAD]"), "targets": IGNORED, "question": -1, "place": 0}
    padding["spoken"] = IGNORED
    width = max(len(row["inputs"]) for row in rows)
    return {
        name: torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])
        for name, value in padding.items()
    }


def _layout(tensors: dict[str, Tensor], recordings: list[dict[str, Any]], rng: random.Random) -> dict[str, Tensor]:
    """Positions [batch, time] and attention bias [batch, 1, time, time] of prefix, audio and questions in one row.

    Every question sees prefix, audio and itself. A silent token counts as many, up to a recording of 30 minutes of
    them, by a bias of the logarithm of that number.
    """
    batch = len(recordings)
    prefix, audio = len(tensors["prefix"]), tensors["classes"].shape[1]
    shared = prefix + audio
    places = tensors["windows"].view(batch, -1) * 750 + tensors["starts"].view(batch, -1)
    audio_positions = prefix + (places[..., None] + torch.arange(audio // places.shape[1])).flatten(1)
    ends = torch.tensor([r["end"] for r in recordings])
    asked = prefix + ends[:, None] + tensors["place"]
    positions = torch.cat((torch.arange(prefix).expand(batch, -1), audio_positions, asked), 1)
    question = torch.cat((torch.zeros(batch, shared, dtype=torch.long), tensors["question"]), 1)
    order = torch.arange(question.shape[1])
    same = (question[:, None, :] == 0) | (question[:, None, :] == question[:, :, None])
    visible = (order[:, None] >= order) & same
    bias = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)[:, None]
    for row, recording in enumerate(recordings):
        silent = recording["classes"] == 0
        many = max(1.0, min(_LAST_TOKEN, recording["end"]) / max(1, int(silent.sum())))
        bias[row, 0, :, prefix:shared] += silent * rng.uniform(0, 1) * float(np.log(many))
    return {"positions": positions, "bias": bias}
