"""Every endpoint through both of OpenAI's clients, their classes of errors, and their second try after a refusal."""

import asyncio
import base64
import inspect
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
import soundfile

from afnext.serve.errors import overloaded

from .conftest import QUESTION, SCENE, Running

MODEL = "afnext-tiny"
TRANSCRIBE = "Transcribe the input speech."
FORMATS = ("json", "text", "srt", "vtt", "verbose_json", "diarized_json")
CHANGING = {"id", "created", "created_at", "completed_at", "timings", "item_id", "cached_tokens"}


def calls() -> list[tuple[str, dict[str, Any]]]:
    """A call of each kind that answers: the method's path, and its arguments."""
    recording = short_recording()
    audio = {"data": base64.b64encode(recording).decode(), "format": "wav"}
    chat = [{"type": "input_audio", "input_audio": audio}, {"type": "text", "text": QUESTION}]
    items = [{"type": "input_audio", "input_audio": audio}, {"type": "input_text", "text": QUESTION}]
    question = {"model": MODEL, "messages": [{"role": "user", "content": chat}], "max_tokens": 8}
    given = {"model": MODEL, "input": [{"role": "user", "content": items}], "max_output_tokens": 8}
    transcript = {"model": "whisper-1", "file": ("scene.wav", recording), "extra_body": {"instruction": TRANSCRIBE}}
    return [
        ("models.list", {}),
        ("models.retrieve", {"model": MODEL}),
        ("chat.completions.create", question),
        ("chat.completions.create", {**question, "stream": True, "stream_options": {"include_usage": True}}),
        ("responses.create", given),
        ("responses.create", {**given, "stream": True}),
        *(("audio.transcriptions.create", {**transcript, "response_format": f}) for f in FORMATS),
        *(
            ("audio.transcriptions.create", {**transcript, "response_format": f, "stream": True})
            for f in ("json", "diarized_json")
        ),
        ("audio.translations.create", transcript),
    ]


def short_recording() -> bytes:
    """The first seconds of the scene, as a WAV file."""
    samples, rate = soundfile.read(SCENE, dtype="int16")
    soundfile.write(file := io.BytesIO(), samples[: 3 * rate], rate, format="WAV")
    return file.getvalue()


def plain(value: Any) -> Any:
    """A result without what differs from one call to the next, and a stream as the list of its events."""
    if hasattr(value, "model_dump"):
        value = value.model_dump()
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items() if name not in CHANGING}
    return [plain(item) for item in value] if isinstance(value, list) else value


def method(client: Any, path: str) -> Any:
    for name in path.split("."):
        client = getattr(client, name)
    return client


async def awaited(client: openai.AsyncOpenAI, path: str, options: dict[str, Any]) -> Any:
    result = method(client, path)(**options)
    result = await result if inspect.isawaitable(result) else result
    return [event async for event in result] if options.get("stream") or path == "models.list" else result


def test_both_clients_read_every_endpoint_alike(service: Running) -> None:
    async def all_of_them() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
            return [plain(await awaited(client, path, options)) for path, options in calls()]

    results = asyncio.run(all_of_them())
    client = service.openai()
    for (path, options), expected in zip(calls(), results, strict=True):
        result = method(client, path)(**options)
        result = list(result) if options.get("stream") or path == "models.list" else result
        assert plain(result) == expected, (path, options.get("response_format"))
        assert expected, path


def test_the_asynchronous_client_keeps_files(service: Running) -> None:
    async def keep() -> None:
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none") as client:
            expires: Any = {"anchor": "created_at", "seconds": 3600}
            stored = await client.files.create(
                file=("a.flac", SCENE.read_bytes()), purpose="user_data", expires_after=expires
            )
            assert stored.expires_at == stored.created_at + 3600
            assert (await client.files.retrieve(stored.id)).filename == "a.flac"
            assert stored.id in [file.id async for file in client.files.list()]
            assert (await client.files.content(stored.id)).content == SCENE.read_bytes()
            assert (await client.files.delete(stored.id)).deleted
            with pytest.raises(openai.NotFoundError):
                await client.files.retrieve(stored.id)

    asyncio.run(keep())


def test_speakers_are_letters_in_diarized_json(service: Running) -> None:
    expected = service.model.transcribe(str(SCENE), prompt=TRANSCRIBE, timestamps=True, speakers=True)
    with SCENE.open("rb") as file:
        result: Any = service.openai().audio.transcriptions.create(
            model="whisper-1", file=file, response_format="diarized_json", extra_body={"instruction": TRANSCRIBE}
        )
    assert [(s.start, s.end, s.text) for s in result.segments] == [(s.start, s.end, s.text) for s in expected.segments]
    assert {segment.speaker for segment in result.segments} <= {"A", "B", "C"}
    assert {segment.type for segment in result.segments} == {"transcript.text.segment"}


def hello(client: openai.OpenAI, model: str = MODEL, **options: Any) -> Any:
    return client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Hello."}], max_tokens=2, **options
    )


def test_errors_are_of_the_client_s_classes(
    service: Running, keyed_service: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = service.openai()
    with pytest.raises(openai.AuthenticationError) as error:
        hello(keyed_service.openai("wrong"))
    assert error.value.code == "invalid_api_key"
    with pytest.raises(openai.PermissionDeniedError) as denied:
        hello(client, extra_headers={"Origin": "https://evil.example"})
    assert denied.value.code == "forbidden_origin"
    with pytest.raises(openai.NotFoundError):
        hello(client, model="gpt-5")
    with pytest.raises(openai.BadRequestError) as bad:
        hello(client, n=2)
    assert (bad.value.code, bad.value.param, bad.value.type) == ("unsupported_value", "n", "invalid_request_error")
    with monkeypatch.context() as patch:
        patch.setattr(service.server, "_admitted", 10_000)
        with pytest.raises(openai.RateLimitError) as busy:
            hello(client)
    assert busy.value.code == "server_overloaded"
    with monkeypatch.context() as patch:
        patch.setattr(service.server, "draining", True)
        with pytest.raises(openai.InternalServerError) as draining:
            hello(client)
    assert (draining.value.status_code, draining.value.code) == (503, "draining")
    with pytest.raises(openai.APITimeoutError):
        hello(client, timeout=1e-9)


def test_a_refused_client_comes_again(service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    admitted, refused = service.server.admitted, []

    @asynccontextmanager
    async def once() -> AsyncIterator[None]:
        if not refused:
            refused.append(True)
            raise overloaded("the server has too much to do", 1)
        async with admitted():
            yield

    monkeypatch.setattr(service.server, "admitted", once)
    completion = hello(openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=1))
    assert completion.choices[0].finish_reason in ("stop", "length")
    assert refused
