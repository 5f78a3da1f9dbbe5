"""The table of what quantization costs: its errors against float64, that it goes on, and a checkpoint's word errors."""

import json
from pathlib import Path

import pytest
import torch
from support.audio import speech_like, wav_bytes
from support.command_line import CommandLine

from afnext.bench.core.random_checkpoint import write_random_checkpoint
from afnext.bench.quality.quantization import (
    MODEL_RECIPES,
    SCHEMES,
    Results,
    Row,
    bits_of,
    layer_case,
    layer_error,
    measure_layers,
    measure_model,
    tables,
    variants,
)
from afnext.quant.int4 import dequantize_int4, fit_int4
from afnext.quant.recipe import RECIPES, recipe
from afnext.quant.scheme import Int4, Int8, Scheme, parse_scheme


def test_the_error_is_that_of_the_output() -> None:
    weight, x, held_out = layer_case("heavy-tailed", 64, 128, 16)
    rounded = dequantize_int4(*fit_int4(weight, 64), torch.float64)
    exact = held_out.double() @ weight.double().T
    expected = float((held_out.double() @ rounded.T - exact).norm() / exact.norm())
    assert layer_error(weight, x, held_out, Int4(64), "nearest") == pytest.approx(expected, rel=1e-3)


def test_calibration_wins_on_outliers_and_never_loses_much(tmp_path: Path) -> None:
    results = Results(tmp_path / "quantization.json")
    measure_layers(results, ("int8", "int4-g64"), rows=512, inputs=128, outputs=32)
    errors = {row.key[1:]: row.values["error"] for row in results.rows}
    assert errors["heavy-tailed", "int4-g64", "both"] < 0.5 * errors["heavy-tailed", "int4-g64", "nearest"]
    assert errors["random", "int4-g64", "both"] < 1.05 * errors["random", "int4-g64", "nearest"]
    assert errors["random", "bf16", "nearest"] < errors["random", "int8", "nearest"]


def test_rows_that_are_there_are_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "results" / "quantization.json"
    first = Results(path)
    for case in ("random", "heavy-tailed"):
        for scheme in ("bf16", "int8"):
            first.add(Row("layers", case, scheme, "nearest", {"error": 123.0}))
    again = Results(path)
    measure_layers(again, ("int8",), rows=64, inputs=64, outputs=8)
    assert [row.values["error"] for row in again.rows if row.method == "nearest"] == [123.0] * 4
    assert {row.method for row in again.rows} == {"nearest", "both"}
    assert json.loads(path.read_text())[0]["scheme"] == "bf16"


def test_bits_count_scales_and_zeros() -> None:
    assert bits_of(Int4(64)) == 4 + 16 / 64
    assert bits_of(Int4(32, symmetric=False)) == 4 + 32 / 32
    assert bits_of(Int8()) == 8 + 32 / 4096


def test_only_what_a_scheme_has_is_measured() -> None:
    assert ("nf4", "feedback") not in set(variants())
    assert set(variants(("int4-g32",))) == {
        ("int4-g32", method) for method in ("nearest", "scaling", "feedback", "both")
    }


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_measured(name: str) -> None:
    asked = recipe(name)
    assert any(recipe(measured) == asked for measured in MODEL_RECIPES)
    assert {str(asked.scheme(layer)) for layer in ("decoder.layers.0.mlp.up_proj", "decoder.lm_head")} <= {*SCHEMES}


def test_every_scheme_is_measured() -> None:
    kinds = {kind for kind in Scheme.__subclasses__() if kind.__module__ == Scheme.__module__}
    assert {type(parse_scheme(name)) for name in SCHEMES} == kinds


def test_the_committed_tables_are_current() -> None:
    committed = Path(__file__).parents[3] / "bench" / "results" / "quantization"
    text = tables(Results(committed.with_suffix(".json")).rows)
    assert committed.with_suffix(".md").read_text(encoding="utf-8") == text


def test_the_tables_show_every_row() -> None:
    rows = [
        Row("layers", "random", "int4-g64", "nearest", {"error": 0.125}),
        Row("layers", "random", "int4-g64", "both", {"error": 0.0625}),
        Row("speech", "everything", "dense", "nearest", {"errors": 3, "words": 133, "divergence": 0.0}),
        Row("speech", "everything", "nf4", "nearest", {"errors": 7, "words": 133, "divergence": 0.0125}),
        Row("model", "tiny", "int8", "nearest", {"wer": 0.031}),
    ]
    text = tables(rows)
    assert "| int4-g64 | 4.25 | 12.5 |  |  | 6.25 |" in text
    assert "| dense | 16 | 3 (0) |" in text
    assert "| nf4 | 4.5 | 7 (12.5) |" in text
    assert "| int8 | 8.01 | 3.10 |" in text


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    folder = tmp_path / "recordings"
    folder.mkdir()
    rows = []
    for number in range(2):
        (folder / f"{number}.wav").write_bytes(wav_bytes(speech_like(1.5, number)))
        rows.append({"audio": f"{number}.wav", "text": "some words"})
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "recordings" / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_a_checkpoint_is_scored_dense_quantized_and_calibrated(tmp_path: Path, recordings: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "model")
    results = Results(tmp_path / "quantization.json")
    manifest = tmp_path / "recordings" / "manifest.jsonl"
    heard = tmp_path / "heard"
    heard.mkdir()
    (heard / "a.wav").write_bytes(wav_bytes(speech_like(2.0, 5)))
    measure_model(results, folder, manifest, heard, ("int4-g32",))
    assert [row.key for row in results.rows] == [
        ("model", "model", "dense", "nearest"),
        ("model", "model", "int4-g32", "nearest"),
        ("model", "model", "int4-g32", "both"),
    ]
    assert all("wer" in row.values for row in results.rows)


def test_the_command_writes_both_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = CommandLine(monkeypatch, capsys, ("bench", "quantization"))
    done = run("--scheme", "int8", "--out", str(tmp_path), "--json")
    assert done.returncode == 0, done.stderr
    assert {row["part"] for row in json.loads(done.stdout)} == {"layers"}
    assert "| int8 |" in (tmp_path / "quantization.md").read_text()
    missing = run("--scheme", "int8", "--out", str(tmp_path), "--model", str(tmp_path))
    assert missing.returncode == 2
    assert "--data" in missing.stderr
