"""Which voices there are, and that those invented for training are voices of their own."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from afnext.bench.tiny import voices
from afnext.bench.tiny.vocabulary import WORDS


def test_half_of_the_trained_voices_are_invented_and_none_is_held_out(seed: int) -> None:
    trained, held_out = voices.voices(seed, 30, False), voices.voices(seed, 30, True)
    espeak = [voice.name for voice in trained if voice.engine == "espeak"]
    assert len(espeak) == 60
    assert len({name for name in espeak if "invented" in name}) == 30
    assert not {voice.name for voice in trained} & {voice.name for voice in held_out}
    assert not any("invented" in voice.name for voice in held_out)


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng")
def test_invented_voices_speak_every_word_differently(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(voices, "WORDS", {word: WORDS[word] for word in ("seven", "stop")})
    speakers = [voices.Voice("espeak", f"en-gb-scotland+invented{number}", 1.0, 1.0) for number in range(3)]
    voices._write_invented(tmp_path, speakers)
    spoken = [dict(voices._espeak(tmp_path, speaker)) for speaker in speakers]
    for word in ("seven", "stop"):
        clips = [each[word] for each in spoken]
        assert all(len(clip) > voices.RATE // 10 for clip in clips)
        pairs = [(0, 1), (0, 2), (1, 2)]
        assert not any(len(clips[i]) == len(clips[j]) and np.array_equal(clips[i], clips[j]) for i, j in pairs)
