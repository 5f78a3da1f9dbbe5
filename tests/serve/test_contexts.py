"""Files and contexts: uploaded once, asked often, seen only by the key that made them, alive after a restart."""

import asyncio
import io
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile

import afnext
from afnext.runtime.errors import ContextLengthError

from .conftest import DATA, QUESTION, SCENE, Running, running

OTHER = "How many words are spoken?"


def ask(client: Any, context: str, question: str = QUESTION, **more: Any) -> Any:
    body = {"messages": [{"role": "user", "content": question}], "context": context, **more}
    return client.post("/v1/chat/completions", json=body)


def listen(client: Any, data: bytes | None = None, **query: Any) -> Any:
    content = SCENE.read_bytes() if data is None else data
    return client.post("/v1/contexts", content=content, headers={"Content-Type": "audio/flac"}, params=query).json()


def test_questions_about_a_context_are_those_about_the_recording(service: Running) -> None:
    with service.http() as client:
        context = listen(client, filename="scene.flac")
        assert context["status"] == "ready"
        assert context["seconds"] == pytest.approx(13.0)
        assert context["audio"][0]["filename"] == "scene.flac"
        for question in (QUESTION, OTHER):
            answer = ask(client, context["id"], question).json()
            expected = service.model.ask(str(SCENE), question)
            assert answer["choices"][0]["message"]["content"] == expected.text
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == context["tokens"]
        assert client.delete(f"/v1/contexts/{context['id']}").json()["deleted"]
        assert ask(client, context["id"]).status_code == 404


def test_stock_clients_ask_a_context_as_a_file(service: Running) -> None:
    with service.http() as client:
        context = listen(client)
    parts = [{"type": "file", "file": {"file_id": context["id"]}}, {"type": "text", "text": QUESTION}]
    completion = service.openai().chat.completions.create(
        model="afnext-tiny",
        messages=[{"role": "user", "content": parts}],  # type: ignore[list-item, misc]
    )
    assert completion.choices[0].message.content == service.model.ask(str(SCENE), QUESTION).text


def test_a_conversation_about_a_context_goes_on(service: Running) -> None:
    turns = [
        {"role": "user", "content": "How many words are spoken?"},
        {"role": "assistant", "content": "5"},
        {"role": "user", "content": QUESTION},
    ]
    audio = {"type": "audio", "audio": str(SCENE)}
    first = {"role": "user", "content": [audio, {"type": "text", "text": "How many words are spoken?"}]}
    expected = service.model.chat([[first, *turns[1:]]])[0].text
    with service.http() as client:
        context = listen(client)
        body = {"messages": turns, "context": context["id"]}
        answer = client.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == expected


def test_the_same_recording_is_the_same_context(service: Running) -> None:
    with service.http() as client:
        first, second = listen(client), listen(client)
        other = listen(client, system="Answer briefly.")
    assert first["id"] == second["id"] != other["id"]


@pytest.mark.parametrize("ttl", ["-4", "soon", "0"])
def test_a_context_does_not_expire_before_it_is_made(service: Running, ttl: str) -> None:
    with service.http() as client:
        error = listen(client, ttl=ttl)["error"]
    assert (error["param"], error["code"]) == ("ttl", "invalid_value")


def test_progress_is_streamed(service: Running) -> None:
    with (
        service.http() as client,
        client.stream(
            "POST", "/v1/contexts", content=SCENE.read_bytes(), params={"stream": "true", "system": "New."}
        ) as response,
    ):
        text = response.read().decode()
    assert "context.progress" in text
    assert "context.ready" in text
    assert text.endswith("data: [DONE]\n\n")


def polled(client: httpx.Client, identifier: str) -> dict[str, Any]:
    """A context once it is no longer being heard."""
    deadline = time.monotonic() + 100
    while (context := client.get(f"/v1/contexts/{identifier}").json()).get("status") == "listening":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return context


def test_a_context_is_heard_in_the_background(service: Running) -> None:
    with service.http() as client:
        response = client.post(
            "/v1/contexts",
            content=SCENE.read_bytes(),
            headers={"Content-Type": "audio/flac"},
            params={"background": "true", "system": "Listen.", "filename": "scene.flac"},
        )
        started = response.json()
        assert response.status_code == 202
        assert (started["status"], started["audio"][0]["filename"]) == ("listening", "scene.flac")
        body = {"messages": [{"role": "user", "content": QUESTION}], "context": started["id"]}
        early = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
        ready = polled(client, started["id"])
        assert (ready["status"], ready["progress"], ready["id"]) == ("ready", 1.0, started["id"])
        listed = [context["id"] for context in client.get("/v1/contexts").json()["data"]]
        assert listed.count(started["id"]) == 1
        metrics = client.get("/metrics").text
        assert 'afnext_contexts{state="listening"} 0.0' in metrics
        assert "afnext_step_seconds_bucket" in metrics
        assert "afnext_upload_seconds_count" in metrics
        assert client.delete(f"/v1/contexts/{started['id']}").json()["deleted"]
    conversation = [
        {"role": "system", "content": "Listen."},
        {"role": "user", "content": [{"type": "audio", "audio": str(SCENE)}, {"type": "text", "text": QUESTION}]},
    ]
    assert early == service.model.chat([conversation])[0].text


def test_a_context_that_cannot_be_heard_says_why(service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    ears = service.server.backend.ears

    async def deaf(*given: Any, **options: Any) -> None:
        raise ContextLengthError("too long for this model")

    monkeypatch.setattr(type(ears), "hear", deaf)
    with service.http() as client:
        started = client.post("/v1/contexts", content=SCENE.read_bytes(), params={"background": "true"}).json()
        failed = polled(client, started["id"])
        assert (failed["status"], failed["error"]["code"]) == ("failed", "context_length_exceeded")
        body = {"messages": [{"role": "user", "content": QUESTION}], "context": started["id"]}
        assert client.post("/v1/chat/completions", json=body).json()["error"]["code"] == "context_length_exceeded"
        assert client.delete(f"/v1/contexts/{started['id']}").json()["deleted"]
        assert client.get(f"/v1/contexts/{started['id']}").status_code == 404


def test_deleting_a_context_stops_the_listening(service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    ears, stopped = service.server.backend.ears, threading.Event()

    async def slow(*given: Any, **options: Any) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    monkeypatch.setattr(type(ears), "hear", slow)
    with service.http() as client:
        started = client.post("/v1/contexts", content=SCENE.read_bytes(), params={"background": "true"}).json()
        assert client.get(f"/v1/contexts/{started['id']}").json()["status"] == "listening"
        assert client.delete(f"/v1/contexts/{started['id']}").json()["deleted"]
        assert stopped.wait(100)
        assert client.get(f"/v1/contexts/{started['id']}").status_code == 404
        both = {"background": "true", "stream": "true"}
        assert client.post("/v1/contexts", content=SCENE.read_bytes(), params=both).status_code == 400


def test_files_can_be_listed_read_and_deleted(service: Running) -> None:
    client = service.openai()
    with SCENE.open("rb") as file:
        stored = client.files.create(file=file, purpose="user_data")
    assert stored.bytes == SCENE.stat().st_size
    assert stored.id in [file.id for file in client.files.list()]
    assert client.files.content(stored.id).read() == SCENE.read_bytes()
    with service.http() as http:
        peaks = http.get(f"/v1/files/{stored.id}/peaks", params={"n": 50}).json()
        assert len(peaks["peaks"]) == 50
        assert all(low <= high for low, high in peaks["peaks"])
    assert client.files.delete(stored.id).deleted
    with service.http() as http:
        assert http.get(f"/v1/files/{stored.id}").json()["error"]["code"] == "file_not_found"


def test_keys_see_neither_each_others_ids_nor_their_caches(keyed_service: Running) -> None:
    with keyed_service.http("one") as one, keyed_service.http("two") as two:
        context = listen(one)
        stored = one.post("/v1/files", files={"file": SCENE.read_bytes()}).json()
        assert two.get(f"/v1/contexts/{context['id']}").status_code == 404
        assert ask(two, context["id"]).status_code == 404
        assert two.get(f"/v1/files/{stored['id']}").status_code == 404
        assert two.get("/v1/contexts").json()["data"] == []
        assert two.get("/v1/files").json()["data"] == []
        assert listen(two)["id"] != context["id"]


def test_what_one_key_has_heard_saves_no_other_key_time(keyed_service: Running) -> None:
    """Neither pages nor encoder outputs are shared: the time of an answer would tell what others have sent."""
    outputs = keyed_service.model.engine._steps._encoder_cache
    speech = (DATA / "jfk.flac").read_bytes()  # no other test of these keys sends it
    with keyed_service.http("one") as one, keyed_service.http("two") as two:
        listen(one, speech)
        first = set(outputs._outputs)
        listen(one, speech, system="Again, for the same key.")
        assert set(outputs._outputs) == first
        listen(two, speech)
        assert set(outputs._outputs) > first


def test_a_key_finds_no_prompt_of_another_in_the_cache(
    keyed_service: Running, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    noise = np.random.default_rng(seed).integers(-9000, 9000, 12 * 16_000, dtype=np.int16)
    soundfile.write(file := io.BytesIO(), noise, 16_000, format="WAV")

    def cached(client: Any) -> int:
        parts = [{"type": "file", "file": {"file_id": client.file}}, {"type": "text", "text": QUESTION}]
        body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 2}
        usage = client.post("/v1/chat/completions", json=body).json()["usage"]
        tokens: int = usage["prompt_tokens_details"]["cached_tokens"]
        return tokens

    with keyed_service.http("one") as one, keyed_service.http("two") as two:
        for client in (one, two):
            client.file = client.post("/v1/files", files={"file": file.getvalue()}).json()["id"]  # type: ignore[attr-defined]
        cached(one)
        assert cached(one) > 0
        assert cached(two) == 0
        monkeypatch.setattr(keyed_service.server.backend, "_share_cache", True)  # --share-cache
        cached(one)
        assert cached(two) > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_half_an_hour_is_heard_once_and_asked_fifty_times(service: Running, seed: int) -> None:
    """The first tokens of each answer: afnext-tiny would list beeps to its limit of 512."""
    samples, rate = soundfile.read(SCENE, dtype="int16")
    noise = np.random.default_rng(seed).integers(-300, 300, 1800 * rate, dtype=np.int16)
    recording = np.resize(samples, 1800 * rate) // 2 + noise
    soundfile.write(file := io.BytesIO(), recording, rate, format="FLAC")
    questions = [f"How many words are spoken? {number}" for number in range(50)]
    with service.http() as client, service.model.listen((recording, rate)) as heard:
        client.timeout = None  # type: ignore[assignment]
        start = time.perf_counter()
        context = listen(client, file.getvalue())
        print(f"the context took {time.perf_counter() - start:.1f} s")
        assert context["seconds"] == pytest.approx(1800)
        assert context["tokens"] == heard.tokens
        for question in questions:
            answer = ask(client, context["id"], question, max_tokens=12).json()
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == context["tokens"]
            assert answer["choices"][0]["message"]["content"] == heard.ask(question, max_new_tokens=12).text
            print(f"a question's first token took {answer['afnext']['timings']['first_token']:.3f} s")
        client.delete(f"/v1/contexts/{context['id']}")


def test_a_context_survives_a_restart(tmp_path: Path) -> None:
    def load() -> afnext.Model:
        return afnext.load("afnext-tiny")

    with running(load, state_dir=tmp_path) as service, service.http() as client:
        context = listen(client)
        expected = ask(client, context["id"]).json()["choices"][0]["message"]["content"]
    with running(load, state_dir=tmp_path) as service, service.http() as client:
        answer = ask(client, context["id"]).json()
        assert answer["choices"][0]["message"]["content"] == expected
        assert answer["afnext"]["reloaded"]
        assert not ask(client, context["id"]).json()["afnext"]["reloaded"]
        for saved in tmp_path.glob("contexts/*.safetensors"):
            saved.unlink()
    with running(load, state_dir=tmp_path) as service, service.http() as client:
        assert ask(client, context["id"]).json()["choices"][0]["message"]["content"] == expected


def test_contexts_give_way_to_requests_that_need_their_room() -> None:
    with running(lambda: afnext.load("afnext-tiny", page_size=16)) as service, service.http() as client:
        pages = service.model.engine._steps.pages
        pages.limit = 1200 // 16
        first = listen(client, system="one")
        second = listen(client, system="two")
        held = [client.get(f"/v1/contexts/{c['id']}").json()["loaded"] for c in (first, second)]
        assert held == [False, True]  # half of the room is for one of them
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1100}
        assert client.post("/v1/chat/completions", json=body).status_code == 200
        for context in (first, second):
            answer = ask(client, context["id"], max_tokens=20)
            assert answer.status_code == 200, answer.text
            assert answer.json()["afnext"]["reloaded"]
