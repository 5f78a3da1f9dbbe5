"""Writes held-out speech as a manifest for `afnext bench quality`, which then scores any scheme of afnext-tiny.

    python -m training.manifest BANK OUT [--count 100] [--snr 10]
    afnext bench quality OUT --model CHECKPOINT --scheme bf16 --kv int8

BANK is the folder `bank` that `train` made; the clips are those of `evaluate`.
"""

import json
from pathlib import Path

import soundfile
import typer

from .evaluate import CLEAN, clips
from .scenes import Conditions
from .voices import RATE, VoiceBank


def write_manifest(bank: VoiceBank, out: Path, count: int, snr: float | None = None) -> Path:
    """Write `count` clips of 10 s and the manifest of their words into `out`; returns the manifest's path.

    snr: decibels between speech and white noise, None for none.
    """
    out.mkdir(parents=True, exist_ok=True)
    conditions, seed = (CLEAN, "clean") if snr is None else (Conditions(snr), "noisy")
    rows = []
    for number, clip in enumerate(clips(bank, "transcribe", count, seed, conditions=conditions, density=1.0)):
        soundfile.write(out / f"{number:04}.wav", clip.samples, RATE, subtype="FLOAT")
        rows.append({"audio": f"{number:04}.wav", "text": clip.question.answer})
    manifest = out / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return manifest


def main(bank: Path, out: Path, count: int = 100, snr: float | None = None) -> None:
    """Write a manifest of held-out speech; see the module."""
    print(write_manifest(VoiceBank(bank, "held_out"), out, count, snr))


if __name__ == "__main__":
    typer.run(main)
