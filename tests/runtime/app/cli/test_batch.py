"""`afnext batch`: inputs, exit codes, what is printed, and runs that are killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.audio import speech_like, wav_bytes
from support.command_line import CommandLine

OPTIONS = ("--dtype", "fp32", "--max-new-tokens", 3, "--threads", 2)
ASK = ("--ask", "What do you hear?")


@pytest.fixture
def folder_of(tmp_path: Path, seed: int) -> Any:
    """Makes a folder of `good` short recordings and `bad` files that are none."""

    def make(good: int, bad: int) -> Path:
        place = tmp_path / "rec"
        names = [f"{index:03}" for index in range(good + bad)]
        random.Random(seed).shuffle(names)
        for index, name in enumerate(names):
            path = place / name[-1] / f"{name}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            data = wav_bytes(speech_like(0.3 + 0.1 * (index % 5), seed + index))
            path.write_bytes(data if index < good else b"no audio")
        return place

    return make


def rows_in(out: Path) -> list[dict[str, Any]]:
    """The rows of a file in the order of their paths, without their timings."""
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return sorted(({**each, "timings": None} for each in rows), key=lambda each: each["path"])


def test_folders_globs_and_lists(run: CommandLine, folder: Path, folder_of: Any, tmp_path: Path) -> None:
    place = folder_of(5, 1)
    files = sorted(str(path) for path in place.rglob("*.wav"))
    (tmp_path / "list.txt").write_text("\n".join(files[:2]) + "\n\n")
    out = tmp_path / "out.jsonl"
    for number, arguments in enumerate(
        (
            ("--list", tmp_path / "list.txt"),
            (f"@{tmp_path}/list.txt", f"{place}/**/*.wav"),
            (place, files[0]),
        )
    ):
        done = run("batch", *arguments, *ASK, "--out", out, "-m", folder, *OPTIONS, "--json")
        assert done.stdout, done.stderr
        summary = json.loads(done.stdout)
        assert summary["items"] == (2 if number == 0 else 6)
        assert len(rows_in(out)) == summary["items"]
    assert (summary["done"], summary["skipped"] + summary["failed_before"]) == (0, 6)
    assert [each["path"] for each in rows_in(out)] == files
    assert done.returncode == 1
    retried = run("batch", place, *ASK, "--out", out, "-m", folder, *OPTIONS, "--retry")
    assert (retried.returncode, retried.stdout) == (1, "")
    assert "0 of 6 done now, 5 before, 1 failed" in retried.stderr
    assert len(rows_in(out)) == 6


def test_transcripts_and_requests(run: CommandLine, folder: Path, folder_of: Any, tmp_path: Path) -> None:
    [path] = folder_of(1, 0).rglob("*.wav")
    out = tmp_path / "out.jsonl"
    common = ("--out", out, "-m", folder, "--dtype", "fp32", "-q")
    done = run("batch", path, "--transcribe", "--window", 1, "--overlap", 0, "--max-new-tokens", 3, *common)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    [row] = rows_in(out)
    assert (row["status"], len(row["result"]["windows"])) == ("ok", 1)
    requests = tmp_path / "requests.jsonl"
    body = {"messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 3}
    requests.write_text(json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}))
    assert run("batch", requests, *common).returncode == 0
    answered = json.loads(out.read_text().splitlines()[1])
    assert (answered["custom_id"], answered["response"]["status_code"]) == ("a", 200)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "name recordings"),
        (("rec",), 2, "--transcribe and --task"),
        (("rec", "--ask", "?", "--transcribe"), 2, "give one of"),
        (("rec", "--ask", "?", "--window", "5"), 2, "belongs to --transcribe"),
        (("empty.jsonl", "--ask", "?"), 2, "leave out --ask"),
        (("-", "--ask", "?"), 2, "standard input"),
        (("rec/*.mp3", "--ask", "?"), 1, "file matches"),
        (("--list", "nowhere", "--ask", "?"), 1, "cannot be read"),
        (("rec", "--ask", "?", "--out", "rows.csv"), 1, "ends neither in"),
        (("rec", "--ask", "?", "--out", "nowhere/rows.jsonl"), 1, "create the folder"),
    ],
)
def test_wrong_usage_is_refused_before_a_model_is_loaded(
    run: CommandLine,
    no_model: None,
    folder_of: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    folder_of(1, 0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    Path("empty.jsonl").write_text("")
    out = () if "--out" in arguments else ("--out", "out.jsonl")
    done = run("batch", *arguments, *out)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr


def run_and_kill(arguments: list[str], out: Path, lines: int, delay: float) -> None:
    """Run the command in a process that is killed `delay` seconds after `out` has `lines` lines."""
    process = subprocess.Popen([sys.executable, "-m", "afnext", *arguments], stderr=subprocess.PIPE)
    try:
        while process.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < lines):
            time.sleep(0.002)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        _, messages = process.communicate()
    assert process.returncode in (-signal.SIGKILL, 1), messages.decode()
    assert b"Traceback" not in messages


@pytest.mark.skipif(sys.platform == "win32", reason="this system has no SIGKILL")
@pytest.mark.parametrize("kills", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_killed_runs_end_like_a_clean_one(
    run: CommandLine, folder: Path, folder_of: Any, tmp_path: Path, seed: int, kills: int
) -> None:
    place = folder_of(6 * kills, 2)
    out, clean = tmp_path / "out.jsonl", tmp_path / "clean.jsonl"
    common = ("batch", place, *ASK, "-m", folder, *OPTIONS, "--batch-invariant", "-q")
    assert run(*common, "--out", clean).returncode == 1
    choose = random.Random(seed)
    arguments = [*map(str, common), "--out", str(out)]
    for kill in range(kills):
        written = out.read_bytes().count(b"\n") if out.exists() else 0
        run_and_kill(arguments, out, written + choose.randint(kill > 0, 3), choose.uniform(0, 0.02))
        if choose.random() < 0.5:
            with out.open("ab") as file:  # as a machine that loses power leaves it
                torn = out.read_bytes()[-1:] in (b"\n", b"")
                file.write(b'{"id": "0123' if torn else b"")
    assert run(*common, "--out", out).returncode == 1
    assert rows_in(out) == rows_in(clean)


@pytest.mark.slow
def test_many_files_of_which_some_are_bad(run: CommandLine, folder: Path, folder_of: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    done = run("batch", folder_of(190, 10), *ASK, "--out", out, "-m", folder, *OPTIONS, "--json")
    summary = json.loads(done.stdout)
    assert (done.returncode, summary["items"], summary["done"], summary["failed"]) == (1, 200, 190, 10)
    table = pytest.importorskip("pyarrow.parquet").read_table(out)
    assert table.num_rows == 200
    assert table.column("status").to_pylist().count("failed") == 10
    assert len(os.listdir(out)) == 1
