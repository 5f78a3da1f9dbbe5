"""`afnext bench` as a user runs it, on a machine without a GPU: tables, JSON, help, mistakes."""

import json
import shutil
from pathlib import Path

import pytest
from support.command_line import CommandLine

import afnext.bench
from afnext.bench.core.random_checkpoint import write_random_checkpoint

COMMANDS = (
    "e2e",
    "kernels",
    "ops",
    "first-run",
    "card",
    "quality",
    "quantization",
    "report",
    "tables",
    "compare",
    "all",
)
RECORDING = Path(afnext.bench.__path__[0]) / "data" / "jfk.flac"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> CommandLine:
    """Runs `afnext bench ...` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return CommandLine(monkeypatch, capsys, ("bench",))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(run: CommandLine, command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0
    assert "Usage: afnext bench" in done.stdout
    assert f"Example: afnext bench {command}" in " ".join(done.stdout.split())


def test_from_measuring_to_a_report_and_a_comparison(run: CommandLine) -> None:
    options = ("--random", "tiny", "--audio", 2, "--scheme", "fp32", "--repeats", 1, "--new-tokens", 2)
    done = run("e2e", *options, "--out", "a.jsonl")
    assert done.returncode == 0, done.stderr
    assert {"log-mel", "encode", "prefill", "decode", "total"} <= set(done.stdout.split())
    done = run("e2e", *options, "--out", "b.jsonl", "--json", "--baseline", "none")
    assert {record["subject"] for record in json.loads(done.stdout)} == {"afnext fp32"}
    done = run("report", "a.jsonl", "--json")
    assert [Path(page).suffix for page in json.loads(done.stdout)] == [".html", ".md"]
    assert all(Path(page).stat().st_size for page in json.loads(done.stdout))
    done = run("compare", "a.jsonl", "b.jsonl", "--json")
    assert {row["name"] for row in json.loads(done.stdout)["rows"]} >= {"encode", "prefill", "decode"}


def test_kernels(run: CommandLine) -> None:
    done = run("kernels", "--quick", "--operation", "gelu", "--dtype", "fp32", "--repeats", 1, "--json")
    assert done.returncode == 0, done.stderr
    assert {record["name"] for record in json.loads(done.stdout)} == {"ceiling", "gelu"}


def test_problems_are_listed(run: CommandLine) -> None:
    done = run("ops", "--list", "--op", "decode_attention", "--problem", "*8x1-of-45001*", "--json")
    assert done.returncode == 0, done.stderr
    listed = {problem["name"]: problem for problem in json.loads(done.stdout)}
    assert set(listed) == {f"decode_attention/8x1-of-45001{kv}-bfloat16" for kv in ("", "-int8-kv")}
    assert listed["decode_attention/8x1-of-45001-bfloat16"]["launches"]["decode 8 at 45000, int4"] == 28
    done = run("ops", "--list", "--op", "gelu")
    assert "gelu/6000x5120-bfloat16" in done.stdout.split()


def test_quality(run: CommandLine, tmp_path: Path) -> None:
    model = write_random_checkpoint(tmp_path / "model")
    shutil.copy(RECORDING, tmp_path / "clip.flac")
    row = {"audio": "clip.flac", "text": "And so, my fellow Americans"}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(row) + "\n")
    options = ("manifest.jsonl", "-m", model, "--scheme", "fp32", "--max-new-tokens", 8)
    done = run("quality", *options, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["values"]["wer"] > 0.5, "random weights transcribe nothing"
    done = run("quality", *options, "--task", "perplexity", "--out", "p.csv", "--json")
    assert json.loads(done.stdout)["values"]["perplexity"] > 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("e2e", "--audio", "long"), 2, "'long' is not a comma-separated"),
        (("e2e", "--audio", "-3"), 2, "not above 0"),
        (("e2e",), 1, "--random"),
        (("kernels", "--dtype", "int3"), 2, "'int3' is not one of"),
        (("kernels", "--operation", "knitting"), 1, "knitting"),
        (("ops", "--op", "knitting"), 1, "unknown operation 'knitting'"),
        (("ops", "--problem", "*knitting*"), 1, "no problem is called '*knitting*'"),
        (("quality", "nowhere.jsonl", "-m", "nowhere"), 1, "nowhere"),
        (("report", "nowhere.jsonl"), 1, "nowhere.jsonl"),
        (("compare", "a.jsonl", "b.jsonl"), 1, "a.jsonl"),
    ],
)
def test_mistakes_are_explained(run: CommandLine, arguments: tuple[object, ...], code: int, message: str) -> None:
    done = run(*arguments)
    assert done.returncode == code
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
