"""Chat completions through OpenAI's client: the answers of `Model.ask`, whole and streamed, and its errors."""

import asyncio
import base64
import json
from typing import Any

import openai
import pytest

from .conftest import QUESTION, SCENE, Running, eventually


def message(question: str = QUESTION, data: bytes | None = None) -> list[dict[str, Any]]:
    audio = base64.b64encode(SCENE.read_bytes() if data is None else data).decode()
    parts = [
        {"type": "text", "text": question},
        {"type": "input_audio", "input_audio": {"data": audio, "format": "mp3"}},
    ]
    return [{"role": "user", "content": parts}]


def complete(client: openai.OpenAI, messages: Any, **options: Any) -> Any:
    return client.chat.completions.create(model="afnext-tiny", messages=messages, **options)


def test_an_answer_is_that_of_the_model(service: Running) -> None:
    expected = service.model.ask(str(SCENE), QUESTION)
    completion = complete(service.openai(), message())
    assert completion.choices[0].message.content == expected.text
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage.completion_tokens == len(expected.token_ids)
    assert completion.usage.prompt_tokens == expected.usage.audio_tokens + expected.usage.text_tokens
    assert completion.usage.prompt_tokens_details.audio_tokens == expected.usage.audio_tokens
    assert completion.usage.model_extra["audio_seconds"] == pytest.approx(13.0)


def test_a_stream_joined_is_the_answer(service: Running) -> None:
    expected = service.model.ask(str(SCENE), QUESTION)
    chunks = list(complete(service.openai(), message(), stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected.text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert not chunks[-1].choices
    assert chunks[-1].usage.completion_tokens == len(expected.token_ids)


def test_thinking_is_apart_from_the_answer(service: Running) -> None:
    question = "How many words are spoken? Please think and reason about the input audio before you respond."
    expected = service.model.ask(str(SCENE), question)
    assert expected.thinking
    completion = complete(service.openai(), message(question))
    assert completion.choices[0].message.content == expected.text
    assert completion.choices[0].message.reasoning_content == expected.thinking
    assert completion.usage.completion_tokens_details.reasoning_tokens > 0
    chunks = list(complete(service.openai(), message(question), stream=True))
    deltas = [c.choices[0].delta for c in chunks]
    assert "".join((d.model_extra or {}).get("reasoning_content") or "" for d in deltas) == expected.thinking
    assert "".join(d.content or "" for d in deltas) == expected.text


def test_a_body_of_several_megabytes_goes_through_files(service: Running) -> None:
    """Long bodies take another path: their audio is moved to files before the JSON is read."""
    expected = service.model.ask(str(SCENE), QUESTION)
    body = {"model": "afnext-tiny", "messages": message(), "metadata": {"note": "x" * (3 << 20)}}
    with service.http() as client:
        response = client.post("/v1/chat/completions", json=body)
    assert response.json()["choices"][0]["message"]["content"] == expected.text


def test_a_client_cannot_name_a_file_of_the_server(service: Running) -> None:
    part = {"type": "input_audio", "input_audio": {"data": {"spooled": str(SCENE)}, "format": "flac"}}
    with service.http() as client:
        body = {"model": "afnext-tiny", "messages": [{"role": "user", "content": [part]}]}
        response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_audio"


def test_concurrent_requests_get_their_own_answers(service: Running) -> None:
    questions = [QUESTION, "Transcribe the words.", "How many words are said?", "Is there a siren?"]
    expected = [service.model.ask(str(SCENE), question).text for question in questions]

    async def all_at_once() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none") as client:
            completions = await asyncio.gather(
                *(client.chat.completions.create(model="afnext-tiny", messages=message(q)) for q in questions)  # type: ignore[arg-type]
            )
        return [completion.choices[0].message.content for completion in completions]

    assert asyncio.run(all_at_once()) == expected


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"max_completion_tokens": "many"}, "max_completion_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"temperature": 1e308}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"stop": [""]}, "stop"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(service: Running, options: dict[str, Any], param: str) -> None:
    with service.http() as client:
        body = {"model": "afnext-tiny", "messages": [{"role": "user", "content": "hi"}], **options}
        response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert param in response.json()["error"]["message"]


def test_unknown_fields_are_named_and_ignored(service: Running) -> None:
    body = {"model": "afnext-tiny", "messages": message(), "shiny": 1, "user": "me", "max_tokens": 3}
    with service.http() as client:
        response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200
    assert response.headers["x-afnext-ignored"] == "shiny"
    assert response.json()["choices"][0]["finish_reason"] == "length"
    assert response.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    ("data", "code"),
    [(b"no audio at all", "invalid_audio"), (b"", "invalid_audio"), (b"RIFF0000WAVE", "invalid_audio")],
)
def test_audio_that_cannot_be_heard_is_an_error(service: Running, data: bytes, code: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        complete(service.openai(), message(data=data))
    assert error.value.code == code
    assert "/tmp" not in str(error.value)
    assert error.value.param == "messages[0].content[1].input_audio.data"


def test_errors_before_the_first_token_keep_their_status_when_streaming(service: Running) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        complete(service.openai(), message(data=b"no audio"), stream=True)
    assert error.value.code == "invalid_audio"
    with pytest.raises(openai.BadRequestError) as error:
        complete(service.openai(), message(), stream=True, max_tokens=10**9)
    assert error.value.code == "context_length_exceeded"


def test_another_model_is_not_found(service: Running) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        service.openai().chat.completions.create(model="gpt-5", messages=[{"role": "user", "content": "hi"}])
    assert error.value.code == "model_not_found"
    assert "gpt-5" in str(error.value)
    assert "afnext-tiny" in str(error.value)


def test_addresses_that_are_not_served_say_what_is(service: Running) -> None:
    with service.http() as client:
        for method, path, status, said in (
            ("POST", "/chat/completions", 404, "there is no /chat/completions; the API is under /v1"),
            ("GET", "/v1/chat/completions", 405, "/v1/chat/completions does not take GET"),
            ("GET", "/v1/realtime", 404, "/v1/realtime is a WebSocket"),
        ):
            response = client.request(method, path)
            assert response.status_code == status
            assert response.json()["error"]["message"].startswith(said)


@pytest.mark.parametrize("body", [b"{", b"\xff\xfe", b"[]", b'"x"', b"[" * 100_000, b'{"messages": 3}'])
def test_bodies_that_are_no_requests(service: Running, body: bytes) -> None:
    with service.http() as client:
        response = client.post("/v1/chat/completions", content=body)
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_client_that_leaves_gives_its_pages_back(service: Running) -> None:
    with service.http() as client:
        body = {"model": "afnext-tiny", "messages": message(), "stream": True, "max_tokens": 2000, "temperature": 2.0}
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            for line in response.iter_lines():
                if '"content"' in line and json.loads(line.removeprefix("data: "))["choices"][0]["delta"]["content"]:
                    break
    assert eventually(lambda: not service.server.requests)
    assert eventually(lambda: not service.model.engine.stats().private_pages)
    stats = service.model.engine.stats()
    assert not stats.waiting + stats.prefilling + stats.decoding
