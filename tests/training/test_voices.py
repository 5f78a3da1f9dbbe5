"""Which voices there are, and that those invented for training are voices of their own."""

import shutil

import pytest

from training import voices
from training.vocabulary import WORDS


def test_half_of_the_trained_voices_are_invented_and_none_is_held_out(seed: int) -> None:
    trained, held_out = voices.voices(seed, 30, False), voices.voices(seed, 30, True)
    espeak = [voice.name for voice in trained if voice.engine == "espeak"]
    assert len(espeak) == 60
    assert len({name for name in espeak if "invented" in name}) == 30
    assert not {voice.name for voice in trained} & {voice.name for voice in held_out}
    assert not any("invented" in voice.name for voice in held_out)


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng")
def test_every_voice_speaks_every_word_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accents, variants and invented voices, however many there are: espeak-ng holds 350 voices at most."""
    monkeypatch.setattr(voices, "WORDS", {word: WORDS[word] for word in ("seven", "stop")})
    names = ["en-us+m1", "en-us+f1", "en-gb-x-rp+m1", *(f"en-gb-scotland+invented{number}" for number in range(120))]
    speakers = [voices.Voice("espeak", name, 1.0, 1.0) for name in names]
    clips = list(voices._synthesize(speakers, "train", lambda *_: None))
    assert all(len(clip) > voices.RATE // 10 for _, _, clip in clips)
    for word in ("seven", "stop"):
        assert len({clip.tobytes() for _, label, clip in clips if label == word}) == len(speakers), word
