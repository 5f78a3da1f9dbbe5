"""The adapter of Piper against the package itself, with a voice made here whose sound is the phonemes' numbers."""

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("starlette", reason="serving needs the extra `serve`")
pytest.importorskip("piper", reason="the package piper-tts (GPL-3) is not among the project's extras")
pytest.importorskip("onnx", reason="the voice of this test is made with onnx")
import onnx

from afnext.serve.speech import SpeechError, check, speaker_of

RATE = 22_050
LETTERS = "_^$ abcdefghijklmnopqrstuvwxyz."


@pytest.fixture
def voice(tmp_path: Path) -> Path:
    """A voice that reads letters: each becomes one sample."""
    kinds, helper = onnx.TensorProto, onnx.helper
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["input"], ["numbers"], to=kinds.FLOAT),
            helper.make_node("Unsqueeze", ["numbers", "axis"], ["output"]),
        ],
        "voice",
        [
            helper.make_tensor_value_info("input", kinds.INT64, [1, "phonemes"]),
            helper.make_tensor_value_info("input_lengths", kinds.INT64, [1]),
            helper.make_tensor_value_info("scales", kinds.FLOAT, [3]),
        ],
        [helper.make_tensor_value_info("output", kinds.FLOAT, [1, 1, "samples"])],
        [helper.make_tensor("axis", kinds.INT64, [1], [1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, str(path := tmp_path / "letters.onnx"))
    config = {
        "audio": {"sample_rate": RATE},
        "espeak": {"voice": "en-us"},
        "phoneme_type": "text",
        "num_symbols": 256,
        "num_speakers": 1,
        "inference": {"noise_scale": 0.0, "length_scale": 1.0, "noise_w": 0.0},
        "phoneme_id_map": {letter: [number] for number, letter in enumerate(LETTERS)},
    }
    path.with_name("letters.onnx.json").write_text(json.dumps(config))
    return path


def test_a_voice_of_piper_speaks(voice: Path) -> None:
    speaker = speaker_of(f"piper:{voice}")
    assert speaker.name == "letters"
    check(speaker)
    samples, rate = asyncio.run(speaker.speak("a z."))
    assert (samples.dtype, rate) == (np.dtype(np.int16), RATE)
    heard = [LETTERS[round(level)] for level in samples / (samples.max() / LETTERS.index("."))]
    assert "".join(letter for letter in heard if letter in " abcdefghijklmnopqrstuvwxyz.") == "a z."


def test_a_damaged_voice_is_named(voice: Path) -> None:
    voice.write_bytes(b"no network")
    with pytest.raises(SpeechError, match=r"letters\.onnx cannot be loaded"):
        speaker_of(f"piper:{voice}")
