"""Calibration of a whole checkpoint: what it gains, that it goes on where it stopped, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.audio import speech_like, wav_bytes
from support.checkpoints import relative_rms, save_checkpoint
from support.command_line import CommandLine
from support.logits import last_logits, question

import afnext
from afnext.quant.calibrate import Calibration
from afnext.quant.recipe import Recipe, recipe
from afnext.runtime.app.calibration import CalibrationError, calibrate, read_examples
from afnext.runtime.app.output_folder import OutputError

FOUR_BITS = recipe("int4-g32")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    save_checkpoint(folder, decoder={"intermediate_size": 128}, scale=1.0)
    return folder


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recordings")
    for number, seconds in enumerate((2.0, 3.5, 1.2)):
        (folder / f"{number}.wav").write_bytes(wav_bytes(speech_like(seconds, number)))
    (folder / "1.txt").write_text("the answer to the second\n")
    (folder / "2.prompt.txt").write_text("What is that?\n")
    return folder


def last_scores(model: afnext.Model, seed: int) -> torch.Tensor:
    """Scores of the token after a prompt with a recording that no test calibrates on."""
    return last_logits(model, question(speech_like(2.5, seed), "What can be heard there?"))


def test_calibrated_weights_are_nearer_to_the_dense_ones(source: Path, recordings: Path, tmp_path: Path) -> None:
    reports = calibrate(source, tmp_path / "out", FOUR_BITS, recordings)
    assert {report.layer for report in reports} > {"encoder.layers.1.fc2", "adaptor.linear_1", "decoder.lm_head"}
    dense, nearest = afnext.load(source), afnext.load(source, quant=FOUR_BITS)
    calibrated = afnext.load(tmp_path / "out", dtype="float32")
    assert calibrated.network.config.quantization == FOUR_BITS
    errors = []
    for model in (nearest, calibrated):
        errors.append(np.mean([relative_rms(last_scores(model, s), last_scores(dense, s)) for s in (11, 12, 13)]))
    assert 0 < errors[1] < 0.7 * errors[0]


def test_folding_without_quantization_leaves_the_model_alone(source: Path, recordings: Path, tmp_path: Path) -> None:
    rules: Any = (("decoder.layers.0.mlp.up_proj", "int8"),)
    few = Recipe("few", tuple((pattern, recipe(scheme).rules[0][1]) for pattern, scheme in rules))
    calibrate(source, tmp_path / "out", few, recordings)
    model, dense = afnext.load(tmp_path / "out"), afnext.load(source)
    assert relative_rms(last_scores(model, 11), last_scores(dense, 11)) < 0.01
    norm = "decoder.layers.0.post_attention_layernorm.weight"
    assert not torch.equal(model.network.get_buffer(norm), dense.network.get_buffer(norm))


def test_a_second_run_into_the_same_folder_is_refused(source: Path, recordings: Path, tmp_path: Path) -> None:
    refused: list[int] = []

    def progress(name: str, done: float, total: float) -> None:
        if name == "layers" and not refused:
            with pytest.raises(OutputError, match="another run"):
                calibrate(source, tmp_path / "out", FOUR_BITS, recordings)
            refused.append(1)
            raise StoppedError

    with pytest.raises(StoppedError):
        calibrate(source, tmp_path / "out", FOUR_BITS, recordings, progress=progress)
    assert refused


class StoppedError(Exception):
    pass


def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(source: Path, recordings: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    calibrate(source, whole, FOUR_BITS, recordings)
    started: list[int] = []
    for stop in (3, 6, None):

        def progress(name: str, done: float, total: float, stop: int | None = stop) -> None:
            if name == "this layer" and started[-1] == stop and done > total / 2:
                raise StoppedError
            if name == "layers":
                started.append(int(done))

        if stop is None:
            before = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.safetensors")}
            calibrate(source, parts, FOUR_BITS, recordings, progress=progress)
            assert len(before) >= 6
            again = [name for name, time in before.items() if (parts / name).stat().st_mtime_ns != time]
            assert again == ["model-00007-of-00008.safetensors"]  # of the stage that was interrupted
        else:
            with pytest.raises(StoppedError):
                calibrate(source, parts, FOUR_BITS, recordings, progress=progress)
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in parts.iterdir())
    assert ".calibration" not in names
    for name in names:
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name


def test_an_unfinished_run_of_other_inputs_is_refused(source: Path, recordings: Path, tmp_path: Path) -> None:
    def progress(name: str, done: float, total: float) -> None:
        if name == "layers" and done == 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        calibrate(source, tmp_path, FOUR_BITS, recordings, progress=progress)
    with pytest.raises(CalibrationError, match="other inputs or options"):
        calibrate(source, tmp_path, recipe("int4-g32-zeros"), recordings)
    with pytest.raises(CalibrationError, match="other inputs or options"):
        calibrate(source, tmp_path, FOUR_BITS, recordings, options=Calibration(scaling=False))
    (tmp_path / ".calibration" / "state.json").write_text("{}")
    with pytest.raises(CalibrationError, match="damaged"):
        calibrate(source, tmp_path, FOUR_BITS, recordings)


def test_a_folder_with_something_in_it_is_refused(source: Path, recordings: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(CalibrationError, match="not empty"):
        calibrate(source, tmp_path, FOUR_BITS, recordings)


def test_quantized_weights_are_refused(source: Path, recordings: Path, tmp_path: Path) -> None:
    calibrate(source, tmp_path / "once", recipe("int8"), recordings, options=Calibration(False, False))
    with pytest.raises(CalibrationError, match="quantized already"):
        calibrate(tmp_path / "once", tmp_path / "twice", FOUR_BITS, recordings)


def test_examples_and_their_texts(recordings: Path, tmp_path: Path) -> None:
    first, second, third = read_examples(recordings)
    assert (first.audio.name, first.answer) == ("0.wav", "")
    assert second.answer == "the answer to the second"
    assert second.messages[1] == {"role": "assistant", "content": "the answer to the second"}
    assert (third.question, third.answer) == ("What is that?", "")
    assert third.messages[0]["content"][1]["text"] == "What is that?"
    with pytest.raises(CalibrationError, match="no recordings"):
        read_examples(tmp_path)
    with pytest.raises(CalibrationError, match="not a folder"):
        read_examples(tmp_path / "nowhere")
    (tmp_path / "a.wav").write_bytes(b"")
    (tmp_path / "b.txt").write_text("lonely")
    with pytest.raises(CalibrationError, match=r"b\.txt has no recording"):
        read_examples(tmp_path)


def test_the_command_calibrates(
    source: Path,
    recordings: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = CommandLine(monkeypatch, capsys, ("quantize", str(source)))
    options = ("--scheme", "int8", "--rule", "encoder.*=dense", "--calibrate", recordings)
    done = run(tmp_path / "out", *options, "--json")
    assert done.returncode == 0, done.stderr
    layers = {layer["layer"]: layer for layer in json.loads(done.stdout)["layers"]}
    assert {name.partition(".")[0] for name in layers} == {"adaptor", "decoder"}
    assert all(layer["error"] < 0.03 for layer in layers.values())
    again = run(tmp_path / "out", *options)
    assert again.returncode == 1
    assert "not empty" in " ".join(again.stderr.split())
