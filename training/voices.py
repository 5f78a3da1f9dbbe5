"""A bank of single spoken words by many synthetic voices, made once and kept in a folder.

Voices come from espeak-ng, flite and festival (Debian packages espeak-ng, flite, festival, festvox-kallpc16k,
festvox-kdlpc16k, festvox-us-slt-hts); the human voice, used for evaluation only, from the prompts of
asterisk-core-sounds-en-wav. Some voices of every synthesizer are held out: no training clip has them, but other voices
in training have their accents.
"""

import calendar
import json
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import soxr

from .vocabulary import WORDS

RATE = 16_000

# Without en-gb, for which espeak-ng 1.51 ignores variants.
_ACCENTS = ("en-us", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029", "en-us-nyc")
_VARIANTS = re.findall(
    r"\w+",
    "m1 m2 m3 m4 m5 m7 m8 f1 f2 f3 f5 klatt klatt2 klatt3 klatt4 klatt5 klatt6 adam Alex Alicia Andy Annie "
    "antonio aunty belinda benjamin boris caleb david Denis Diogo ed announcer Gene Gene2 gustave Henrique Hugo "
    "iven iven2 iven3 iven4 Jacky john kaukovalta Lee linda marcelo Marco Mario max Michael michel miguel Nguyen "
    "norbert pablo paul pedro quincy rob robert sandro steph steph2 steph3 travis victor zac anika grandma "
    "grandpa",
)
_HELD_OUT_ACCENTS, _HELD_OUT_VARIANTS = ("en-gb-x-gbcwmd", "en-us"), ("f4", "m6", "Andrea", "Mike", "edward", "shelby")
_FLITE, _FLITE_HELD_OUT = ("kal16", "awb", "slt"), ("rms",)
_FESTIVAL, _FESTIVAL_HELD_OUT = ("kal_diphone", "cmu_us_slt_arctic_hts"), ("ked_diphone",)
_INVENTED = "invented"
_TRAINING_SHARES = {"espeak": 2.0}  # by far the most voices
_HUMAN = Path("/usr/share/asterisk/sounds/en")


@dataclass(frozen=True)
class Voice:
    """A voice: the synthesizer, its voice, and relative speed and pitch (1 is normal)."""

    engine: str
    name: str
    speed: float
    pitch: float


class VoiceBank:
    """The clips of one split, by engine and word. `clip` draws one at random."""

    def __init__(self, folder: Path, split: str):
        """Open the bank that `build_bank` left in `folder`; split: "train", "held_out" or "human"."""
        index = json.loads((folder / f"{split}.json").read_text())
        self._training = split == "train"
        self._samples = np.load(folder / f"{split}.npy", mmap_mode="r")
        self._clips: dict[str, dict[str, list[tuple[int, int]]]] = {}
        for engine, word, start, end in index:
            self._clips.setdefault(engine, {}).setdefault(word, []).append((start, end))
        self.words = sorted({word for clips in self._clips.values() for word in clips})

    def clip(self, word: str, rng: random.Random) -> np.ndarray:
        """A float32 clip of `word` at 16 kHz, without silence around it, with a peak of 1. Every voice is as likely as
        any other, but in training synthesizers have their shares."""
        engines = [engine for engine, clips in self._clips.items() if word in clips]
        shares = [_TRAINING_SHARES.get(e, 1.0) if self._training else len(self._clips[e][word]) for e in engines]
        engine = rng.choices(engines, weights=shares)[0]
        start, end = rng.choice(self._clips[engine][word])
        samples = self._samples[start:end].astype(np.float32)
        return np.asarray(samples / np.abs(samples).max())


def voices(seed: int, count: int, held_out: bool) -> list[Voice]:
    """Random voices: `count` of espeak-ng, for training as many with random variants, and each voice of flite and
    festival at a few speeds."""
    rng = random.Random(seed)
    accents, variants = (_HELD_OUT_ACCENTS, _HELD_OUT_VARIANTS) if held_out else (_ACCENTS, _VARIANTS)
    named = [("espeak", f"{rng.choice(accents)}+{rng.choice(variants)}") for _ in range(count)]
    if not held_out:
        named += [("espeak", f"{rng.choice(accents)}+{_INVENTED}{number}") for number in range(count)]
    named += [("flite", name) for name in (_FLITE_HELD_OUT if held_out else _FLITE) for _ in range(3)]
    named += [("festival", name) for name in (_FESTIVAL_HELD_OUT if held_out else _FESTIVAL) for _ in range(2)]
    return [Voice(engine, name, rng.uniform(0.75, 1.3), rng.uniform(0.75, 1.35)) for engine, name in named]


def build_bank(folder: Path, seed: int, progress: Callable[[str, int, int], None]) -> None:
    """Synthesize every word by every voice into `folder`, once. `progress`: called with (split, clips done, of all)."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, held_out, count in (("train", False, 200), ("held_out", True, 14)):
        if not (folder / f"{split}.json").exists():
            speakers = voices(seed + held_out, count, held_out)
            _write(folder, split, _synthesize(speakers, split, progress))
    if not (folder / "human.json").exists() and _HUMAN.is_dir():
        _write(folder, "human", _human_clips())


def _synthesize(
    speakers: list[Voice], split: str, progress: Callable[[str, int, int], None]
) -> Iterator[tuple[str, str, np.ndarray]]:
    with tempfile.TemporaryDirectory() as folder:
        version = subprocess.run(["espeak-ng", "--version"], check=True, capture_output=True, text=True).stdout
        data = shutil.copytree(version.rpartition("Data at: ")[2].strip(), Path(folder) / "espeak-ng-data")
        engines: dict[str, Callable[[Voice], Iterator[tuple[str, np.ndarray]]]]
        engines = {"espeak": partial(_espeak, data), "flite": _flite, "festival": _festival}
        for done, voice in enumerate(speakers):
            progress(split, done * len(WORDS), len(speakers) * len(WORDS))
            for word, samples in engines[voice.engine](voice):
                yield voice.engine, word, samples


def _invented_variant(name: str) -> str:
    """A random variant file of espeak-ng: another vocal tract (all formants higher or lower, and each changed a little
    in frequency, loudness and width), another source."""
    rng = random.Random(name)
    throat = rng.uniform(0.82, 1.25)
    lines = ["language variant", f"name {name}", f"roughness {rng.choice((0, 0, 1, 2, 3))}"]
    lines += [f"pitch {(base := rng.randrange(60, 220))} {base + rng.randrange(10, 90)}"]
    lines += [f"voicing {rng.randrange(60, 140)}", f"consonants {rng.randrange(60, 140)} {rng.randrange(60, 140)}"]
    lines += [f"klatt {rng.randrange(1, 7)}"] if rng.random() < 0.3 else []
    lines += [f"echo {rng.randrange(20, 140)} {rng.randrange(5, 30)}"] if rng.random() < 0.2 else []
    for formant in range(1, 9):
        frequency = round(100 * throat * rng.uniform(0.94, 1.06))
        lines.append(f"formant {formant} {frequency} {rng.randrange(60, 130)} {rng.randrange(70, 170)}")
    return "\n".join(lines) + "\n"


def _espeak(data: Path, voice: Voice) -> Iterator[tuple[str, np.ndarray]]:
    """data: a copy of espeak-ng-data, which has a random variant only while it speaks: with more than 350 voices in
    total, espeak-ng makes all of them sound the same."""
    speed, pitch = str(round(150 * voice.speed)), str(round(50 * voice.pitch))
    variant = voice.name.partition("+")[2]
    file, invented = data / "voices" / "!v" / variant, variant.startswith(_INVENTED)
    if invented:
        file.write_text(_invented_variant(variant))

    def speak(spelling: str) -> np.ndarray:
        with tempfile.NamedTemporaryFile(suffix=".wav") as sound:
            settings = [f"--path={data.parent}", "-v", voice.name, "-s", speed, "-p", pitch]
            command = ["espeak-ng", *settings, "-w", sound.name, spelling]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
            if said:
                raise RuntimeError(f"{' '.join(command)}: {said}")
            return _read(Path(sound.name))

    with ThreadPoolExecutor(3) as pool:
        yield from zip(WORDS, pool.map(speak, WORDS.values()), strict=True)
    if invented:
        file.unlink()


def _flite(voice: Voice) -> Iterator[tuple[str, np.ndarray]]:
    for word, spelling in WORDS.items():
        with tempfile.NamedTemporaryFile(suffix=".wav") as file:
            settings = ["--setf", f"duration_stretch={1 / voice.speed:.3f}"]
            settings += ["--setf", f"int_f0_target_mean={110 * voice.pitch:.0f}"]
            command = ["flite", "-voice", voice.name, *settings, "-t", spelling, "-o", file.name]
            subprocess.run(command, check=True, capture_output=True)
            yield word, _read(Path(file.name))


def _festival(voice: Voice) -> Iterator[tuple[str, np.ndarray]]:
    """All words in one process, because festival takes a second to start."""
    with tempfile.TemporaryDirectory() as folder:
        lines = [f"(voice_{voice.name})", f"(Parameter.set 'Duration_Stretch {1 / voice.speed:.3f})"]
        for i, spelling in enumerate(WORDS.values()):
            lines.append(f'(utt.save.wave (utt.synth (Utterance Text "{spelling}")) "{folder}/{i}.wav" \'riff)')
        script = Path(folder) / "words.scm"
        script.write_text("\n".join(lines))
        subprocess.run(["festival", "-b", str(script)], check=True, capture_output=True)
        for i, word in enumerate(WORDS):
            yield word, _read(Path(folder) / f"{i}.wav")


def _human_clips() -> Iterator[tuple[str, str, np.ndarray]]:
    days = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"]
    months = calendar.month_name[1:]
    digits = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    files = {f"letters/{word.lower()}.wav": word for word in WORDS if len(word) == 1}
    files |= {f"digits/{i}.wav": word for i, word in enumerate(digits)}
    files |= {"digits/20.wav": "twenty", "digits/30.wav": "thirty", "digits/hundred.wav": "hundred"}
    files |= {f"digits/day-{i}.wav": word for i, word in enumerate(days)}
    files |= {f"digits/mon-{i}.wav": word for i, word in enumerate(months)}
    for name, word in files.items():
        if (_HUMAN / name).exists():
            yield "human", word, _read(_HUMAN / name)


def _read(path: Path) -> np.ndarray:
    """Mono int16 at 16 kHz, with the silence before and after the word cut off."""
    samples, rate = soundfile.read(path, dtype="float32")
    if rate != RATE:
        samples = soxr.resample(samples, rate, RATE)
    samples = samples / max(float(np.abs(samples).max()), 1e-6)
    loud = np.flatnonzero(np.convolve(np.abs(samples), np.ones(160) / 160, "same") > 0.015)
    samples = samples[loud[0] : loud[-1] + 1] if len(loud) else samples[:1600]
    return np.asarray((samples * 32_000).astype(np.int16))


def _write(folder: Path, split: str, clips: Iterator[tuple[str, str, np.ndarray]]) -> None:
    index, parts, position = [], [], 0
    for engine, word, samples in clips:
        index.append((engine, word, position, position + len(samples)))
        parts.append(samples)
        position += len(samples)
    np.save(folder / f"{split}.npy", np.concatenate(parts))
    (folder / f"{split}.json").write_text(json.dumps(index))
