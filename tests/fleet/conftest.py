"""A fleet on a Ray cluster of this machine, as `afnext serve --ray` starts it. Without Ray these tests are skipped."""

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

import afnext.bench

psutil = pytest.importorskip("psutil")
SCENE = Path(afnext.bench.__path__[0]) / "data" / "scene.flac"
QUESTION = "Describe the audio with timestamps."
START_SECONDS = 300


@dataclass
class Fleet:
    """A running fleet of two replicas, each of which takes one request at a time."""

    url: str
    process: subprocess.Popen[str]

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home folder for Ray, which writes a token there."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield folder


@pytest.fixture(scope="module")
def fleet(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """The fleet."""
    state = tmp_path_factory.mktemp("state")
    arguments = ["--ray", "--replicas", "2", "--max-requests", "1", "--decode-workers", "1", "--threads", "1"]
    command = [sys.executable, "-m", "afnext", "serve", *arguments, "--port", "0", "--state-dir", str(state)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    ready, lines = threading.Event(), []

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if line == "ready\n":
                ready.set()
        ready.set()

    threading.Thread(target=read, daemon=True).start()
    try:
        assert ready.wait(START_SECONDS), "".join(lines)
        assert process.poll() is None, "".join(lines)
        url = re.search(r"^afnext-tiny on (http://127\.0\.0\.1:[1-9]\d*)$", "".join(lines), re.MULTILINE)
        assert url is not None, "".join(lines)
        yield Fleet(url[1], process)
    finally:
        process.terminate()
        try:
            process.wait(120)
        finally:
            process.kill()
        print("".join(lines[-200:]))


def kill(fleet: Fleet, replica: str) -> None:
    """Kill the process of a replica, which is known by its log file."""
    for each in descendants(fleet.process.pid):
        with suppress(psutil.Error):
            if any(f"_Listener_{replica}." in file.path for file in each.open_files()):
                each.kill()
                return
    raise AssertionError(f"no process belongs to {replica}")


def descendants(process: int) -> list[Any]:
    """A process and those that it has started, directly or not."""
    root = psutil.Process(process)
    return [root, *root.children(recursive=True)]


def listening_addresses(process: int) -> set[str]:
    """The addresses at which a process and its descendants listen."""
    found: set[str] = set()
    for each in descendants(process):
        with suppress(psutil.Error):
            connections = each.net_connections("inet")
            listening = [each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN]
            found |= {ip.removeprefix("::ffff:") for ip in listening}  # IPv4 addresses on IPv6 sockets
    return found


def replica_of(response: httpx.Response) -> str:
    """The replica that answered."""
    assert re.fullmatch(r"\w+", response.headers["x-afnext-replica"])
    return response.headers["x-afnext-replica"]
