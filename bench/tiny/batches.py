"""Training batches: crops of recordings, questions about them, and where every head should look, as tensors."""

import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from .attention import Looks, asked_label, audio_looks, mentions, near_previous, question_looks
from .features import Crop
from .hearing import CLASSES
from .model import ROTE
from .scenes import Item, Question, clock, random_questions, tenths_of

PREFIX = "<|im_start|>user\n<|sound_bos|>"
IGNORED = -100
MOST_WORDS = 31
_LAST_TOKEN = 45_000
_WINDOW_SECONDS = 30.0


@dataclass(frozen=True)
class Stage:
    """A stretch of training: `batch` recordings a step, each asked `questions`. long: the share of steps whose
    recordings are crops from up to 30 minutes."""

    steps: int
    batch: int
    questions: int
    long: float = 0.0
    crops: int = 3


class Batches(Dataset[dict[str, Any]]):
    """Batch number i of a seed is always the same, so that training can stop and go on anywhere."""

    def __init__(
        self, short: list[Crop], long: list[Crop], tokenizer: Tokenizer, stages: list[Stage], seed: int
    ) -> None:
        self._short, self._long, self._tokenizer, self._seed = short, long, tokenizer, seed
        self._stages = [stage for stage in stages for _ in range(stage.steps)]
        self._prefix = tokenizer.encode(PREFIX).ids

    def __len__(self) -> int:
        return len(self._stages)

    def __getitem__(self, step: int) -> dict[str, Any]:
        torch.set_num_threads(1)
        stage, rng = self._stages[step], random.Random(f"{self._seed}/{step}")
        long = rng.random() < stage.long
        recordings = [self._recording(long, stage, rng) for _ in range(stage.batch)]
        tensors = {
            name: torch.stack([r[name] for r in recordings])
            for name in ("audio", "windows", "tokens", "classes", "onsets", "tenths", "before", "words")
        }
        looks, shared = Looks(), len(self._prefix) + tensors["audio"].shape[1]
        for row, recording in enumerate(recordings):
            audio_looks(looks, row, len(self._prefix), recording["items"], recording["begins"])
        tensors |= self._questions([r["questions"] for r in recordings], recordings, shared, looks)
        tensors["prefix"] = torch.tensor(self._prefix)
        tensors |= _layout(tensors, recordings, rng)
        return {**tensors, "looks": looks.tensors()}

    def _recording(self, long: bool, stage: Stage, rng: random.Random) -> dict[str, Any]:
        crops = [rng.choice(self._long if long else self._short) for _ in range(stage.crops if long else 1)]
        if long:
            last = max(rng.choice((3, 6, 12, 30, 60, 60)), stage.crops)
            windows = sorted(rng.sample(range(last), stage.crops))
        else:
            windows = [0 if rng.random() < 0.7 else rng.randrange(60)]
        items, begins, classes, onsets, passed = [], [], [], [], 0
        for window, crop in zip(windows, crops, strict=True):
            offset, length = window * _WINDOW_SECONDS, len(crop.tokens)
            marks = torch.zeros(length, dtype=torch.long), torch.zeros(length)
            for item in crop.items:
                first = int(item.onset / ROTE.frame_seconds) - crop.start
                final = int(item.end / ROTE.frame_seconds) - crop.start
                marks[0][first : final + 1] = CLASSES.index(item.label)
                marks[1][first] = 1.0
                begins.append((passed + first, min(passed + final, passed + length - 1)))
                items.append(replace(item, onset=item.onset + offset, end=item.end + offset))
            classes.append(marks[0])
            onsets.append(marks[1])
            passed += length
        tokens = torch.cat([crop.start + torch.arange(len(crop.tokens)) for crop in crops])
        places = torch.cat([torch.full((len(c.tokens),), w) for w, c in zip(windows, crops, strict=True)])
        absolute = 750 * places + tokens
        return {
            "audio": torch.cat([crop.tokens for crop in crops]),
            "windows": places,
            "tokens": tokens,
            "classes": torch.cat(classes),
            "onsets": torch.cat(onsets),
            "tenths": absolute * 4 // 10,
            **_preceding(items, begins, len(tokens)),
            "items": items,
            "begins": begins,
            "questions": random_questions(items, rng, stage.questions),
            "end": int(absolute[-1]) + 1 + (0 if not long or rng.random() < 0.3 else rng.randrange(1, 750)),
            "long": long,
        }

    def _questions(
        self, questions: list[list[Question]], recordings: list[dict[str, Any]], shared: int, looks: Looks
    ) -> dict[str, Tensor]:
        """The questions of each recording one after another, each [batch, time]: token ids, targets (none in padding
        and prompts), which question a token belongs to (from 1), its place in it, the tenth of a second of the item
        last written in an answer with times, and how many items an answer without has."""
        rows = []
        for number, (asked, recording) in enumerate(zip(questions, recordings, strict=True)):
            row: dict[str, list[int]] = {"inputs": [], "targets": [], "question": [], "place": []}
            row |= {"written": [], "ordinal": []}
            for index, question in enumerate(asked, start=1):
                start = "<|sound_eos|>"
                asking = self._tokenizer.encode(f"{start}{question.prompt}<|im_end|>\n<|im_start|>assistant\n")
                prompt = asking.ids
                encoded = self._tokenizer.encode(question.answer + "<|im_end|>")
                answer, begin = encoded.ids, shared + len(row["inputs"])
                spoken = mentions(question, encoded.offsets)
                evidence = [recording["items"].index(item) for item in question.evidence]
                span = asked_label(question)
                label = [
                    token
                    for token, (first, after) in enumerate(asking.offsets)
                    if span and first < len(start) + span[1] and after > len(start) + span[0]
                ]
                question_looks(
                    looks, number, question, spoken, label, evidence, recording, shared, begin, begin + len(prompt)
                )
                row["inputs"] += prompt + answer
                row["targets"] += [IGNORED] * (len(prompt) - 1) + answer + [IGNORED]
                row["question"] += [index] * len(prompt + answer)
                row["place"] += range(len(prompt + answer))
                timed, plain = "[" in question.answer or "when" in question.kind, question.kind == "transcribe"
                written = [
                    tenths_of(question.evidence[k - 1].onset) if timed and k is not None and k > 0 else IGNORED
                    for k in spoken
                ]
                ordinal = [min(k, MOST_WORDS) if plain and k is not None else IGNORED for k in spoken]
                row["written"] += [IGNORED] * (len(prompt) - 1) + written + [IGNORED]
                row["ordinal"] += [IGNORED] * (len(prompt) - 1) + ordinal + [IGNORED]
            rows.append(row)
        padding = {"inputs": self._tokenizer.token_to_id("[PAD]"), "targets": IGNORED, "question": -1, "place": 0}
        padding |= {"written": IGNORED, "ordinal": IGNORED}
        width = max(len(row["inputs"]) for row in rows)
        return {
            name: torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])
            for name, value in padding.items()
        }


def _preceding(items: list[Item], begins: list[tuple[int, int]], time: int) -> dict[str, Tensor]:
    """What the token in which an item begins comes after: minute, second and tenth at which the near item before it
    of each kind of `attention` began, [time, 4, 3], and the number of words before a word, [time]."""
    times, words, passed = torch.full((time, 4, 3), IGNORED), torch.full((time,), IGNORED), 0
    for index, (item, (first, _)) in enumerate(zip(items, begins, strict=True)):
        for kind in range(4):
            last = near_previous(items, index, kind)
            if last is not None:
                times[first, kind] = torch.tensor(clock(tenths_of(items[last].onset)))
        if item.is_word:
            words[first] = min(passed, MOST_WORDS)
            passed += 1
    return {"before": times, "words": words}


def _layout(tensors: dict[str, Tensor], recordings: list[dict[str, Any]], rng: random.Random) -> dict[str, Tensor]:
    """Positions [batch, time] and attention bias [batch, 1, time, time] of prefix, audio and questions in one row.

    Every question sees prefix, audio and itself. In long recordings a silent token counts as many, up to a recording
    of 30 minutes of them, by a bias of the logarithm of that number.
    """
    batch = len(recordings)
    prefix, audio = len(tensors["prefix"]), tensors["classes"].shape[1]
    shared = prefix + audio
    audio_positions = prefix + 750 * tensors["windows"] + tensors["tokens"]
    ends = torch.tensor([r["end"] for r in recordings])
    asked = prefix + ends[:, None] + tensors["place"]
    positions = torch.cat((torch.arange(prefix).expand(batch, -1), audio_positions, asked), 1)
    question = torch.cat((torch.zeros(batch, shared, dtype=torch.long), tensors["question"]), 1)
    order = torch.arange(question.shape[1])
    same = (question[:, None, :] == 0) | (question[:, None, :] == question[:, :, None])
    visible = (order[:, None] >= order) & same
    bias = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)[:, None]
    for row, recording in enumerate(recordings):
        if recording["long"]:
            silent = recording["classes"] == 0
            many = max(1.0, min(_LAST_TOKEN, recording["end"]) / max(1, int(silent.sum())))
            bias[row, 0, :, prefix:shared] += silent * rng.uniform(0, 1) * float(torch.tensor(many).log())
    return {"positions": positions, "bias": bias}
