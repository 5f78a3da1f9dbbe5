"""The small model that comes with the package: it loads by default, hears, thinks, and stops by itself."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from support.command_line import CommandLine

import afnext
import afnext.bench
from afnext.runtime.model.hub import BUNDLED, resolve

RECORDING = Path(afnext.bench.__path__[0]) / "data" / "scene.flac"
SCENE = {
    0.4: "hello",
    1.0: "beep",
    1.6: "seven",
    2.6: "March",
    3.7: "siren",
    5.9: "beep",
    6.8: "green",
    7.8: "window",
    8.7: "knock",
    9.4: "beep",
    10.0: "goodbye",
}
"""What is in the recording, and when it begins."""


@pytest.fixture(scope="module")
def bundled() -> afnext.Model:
    return afnext.load()


def listed(text: str) -> list[tuple[float, str]]:
    """The (seconds, label) of each line `[mm:ss.d] label`."""
    found = re.findall(r'^\[(\d\d):(\d\d\.\d)\] "?(.+?)"?$', text, re.MULTILINE)
    return [(60 * int(minutes) + float(seconds), label) for minutes, seconds, label in found]


def test_it_is_at_most_16_mb() -> None:
    assert sum(file.stat().st_size for file in resolve(BUNDLED).iterdir()) <= 16_000_000


def test_it_hears_a_scene_and_places_it_in_time(bundled: afnext.Model) -> None:
    answer = bundled.ask(RECORDING, "Describe the audio with timestamps.")
    assert answer.finish_reason == "stop"
    heard = listed(answer.text)
    times = [time for time, _ in heard]
    assert len(times) == len(SCENE)
    assert np.allclose(times, list(SCENE), atol=0.15), answer.text
    assert sum(label == expected for (_, label), expected in zip(heard, SCENE.values(), strict=True)) >= 8, answer.text


@pytest.mark.parametrize("question", ["How many beeps are there?", "When does the beep occur?"])
def test_it_thinks_before_it_answers(bundled: afnext.Model, question: str) -> None:
    """What it lists first is what is there, and what it then counts or answers with."""
    answer = bundled.ask(RECORDING, f"{question} Please think and reason about the input audio before you respond.")
    assert answer.thinking is not None
    evidence = listed(re.sub(r"^\d+\. ", "", answer.thinking, flags=re.MULTILINE))
    assert {label for _, label in evidence} == {"beep"}
    assert np.allclose(
        [time for time, _ in evidence], [time for time, label in SCENE.items() if label == "beep"], atol=0.15
    )
    if question.startswith("How many"):
        assert answer.text == str(len(evidence))
    else:
        assert re.findall(r"\[(.+?)\]", answer.thinking) == answer.text.split(", ")


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Transcribe the input speech.", "No speech."),
        ("List the sounds with timestamps.", "No sound."),
        ("What happens first?", "Silence."),
    ],
)
def test_it_tells_silence_from_sound(bundled: afnext.Model, question: str, answer: str) -> None:
    assert bundled.ask((np.zeros(5 * 16_000, np.float32), 16_000), question).text == answer


def test_where_the_native_kernels_are_not_built_torch_gives_the_same_answer(
    bundled: afnext.Model, tmp_path: Path
) -> None:
    def run(*arguments: object) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "afnext", *map(str, arguments), "--device", "cpu"],
            cwd=tmp_path,
            env={**os.environ, "AFNEXT_NATIVE": str(tmp_path), "AFNEXT_BACKEND": "", "AFNEXT_MODEL": ""},
            capture_output=True,
            text=True,
            timeout=99,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    lines = run("info", "--backend").splitlines()
    (built,) = (at for at, line in enumerate(lines) if line.startswith("native kernels"))
    operations = lines[built + 1 :]
    assert "not built" in lines[built]
    assert {line.split()[-1] for line in operations} == {"torch"}
    question = "How many beeps are there?"
    assert run("ask", RECORDING, question) == bundled.ask(RECORDING, question).text


def test_it_says_which_model_answers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("AFNEXT_MODEL", raising=False)
    run = CommandLine(monkeypatch, capsys)
    done = run("ask", RECORDING, "What happens first?")
    assert (done.returncode, BUNDLED in done.stderr) == (0, True)
    assert done.stdout.startswith('The word "hello" at 00:00.')
    quiet = run("ask", RECORDING, "What happens first?", "--json")
    assert (json.loads(quiet.stdout)["text"], quiet.stderr) == (done.stdout.strip(), "")


@pytest.mark.parametrize(
    ("kv", "attention"), [*((kv, "auto") for kv in ("auto", "int8", "fp8", "int4")), ("int8", "int8")]
)
def test_an_event_deep_in_a_recording_is_found(kv: str, attention: str) -> None:
    """Four windows of faint noise, three events in the third: their time comes from RoTE."""
    scene, rate = soundfile.read(RECORDING, dtype="float32")
    samples = np.random.default_rng(0).standard_normal(110 * rate).astype(np.float32) * 1e-4
    part = scene[round(5.7 * rate) : round(8.6 * rate)]
    samples[75 * rate : 75 * rate + len(part)] += part
    answer = afnext.load(kv=kv, attention=attention).ask((samples, rate), "When does the beep occur?")
    (time, _), *others = listed(f"[{answer.text}] beep")
    assert not others
    assert abs(time - 75.2) <= 0.15, answer.text
