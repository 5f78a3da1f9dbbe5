"""The end-to-end benchmark: what it compares, refuses, extrapolates and resumes."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from afnext.bench.core.record import Record, read
from afnext.bench.model import e2e as bench
from afnext.bench.model.e2e_subjects import AfnextSubject, TransformersSubject
from afnext.kernels.errors import AfnextError

STAGES = ["log-mel", "encode", "prefill", "decode", "first token", "total"]


def run(out: Path, **options: Any) -> list[Record]:
    defaults = {"random": "tiny", "audio_seconds": (3.0,), "schemes": ("fp32",), "repeats": 2, "new_tokens": 3}
    return bench.run_e2e(out=out, quiet=True, **{**defaults, **options})


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Record]]:
    out = tmp_path_factory.mktemp("bench") / "results.jsonl"
    return out, run(out, batches=(1, 2))


def test_every_stage_is_measured_for_both_sides(measured: tuple[Path, list[Record]]) -> None:
    _, records = measured
    for batch in (1, 2):
        names = {(r.name, r.subject) for r in records if r.case["batch"] == batch} - {("load audio", "afnext fp32")}
        assert names == {(stage, side) for stage in STAGES for side in ("afnext fp32", "transformers fp32")}
    assert {record.kind for record in records} == {"measured"}
    assert all(record.values["median_s"] > 0 for record in records)
    assert all(record.machine["versions"]["torch"] == torch.__version__ for record in records)


def test_the_two_sides_agree_and_only_then_have_a_speedup(measured: tuple[Path, list[Record]]) -> None:
    ours = [r for r in measured[1] if r.subject == "afnext fp32" and r.name != "load audio"]
    assert all(record.values["agrees"] for record in ours), [record.values["reason"] for record in ours]
    for record in ours:
        other = next(
            r for r in measured[1] if (r.name, r.case) == (record.name, record.case) and r.subject != record.subject
        )
        assert record.values["speedup"] == pytest.approx(other.values["median_s"] / record.values["median_s"])


def test_a_finished_run_is_not_measured_again(
    measured: tuple[Path, list[Record]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AfnextSubject, "begin", forbidden)
    out, records = measured
    assert run(out, batches=(1, 2)) == []
    assert [record.key for record in read(out)] == [record.key for record in records]


def forbidden(*arguments: object) -> None:
    raise AssertionError("measured again")


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "results.jsonl"
    begin = AfnextSubject.begin

    def interrupted(self: AfnextSubject, audio: Any, batch: int, new_tokens: int) -> None:
        if len(audio) > 2 * 16_000:
            raise KeyboardInterrupt
        begin(self, audio, batch, new_tokens)

    options = {"audio_seconds": (1.0, 3.0), "baseline": "none"}
    monkeypatch.setattr(AfnextSubject, "begin", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(out, **options)
    assert {record.case["audio_seconds"] for record in read(out)} == {1.0, 3.0}, "loading 3 s was still measured"
    monkeypatch.setattr(AfnextSubject, "begin", begin)
    assert {record.case["audio_seconds"] for record in run(out, **options)} == {3.0}


@pytest.mark.parametrize("stage", ["log-mel", "encode", "prefill", "decode"])
def test_a_wrong_output_forbids_the_speedup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    method = stage.replace("-", "_")
    right: Callable[[AfnextSubject], torch.Tensor] = getattr(AfnextSubject, method)
    monkeypatch.setattr(AfnextSubject, method, lambda self: right(self) * 1.01)
    records = run(tmp_path / "results.jsonl", repeats=1)
    wrong = next(r for r in records if (r.name, r.subject) == (stage, "afnext fp32"))
    assert wrong.values["speedup"] is None
    assert not wrong.values["agrees"]
    assert "the outputs differ" in wrong.values["reason"]


def test_a_slow_stage_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    right = AfnextSubject.encode

    def slow(self: AfnextSubject) -> torch.Tensor:
        time.sleep(1.0)
        return right(self)

    monkeypatch.setattr(AfnextSubject, "encode", slow)
    records = run(tmp_path / "results.jsonl", repeats=1)
    encode = next(r for r in records if (r.name, r.subject) == ("encode", "afnext fp32"))
    assert encode.values["median_s"] >= 1.0
    assert encode.values["speedup"] < 0.9


def test_extrapolation_adds_the_cost_of_a_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake of the true width, whose stages take 1 s and 0.1 s a layer."""
    monkeypatch.setattr(bench, "FULL_WIDTH", (64, 96))
    monkeypatch.setattr(bench, "FULL_LAYERS", (32, 28))

    def fake_times(self: object, stage: str, calls: dict[str, Callable[[], Any]], device: object) -> Any:
        return {name: bench.Samples((1.1 if "first layer only" in name else 1.2,)) for name in calls}

    monkeypatch.setattr(bench._Run, "_measure", fake_times)
    records = run(tmp_path / "results.jsonl", baseline="none")
    extrapolated = {record.name: record for record in records if record.kind == "extrapolated"}
    assert extrapolated.keys() == {"encode", "prefill", "decode"}
    assert extrapolated["encode"].values["median_s"] == pytest.approx(1.0 + 0.1 * 32)
    assert extrapolated["decode"].values["median_s"] == pytest.approx(1.0 + 0.1 * 28)
    assert extrapolated["decode"].case["layers"] == [32, 28]


def test_measuring_single_layers_changes_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the runs with one layer leave in caches and features must not reach the stages that follow."""
    monkeypatch.setattr(bench, "FULL_WIDTH", (64, 96))
    records = run(tmp_path / "results.jsonl", repeats=3, batches=(1, 2))
    ours = [r for r in records if r.subject == "afnext fp32" and r.kind == "measured" and r.name != "load audio"]
    assert len(ours) == 2 * len(STAGES)
    assert all(record.values["agrees"] for record in ours), [record.values["reason"] for record in ours]
    assert sum(record.kind == "extrapolated" for record in records) == 2 * 2 * 3


def test_a_compiled_reference_with_a_static_cache_agrees(tmp_path: Path) -> None:
    records = run(tmp_path / "results.jsonl", baseline="compiled", batches=(2,), repeats=1)
    decode = next(r for r in records if (r.name, r.subject) == ("decode", "afnext fp32"))
    assert decode.values["agrees"], decode.values["reason"]
    assert decode.values["speedup_over"] == "transformers compiled"


@pytest.mark.parametrize("name", ["hqq", "torchao"])
def test_a_quantizer_that_is_not_installed_is_left_out(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed")
    options: dict[str, Any] = {"random": "tiny", "audio_seconds": (1.0,), "schemes": ("fp32",), "repeats": 1}
    records = bench.run_e2e(out=tmp_path / "r.jsonl", baseline=name, new_tokens=2, **options)
    assert {record.subject for record in records} == {"afnext fp32"}
    assert f"transformers {name} is left out" in capsys.readouterr().err


def test_first_layers_are_all_that_runs_and_come_back(measured: tuple[Path, list[Record]]) -> None:
    from torch import nn

    from afnext.bench.model.e2e_subjects import first_layers

    stack = nn.Module()
    stack.layers = nn.ModuleList(nn.Identity() for _ in range(5))
    with first_layers(stack, 2):
        assert len(stack.layers) == 2
    assert len(stack.layers) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"random": None}, "--model"),
        ({"model": "x"}, "--random"),
        ({"schemes": ("int5",)}, "int5.*choose from fp32, bf16, fp16, int8"),
        ({"baseline": "llama"}, "llama"),
        ({"random": "huge"}, "unknown shape 'huge'"),
    ],
)
def test_wrong_arguments_are_explained(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(AfnextError, match=message):
        run(tmp_path / "results.jsonl", **options)


def test_a_baseline_that_cannot_load_is_left_out_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*arguments: object, **options: object) -> None:
        raise ImportError("no such library")

    monkeypatch.setattr(TransformersSubject, "__init__", missing)
    records = bench.run_e2e(
        out=tmp_path / "r.jsonl", random="tiny", audio_seconds=(1.0,), schemes=("fp32",), repeats=1, new_tokens=2
    )
    assert {record.subject for record in records} == {"afnext fp32"}
    assert "transformers fp32 is left out" in capsys.readouterr().err


@pytest.mark.parametrize("baseline", ["none", "transformers"])
def test_packed_weights_are_measured_beside_dense_ones(baseline: str, tmp_path: Path) -> None:
    records = run(tmp_path / "r.jsonl", schemes=("int8",), baseline=baseline, repeats=1)
    sides = {"afnext int8"} | ({"transformers bf16"} if baseline == "transformers" else set())
    assert {record.subject for record in records} == sides
    decode = next(record for record in records if (record.name, record.subject) == ("decode", "afnext int8"))
    assert decode.case["scheme"] == "int8"
    weight_bytes, seconds = decode.values["weight_bytes"], decode.values["median_s"]
    # Two layers with q, k, v, o and the MLP, and the head, all a byte a weight; norms, biases and scales on top.
    assert 180_000 < weight_bytes < 210_000
    assert decode.values["weight_bytes_per_s"] == pytest.approx(weight_bytes / seconds)
    assert decode.values["percent_of_copy"] > 0
    assert decode.values["resident_bytes"] > weight_bytes
    if baseline == "transformers":
        assert decode.values["agrees"], decode.values["reason"]
