"""Recordings made of words and sounds at known times, with reverberation and noise, and questions about them."""

import random
from collections import Counter
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy.signal import butter, fftconvolve, sosfilt
from torch import Tensor

from . import vocabulary
from .sounds import make_sound
from .voices import RATE, VoiceBank

_Tenths = TypeVar("_Tenths", int, Tensor)


@dataclass(frozen=True)
class Item:
    """A word or a sound in a recording. onset, end: seconds."""

    label: str
    is_word: bool
    onset: float
    end: float
    pitch: str | None = None


@dataclass(frozen=True)
class Conditions:
    """Acoustics of a recording. snr: decibels between the items and the noise, None for none; others: probabilities."""

    snr: float | None
    noise: str = "white"
    reverberation: float = 0.0
    telephone: bool = False


def random_conditions(rng: random.Random) -> Conditions:
    """Conditions for training: a third clean, the rest down to 4 dB, some with reverberation or a telephone's band."""
    snr = None if rng.random() < 0.33 else rng.uniform(4, 24)
    reverberation = rng.uniform(0.1, 0.5) if rng.random() < 0.3 else 0.0
    return Conditions(snr, rng.choice(("white", "pink", "brown")), reverberation, rng.random() < 0.1)


def make_scene(
    bank: VoiceBank,
    rng: random.Random,
    seconds: float,
    conditions: Conditions,
    *,
    density: float | None = None,
    respeak: bool = False,
) -> tuple[np.ndarray, list[Item]]:
    """A recording of `seconds` with its items in order. density: the share of words among them, or random; respeak:
    change speed and pitch of each word a little, for training."""
    samples = np.zeros(round(seconds * RATE), np.float32)
    items: list[Item] = []
    if density is None:
        density = rng.choice((1.0, 1.0, 1.0, 0.8, 0.5, 0.3, 0.0))
    # Few kinds per recording give repetitions, without which counts would never exceed one.
    kinds = rng.sample(vocabulary.SOUNDS, rng.choice((1, 2, 3, len(vocabulary.SOUNDS))))
    pause = rng.choice((0.15, 0.15, 0.4, 1.2))
    position = rng.uniform(0.1, 0.1 + 2 * pause)
    while rng.random() > 0.04:
        is_word = rng.random() < density
        label = rng.choice(bank.words) if is_word else rng.choice(kinds)
        clip, pitch = (bank.clip(label, rng), None) if is_word else make_sound(label, rng)
        if is_word and respeak:
            clip = _respeak(clip, rng)
        start = round(position * RATE)
        if start + len(clip) + RATE // 20 > len(samples):
            break
        samples[start : start + len(clip)] += clip * 10 ** (rng.uniform(-12, 0) / 20)
        end = position + len(clip) / RATE
        items.append(Item(label, is_word, position, end, pitch))
        position = end + 0.1 + rng.expovariate(1 / pause)
    return _recorded(samples, items, rng, conditions), items


def _respeak(clip: np.ndarray, rng: random.Random) -> np.ndarray:
    """The clip a little faster and higher, or slower and lower, like another speaker."""
    length = max(2, round(len(clip) / rng.uniform(0.82, 1.22)))
    return np.interp(np.linspace(0, len(clip) - 1, length), np.arange(len(clip)), clip).astype(np.float32)


def _recorded(samples: np.ndarray, items: list[Item], rng: random.Random, conditions: Conditions) -> np.ndarray:
    draw = np.random.default_rng(rng.getrandbits(32))
    if conditions.reverberation:
        length = round(conditions.reverberation * RATE)
        room = draw.standard_normal(length) * np.exp(-6.9 * np.arange(length) / length) * rng.uniform(0.02, 0.12)
        room[0] = 1.0
        samples = fftconvolve(samples, room)[: len(samples)]
    if conditions.snr is not None:
        active = sum(item.end - item.onset for item in items)
        power = float((samples**2).sum()) / (active * RATE) if items else 0.01
        noise = _background(len(samples), conditions.noise, draw)
        samples = samples + noise * np.sqrt(power / 10 ** (conditions.snr / 10))
    elif rng.random() < 0.7:
        samples = samples + draw.standard_normal(len(samples)) * 10 ** (rng.uniform(-90, -50) / 20)
    if conditions.telephone:
        samples = sosfilt(butter(4, (300, 3400), "bandpass", fs=RATE, output="sos"), samples)
    peak = float(np.abs(samples).max()) or 1.0
    return np.asarray(samples / peak * 10 ** (rng.uniform(-20, -1) / 20), np.float32)


def _background(length: int, kind: str, draw: np.random.Generator) -> np.ndarray:
    """Noise of unit power whose spectrum falls by 0, 3 or 6 dB per octave."""
    spectrum = np.fft.rfft(draw.standard_normal(length))
    frequency = np.maximum(np.arange(len(spectrum)) * RATE / length, 30.0)
    noise = np.fft.irfft(spectrum / frequency ** {"white": 0.0, "pink": 0.5, "brown": 1.0}[kind], length)
    return np.asarray(noise / noise.std())


def tenths_of(seconds: float) -> int:
    """A time in tenths of a second, rounded down."""
    return int(seconds * 10 + 1e-6)


def clock(tenths: _Tenths) -> tuple[_Tenths, _Tenths, _Tenths]:
    """Minute, second and tenth, of an int or of a tensor."""
    return tenths // 600, tenths // 10 % 60, tenths % 10


def timestamp(seconds: float) -> str:
    """`mm:ss.d`, rounded down to the tenth of a second."""
    minute, second, tenth = clock(tenths_of(seconds))
    return f"{minute:02}:{second:02}.{tenth}"


def lines(items: list[Item], quoted: bool = False, numbered: bool = False) -> str:
    """One line per item, `[mm:ss.d] label`; quoted: words in quotation marks; numbered: a number before each line."""
    labels = [f'"{item.label}"' if quoted and item.is_word else item.label for item in items]
    told = [f"[{timestamp(item.onset)}] {label}" for item, label in zip(items, labels, strict=True)]
    return "\n".join(f"{number}. {line}" if numbered else line for number, line in enumerate(told, start=1))


@dataclass(frozen=True)
class Question:
    """A question about a recording, its kind, the right answer, and the items that the answer is about."""

    kind: str
    prompt: str
    answer: str
    evidence: tuple[Item, ...] = ()


def ask(kind: str, items: list[Item], rng: random.Random, think: bool = False) -> Question:
    """A question of `kind` (one of KINDS) about a recording with these items.

    An answer with a count lists the counted items before the number, because so small a model cannot count them in one
    step.
    """
    prompt, answer, evidence = _ASK[kind](items, rng)
    if think:
        shown = lines(evidence, quoted=True, numbered=True) or "nothing"
        answer = f"<think>\n{shown}\n</think>\n{answer}"
        return Question(kind, prompt + vocabulary.THINK, answer, tuple(evidence))
    if kind.startswith("count") and evidence:
        told = [f"{number} at {timestamp(item.onset)}" for number, item in enumerate(evidence, start=1)]
        answer = f"{', '.join(told)}: {answer}"
    return Question(kind, prompt, answer, tuple(evidence))


def random_questions(items: list[Item], rng: random.Random, count: int) -> list[Question]:
    """`count` questions of different kinds; kinds with longer answers are more frequent."""
    chosen = list(dict.fromkeys(rng.choices(list(KINDS), weights=list(KINDS.values()), k=4 * count)))[:count]
    return [_ask_sometimes_thinking(kind, items, rng) for kind in chosen]


def sound_questions(items: list[Item], rng: random.Random, count: int) -> list[Question]:
    """`count` questions about the number or the times of some kind of sound."""
    kinds = rng.choices(("count_sound", "when_sound"), k=count)
    return [_ask_sometimes_thinking(kind, items, rng) for kind in kinds]


def _ask_sometimes_thinking(kind: str, items: list[Item], rng: random.Random) -> Question:
    return ask(kind, items, rng, kind in _THINKABLE and rng.random() < 0.35)


def moments(items: list[Item]) -> list[Item]:
    """The items whose label occurs once."""
    labels = Counter(item.label for item in items)
    return [item for item in items if labels[item.label] == 1]


def ask_moment(item: Item, rng: random.Random | None = None) -> Question:
    """A question about the time of one of `moments`, in a wording that `rng` chooses, or the first one without it."""
    prompts = vocabulary.WHEN_WORD if item.is_word else vocabulary.WHEN_SOUND
    prompt = (rng.choice(prompts) if rng else prompts[0]).format(item.label)
    return Question("when_word" if item.is_word else "when_sound", prompt, timestamp(item.onset), (item,))


_Answer = tuple[str, str, list[Item]]


def _words(items: list[Item]) -> list[Item]:
    return [item for item in items if item.is_word]


def _sounds(items: list[Item]) -> list[Item]:
    return [item for item in items if not item.is_word]


def _transcribe(items: list[Item], rng: random.Random) -> _Answer:
    answer = " ".join(item.label for item in _words(items)) or "No speech."
    return rng.choice(vocabulary.TRANSCRIBE), answer, _words(items)


def _transcribe_times(items: list[Item], rng: random.Random) -> _Answer:
    return rng.choice(vocabulary.TRANSCRIBE_TIMES), lines(_words(items)) or "No speech.", _words(items)


def _sounds_times(items: list[Item], rng: random.Random) -> _Answer:
    return rng.choice(vocabulary.SOUNDS_TIMES), lines(_sounds(items)) or "No sound.", _sounds(items)


def _describe(items: list[Item], rng: random.Random) -> _Answer:
    return rng.choice(vocabulary.DESCRIBE), lines(items, quoted=True) or "Silence.", items


def _when_sound(items: list[Item], rng: random.Random) -> _Answer:
    present = sorted({item.label for item in _sounds(items)})
    kind = rng.choice(present) if present and rng.random() < 0.85 else rng.choice(vocabulary.SOUNDS)
    found = [item for item in _sounds(items) if item.label == kind]
    answer = ", ".join(timestamp(item.onset) for item in found) or "It does not occur."
    return rng.choice(vocabulary.WHEN_SOUND).format(kind), answer, found


def _when_word(items: list[Item], rng: random.Random) -> _Answer:
    present = sorted({item.label for item in _words(items)})
    word = rng.choice(present) if present and rng.random() < 0.85 else rng.choice(sorted(vocabulary.WORDS))
    found = [item for item in _words(items) if item.label == word]
    answer = ", ".join(timestamp(item.onset) for item in found) or "It is not spoken."
    return rng.choice(vocabulary.WHEN_WORD).format(word), answer, found


def _count_sound(items: list[Item], rng: random.Random) -> _Answer:
    present = sorted({item.label for item in _sounds(items)})
    kind = rng.choice(present) if present and rng.random() < 0.9 else rng.choice(vocabulary.SOUNDS)
    found = [item for item in _sounds(items) if item.label == kind]
    prompt = rng.choice(vocabulary.COUNT_SOUND).format(sound=kind, plural=vocabulary.PLURALS[kind])
    return prompt, str(len(found)), found


def _count_words(items: list[Item], rng: random.Random) -> _Answer:
    return rng.choice(vocabulary.COUNT_WORDS), str(len(_words(items))), _words(items)


def _named(item: Item) -> str:
    what = f'The word "{item.label}"' if item.is_word else f"A {item.label}"
    return f"{what} at {timestamp(item.onset)}."


def _first(items: list[Item], rng: random.Random) -> _Answer:
    return rng.choice(vocabulary.FIRST), _named(items[0]) if items else "Silence.", items[:1]


def _last(items: list[Item], rng: random.Random) -> _Answer:
    return rng.choice(vocabulary.LAST), _named(items[-1]) if items else "Silence.", items[-1:]


def _pitch(items: list[Item], rng: random.Random) -> _Answer:
    tones = [item for item in items if item.label == "tone" and not item.is_word]
    pitch = tones[0].pitch if tones else None
    return rng.choice(vocabulary.PITCH), f"{pitch.capitalize()}." if pitch else "There is no tone.", tones[:1]


_ASK = {
    "transcribe": _transcribe,
    "transcribe_times": _transcribe_times,
    "sounds_times": _sounds_times,
    "describe": _describe,
    "when_sound": _when_sound,
    "when_word": _when_word,
    "count_sound": _count_sound,
    "count_words": _count_words,
    "first": _first,
    "last": _last,
    "pitch": _pitch,
}
KINDS = {
    "transcribe": 4,
    "transcribe_times": 4,
    "sounds_times": 4,
    "describe": 2,
    "when_sound": 5,
    "when_word": 5,
    "count_sound": 5,
    "count_words": 3,
    "first": 1,
    "last": 1,
    "pitch": 1,
}
"""Every kind of question, and how often training asks it."""
_THINKABLE = ("when_sound", "when_word", "count_sound", "count_words", "first", "last")
