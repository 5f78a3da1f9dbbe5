"""Training batches: crops of recordings, questions about them, and where every head should look, as tensors."""

import math
import random
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from .attention import WORD, Looks, asked_label, audio_looks, mentions, near_previous, numbers, question_looks
from .features import Crop
from .hearing import CLASSES, marked
from .scenes import Item, Question, ask_moment, clock, moments, random_questions, sound_questions, tenths_of
from .vocabulary import SINGULARS

PREFIX = "<|im_start|>user\n<|sound_bos|>"
IGNORED = -100
MOST_WORDS = 31
_LAST_TOKEN = 45_000
_WINDOW_SECONDS = 30.0
_SCATTERED = 120


@dataclass(frozen=True)
class _Piece:
    """Some tokens of one window: their encoder outputs, [tokens, width], and the items, in seconds of the window."""

    window: int
    audio: Tensor
    tokens: Tensor
    items: list[Item]

    @classmethod
    def of(cls, window: int, crop: Crop) -> "_Piece":
        return cls(window, crop.tokens, crop.start + torch.arange(len(crop.tokens)), crop.items)


@dataclass(frozen=True)
class Stage:
    """A stage of training: `batch` recordings per step, with `questions` questions each. long: the share of steps whose
    recordings, `long_batch` or else `batch`, are `crops` from up to 30 minutes; each of those has `moments` further
    questions about the time of items that occur once, and each of the others `sounds` about the number or the times of
    sounds."""

    steps: int
    batch: int
    questions: int
    long: float = 0.0
    crops: int = 3
    long_batch: int | None = None
    moments: int = 0
    sounds: int = 0


class Batches(Dataset[dict[str, Any]]):
    """Batch i of a seed is always the same, so that training can stop and continue anywhere."""

    def __init__(
        self, short: list[Crop], long: list[Crop], tokenizer: Tokenizer, stages: list[Stage], seed: int
    ) -> None:
        self._short, self._long, self._tokenizer, self._seed = short, long, tokenizer, seed
        self._stages = [stage for stage in stages for _ in range(stage.steps)]
        self._silent = [crop for crop in long if not crop.items]
        self._prefix = tokenizer.encode(PREFIX).ids

    def __len__(self) -> int:
        return len(self._stages)

    def __getitem__(self, step: int) -> dict[str, Any]:
        torch.set_num_threads(1)
        stage, rng = self._stages[step], random.Random(f"{self._seed}/{step}")
        long = rng.random() < stage.long
        batch = stage.long_batch or stage.batch if long else stage.batch
        recordings = [self._recording(long, stage, rng) for _ in range(batch)]
        tensors = {
            name: torch.stack([r[name] for r in recordings])
            for name in ("audio", "windows", "tokens", "classes", "onsets", "tenths", "before", "follows", "words")
        }
        looks, shared = Looks(), len(self._prefix) + tensors["audio"].shape[1]
        for row, recording in enumerate(recordings):
            audio_looks(looks, row, len(self._prefix), recording["items"], recording["begins"])
        tensors |= self._questions([r["questions"] for r in recordings], recordings, shared, looks)
        tensors["prefix"] = torch.tensor(self._prefix)
        tensors |= _layout(tensors, recordings, rng)
        return {**tensors, "looks": looks.tensors()}

    def _recording(self, long: bool, stage: Stage, rng: random.Random) -> dict[str, Any]:
        if long:
            last = max(rng.choice((6, 12, 30, 60, 60)), stage.crops + 1)
            windows = sorted(rng.sample(range(last), stage.crops))
            pieces = [_Piece.of(window, rng.choice(self._long)) for window in windows]
            pieces += self._silence([window for window in range(last) if window not in windows], rng)
            pieces.sort(key=lambda piece: piece.window)
        else:
            pieces = [_Piece.of(0 if rng.random() < 0.7 else rng.randrange(60), rng.choice(self._short))]
        items, begins, classes, onsets, passed = [], [], [], [], 0
        for piece in pieces:
            offset = piece.window * _WINDOW_SECONDS
            *marks, spans = marked(piece.items, len(piece.audio), int(piece.tokens[0]))
            items += [replace(item, onset=item.onset + offset, end=item.end + offset) for item in piece.items]
            begins += [(passed + first, passed + after - 1) for first, after in spans]
            classes.append(marks[0])
            onsets.append(marks[1])
            passed += len(piece.audio)
        tokens = torch.cat([piece.tokens for piece in pieces])
        places = torch.cat([torch.full_like(piece.tokens, piece.window) for piece in pieces])
        absolute = 750 * places + tokens
        questions = random_questions(items, rng, stage.questions)
        if long:
            once = moments(items)
            questions += [ask_moment(item, rng) for item in rng.sample(once, min(stage.moments, len(once)))]
        else:
            questions += sound_questions(items, rng, stage.sounds)
        return {
            "audio": torch.cat([piece.audio for piece in pieces]),
            "windows": places,
            "tokens": tokens,
            "classes": torch.cat(classes),
            "onsets": torch.cat(onsets),
            "tenths": absolute * 4 // 10,
            **_preceding(items, begins, len(tokens)),
            "items": items,
            "begins": begins,
            "questions": questions,
            "end": int(absolute[-1]) + 1 + (0 if not long or rng.random() < 0.3 else rng.randrange(1, 750)),
            "long": long,
        }

    def _silence(self, windows: list[int], rng: random.Random) -> list["_Piece"]:
        """_SCATTERED silent tokens of random windows, which represent all silent tokens."""
        pieces = []
        for window, count in sorted(Counter(rng.choices(windows, k=_SCATTERED)).items()):
            crop = rng.choice(self._silent)
            kept = torch.tensor(sorted(rng.sample(range(len(crop.tokens)), count)))
            pieces.append(_Piece(window, crop.tokens[kept], crop.start + kept, []))
        return pieces

    def _questions(
        self, questions: list[list[Question]], recordings: list[dict[str, Any]], shared: int, looks: Looks
    ) -> dict[str, Tensor]:
        """The questions of each recording one after another, each tensor [batch, time]: token ids; targets (none in
        padding and prompts) and their weights, so that an answer weighs as the square root of its length; the token's
        question, counted from 1, and its position in it; for an answer's tokens the class that is asked about; for
        answers with times, the tenths of a second of the item written last and of the present one; for answers without
        times, the class of the word written last and the number of words so far."""
        padding = {"inputs": self._tokenizer.token_to_id("[PAD]"), "question": -1, "place": 0, "weights": 0.0}
        padding |= dict.fromkeys(("targets", "named", "written", "writing", "last", "ordinal"), IGNORED)
        rows = []
        for number, (asked, recording) in enumerate(zip(questions, recordings, strict=True)):
            row: dict[str, list[Any]] = {name: [] for name in padding}
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
                numbered = numbers(question, encoded.offsets)
                after = begin + len(prompt)
                question_looks(
                    looks, number, question, spoken, numbered, label, evidence, recording, shared, begin, after
                )
                row["inputs"] += prompt + answer
                row["question"] += [index] * len(prompt + answer)
                row["place"] += range(len(prompt + answer))
                asked_for = question.prompt[slice(*span)] if span else None
                named = CLASSES.index(SINGULARS.get(asked_for, asked_for)) if asked_for else IGNORED
                told = {"targets": answer, "weights": [len(answer) ** -0.5] * len(answer)}
                told |= {"named": [named] * len(answer), **_written(question, spoken)}
                for name, values in told.items():
                    row[name] += [padding[name]] * (len(prompt) - 1) + values + [padding[name]]
            rows.append(row)
        width = max(len(row["inputs"]) for row in rows)
        return {
            name: torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])
            for name, value in padding.items()
        }


def _written(question: Question, spoken: list[int | None]) -> dict[str, list[int]]:
    """The items that an answer has before each of its tokens, or at it, see `_questions`. spoken: see `mentions`."""
    plain = question.kind == "transcribe"
    timed = "[" in question.answer or question.kind.startswith(("when", "count", "first", "last"))
    labels = ["", *(item.label for item in question.evidence)]
    times = [tenths_of(item.onset) if timed else IGNORED for item in question.evidence]
    return {
        "written": [times[k - 1] if k else IGNORED for k in spoken],
        "writing": [times[k] if k is not None and k < len(times) else IGNORED for k in spoken],
        "last": [CLASSES.index(labels[k]) if plain and k is not None else IGNORED for k in spoken],
        "ordinal": [min(k, MOST_WORDS) if plain and k is not None else IGNORED for k in spoken],
    }


def _preceding(items: list[Item], begins: list[tuple[int, int]], time: int) -> dict[str, Tensor]:
    """For the token in which an item begins: minute, second and tenth at which the near item before it of each kind of
    `attention` began, [time, 4, 3], the class of the near word before it, [time], and the number of words before a
    word, [time]."""
    times, words, passed = torch.full((time, 4, 3), IGNORED), torch.full((time,), IGNORED), 0
    follows = torch.zeros(time, dtype=torch.long)
    for index, (item, (first, _)) in enumerate(zip(items, begins, strict=True)):
        for kind in range(4):
            last = near_previous(items, index, kind)
            if last is not None:
                times[first, kind] = torch.tensor(clock(tenths_of(items[last].onset)))
                if kind == WORD:
                    follows[first] = CLASSES.index(items[last].label)
        if item.is_word:
            words[first] = min(passed, MOST_WORDS)
            passed += 1
    return {"before": times, "follows": follows, "words": words}


def _layout(tensors: dict[str, Tensor], recordings: list[dict[str, Any]], rng: random.Random) -> dict[str, Tensor]:
    """Positions [batch, time] and attention bias [batch, 1, time, time] of prefix, audio and questions in one row.

    Every question attends to prefix, audio and itself. In long recordings a silent token counts as many tokens, mostly
    as all that it represents, by a bias of the logarithm of their number.
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
            weight = 1.0 if rng.random() < 0.6 else rng.random()
            bias[row, 0, :, prefix:shared] += silent * weight * math.log(many)
    return {"positions": positions, "bias": bias}
