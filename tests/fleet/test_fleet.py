"""Two replicas behind one address: `make test-ray`."""

import base64
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import websockets.sync.client
from support.audio import wav_bytes

import afnext

from .conftest import QUESTION, SCENE, Fleet, kill, listening_addresses, replica_of

pytest.importorskip("ray", reason="Ray is not installed; `make test-ray` sets it up")
pytestmark = pytest.mark.timeout(600)  # the first test starts the fleet
WAIT_SECONDS = 120
LONG_SECONDS = 1500.0  # of audio, which takes longer than any test


def chat(data: bytes, **fields: Any) -> dict[str, Any]:
    audio = {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"}}
    content = [{"type": "text", "text": QUESTION}, audio]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 8, **fields}


def about(context: str, **fields: Any) -> dict[str, Any]:
    return {"context": context, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 8, **fields}


def text(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    content: str = response.json()["choices"][0]["message"]["content"]
    return content


def eventually(holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    end = time.monotonic() + WAIT_SECONDS
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.2)


def busy(client: httpx.Client) -> int:
    """Requests that the replicas work on."""
    return sum(replica["requests"] for replica in client.get("/v1/status").json()["replicas"].values())


def noise(seed: int, seconds: float) -> bytes:
    rng = np.random.default_rng(seed)
    return wav_bytes((0.1 * rng.standard_normal(round(16000 * seconds))).astype(np.float32))


@pytest.fixture
def client(fleet: Fleet) -> Iterator[httpx.Client]:
    """A client of the fleet, once it has two replicas without work."""
    with fleet.http() as client:
        eventually(lambda: len(client.get("/v1/status").json()["replicas"]) == 2 and not busy(client))
        yield client


@contextmanager
def long_request(client: httpx.Client, recording: bytes) -> Iterator[tuple[str, Iterator[str]]]:
    """A streamed transcript that lasts; its replica, and its lines from the first event on."""
    form = {"data": {"stream": "true", "window": "10", "overlap": "0"}, "files": {"file": ("long.wav", recording)}}
    with client.stream("POST", "/v1/audio/transcriptions", **form) as response:
        assert response.status_code == 200
        yield replica_of(response), response.iter_lines()


def test_answers_are_those_of_the_model(client: httpx.Client) -> None:
    response = client.post("/v1/chat/completions", json=chat(SCENE.read_bytes(), max_tokens=60))
    with afnext.load("afnext-tiny") as model:
        assert text(response) == model.ask(str(SCENE), QUESTION, max_new_tokens=60).text


def test_a_second_question_reaches_the_replica_that_has_heard_the_recording(client: httpx.Client, seed: int) -> None:
    homes = set()

    def post(path: str, **fields: Any) -> httpx.Response:
        eventually(lambda: not busy(client))  # the home has not always noticed that it has room again
        return client.post(path, **fields)

    for number in range(40):
        recording = noise(seed + number, 12.0)  # more than a page of the cache
        first = post("/v1/chat/completions", json=chat(recording))
        again = post("/v1/chat/completions", json=chat(recording))
        stored = post("/v1/files", files={"file": ("a.wav", recording)})
        named = post("/v1/contexts", json={"file_ids": [stored.json()["id"]]})
        asked = post("/v1/chat/completions", json=about(named.json()["id"]))
        responses = (first, again, stored, named, asked)
        assert len({replica_of(response) for response in responses}) == 1
        assert text(first) == text(again) == text(asked)
        assert again.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        assert not asked.json()["afnext"]["reloaded"]
        homes.add(replica_of(first))
        if len(homes) == 2:
            break
    assert len(homes) == 2
    for _ in range(10):  # of any replica
        assert named.json()["id"] in {context["id"] for context in client.get("/v1/contexts").json()["data"]}


def test_a_full_replica_s_overflow_goes_to_the_next_then_is_refused_and_leaving_frees_it(
    client: httpx.Client, seed: int
) -> None:
    recording = noise(seed, LONG_SECONDS)
    short = noise(seed + 1, 1.0)
    with long_request(client, recording) as (home, _), long_request(client, recording) as (second, _):
        assert second != home
        refused = client.post("/v1/chat/completions", json=chat(short))
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "server_overloaded"
        assert 1 <= int(refused.headers["retry-after"]) <= 120
    eventually(lambda: not busy(client))
    assert text(client.post("/v1/chat/completions", json=chat(short)))


def test_a_websocket_and_the_context_that_it_leaves_are_of_one_replica(fleet: Fleet, client: httpx.Client) -> None:
    samples = afnext.load_audio(str(SCENE)).samples
    pcm = (samples * 32767).clip(-32768, 32767).astype("<i2")
    with websockets.sync.client.connect(f"{fleet.url.replace('http', 'ws')}/v1/realtime") as socket:
        assert socket.response is not None
        replica = socket.response.headers["x-afnext-replica"]

        def send(kind: str, **values: Any) -> None:
            socket.send(json.dumps({"type": kind, **values}))

        def receive(kind: str) -> dict[str, Any]:
            while True:
                event: dict[str, Any] = json.loads(socket.recv(timeout=WAIT_SECONDS))
                assert event["type"] != "error", event
                if event["type"] == kind:
                    return event

        receive("session.created")
        sound = {"input": {"format": {"type": "audio/pcm", "rate": 16000}}}
        send("session.update", session={"type": "realtime", "audio": sound})
        for piece in np.array_split(pcm, 20):
            send("input_audio_buffer.append", audio=base64.b64encode(piece.tobytes()).decode())
        send("response.create", response={"instructions": QUESTION})
        answer = receive("response.done")["response"]["output"][0]["content"][0]["text"]
        send("afnext.finish")
        context = receive("afnext.context")["context"]
    asked = client.post("/v1/chat/completions", json=about(context["id"], max_tokens=100))
    assert replica_of(asked) == replica
    assert not asked.json()["afnext"]["reloaded"]
    with afnext.load("afnext-tiny") as model:
        assert answer == model.ask((pcm, 16000), QUESTION).text


def test_a_killed_replica_ends_its_stream_with_an_error_and_another_one_takes_its_contexts(
    fleet: Fleet, client: httpx.Client, seed: int
) -> None:
    recording = noise(seed, LONG_SECONDS)
    short = recording[: 44 + 2 * 16000 * 3]
    stored = client.post("/v1/files", files={"file": ("a.wav", short)}).json()["id"]
    named = client.post("/v1/contexts", json={"file_ids": [stored]})
    context, home = named.json()["id"], replica_of(named)
    eventually(lambda: not busy(client))
    before = text(client.post("/v1/chat/completions", json=about(context)))
    with long_request(client, recording) as (busy_one, lines):
        kill(fleet, busy_one)
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert events[-1]["error"]["code"] == "replica_lost"
    if busy_one != home:
        kill(fleet, home)
    responses: list[httpx.Response] = []

    def answered() -> bool:
        responses.append(client.post("/v1/chat/completions", json=about(context)))
        return responses[-1].status_code == 200

    eventually(answered)
    asked = responses[-1]
    assert text(asked) == before
    assert asked.json()["afnext"]["reloaded"]
    assert replica_of(asked) != home
    assert client.get(f"/v1/files/{stored}").status_code == 200
    eventually(lambda: len(client.get("/v1/status").json()["replicas"]) == 2)


def test_nothing_listens_beyond_this_machine(fleet: Fleet, client: httpx.Client) -> None:
    assert listening_addresses(fleet.process.pid) <= {"127.0.0.1", "::1"}


def test_metrics_are_labelled_by_replica(client: httpx.Client) -> None:
    client.get("/v1/models")
    replicas = client.get("/v1/status").json()["replicas"]
    metrics = client.get("/metrics").text
    for replica in replicas:
        assert f'replica="{replica}"' in metrics


def test_no_usage_is_reported(home: Path) -> None:
    assert not (home / ".ray" / "usage_stats.json").exists()
