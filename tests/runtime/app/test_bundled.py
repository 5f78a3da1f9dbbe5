"""The small model that comes with the package: it loads by default, hears, thinks, and stops by itself."""

import json
from pathlib import Path

import numpy as np
import pytest
from support.command_line import CommandLine

import afnext
from afnext.runtime.model.hub import BUNDLED, resolve

RECORDING = Path(__file__).parents[3] / "bench" / "data" / "scene.flac"
BEEPS = (1.0, 5.9, 9.4)


@pytest.fixture(scope="module")
def bundled() -> afnext.Model:
    return afnext.load()


def seconds(stamp: str) -> float:
    minutes, rest = stamp.strip("[], ").split(":")
    return 60 * int(minutes) + float(rest)


def test_it_is_at_most_16_mb() -> None:
    assert sum(file.stat().st_size for file in resolve(BUNDLED).iterdir()) <= 16_000_000


def test_it_finds_the_beeps_in_time(bundled: afnext.Model) -> None:
    answer = bundled.ask(RECORDING, "When does the beep occur?")
    assert answer.finish_reason == "stop"
    found = [seconds(stamp) for stamp in answer.text.split(",")]
    assert np.allclose(found, BEEPS, atol=0.25), answer.text


def test_it_counts_and_says_why(bundled: afnext.Model) -> None:
    question = "How many beeps are there? Please think and reason about the input audio before you respond."
    answer = bundled.ask(RECORDING, question)
    assert answer.text == "3"
    assert answer.thinking is not None
    assert [line.partition("] ")[2] for line in answer.thinking.splitlines()] == ["beep"] * 3


def test_it_hears_words(bundled: afnext.Model) -> None:
    spoken = ["hello", "seven", "March", "green", "window", "goodbye"]
    heard = bundled.ask(RECORDING, "Transcribe the input speech.").text.split()
    assert len(set(spoken) & set(heard)) >= 4, heard


def test_it_tells_silence_from_sound(bundled: afnext.Model) -> None:
    silence = np.zeros(5 * 16_000, np.float32)
    assert bundled.ask((silence, 16_000), "Transcribe the input speech.").text == "No speech."


def test_it_says_which_model_answers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("AFNEXT_MODEL", raising=False)
    run = CommandLine(monkeypatch, capsys)
    done = run("ask", RECORDING, "When does the siren occur?")
    assert (done.returncode, BUNDLED in done.stderr) == (0, True)
    assert abs(seconds(done.stdout) - 3.7) <= 0.25
    quiet = run("ask", RECORDING, "When does the siren occur?", "--json")
    assert (json.loads(quiet.stdout)["text"], quiet.stderr) == (done.stdout.strip(), "")


@pytest.mark.parametrize("kv", ["auto", "int8"])
def test_an_event_deep_in_a_recording_is_found(kv: str) -> None:
    """Four windows of faint noise, a siren in the third: its time comes from RoTE."""
    import soundfile

    scene, rate = soundfile.read(RECORDING, dtype="float32")
    samples = np.random.default_rng(0).standard_normal(110 * rate).astype(np.float32) * 1e-4
    siren = scene[round(3.6 * rate) : round(5.5 * rate)]
    samples[75 * rate : 75 * rate + len(siren)] += siren
    answer = afnext.load(kv=kv).ask((samples, rate), "When does the siren occur?")
    assert abs(seconds(answer.text) - 75.1) <= 0.3, answer.text
