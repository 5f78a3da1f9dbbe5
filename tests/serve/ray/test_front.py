"""The HTTP side of a fleet, before replicas that are small applications in this process."""

import asyncio
import base64
import hashlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from afnext.serve.app import Guarded
from afnext.serve.context_store import new_id
from afnext.serve.ray.bridge import Bridge, cut
from afnext.serve.ray.front import Front, ReplicaLostError
from afnext.serve.ray.routing import preference
from afnext.serve.settings import Settings

Application = Callable[[Any, Any, Any], Awaitable[None]]
NAMES = ("a", "b", "c", "d")
CHAT = "/v1/chat/completions"
WAV = bytes(range(256)) * 8


class LocalReplicas:
    """Replicas of this process. `asked` are those that requests went to."""

    def __init__(self, applications: dict[str, Application]):
        self._bridges = {name: Bridge(application) for name, application in applications.items()}
        self.asked: list[str] = []

    def names(self) -> Sequence[str]:
        return list(self._bridges)

    @asynccontextmanager
    async def request(self, replica: str, scope: Any, body: bytes | Path) -> AsyncIterator[Any]:
        self.asked.append(replica)
        data = body if isinstance(body, bytes) else body.read_bytes()
        async with aclosing(self._bridges[replica].request(scope, cut(data))) as batches:
            yield batches

    @asynccontextmanager
    async def connect(self, replica: str, session: str, scope: Any) -> AsyncIterator[Any]:
        self.asked.append(replica)
        async with aclosing(self._bridges[replica].connect(session, scope)) as batches:
            yield batches

    async def send(self, replica: str, session: str, messages: Sequence[Any]) -> bool:
        return await self._bridges[replica].receive(session, messages)


async def reply(send: Any, status: int, body: bytes, **headers: str) -> None:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def answering(name: str) -> Application:
    """Says who it is, and what it got."""

    async def application(scope: Any, receive: Any, send: Any) -> None:
        size, more = 0, True
        while more:
            message = await receive()
            size, more = size + len(message["body"]), message["more_body"]
        assert dict(scope["headers"])[b"host"] == b"localhost"
        got = {"name": name, "route": scope["afnext.route"], "key": scope["afnext.key"], "size": size}
        await reply(send, 200, json.dumps(got).encode(), content_type="application/json")

    return application


def refusing(status: int, seconds: int) -> Application:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await reply(send, status, b'{"error": {"code": "full"}}', retry_after=str(seconds))

    return application


async def lost(scope: Any, receive: Any, send: Any) -> None:
    raise ReplicaLostError


def asked(replicas: LocalReplicas, *requests: httpx.Request, settings: Settings | None = None) -> list[httpx.Response]:
    """The responses to requests, one after the other."""

    async def run() -> list[httpx.Response]:
        options = settings or Settings()
        front = Front(options, replicas)
        transport = httpx.ASGITransport(Guarded(front, options))  # type: ignore[arg-type]
        try:
            async with httpx.AsyncClient(transport=transport) as client:
                return [await client.send(request) for request in requests]
        finally:
            await front.close()

    return asyncio.run(run())


def get(path: str, **headers: str) -> httpx.Request:
    return httpx.Request("GET", f"http://localhost{path}", headers=headers)


def chat(data: bytes = WAV, **headers: str) -> httpx.Request:
    audio = {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"}}
    body = {"messages": [{"role": "user", "content": [audio]}]}
    return httpx.Request("POST", f"http://localhost{CHAT}", json=body, headers=headers)


def upload(path: str, data: bytes = WAV) -> httpx.Request:
    return httpx.Request("POST", f"http://localhost{path}", files={"file": ("a.wav", data)})


def fleet(**instead: Application) -> LocalReplicas:
    """Four replicas that answer; `instead` are others."""
    return LocalReplicas({name: instead.get(name, answering(name)) for name in NAMES})


def route_of(data: bytes = WAV) -> str:
    [response] = asked(fleet(), chat(data))
    return response.json()["route"]


def test_all_requests_about_a_recording_reach_one_replica() -> None:
    route = route_of()
    home = preference(route, NAMES)[0]
    context = new_id(route)
    raw = httpx.Request("POST", "http://localhost/v1/contexts", content=WAV, headers={"content-type": "audio/wav"})
    about = httpx.Request("POST", f"http://localhost{CHAT}", json={"context": context, "messages": []})
    paths = ("/v1/files", "/v1/contexts", "/v1/audio/transcriptions", "/v1/audio/translations", "/inference")
    requests = [chat(), *map(upload, paths), raw, about, get(f"/v1/contexts/{context}")]
    responses = asked(fleet(), *requests)
    assert {response.json()["name"] for response in responses} == {home}
    assert {response.headers["x-afnext-replica"] for response in responses} == {home}
    assert {response.json()["route"] for response in responses} == {route}
    for request, response in zip(requests, responses, strict=True):
        assert response.json()["size"] == len(request.read())
    others = asked(fleet(), *(chat(bytes([number]) * 40) for number in range(40)))
    assert {response.json()["name"] for response in others} == set(NAMES)


def test_long_bodies_are_passed_on_whole(seed: int) -> None:
    data = hashlib.shake_128(seed.to_bytes(4, "big")).digest(3 << 20)
    requests = [chat(data), upload("/v1/files", data)]
    responses = asked(fleet(), *requests)
    assert [response.json()["size"] for response in responses] == [len(request.read()) for request in requests]
    assert len({response.json()["route"] for response in responses}) == 1


def test_requests_without_a_recording_are_spread() -> None:
    requests = [get("/v1/models") for _ in range(60)]
    assert {response.json()["name"] for response in asked(fleet(), *requests)} == set(NAMES)


@pytest.mark.parametrize("status", [429, 503])
def test_what_a_replica_refuses_goes_to_the_next_one_of_the_route(status: int) -> None:
    first, second, *_ = preference(route_of(), NAMES)
    replicas = fleet(**{first: refusing(status, 9)})
    [response] = asked(replicas, chat())
    assert response.json()["name"] == second
    assert replicas.asked == [first, second]


def test_the_best_refusal_is_passed_on() -> None:
    order = preference(route_of(), NAMES)
    refusals = dict(zip(order, (refusing(503, 1), refusing(429, 50), refusing(429, 9), answering("far")), strict=True))
    replicas = fleet(**refusals)
    [response] = asked(replicas, chat())
    assert response.status_code == 429
    assert response.headers["retry-after"] == "9"
    assert response.json() == {"error": {"code": "full"}}
    assert replicas.asked == order[:3]


def test_a_replica_that_is_lost_before_it_answers_is_replaced_once() -> None:
    first, second, third, _ = preference(route_of(), NAMES)
    [response] = asked(fleet(**{first: lost}), chat())
    assert response.json()["name"] == second
    replicas = fleet(**{first: lost, second: lost})
    [response] = asked(replicas, chat())
    assert (response.status_code, response.json()["error"]["code"]) == (503, "replica_lost")
    assert response.headers["retry-after"] == "5"
    assert third not in replicas.asked


def test_a_fleet_without_replicas_is_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[str] = []
    monkeypatch.setattr(logging.getLogger("afnext.serve.requests"), "info", logged.append)
    for response in asked(LocalReplicas({}), chat(), get("/health/ready")):
        assert (response.status_code, response.json()["error"]["code"]) == (503, "loading")
    lines = [json.loads(line) for line in logged]
    assert [(line["status"], line["error"]) for line in lines] == [(503, "loading")] * 2
    [response] = asked(LocalReplicas({}), get("/health/live"))
    assert response.status_code == 200


def test_a_stream_that_loses_its_replica_ends_with_an_error() -> None:
    async def break_off(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({"type": "http.response.body", "body": b'data: {"text": "so"}\n\n', "more_body": True})
        raise ReplicaLostError

    replicas = fleet(**dict.fromkeys(NAMES, break_off))
    [response] = asked(replicas, chat())
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert json.loads(events[0]) == {"text": "so"}
    assert json.loads(events[1])["error"]["code"] == "replica_lost"
    assert events[2:] == ["[DONE]"]
    assert len(replicas.asked) == 1


def test_a_response_that_is_no_stream_and_loses_its_replica_is_broken_off() -> None:
    async def break_off(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise ReplicaLostError

    with pytest.raises(ReplicaLostError):  # which makes the server close the connection
        asked(fleet(**dict.fromkeys(NAMES, break_off)), chat())


def test_the_guard_stands_before_the_replicas() -> None:
    settings = Settings(keys={hashlib.sha256(b"secret").hexdigest(): "me"})
    replicas = fleet()
    refused, foreign, too_long = asked(
        replicas,
        chat(),
        chat(authorization="Bearer secret", origin="https://elsewhere.org"),
        chat(authorization="Bearer secret", **{"content-length": str(1 << 40)}),
        settings=settings,
    )
    assert [response.status_code for response in (refused, foreign, too_long)] == [401, 403, 413]
    assert all(response.headers["x-request-id"] for response in (refused, foreign, too_long))
    assert not replicas.asked
    [response] = asked(replicas, chat(authorization="Bearer secret"), settings=settings)
    assert response.json()["key"] == "me"
    assert response.json()["route"] != route_of()  # keys share nothing, so their routes need not meet
    [response] = asked(replicas, chat(authorization="Bearer secret"), settings=replace(settings, share_cache=True))
    assert response.json()["route"] == route_of()


def test_status_and_metrics_are_those_of_all_replicas() -> None:
    def reporting(name: str) -> Application:
        async def application(scope: Any, receive: Any, send: Any) -> None:
            if scope["path"] == "/v1/status":
                await reply(send, 200, json.dumps({"requests": ord(name)}).encode())
            else:
                text = f'# TYPE afnext_requests counter\nafnext_requests_total{{route="/"}} {ord(name)}\n'
                await reply(send, 200, text.encode())

        return application

    replicas = fleet(**{name: reporting(name) for name in NAMES[1:]}, a=lost)
    status, metrics = asked(replicas, get("/v1/status"), get("/metrics"))
    assert status.json()["replicas"] == {name: {"requests": ord(name)} for name in NAMES[1:]}
    [family] = text_string_to_metric_families(metrics.text)
    assert {sample.labels["replica"]: sample.value for sample in family.samples} == {n: ord(n) for n in NAMES[1:]}
    assert {sample.labels["route"] for sample in family.samples} == {"/"}


class Connection:
    """A WebSocket's client that speaks ASGI itself. `sent` is what the server sends."""

    def __init__(self, replicas: LocalReplicas, **scope: Any):
        self.sent: asyncio.Queue[Any] = asyncio.Queue()
        self.to_server: asyncio.Queue[Any] = asyncio.Queue()
        self.to_server.put_nowait({"type": "websocket.connect"})
        settings = Settings()
        self._front = Front(settings, replicas)
        whole = {"type": "websocket", "path": "/v1/realtime", "query_string": b"", "subprotocols": [], **scope}
        headers = {"headers": [(b"host", b"localhost")]}
        application = Guarded(self._front, settings)  # type: ignore[arg-type]
        self.task = asyncio.create_task(application({**headers, **whole}, self.to_server.get, self.sent.put))  # type: ignore[arg-type]

    async def end(self) -> None:
        await asyncio.wait_for(self.task, 30)
        await self._front.close()


def shouting(name: str) -> Application:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept", "headers": []})
        await send({"type": "websocket.send", "text": f"{name} {scope['afnext.route']}"})
        while (message := await receive())["type"] == "websocket.receive":
            if message["text"] == "die":
                raise ReplicaLostError
            await send({"type": "websocket.send", "text": message["text"].upper()})
        await send({"type": "websocket.close", "code": 1000})

    return application


def test_a_websocket_stays_with_its_replica() -> None:
    async def run() -> None:
        replicas = LocalReplicas({name: shouting(name) for name in NAMES})
        connection = Connection(replicas)
        assert (await connection.sent.get())["type"] == "websocket.accept"
        name, route = (await connection.sent.get())["text"].split()
        assert preference(route, NAMES)[0] == name  # where later questions about the session's context will go
        for text in ("one", "two"):
            connection.to_server.put_nowait({"type": "websocket.receive", "text": text})
            assert (await connection.sent.get())["text"] == text.upper()
        connection.to_server.put_nowait({"type": "websocket.disconnect", "code": 1000})
        assert (await connection.sent.get())["type"] == "websocket.close"
        await connection.end()
        assert replicas.asked == [name]

    asyncio.run(run())


def test_a_websocket_that_loses_its_replica_says_so() -> None:
    async def run() -> None:
        connection = Connection(LocalReplicas({"a": shouting("a")}))
        await connection.sent.get()
        await connection.sent.get()
        connection.to_server.put_nowait({"type": "websocket.receive", "text": "die"})
        assert json.loads((await connection.sent.get())["text"])["error"]["code"] == "replica_lost"
        assert (await connection.sent.get())["type"] == "websocket.close"
        await connection.end()

    asyncio.run(run())


def test_a_websocket_that_all_refuse_gets_the_refusal() -> None:
    async def full(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.http.response.start", "status": 429, "headers": [(b"retry-after", b"5")]})
        await send({"type": "websocket.http.response.body", "body": b"full"})

    async def run() -> None:
        replicas = LocalReplicas(dict.fromkeys(NAMES, full))
        connection = Connection(replicas)
        await connection.end()
        assert (await connection.sent.get())["status"] == 429
        assert (await connection.sent.get())["body"] == b"full"
        assert len(replicas.asked) == 3

    asyncio.run(run())


def test_a_client_that_leaves_ends_the_work_of_its_replica() -> None:
    async def run() -> None:
        waiting, noticed = asyncio.Event(), asyncio.Event()

        async def work(scope: Any, receive: Any, send: Any) -> None:
            while (await receive()).get("more_body"):
                pass
            waiting.set()
            if (await receive())["type"] == "http.disconnect":
                noticed.set()

        leaving: asyncio.Queue[Any] = asyncio.Queue()
        leaving.put_nowait({"type": "http.request", "body": b"{}", "more_body": False})
        front = Front(Settings(), LocalReplicas({"a": work}))
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": CHAT, "query_string": b"", "headers": headers}
        task = asyncio.create_task(front(scope, leaving.get, lambda message: asyncio.sleep(0)))
        await asyncio.wait_for(waiting.wait(), 30)
        leaving.put_nowait({"type": "http.disconnect"})
        await asyncio.wait_for(task, 30)
        assert noticed.is_set()
        await front.close()

    asyncio.run(run())
