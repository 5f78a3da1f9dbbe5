"""`afnext models`, against a small Hub on loopback, as a user runs it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command_line import CommandLine
from support.fake_hub import COMMIT, FakeHub, environment, served, use

from afnext.bench.core.random_checkpoint import write_random_checkpoint

NAME = "nvidia/audio-flamingo-next-hf"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def no_packed_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFNEXT_CACHE", str(tmp_path / "afnext"))


@pytest.fixture
def fake(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub on loopback that has a small random model by the name of the published one."""
    with served(FakeHub()) as fake:
        fake.add(NAME, write_random_checkpoint(tmp_path / "random"))
        use(fake, cache, monkeypatch)
        yield fake


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


def test_pull_list_where_and_rm(fake: FakeHub, run: CommandLine, cache: Path) -> None:
    absent = run("models", "where", "next")
    assert (absent.returncode, absent.stdout) == (1, "")
    assert "afnext models pull" in " ".join(absent.stderr.split())
    pulled = run("models", "pull", "next")
    folder = Path(pulled.stdout.strip())
    assert pulled.returncode == 0, pulled.stderr
    assert folder == cache / "models--nvidia--audio-flamingo-next-hf" / "snapshots" / COMMIT
    assert run("models", "where", NAME).stdout == pulled.stdout
    described = json.loads(run("info", "next", "--json").stdout)
    assert described["folder"] == str(folder)
    listed = run("models", "list").stdout
    assert "next-think" in listed
    assert listed.count("complete") == 2
    assert listed.count("not downloaded") == 2
    declined = run("models", "rm", "next", stdin=b"n\n")
    assert declined.returncode == 1
    assert folder.is_dir()
    assert run("models", "rm", "next", stdin=b"y\n").returncode == 0
    assert not folder.exists()
    assert run("models", "rm", "next", "--yes").returncode == 1


def test_every_command_has_json(fake: FakeHub, run: CommandLine, cache: Path) -> None:
    folder = json.loads(run("models", "pull", "next", "--json").stdout)["folder"]
    assert json.loads(run("models", "where", "next", "--json").stdout) == {"name": NAME, "folder": folder}
    bundled, listed = json.loads(run("models", "list", "--json").stdout)
    nbytes = sum(path.stat().st_size for path in Path(folder).iterdir())
    assert (bundled["short_name"], bundled["complete"]) == ("tiny", True)
    assert listed == {
        "name": NAME, "short_name": "next", "commit": COMMIT, "bytes": nbytes, "complete": True, "folder": folder
    }  # fmt: skip
    removed = json.loads(run("models", "rm", "next", "--json").stdout)
    assert (removed["name"], removed["bytes"] >= nbytes) == (NAME, True)


def test_an_interrupted_pull_is_listed_and_continues(
    fake: FakeHub, run: CommandLine, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: object, nbytes: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("afnext.runtime.model.download._Bar.update", interrupted)
        stopped = run("models", "pull", "next")
    assert (stopped.returncode, stopped.stdout) == (130, "")
    assert "Traceback" not in stopped.stderr
    assert [model["complete"] for model in json.loads(run("models", "list", "--json").stdout)] == [True, False]
    assert run("models", "pull", "next").returncode == 0
    assert [model["complete"] for model in json.loads(run("models", "list", "--json").stdout)] == [True, True]


def test_what_cannot_be_pulled_is_said_in_a_sentence(fake: FakeHub, run: CommandLine) -> None:
    fake.refused["org/gated"] = (403, "GatedRepo")
    for name, message in [("org/absent", "is not on the Hub"), ("org/gated", "is gated"), ("nxt", "Short names are")]:
        done = run("models", "pull", name)
        assert (done.returncode, done.stdout) == (1, "")
        assert message in " ".join(done.stderr.split())


def test_a_process_finds_the_hub_by_hf_endpoint(fake: FakeHub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    done = subprocess.run(
        [sys.executable, "-m", "afnext", "models", "pull", "next"],
        env={**os.environ, **environment(fake, home)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(home / "hub"))
