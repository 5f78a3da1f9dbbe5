"""`afnext serve` as a process: signals under load, and an engine that fails."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("starlette", reason="serving needs the extra `serve`")
from .conftest import eventually

BODY = {"messages": [{"role": "user", "content": "hi"}], "temperature": 2.0, "seed": 1, "ignore_eos": True}
# The server with an engine whose steps are slow, or which fails at its first step.
SCRIPT = """
import sys, time, afnext
from afnext.serve.run import run
from afnext.serve.settings import Settings

mode, drain = sys.argv[1:]

def load():
    model = afnext.load("afnext-tiny")
    steps = model.engine._steps
    step = steps.step
    def slow():
        time.sleep(0.3)
        return step()
    def failing(*arguments):
        raise KeyboardInterrupt
    if mode == "slow":
        steps.step = slow
    else:
        steps.scheduler.next_admissible = failing
        steps.pages.rebuild = lambda waiting: 1 // 0
    return model

sys.exit(run(Settings(port=0, names=("afnext-tiny",), drain_seconds=float(drain)), load))
"""


_URL = re.compile(r"http://127\.0\.0\.1:\d+")


def script(mode: str, drain: float) -> list[str]:
    return [sys.executable, "-c", SCRIPT, mode, str(drain)]


@contextmanager
def serving(
    folder: Path, *arguments: str, command: list[str] | None = None, **variables: str
) -> Iterator[tuple[str, Any]]:
    """The URL of a server in a process of its own, whose temporary files lie in `folder`, and the process.

    variables: of its environment.
    """
    environment = {**os.environ, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1", **variables}
    default = [sys.executable, "-m", "afnext", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(command or default, env=environment, stderr=subprocess.PIPE, text=True)
    lines: list[str] = []
    ready = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if line == "ready\n":
                ready.set()

    reading = threading.Thread(target=read)
    reading.start()
    try:
        assert ready.wait(200), lines
        process.lines = lines  # type: ignore[attr-defined]
        yield next(filter(None, map(_URL.search, lines)))[0], process
    finally:
        process.kill()
        process.wait()
        reading.join()


def half_sent(url: str) -> tuple[socket.socket, bytes]:
    """A request that the server has accepted, and the half of its body that is not sent yet."""
    body = json.dumps({**BODY, "max_tokens": 50}).encode()
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=100)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n"
    connection.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
    assert connection.recv(1000).startswith(b"HTTP/1.1 100")  # it reads the body: the request is accepted
    connection.sendall(body[:10])
    return connection, body[10:]


def until_draining(client: httpx.Client) -> None:
    assert eventually(lambda: client.get("/health/ready").status_code != 200)


def test_sigterm_under_load_loses_no_accepted_answer(tmp_path: Path) -> None:
    with (
        serving(tmp_path, "--drain-seconds", "200") as (url, process),
        httpx.Client(base_url=url, timeout=100) as client,
    ):
        accepted = [half_sent(url) for _ in range(4)]
        process.send_signal(signal.SIGTERM)
        until_draining(client)
        assert client.get("/health/ready").json()["status"] == "draining"
        refused = client.post("/v1/chat/completions", json=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert client.get("/v1/models").status_code == 503
        assert client.get("/health/live").status_code == 200
        for connection, rest in accepted:
            connection.sendall(rest)
        for connection, _ in accepted:
            answer = b""
            while not answer.endswith(b"}}") and (piece := connection.recv(1 << 16)):
                answer += piece
            connection.close()
            assert answer.startswith(b"HTTP/1.1 200"), answer
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["finish_reason"] in ("stop", "length")
        assert process.wait(100) == 0
    assert not list(tmp_path.iterdir())
    requests = [json.loads(line) for line in process.lines if line.startswith("{")]
    assert [line["status"] for line in requests if line["route"] == "/v1/chat/completions"].count(200) == 4


def test_what_does_not_end_in_time_ends_with_an_error(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(path := str(tmp_path_factory.mktemp("systemd") / "notify"))
        systemd.settimeout(100)
        broken_off(tmp_path, path)
        assert [systemd.recv(100), systemd.recv(100)] == [b"READY=1", b"STOPPING=1"]


def broken_off(tmp_path: Path, notify_socket: str) -> None:
    """An answer that goes on when the server's patience ends."""
    with serving(tmp_path, command=script("slow", 0.2), NOTIFY_SOCKET=notify_socket) as (url, process):
        body = {**BODY, "stream": True, "max_tokens": 4000}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=100) as response:
            process.send_signal(signal.SIGTERM)
            answer = response.read().decode()
        assert process.wait(100) == 0
    assert '"code":"draining"' in answer
    assert answer.endswith("data: [DONE]\n\n")
    assert not list(tmp_path.iterdir())


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    with (
        serving(tmp_path, "--drain-seconds", "1000") as (url, process),
        httpx.Client(base_url=url, timeout=100) as client,
    ):
        connection, _ = half_sent(url)
        process.send_signal(signal.SIGTERM)
        until_draining(client)
        process.send_signal(signal.SIGTERM)
        assert process.wait(100) == 1
        connection.close()
    assert not list(tmp_path.iterdir())


def test_a_failed_engine_gives_errors_and_ends_the_server(tmp_path: Path) -> None:
    with serving(tmp_path, command=script("broken", 1)) as (url, process):
        answer = httpx.post(f"{url}/v1/chat/completions", json=BODY, timeout=100)
        assert answer.status_code in (500, 503)
        assert answer.json()["error"]["type"] == "server_error"
        assert "KeyboardInterrupt" not in answer.text
        with suppress(httpx.TransportError):  # it may have ended
            assert httpx.get(f"{url}/health/live", timeout=100).status_code == 503
        assert process.wait(100) == 1
    assert any("the engine has failed" in line for line in process.lines)


def children(pid: int, module: str) -> list[int]:
    """The processes that `pid` has started with `python -m module`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and module in (folder / "cmdline").read_text().split("\0"):
                found.append(int(folder.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_a_killed_rank_ends_the_server(tmp_path: Path) -> None:
    with serving(tmp_path, "--tp", "2") as (url, process):
        body = {**BODY, "stream": True, "max_tokens": 20_000}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=100) as response:
            lines = response.iter_lines()
            while "content" not in next(lines):
                pass
            (rank,) = children(process.pid, "afnext.runtime.app.rank")
            os.kill(rank, signal.SIGKILL)
            rest = "".join(lines)
        assert '"code":"engine_dead"' in rest
        assert rest.endswith("data: [DONE]")
        assert process.wait(100) == 1
    assert any("the process of rank 1 was killed by SIGKILL" in line for line in process.lines)


@pytest.mark.slow
def test_sigterm_lets_all_ranks_finish_what_was_accepted(tmp_path: Path) -> None:
    """A service manager sends it to every process of the service."""
    with serving(tmp_path, "--tp", "2") as (url, process):
        connection, rest = half_sent(url)
        for pid in (process.pid, *children(process.pid, "afnext.runtime.app.rank")):
            os.kill(pid, signal.SIGTERM)
        connection.sendall(rest)
        answer = b""
        while not answer.endswith(b"}}") and (piece := connection.recv(1 << 16)):
            answer += piece
        connection.close()
        assert answer.startswith(b"HTTP/1.1 200"), answer
        assert process.wait(100) == 0
    assert not list(tmp_path.iterdir())
