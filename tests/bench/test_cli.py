"""`afnext bench` as a user runs it, on a machine without a GPU: tables, JSON, help, mistakes."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import afnext.bench
from afnext.__main__ import main
from afnext.bench.random_checkpoint import write_random_checkpoint

COMMANDS = ("e2e", "kernels", "quality", "report", "compare", "all")
RECORDING = Path(afnext.bench.__path__[0]) / "data" / "jfk.flac"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs `afnext bench ...` in an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["afnext", "bench", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(run: Run, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "Usage: afnext bench" in out
    assert f"Example: afnext bench {command}" in " ".join(out.split())


def test_from_measuring_to_a_report_and_a_comparison(run: Run) -> None:
    options = ("--random", "tiny", "--audio", 2, "--scheme", "fp32", "--repeats", 1, "--new-tokens", 2)
    code, out, err = run("e2e", *options, "--out", "a.jsonl")
    assert code == 0, err
    assert {"log-mel", "encode", "prefill", "decode", "total"} <= set(out.split())
    code, out, err = run("e2e", *options, "--out", "b.jsonl", "--json", "--baseline", "none")
    assert {record["subject"] for record in json.loads(out)} == {"afnext fp32"}
    code, out, err = run("report", "a.jsonl", "--json")
    assert [Path(page).suffix for page in json.loads(out)] == [".html", ".md"]
    assert all(Path(page).stat().st_size for page in json.loads(out))
    code, out, err = run("compare", "a.jsonl", "b.jsonl", "--json")
    assert {row["name"] for row in json.loads(out)["rows"]} >= {"encode", "prefill", "decode"}


def test_kernels(run: Run) -> None:
    code, out, err = run("kernels", "--quick", "--operation", "gelu", "--dtype", "fp32", "--repeats", 1, "--json")
    assert code == 0, err
    assert {record["name"] for record in json.loads(out)} == {"ceiling", "gelu"}


def test_quality(run: Run, tmp_path: Path) -> None:
    model = write_random_checkpoint(tmp_path / "model")
    shutil.copy(RECORDING, tmp_path / "clip.flac")
    row = {"audio": "clip.flac", "text": "And so, my fellow Americans"}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(row) + "\n")
    options = ("manifest.jsonl", "-m", model, "--scheme", "fp32", "--max-new-tokens", 8)
    code, out, err = run("quality", *options, "--json")
    assert code == 0, err
    assert json.loads(out)["values"]["wer"] > 0.5, "random weights transcribe nothing"
    code, out, err = run("quality", *options, "--task", "perplexity", "--out", "p.csv", "--json")
    assert json.loads(out)["values"]["perplexity"] > 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("e2e", "--audio", "long"), 2, "'long' should be numbers"),
        (("e2e", "--audio", "-3"), 2, "not above 0"),
        (("e2e",), 1, "--random"),
        (("kernels", "--dtype", "int3"), 2, "'int3' is none of"),
        (("kernels", "--operation", "knitting"), 1, "knitting"),
        (("quality", "nowhere.jsonl", "-m", "nowhere"), 1, "nowhere"),
        (("report", "nowhere.jsonl"), 1, "nowhere.jsonl"),
        (("compare", "a.jsonl", "b.jsonl"), 1, "a.jsonl"),
    ],
)
def test_mistakes_are_explained(run: Run, arguments: tuple[object, ...], code: int, message: str) -> None:
    found, _, err = run(*arguments)
    assert found == code
    assert message in " ".join(err.split())
    assert "Traceback" not in err
