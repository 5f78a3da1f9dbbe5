"""/v1/responses through OpenAI's client: the answers of `Model.ask`, reasoning apart, numbered events, refusals."""

import asyncio
import base64
from typing import Any

import openai
import pytest

from .conftest import QUESTION, SCENE, Running

THINK = "How many words are spoken? Please think and reason about the input audio before you respond."


def items(question: str = QUESTION) -> list[dict[str, Any]]:
    audio = {"data": base64.b64encode(SCENE.read_bytes()).decode(), "format": "mp3"}
    content = [{"type": "input_audio", "input_audio": audio}, {"type": "input_text", "text": question}]
    return [{"role": "user", "content": content}]


def create(client: openai.OpenAI, given: Any, **options: Any) -> Any:
    return client.responses.create(model="afnext-tiny", input=given, **options)


def test_an_answer_is_that_of_the_model(service: Running) -> None:
    expected = service.model.ask(str(SCENE), QUESTION)
    response = create(service.openai(), items(), metadata={"note": "mine"})
    assert response.status == "completed"
    assert response.output_text == expected.text
    assert [item.type for item in response.output] == ["message"]
    assert response.usage.output_tokens == len(expected.token_ids)
    assert response.usage.input_tokens == expected.usage.audio_tokens + expected.usage.text_tokens
    assert response.metadata == {"note": "mine"}


def test_text_and_instructions_are_a_conversation(service: Running) -> None:
    expected = service.model.ask(None, "Who are you?", system="Answer briefly.")
    assert create(service.openai(), "Who are you?", instructions="Answer briefly.").output_text == expected.text


def test_reasoning_is_an_item_of_its_own_and_can_be_sent_back(service: Running) -> None:
    expected = service.model.ask(str(SCENE), THINK)
    first = create(service.openai(), items(THINK))
    assert [item.type for item in first.output] == ["reasoning", "message"]
    assert first.output[0].content[0].text == expected.thinking
    assert first.output_text == expected.text
    assert first.usage.output_tokens_details.reasoning_tokens > 0
    turns = [*items(THINK), *(item.model_dump(exclude_none=True) for item in first.output)]
    second = create(service.openai(), [*turns, {"role": "user", "content": QUESTION}])
    audio = {"type": "audio", "audio": str(SCENE)}
    conversation = [
        {"role": "user", "content": [audio, {"type": "text", "text": THINK}]},
        {"role": "assistant", "content": expected.text},
        {"role": "user", "content": QUESTION},
    ]
    assert second.output_text == service.model.chat([conversation])[0].text


def test_files_and_contexts_are_read_by_their_ids(service: Running) -> None:
    client = service.openai()
    with SCENE.open("rb") as file:
        stored = client.files.create(file=file, purpose="user_data")
    with service.http() as http:
        context = http.post("/v1/contexts", json={"file_ids": [stored.id]}).json()
    expected = service.model.ask(str(SCENE), QUESTION).text
    for identifier in (stored.id, context["id"]):
        content = [{"type": "input_file", "file_id": identifier}, {"type": "input_text", "text": QUESTION}]
        assert create(client, [{"role": "user", "content": content}]).output_text == expected


@pytest.mark.parametrize("question", [QUESTION, THINK])
def test_events_are_numbered_and_add_up_to_the_response(service: Running, question: str) -> None:
    expected = service.model.ask(str(SCENE), question)
    events = list(create(service.openai(), items(question), stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))

    def item(kind: str) -> list[str]:
        deltas = [f"response.{kind}.delta"] * sum(event.type == f"response.{kind}.delta" for event in events)
        added = ["response.output_item.added", "response.content_part.added"]
        return [*added, *deltas, f"response.{kind}.done", "response.content_part.done", "response.output_item.done"]

    reasoning = item("reasoning_text") if expected.thinking else []
    kinds = ["response.created", "response.in_progress", *reasoning, *item("output_text"), "response.completed"]
    assert [event.type for event in events] == kinds
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == expected.text
    assert "".join(e.delta for e in events if e.type == "response.reasoning_text.delta") == (expected.thinking or "")
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert done == events[-1].response.output
    assert events[0].response.output == []
    assert events[-1].response.output_text == expected.text


def test_the_streaming_helpers_of_both_clients(service: Running) -> None:
    expected = service.model.ask(str(SCENE), QUESTION).text
    with service.openai().responses.stream(model="afnext-tiny", input=items()) as stream:  # type: ignore[arg-type]
        assert "".join(e.delta for e in stream if e.type == "response.output_text.delta") == expected
        assert stream.get_final_response().output_text == expected

    async def asynchronous() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none") as client:
            whole = await client.responses.create(model="afnext-tiny", input=items())  # type: ignore[arg-type]
            async with client.responses.stream(model="afnext-tiny", input=items()) as stream:  # type: ignore[arg-type]
                return whole.output_text, (await stream.get_final_response()).output_text

    assert asyncio.run(asynchronous()) == (expected, expected)


def test_an_answer_that_is_cut_is_incomplete(service: Running) -> None:
    expected = service.model.ask(str(SCENE), QUESTION, max_new_tokens=3)
    response = create(service.openai(), items(), max_output_tokens=3)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.output_text == expected.text
    events = list(create(service.openai(), items(), max_output_tokens=3, stream=True))
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == expected.text


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format"),
        ({"truncation": "auto"}, "truncation"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_url": "http://a/b"}]}]},
            "input[0].content[0].file.file_url",
        ),
        ({"input": 3}, "input"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(service: Running, options: dict[str, Any], param: str) -> None:
    with service.http() as client:
        response = client.post("/v1/responses", json={"model": "afnext-tiny", "input": "hi", **options})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_a_failure_after_the_start_is_an_event(service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    from afnext.serve.local import LocalAnswering

    async def fail(self: LocalAnswering) -> None:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(LocalAnswering, "finish", fail)
    events = list(create(service.openai(), items(), stream=True))
    assert events[-1].type == "response.failed"
    assert events[-1].response.error.code == "server_error"
    assert "secret" not in events[-1].response.error.message
