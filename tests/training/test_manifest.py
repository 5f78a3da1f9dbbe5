"""The manifest of held-out speech is one that the quality benchmark reads."""

from pathlib import Path

import soundfile

from afnext.bench.quality.data import read_manifest
from training.evaluate import clips
from training.manifest import write_manifest
from training.voices import RATE, VoiceBank


def test_the_manifest_holds_the_clips_and_their_words(bank: VoiceBank, tmp_path: Path) -> None:
    manifest = read_manifest(write_manifest(bank, tmp_path / "data", 3))
    expected = clips(bank, "transcribe", 3, "clean", density=1.0)
    assert manifest.task == "asr"
    for item, clip in zip(manifest.items, expected, strict=True):
        assert item.text == clip.question.answer
        assert item.audio is not None
        samples, rate = soundfile.read(item.audio, dtype="float32")
        assert rate == RATE
        assert (samples == clip.samples).all()
