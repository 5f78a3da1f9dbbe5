"""Transcriptions through OpenAI's client, in every format, whole and streamed."""

import json
from typing import Any

import openai
import pytest
import srt
import webvtt

from afnext.runtime.app.prompts import CARD

from .conftest import SCENE, Running


def transcribe(client: openai.OpenAI, **options: Any) -> Any:
    with SCENE.open("rb") as file:
        return client.audio.transcriptions.create(model="whisper-1", file=file, **options)


def words(service: Running, **options: Any) -> str:
    return " ".join(segment.text for segment in service.model.transcribe(str(SCENE), **options).segments)


def test_json_has_the_words_and_the_usage(service: Running) -> None:
    result = transcribe(service.openai())
    assert result.text == words(service)
    assert result.usage.type == "tokens"
    assert result.usage.input_token_details.audio_tokens == 325
    assert result.usage.output_tokens > 0


def test_verbose_json_has_every_key_of_a_segment(service: Running) -> None:
    result = transcribe(service.openai(), response_format="verbose_json", timestamp_granularities=["segment"])
    expected = service.model.transcribe(str(SCENE), timestamps=True).segments
    assert result.duration == pytest.approx(13.0)
    assert [(s.start, s.end, s.text) for s in result.segments] == [(s.start, s.end, s.text) for s in expected]
    for segment in result.segments:
        assert None not in segment.to_dict().values()
        assert {"id", "seek", "tokens", "temperature", "avg_logprob", "compression_ratio", "no_speech_prob"} <= set(
            segment.to_dict()
        )


def test_subtitles_are_bare_text_that_other_parsers_read(service: Running) -> None:
    expected = service.model.transcribe(str(SCENE), timestamps=True).segments
    subtitles = transcribe(service.openai(), response_format="srt")
    assert [entry.content for entry in srt.parse(subtitles)] == [segment.text for segment in expected]
    captions = webvtt.from_string(transcribe(service.openai(), response_format="vtt"))
    assert [caption.text for caption in captions] == [segment.text for segment in expected]
    assert transcribe(service.openai(), response_format="text").strip() == words(service)


def test_deltas_joined_are_the_text(service: Running) -> None:
    events = list(transcribe(service.openai(), stream=True))
    assert events[-1].type == "transcript.text.done"
    assert "".join(event.delta for event in events[:-1]) == events[-1].text == words(service)


def test_whisper_cpp_clients_find_their_route(service: Running) -> None:
    with service.http() as client, SCENE.open("rb") as file:
        response = client.post("/inference", files={"file": file}, data={"response_format": "json", "temperature": "0"})
    assert response.json()["text"] == words(service)


def test_a_verbose_stream_sends_each_segment_with_its_times(service: Running) -> None:
    fields = {"response_format": "verbose_json", "stream": "true"}
    with service.http() as client, SCENE.open("rb") as file:
        text = client.post("/v1/audio/transcriptions", files={"file": file}, data=fields).text
    events = [json.loads(line[5:]) for line in text.splitlines() if line.startswith("data: {")]
    told = [event for event in events if event["type"] == "transcript.text.segment"]
    expected = service.model.transcribe(str(SCENE), timestamps=True).segments
    assert [(s["start"], s["end"], s["text"]) for s in told] == [(s.start, s.end, s.text) for s in expected]
    deltas = [event for event in events if event["type"] == "transcript.text.delta"]
    assert [delta["segment_id"] for delta in deltas] == [segment["id"] for segment in told]
    assert "".join(delta["delta"] for delta in deltas) == events[-1]["text"] == words(service)


def test_a_stored_file_can_be_transcribed(service: Running) -> None:
    with service.http() as client:
        with SCENE.open("rb") as file:
            stored = client.post("/v1/files", files={"file": file}, data={"purpose": "user_data"}).json()
        response = client.post("/v1/audio/transcriptions", files={"file_id": (None, stored["id"])})
    assert response.json()["text"] == words(service)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "docx"}, "response_format"),
        ({"timestamp_granularities[]": "word"}, "timestamp_granularities[]"),
        ({"include[]": "logprobs"}, "include[]"),
        ({"temperature": "hot"}, "temperature"),
        ({"stream": "perhaps"}, "stream"),
        ({"model": "whisper-9"}, "model"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(service: Running, fields: dict[str, str], param: str) -> None:
    with service.http() as client, SCENE.open("rb") as file:
        response = client.post("/v1/audio/transcriptions", files={"file": file}, data=fields)
    assert response.status_code in (400, 404)
    assert response.json()["error"]["param"] == param


def test_word_times_beside_segments_are_left_out_with_a_warning(service: Running) -> None:
    fields = {"response_format": "verbose_json", "timestamp_granularities[]": ["word", "segment"]}
    with service.http() as client, SCENE.open("rb") as file:
        response = client.post("/v1/audio/transcriptions", files={"file": file}, data=fields)
    assert any("word times" in warning for warning in response.json()["warnings"])


def translate(service: Running, **fields: str) -> Any:
    with service.http() as client, SCENE.open("rb") as file:
        return client.post("/v1/audio/translations", files={"file": file}, data=fields)


def test_translations_ask_for_english(service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the prompts of a checkpoint that translates, which the bundled one does not."""
    monkeypatch.setattr(service.model, "prompts", CARD)
    for fields, prompt in (
        ({}, "Translate any speech you hear into English."),
        ({"language": "fr"}, "Translate any speech you hear into English."),
        ({"language": "French"}, "Translate any speech you hear from French into English."),
    ):
        expected = service.model.transcribe(str(SCENE), prompt=prompt, timestamps=True)
        result = translate(service, response_format="verbose_json", **fields).json()
        assert result["task"] == "translate"
        assert [s["text"] for s in result["segments"]] == [segment.text for segment in expected.segments]


def test_a_checkpoint_that_cannot_translate_says_so(service: Running) -> None:
    response = translate(service)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_prompt")
    assert "ast" in response.json()["error"]["message"]


def test_a_form_without_a_recording_is_an_error(service: Running) -> None:
    with service.http() as client:
        empty = client.post("/v1/audio/transcriptions", files={"model": (None, "whisper-1")})
        assert empty.json()["error"]["code"] == "missing_value"
        two = client.post("/v1/audio/transcriptions", files=[("file", b"a"), ("file", b"b")])
        assert two.json()["error"]["message"] == "send one recording, not 2"
        other = client.post("/v1/audio/transcriptions", content=json.dumps({"file": "x"}))
        assert other.status_code == 415
