"""Clients that leave at any moment: everything that they held returns to where it was."""

import base64
import json
import logging
import os
import random
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import websockets.exceptions
import websockets.sync.client

from .conftest import QUESTION, SCENE, Running, eventually

AUDIO = base64.b64encode(SCENE.read_bytes()).decode()
BOUNDARY = "boundary"
QUIET = logging.getLogger("tests.quiet")  # the client's library logs a traceback when its socket is shut
QUIET.disabled = True


def chat(chance: random.Random) -> tuple[str, str, bytes]:
    """A chat request that may stream and may be so long that it goes through a file."""
    parts = [
        {"type": "text", "text": f"{QUESTION} {chance.random()}"},
        {"type": "input_audio", "input_audio": {"data": AUDIO, "format": "flac"}},
    ]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 300, "temperature": 2.0}
    body |= {"stream": chance.random() < 0.5, "metadata": {"pad": "x" * chance.choice([0, 2 << 20])}}
    return "/v1/chat/completions", "application/json", json.dumps(body).encode()


def response(chance: random.Random) -> tuple[str, str, bytes]:
    """A request for a response, perhaps to a question that makes the model think."""
    question = chance.choice([QUESTION, "How many beeps? Please think and reason about the input audio."])
    body = {"input": f"{question} {chance.random()}", "max_output_tokens": 300, "stream": chance.random() < 0.5}
    return "/v1/responses", "application/json", json.dumps(body).encode()


def form(chance: random.Random) -> tuple[str, str, bytes]:
    """A transcript, a file, or a context from a form."""
    path = chance.choice(["/v1/audio/transcriptions", "/v1/files", "/v1/contexts"])
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    stream = (
        f'\r\n--{BOUNDARY}\r\nContent-Disposition: form-data; name="stream"\r\n\r\n{chance.choice(["true", "false"])}'
    )
    body = head.encode() + SCENE.read_bytes() + f"{stream}\r\n--{BOUNDARY}--\r\n".encode()
    return path, f"multipart/form-data; boundary={BOUNDARY}", body


def leave(service: Running, chance: random.Random) -> None:
    """Begin something, and hang up at any moment."""
    if chance.random() < 0.2:
        leave_a_session(service, chance)
    else:
        leave_a_request(service, chance)


def leave_a_session(service: Running, chance: random.Random) -> None:
    """Speak to the realtime endpoint, ask, wait for some events, or not at all, and hang up."""
    kind = chance.choice(["realtime", "transcription"])
    noise = np.random.default_rng(chance.randrange(1 << 32)).integers(-9000, 9000, 24_000, dtype=np.int16)
    audio = {"type": "input_audio_buffer.append", "audio": base64.b64encode(noise.tobytes()).decode()}
    ask = {"type": "response.create", "response": {"instructions": QUESTION, "temperature": 2.0}}
    steps = [audio, audio, {"type": "input_audio_buffer.commit"} if kind == "transcription" else ask, audio]
    url = f"{service.url.replace('http', 'ws')}/v1/realtime?intent={kind}"
    try:
        with websockets.sync.client.connect(url, open_timeout=100, close_timeout=1, logger=QUIET) as connection:
            for step in steps[: chance.randrange(len(steps) + 1)]:
                connection.send(json.dumps(step))
            for _ in range(chance.randrange(4)):
                connection.recv(timeout=chance.choice([0.001, 0.3, 1.0]))
            if chance.random() < 0.5:
                connection.socket.shutdown(socket.SHUT_RDWR)  # without the closing handshake
    except (TimeoutError, OSError, websockets.exceptions.WebSocketException):
        pass


def leave_a_request(service: Running, chance: random.Random) -> None:
    """Send a request, or a part of it, wait for some of the answer, all of it, or not at all, and hang up."""
    path, kind, body = chance.choice([chat, form, response])(chance)
    host, port = service.url.removeprefix("http://").split(":")
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=100) as connection:
        sent = head.encode() + body
        try:
            connection.sendall(sent[: chance.randrange(len(sent)) if chance.random() < 0.3 else len(sent)])
            connection.settimeout(chance.choice([0.001, 0.05, 0.3, 1.0, 5.0]))
            for _ in range(chance.choice([0, 1, 2, 3, 1000])):
                connection.recv(chance.choice([1, 1000]))
        except OSError:
            pass
        if chance.random() < 0.5:  # a reset instead of an orderly end
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")


def held(service: Running) -> dict[str, int]:
    """What requests hold while they are there."""
    server, stats = service.server, service.model.engine.stats()
    return {
        "requests": server.requests,
        "live sessions": int(server.metrics.registry.get_sample_value("afnext_live_sessions") or 0),
        "spool bytes": server.spool.bytes,
        "spool files": len(list(Path(server.spool._folder.name).iterdir())),
        "busy workers": server.settings.decode_workers - server.pool.idle,
        "waiting for workers": server.pool.waiting,
        "sequences": stats.waiting + stats.prefilling + stats.decoding,
        "private pages": stats.private_pages,
    }


def settled(service: Running) -> dict[str, int]:
    """What is held once nothing changes any more, or after a while."""
    eventually(lambda: not any(held(service).values()))
    return held(service)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def check(service: Running, rounds: int) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    for _ in range(8):  # threads and descriptors that pools keep are there afterwards
        leave(service, chance)
    now = settled(service)
    assert not any(now.values()), now
    forget_everything(service)
    before, threads, prefixes = descriptors(), threading.active_count(), service.model.engine.stats().prefix_pages
    clients = [random.Random(chance.random()) for _ in range(rounds)]
    for start in range(0, rounds, 4):
        group = [threading.Thread(target=leave, args=(service, one)) for one in clients[start : start + 4]]
        for thread in group:
            thread.start()
        for thread in group:
            thread.join()
    now = settled(service)
    assert not any(now.values()), now
    with service.http() as client:
        messages = [{"role": "user", "content": "hi"}]
        assert client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 2}).status_code == 200

    def left() -> dict[str, int]:
        forget_everything(service)  # also what a request has stored that the server had not read a moment ago
        return {
            **held(service),
            "descriptors": max(0, descriptors() - before - 4),
            "prefix pages": max(0, service.model.engine.stats().prefix_pages - prefixes),
            "files of contexts": len(list(contexts_folder(service).iterdir())),
        }

    eventually(lambda: not any(left().values()))
    now = left()
    assert not any(now.values()), now
    assert threading.active_count() <= threads + 40  # the pools of threads fill up to their bounds


def forget_everything(service: Running) -> None:
    """Delete all contexts and files."""
    with service.http() as client:
        for kind in ("contexts", "files"):
            for entry in client.get(f"/v1/{kind}").json()["data"]:
                client.delete(f"/v1/{kind}/{entry['id']}")


def contexts_folder(service: Running) -> Path:
    return service.server.contexts._folder


def test_clients_that_leave_hold_nothing(service: Running) -> None:
    check(service, 24)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_thousand_clients_that_leave_hold_nothing(service: Running) -> None:
    check(service, 1000)
