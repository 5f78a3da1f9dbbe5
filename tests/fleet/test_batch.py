"""`afnext batch --ray`: the rows of one process, also when a process is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.audio import speech_like, wav_bytes

pytest.importorskip("ray", reason="Ray is not installed; `make test-ray` sets it up")
psutil = pytest.importorskip("psutil")
pytestmark = pytest.mark.slow  # each starts Ray twice


def batch(folder: Path, out: Path, *more: str) -> list[str]:
    options = ["--ask", "What do you hear?", "--max-new-tokens", "4", "--threads", "1", "--json"]
    return [sys.executable, "-m", "afnext", "batch", str(folder), "--out", str(out), *options, *more]


def rows_in(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return sorted(({**row, "timings": None} for row in rows), key=lambda row: row["path"])


@pytest.fixture
def folder(tmp_path: Path, seed: int) -> Path:
    """Thirty short recordings, and a file that is none."""
    place = tmp_path / "recordings"
    place.mkdir()
    for number in range(30):
        (place / f"{number:02}.wav").write_bytes(wav_bytes(speech_like(0.5 + 0.1 * (number % 5), seed + number)))
    (place / "bad.wav").write_text("no audio")
    return place


def test_rows_on_ray_are_those_of_one_process(home: Path, folder: Path, tmp_path: Path) -> None:
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    alone = subprocess.run(batch(folder, here), capture_output=True, text=True, timeout=300)
    done = subprocess.run(batch(folder, there, "--ray", "--replicas", "2"), capture_output=True, text=True, timeout=300)
    assert (alone.returncode, done.returncode) == (1, 1), done.stderr
    summary = json.loads(done.stdout)
    assert (summary["done"], summary["failed"]) == (30, 1)
    assert rows_in(there) == rows_in(here)
    again = subprocess.run(batch(folder, there, "--ray"), capture_output=True, text=True, timeout=300)
    assert json.loads(again.stdout)["skipped"] == 30
    assert len(rows_in(there)) == 31


def test_a_killed_process_and_a_killed_run_lose_nothing(home: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    command = batch(folder, out, "--ray", "--replicas", "2")

    def rows() -> int:
        return len(out.read_bytes().splitlines()) if out.exists() else 0

    def started(more_than: int) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        end = time.monotonic() + 240
        while rows() <= more_than and process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.05)
        return process

    run = started(0)
    descendants = psutil.Process(run.pid).children(recursive=True)
    workers = [each for each in descendants if any("ray::Worker" in part for part in each.cmdline())]
    if workers:  # otherwise the run was quicker
        os.kill(workers[0].pid, signal.SIGKILL)
    time.sleep(0.2)
    run.kill()
    run.wait()
    for each in descendants:  # Ray's own processes notice after a while
        each.kill()
    final = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert final.returncode == 1, final.stderr
    assert len(rows_in(out)) == 31
    assert len({row["id"] for row in rows_in(out)}) == 31
    assert [row["path"] for row in rows_in(out) if row["status"] == "failed"] == [str(folder / "bad.wav")]
