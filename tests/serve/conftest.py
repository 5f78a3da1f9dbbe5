"""A server with the bundled model on a free port of the loopback interface, and clients for it."""

import asyncio
import hashlib
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import httpx
import pytest

pytest.importorskip("starlette", reason="serving needs the extra `serve`")
import openai

import afnext
import afnext.bench
from afnext.serve.local import LocalBackend
from afnext.serve.run import listener
from afnext.serve.server import Server
from afnext.serve.settings import Settings

DATA = Path(afnext.bench.__path__[0]) / "data"
SCENE = DATA / "scene.flac"
HOST = "audio.example"
T = TypeVar("T", str, bytes)
QUESTION = "Describe the audio with timestamps."


@dataclass
class Running:
    """A server in a thread of this process."""

    url: str
    server: Server
    model: afnext.Model

    def openai(self, key: str = "none", **options: object) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **options)  # type: ignore[arg-type]

    def http(self, key: str | None = None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=120)


def eventually(condition: Callable[[], object], seconds: float = 100) -> bool:
    """Whether a condition holds now or comes to hold within `seconds`."""
    deadline = time.monotonic() + seconds
    while not (held := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(held)


@contextmanager
def patience(service: Running, seconds: float) -> Iterator[None]:
    """For the length of the block the server waits so long for clients that are too slow."""
    usual = service.server.settings
    service.server.settings = replace(usual, slow_seconds=seconds)
    try:
        yield
    finally:
        service.server.settings = usual


def stalled(service: Running, ask: Callable[[], T]) -> T:
    """What an impatient server sends to a client that stalls, or b"" or "" if it hangs up.

    Its patience begins with the connection. Where a client is so slow that nothing was asked until it ended, it gets
    more.
    """
    for seconds in (0.5, 5.0, 50.0):
        with patience(service, seconds):
            if received := ask():
                break
    return received


@contextmanager
def running(load: Callable[[], afnext.Model], **settings: object) -> Iterator[Running]:
    """Serve a model for the length of the block."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        options = Settings(port=port, names=("afnext-tiny",), decode_workers=1, **settings)  # type: ignore[arg-type]
        ready, failures, made = threading.Event(), [], []

        async def serve() -> None:
            backend = LocalBackend(load, share_cache=options.share_cache)
            server = Server(backend, options)
            http = listener(server)
            serving = asyncio.create_task(http.serve(sockets=[listening]))
            await backend.start()
            made.append((http, server, backend.model.model))
            ready.set()
            await serving

        def run() -> None:
            try:
                asyncio.run(serve())
            except BaseException as error:
                failures.append(error)
            finally:
                ready.set()

        thread = threading.Thread(target=run, name="server")
        thread.start()
        ready.wait(200)
        assert made, failures
        http, server, model = made[0]
        try:
            yield Running(f"http://127.0.0.1:{port}", server, model)
        finally:
            http.should_exit = True
            thread.join(100)
            assert not thread.is_alive()


@pytest.fixture(scope="session")
def service() -> Iterator[Running]:
    """A server without keys."""
    with running(lambda: afnext.load("afnext-tiny")) as service:
        yield service


@pytest.fixture(scope="session")
def keyed_service() -> Iterator[Running]:
    """A server with the keys "one" and "two"."""
    keys = {hashlib.sha256(key.encode()).hexdigest(): f"client-{key}" for key in ("one", "two")}
    with running(lambda: afnext.load("afnext-tiny"), keys=keys) as service:
        yield service


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate for audio.example, in one file."""
    folder = tmp_path_factory.mktemp("tls")
    names = ["-subj", f"/CN={HOST}", "-addext", f"subjectAltName=DNS:{HOST}"]
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    try:
        subprocess.run(
            [*made, "-keyout", "key.pem", "-out", "cert.pem", *names], cwd=folder, check=True, capture_output=True
        )
    except FileNotFoundError:
        pytest.skip("openssl makes the certificate, and is not installed")
    path = folder / "both.pem"
    path.write_text((folder / "key.pem").read_text() + (folder / "cert.pem").read_text())
    return path
