"""/v1/realtime through OpenAI's client and bare WebSockets: answers are those about the cut recording."""

import asyncio
import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import openai
import pytest
import websockets.exceptions
import websockets.sync.client

import afnext
from afnext.serve.realtime_config import ResponseOptions
from afnext.serve.realtime_response import RealtimeResponse

from .conftest import QUESTION, SCENE, Running, eventually

RATE = 24000
WORDS = "How many words are spoken?"


def scene() -> np.ndarray:
    """The scene as a client would send it: int16 [n] at 24 kHz."""
    samples = afnext.load_audio(str(SCENE)).samples
    times = np.arange(0, len(samples) / 16000, 1 / RATE)
    heard = np.interp(times, np.arange(len(samples)) / 16000, samples)
    return (heard * 32767).clip(-32768, 32767).astype(np.int16)


def encoded(samples: np.ndarray) -> str:
    return base64.b64encode(samples.astype("<i2").tobytes()).decode()


@contextmanager
def connected(service: Running, query: str = "", **options: Any) -> Iterator[Any]:
    url = service.url.replace("http", "ws") + f"/v1/realtime{query}"
    with websockets.sync.client.connect(url, max_size=None, open_timeout=100, **options) as socket:
        assert receive(socket, "session.created")
        yield socket


def send(socket: Any, kind: str, **values: Any) -> None:
    socket.send(json.dumps({"type": kind, **values}))


def receive(socket: Any, *kinds: str) -> dict[str, Any]:
    """The next event of one of these types."""
    while True:
        event: dict[str, Any] = json.loads(socket.recv(timeout=100))
        assert event["event_id"].startswith("event_")
        if event["type"] in kinds:
            return event
        assert event["type"] != "error", event


def append(socket: Any, samples: np.ndarray, pieces: int = 7) -> None:
    for piece in np.array_split(samples, pieces):
        send(socket, "input_audio_buffer.append", audio=encoded(piece))


def ask(socket: Any, question: str, **response: Any) -> dict[str, Any]:
    """The response to a question apart from the conversation."""
    item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": question}]}
    send(socket, "response.create", response={"conversation": "none", "input": [item], **response})
    done: dict[str, Any] = receive(socket, "response.done")["response"]
    return done


def text(response: dict[str, Any]) -> str:
    assert response["status"] == "completed", response
    content: str = response["output"][0]["content"][0]["text"]
    return content


def settled(service: Running) -> Any:
    """The engine's numbers once nothing is in progress."""

    def idle() -> bool:
        stats = service.model.engine.stats()
        return not (stats.waiting + stats.prefilling + stats.decoding or service.server.requests)

    assert eventually(idle)
    return service.model.engine.stats()


def test_answers_while_recording_are_those_about_the_cut_recording(service: Running) -> None:
    samples = scene()
    with connected(service) as socket:
        start = 0
        for end in (5 * RATE, 9 * RATE + 17, len(samples)):
            append(socket, samples[start:end])
            start = end
            for question in (QUESTION, WORDS):
                assert text(ask(socket, question)) == service.model.ask((samples[:end], RATE), question).text


def test_a_window_is_heard_before_the_question_and_audio_after_it_is_not(service: Running) -> None:
    """More than 30 s: the first window is computed as it completes."""
    samples = np.tile(scene(), 3)
    cut = 35 * RATE
    expected = service.model.ask((samples[:cut], RATE), QUESTION)
    with connected(service) as socket:
        append(socket, samples[:cut], 50)
        item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": QUESTION}]}
        send(socket, "response.create", response={"conversation": "none", "input": [item]})
        append(socket, samples[cut:], 3)
        response = receive(socket, "response.done")["response"]
        assert text(response) == expected.text
        assert response["usage"]["audio_seconds"] == pytest.approx(35)
        assert response["usage"]["input_token_details"]["cached_tokens"] >= 750


def test_openai_s_client_holds_a_conversation(service: Running) -> None:
    samples = scene()
    audio = {"type": "audio", "audio": (samples, RATE)}
    first = service.model.ask((samples, RATE), WORDS, system="Be exact.")
    turns = [
        {"role": "system", "content": "Be exact."},
        {"role": "user", "content": [audio, {"type": "text", "text": WORDS}]},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": QUESTION},
    ]
    second = service.model.chat([turns])[0]

    async def converse() -> list[tuple[str, str]]:
        answers = []
        async with (
            openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none") as client,
            client.realtime.connect(model="afnext-tiny") as connection,
        ):
            assert (await connection.recv()).type == "session.created"
            await connection.session.update(session={"type": "realtime", "instructions": "Be exact."})
            assert (await connection.recv()).session.instructions == "Be exact."  # type: ignore[union-attr]
            await connection.input_audio_buffer.append(audio=encoded(samples))
            for question in (WORDS, QUESTION):
                part = {"type": "input_text", "text": question}
                await connection.conversation.item.create(
                    item={"type": "message", "role": "user", "content": [part]}  # type: ignore[list-item, misc]
                )
                await connection.response.create()
                kinds, deltas = [], ""
                async for event in connection:
                    kinds.append(event.type)
                    if event.type == "response.output_text.delta":
                        deltas += event.delta
                    if event.type == "response.done":
                        break
                assert event.response.status == "completed"
                assert event.response.usage.total_tokens > 0
                answers.append((deltas, event.response.output[0].content[0].text))
                rest = [kind for kind in dict.fromkeys(kinds) if not kind.startswith("conversation")]
                assert rest == [
                    "response.created",
                    "response.output_item.added",
                    "response.content_part.added",
                    "response.output_text.delta",
                    "response.output_text.done",
                    "response.content_part.done",
                    "response.output_item.done",
                    "response.done",
                ]
        return answers

    assert asyncio.run(converse()) == [(first.text, first.text), (second.text, second.text)]


def test_openai_s_synchronous_client(service: Running) -> None:
    with service.openai().realtime.connect(model="afnext-tiny") as connection:
        connection.session.update(session={"type": "realtime"})
        connection.input_audio_buffer.append(audio=encoded(scene()))
        connection.response.create(response={"instructions": QUESTION})
        for event in connection:
            if event.type == "response.done":
                break
    expected = service.model.ask((scene(), RATE), QUESTION).text
    assert event.response.output[0].content[0].text == expected  # type: ignore[union-attr, index]


def test_thinking_is_told_apart(service: Running) -> None:
    question = f"{WORDS} Please think and reason about the input audio before you respond."
    expected = service.model.ask((scene(), RATE), question)
    assert expected.thinking
    with connected(service) as socket:
        append(socket, scene())
        response = ask(socket, question)
    assert text(response) == expected.text
    assert response["afnext"]["reasoning"] == expected.thinking


@pytest.mark.parametrize(
    ("format", "law"), [({"type": "audio/pcm", "rate": 16000}, None), ({"type": "audio/pcmu"}, "ULAW")]
)
def test_other_formats(service: Running, format: dict[str, Any], law: str | None) -> None:
    import io

    import soundfile

    rate = format.get("rate", 8000)
    samples = scene()[:: RATE // rate]
    content = samples.astype("<i2").tobytes()
    if law:
        file = io.BytesIO()
        soundfile.write(file, samples, rate, format="RAW", subtype=law)
        content = file.getvalue()
        file.seek(0)
        samples, _ = soundfile.read(file, samplerate=rate, channels=1, format="RAW", subtype=law, dtype="int16")
    with connected(service) as socket:
        send(socket, "session.update", session={"type": "realtime", "audio": {"input": {"format": format}}})
        send(socket, "input_audio_buffer.append", audio=base64.b64encode(content).decode())
        assert text(ask(socket, QUESTION)) == service.model.ask((samples, rate), QUESTION).text


def test_the_context_of_a_session_answers_afterwards(service: Running) -> None:
    samples = scene()
    expected = service.model.ask((samples, RATE), QUESTION).text
    with service.http() as client:
        with connected(service) as socket:
            append(socket, samples)
            send(socket, "afnext.finish")
            context = receive(socket, "afnext.context")["context"]
            with pytest.raises(websockets.exceptions.ConnectionClosedOK):
                socket.recv(timeout=100)
        for reheard in (False, True):
            body = {"messages": [{"role": "user", "content": QUESTION}], "context": context["id"]}
            answer = client.post("/v1/chat/completions", json=body).json()
            assert answer["choices"][0]["message"]["content"] == expected
            assert answer["afnext"]["reloaded"] == reheard
            entry = service.server.contexts._entries[context["id"]]
            held, entry.heard = entry.heard, None
            assert held is not None
            held.close()
        assert client.delete(f"/v1/contexts/{context['id']}").json()["deleted"]


def test_a_client_that_leaves_keeps_a_context_and_gives_the_rest_back(service: Running) -> None:
    before = settled(service)
    url = service.url.replace("http", "ws") + "/v1/realtime"
    with websockets.sync.client.connect(url, open_timeout=100) as socket:
        identifier = json.loads(socket.recv())["session"]["afnext"]["context"]
        append(socket, scene())
        send(socket, "response.create", response={"instructions": QUESTION, "temperature": 2.0})
        receive(socket, "response.output_text.delta", "response.reasoning_text.delta", "response.done")
    with service.http() as client:
        assert eventually(lambda: client.get(f"/v1/contexts/{identifier}").status_code == 200)
        response = client.get(f"/v1/contexts/{identifier}")
        assert response.json()["seconds"] == pytest.approx(13.0, abs=0.01)
        assert client.delete(f"/v1/contexts/{identifier}").json()["deleted"]
    after = settled(service)
    assert (after.private_pages, after.prefix_pages) == (0, before.prefix_pages)
    assert service.server.spool.bytes == 0


def test_a_response_can_be_cancelled(service: Running) -> None:
    with connected(service) as socket:
        append(socket, scene())
        send(socket, "response.create", response={"instructions": QUESTION, "temperature": 2.0, "seed": 1})
        first = receive(socket, "response.output_text.delta", "response.reasoning_text.delta")
        send(socket, "response.create", response={"instructions": QUESTION})
        assert receive_error(socket) == "conversation_already_has_active_response"
        send(socket, "response.cancel")
        response = receive(socket, "response.done")["response"]
        assert response["id"] == first["response_id"]
        assert response["status"] == "cancelled"
        send(socket, "response.cancel")
        assert receive_error(socket) == "response_cancel_not_active"
        assert text(ask(socket, QUESTION)) == service.model.ask((scene(), RATE), QUESTION).text
    assert settled(service).private_pages == 0


def test_a_response_that_is_cancelled_before_it_has_begun_ends() -> None:
    """Its task has not run yet. A session whose client leaves just then would wait for its end for ever."""
    events: list[tuple[str, dict[str, Any]]] = []

    async def emit(kind: str, **values: Any) -> None:
        events.append((kind, values))

    async def run() -> bool:
        response = RealtimeResponse(None, emit, ResponseOptions(), lambda text: {})  # type: ignore[arg-type]
        response.start(lambda: pytest.fail("the model was asked"))
        response.cancel("client_cancelled")
        await asyncio.wait_for(response.accepted.wait(), 60)
        await response.wait()
        return response.ended

    assert asyncio.run(run())
    ((kind, values),) = events
    assert (kind, values["response"]["status"]) == ("response.done", "cancelled")


def receive_error(socket: Any) -> str:
    while (event := json.loads(socket.recv(timeout=100)))["type"] != "error":
        pass
    code: str = event["error"]["code"]
    return code


def test_transcription_sessions_find_speech_and_transcribe_it(service: Running) -> None:
    samples = scene()
    silence = np.zeros(2 * RATE, np.int16)
    url = "?intent=transcription"
    with connected(service, url) as socket:
        append(socket, np.concatenate([silence, samples, silence]), 30)
        started = receive(socket, "input_audio_buffer.speech_started")
        stopped = receive(socket, "input_audio_buffer.speech_stopped")
        committed = receive(socket, "input_audio_buffer.committed")
        assert started["item_id"] == stopped["item_id"] == committed["item_id"]
        assert 1600 <= started["audio_start_ms"] < stopped["audio_end_ms"]
        deltas = ""
        while True:
            kinds = [f"conversation.item.input_audio_transcription.{kind}" for kind in ("delta", "completed")]
            event = receive(socket, *kinds)
            if event["type"].endswith("completed"):
                break
            deltas += event["delta"]
        rate = RATE // 1000
        start, end = started["audio_start_ms"] * rate, stopped["audio_end_ms"] * rate
        heard = np.concatenate([silence, samples, silence])[start:end]
        expected = service.model.transcribe((heard, RATE), timestamps=None)
        assert event["item_id"] == committed["item_id"]
        assert deltas == event["transcript"] == " ".join(s.text for s in expected.segments if s.text)
        assert event["usage"]["input_token_details"]["audio_tokens"] == expected.usage.audio_tokens
        send(socket, "response.create")
        assert receive_error(socket) == "unsupported_value"


def test_openai_s_client_transcribes_what_it_commits(service: Running) -> None:
    samples = scene()
    expected = service.model.transcribe((samples, RATE), timestamps=True)
    with service.openai().realtime.connect(extra_query={"intent": "transcription"}) as connection:
        changes = {"turn_detection": None, "transcription": {"timestamps": True}}
        connection.session.update(session={"type": "transcription", "audio": {"input": changes}})  # type: ignore[typeddict-item]
        for piece in np.array_split(samples, 5):
            connection.input_audio_buffer.append(audio=encoded(piece))
        connection.input_audio_buffer.commit()
        segments = []
        for event in connection:
            assert event.type != "error", event
            if event.type == "conversation.item.input_audio_transcription.segment":
                segments.append(event)
            if event.type == "conversation.item.input_audio_transcription.completed":
                break
    assert event.transcript == " ".join(segment.text for segment in expected.segments if segment.text)  # type: ignore[union-attr]
    assert [(s.start, s.end, s.text) for s in segments] == [(s.start, s.end, s.text) for s in expected.segments]


def test_updates_change_only_what_they_name(service: Running) -> None:
    with connected(service) as socket:
        detection = {"type": "server_vad", "silence_duration_ms": 700, "create_response": False}
        send(socket, "session.update", session={"audio": {"input": {"turn_detection": detection}}})
        receive(socket, "session.updated")
        send(socket, "session.update", session={"audio": {"input": {"turn_detection": {"threshold": 0.25}}}})
        session = receive(socket, "session.updated")["session"]
        merged = session["audio"]["input"]["turn_detection"]
        assert (merged["threshold"], merged["silence_duration_ms"], merged["prefix_padding_ms"]) == (0.25, 700, 300)
        send(socket, "session.update", session={**session, "instructions": "New."})
        assert receive(socket, "session.updated")["session"]["instructions"] == "New."
        send(socket, "session.update", session={"audio": {"input": {"format": {"type": "audio/pcma"}}}})
        assert receive(socket, "session.updated")["session"]["audio"]["input"]["format"]["rate"] == 8000
        send(socket, "session.update", session={"audio": {"input": {"turn_detection": None}}})
        assert receive(socket, "session.updated")["session"]["audio"]["input"]["turn_detection"] is None


MALFORMED: list[tuple[Any, str]] = [
    ("{", "invalid_json"),
    ("[" * 100_000, "invalid_json"),
    ("[]", "invalid_value"),
    ('{"type": 3}', "invalid_value"),
    ('{"type": "shout"}', "invalid_value"),
    (b"\x00\x01", "invalid_json"),
    ('{"type": "input_audio_buffer.append"}', "invalid_audio"),
    ('{"type": "input_audio_buffer.append", "audio": "AAA"}', "invalid_audio"),
    ('{"type": "input_audio_buffer.append", "audio": "AAAA"}', "invalid_audio"),
    ('{"type": "input_audio_buffer.commit"}', "input_audio_buffer_commit_empty"),
    ('{"type": "response.create"}', "missing_value"),
    ('{"type": "response.create", "response": {"instructions": "hi", "shiny": 1}}', "invalid_value"),
    ('{"type": "response.create", "response": {"instructions": "hi", "max_output_tokens": -1}}', "unsupported_value"),
    ('{"type": "response.create", "response": {"instructions": "hi", "max_output_tokens": 0}}', "unsupported_value"),
    ('{"type": "response.create", "response": []}', "invalid_value"),
    ('{"type": "conversation.item.create", "item": {"type": "function_call"}}', "unsupported_value"),
    ('{"type": "conversation.item.create", "item": {"role": "user", "content": [3]}}', "unsupported_value"),
    ('{"type": "session.update", "session": {"tools": [{"type": "function"}]}}', "invalid_value"),
    ('{"type": "session.update", "session": {"output_modalities": ["audio"]}}', "unsupported_value"),
    ('{"type": "session.update", "session": {"model": "gpt-5"}}', "model_not_found"),
    ('{"type": "session.update", "session": {"audio": {"input": {"format": {"rate": 3}}}}}', "unsupported_value"),
    ('{"type": "session.update", "session": {"audio": {"input": {"noise_reduction": {}}}}}', "invalid_value"),
    ('{"type": "session.update", "session": 3}', "invalid_value"),
]


def test_malformed_events_are_errors_and_end_nothing(service: Running) -> None:
    with connected(service) as socket:
        for content, code in MALFORMED:
            socket.send(content)
            event = json.loads(socket.recv(timeout=100))
            if event["type"] == "response.created":
                event = json.loads(socket.recv(timeout=100))["response"]["status_details"]
            assert event.get("error", {}).get("code") == code, (content[:80], event)
        send(socket, "session.update", event_id="mine", session={"shiny": 1})
        assert json.loads(socket.recv(timeout=100))["error"]["event_id"] == "mine"
        append(socket, scene())
        assert text(ask(socket, QUESTION)) == service.model.ask((scene(), RATE), QUESTION).text


def test_audio_settings_stay_once_audio_has_come(service: Running) -> None:
    with connected(service) as socket:
        append(socket, scene()[:RATE], 1)
        for change in ({"audio": {"input": {"format": {"rate": 16000}}}}, {"instructions": "New."}):
            send(socket, "session.update", session=change)
            assert receive_error(socket) == "unsupported_value"


def test_speech_that_ends_is_answered_and_interrupted_by_more(service: Running) -> None:
    silence = np.zeros(RATE, np.int16)
    samples = scene()
    with connected(service) as socket:
        send(socket, "session.update", session={"audio": {"input": {"turn_detection": {"type": "server_vad"}}}})
        send(
            socket,
            "conversation.item.create",
            item={"type": "message", "role": "user", "content": [{"type": "input_text", "text": QUESTION}]},
        )
        append(socket, np.concatenate([samples, silence]), 1)
        receive(socket, "input_audio_buffer.speech_stopped")
        assert receive(socket, "response.done")["response"]["status"] in ("completed", "cancelled")


def test_audio_beyond_what_the_model_hears_is_an_error(service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    from afnext.runtime.io.audio_stream import AudioStream

    original = AudioStream.__init__
    monkeypatch.setattr(AudioStream, "__init__", lambda self, seconds: original(self, 5.0))
    samples = scene()
    with connected(service) as socket:
        append(socket, samples, 13)
        assert receive_error(socket) == "audio_too_long"
        expected = service.model.ask((samples[: sum(map(len, np.array_split(samples, 13)[:4]))], RATE), QUESTION)
        assert text(ask(socket, QUESTION)) == expected.text


def test_unheard_audio_stops_the_reading(service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the model hears nothing, at most 30 s of audio are taken from the socket, and one message more."""
    import threading

    from afnext.runtime.app.live import Live

    go, fed, original = threading.Event(), [], Live.feed

    def feed(self: Live, pcm: Any, rate: float) -> None:
        go.wait(100)
        fed.append(len(pcm) / rate)
        original(self, pcm, rate)

    monkeypatch.setattr(Live, "feed", feed)
    second = np.zeros(RATE, np.int16)
    with connected(service) as socket:
        for _ in range(40):
            append(socket, second, 1)
        send(socket, "shout")
        with pytest.raises(TimeoutError):
            socket.recv(timeout=2)
        go.set()
        assert receive_error(socket) == "invalid_value"
        assert text(ask(socket, QUESTION))
        assert sum(fed) == pytest.approx(40)


def test_keys_and_where_they_come_from(keyed_service: Running) -> None:
    url = keyed_service.url.replace("http", "ws") + "/v1/realtime"
    with pytest.raises(websockets.exceptions.InvalidStatus) as refused:
        websockets.sync.client.connect(url, open_timeout=100)
    assert refused.value.response.status_code == 401
    assert json.loads(refused.value.response.body or b"")["error"]["code"] == "invalid_api_key"
    protocols: Any = ["realtime", "openai-insecure-api-key.one"]
    with websockets.sync.client.connect(url, subprotocols=protocols, open_timeout=100) as socket:
        assert socket.subprotocol == "realtime"
        append(socket, scene())
        send(socket, "afnext.finish")
        context = receive(socket, "afnext.context")["context"]
    with keyed_service.http("one") as one, keyed_service.http("two") as two:
        assert one.get(f"/v1/contexts/{context['id']}").status_code == 200
        assert two.get(f"/v1/contexts/{context['id']}").status_code == 404
    with keyed_service.openai("two").realtime.connect(model="afnext-tiny") as connection:
        assert connection.recv().type == "session.created"


def test_a_foreign_page_and_another_model_are_refused(service: Running) -> None:
    url = service.url.replace("http", "ws") + "/v1/realtime"
    with pytest.raises(websockets.exceptions.InvalidStatus) as refused:
        websockets.sync.client.connect(url, origin="https://evil.example")  # type: ignore[arg-type]
    assert refused.value.response.status_code == 403
    with pytest.raises(websockets.exceptions.InvalidStatus) as refused:
        websockets.sync.client.connect(f"{url}?model=gpt-5")
    assert refused.value.response.status_code == 404
    with pytest.raises(websockets.exceptions.InvalidStatus) as refused:
        websockets.sync.client.connect(f"{url}?intent=dance")
    assert refused.value.response.status_code == 400


def test_too_many_sessions_are_refused(service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    sessions = "afnext_live_sessions"  # those of tests before end late
    assert eventually(lambda: not service.server.metrics.registry.get_sample_value(sessions))
    monkeypatch.setattr(service.server, "settings", replace(service.server.settings, max_live=1))
    with connected(service):
        with pytest.raises(websockets.exceptions.InvalidStatus) as refused:
            websockets.sync.client.connect(service.url.replace("http", "ws") + "/v1/realtime")
        assert refused.value.response.status_code == 429
