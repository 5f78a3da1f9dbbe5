"""Answers that are spoken: sentences, speakers, and their sound through chat completions and realtime sessions."""

import asyncio
import base64
import io
import itertools
import json
import os
import shlex
import shutil
import sys
import wave
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from afnext.runtime.app.answer import Piece
from afnext.serve.realtime_audio import decoded, encoded
from afnext.serve.speech import (
    CommandSpeaker,
    Sentences,
    Sound,
    SpeechError,
    Unspoken,
    check,
    speakable,
    speaker_of,
    spoken,
    wav_samples,
)

from .conftest import QUESTION, SCENE, Running, eventually
from .test_realtime import append, connected, receive, scene, send

TONE_RATE = 16000
TONE = """
import io, math, struct, sys, wave
text, buffer = sys.stdin.read(), io.BytesIO()
with wave.open(buffer, "wb") as file:
    file.setparams((2, 2, 16000, 0, "NONE", ""))
    for n in range(160 * len(text)):
        file.writeframesraw(struct.pack("<hh", *[int(9000 * math.sin(n / 8))] * 2))
sys.stdout.buffer.write(buffer.getvalue())
"""


class ToneSpeaker:
    """Says a text as a tone, and remembers it."""

    name = "tone"

    def __init__(self, fails_at: str = "\0", slow: float = 0.0, letter: float = 0.01):
        """fails_at: a text that it cannot say. slow: seconds that a sentence takes. letter: seconds of sound."""
        self.texts: list[str] = []
        self.fails_at = fails_at
        self.slow = slow
        self.letter = letter

    async def speak(self, text: str) -> tuple[np.ndarray, int]:
        await asyncio.sleep(self.slow)
        if self.fails_at in text:
            raise SpeechError("no voice")
        self.texts.append(text)
        times = np.arange(round(TONE_RATE * self.letter) * len(text))
        return (9000 * np.sin(times / 8)).astype(np.int16), TONE_RATE


def said(text: str) -> str:
    """What is spoken of a text, all of it."""
    cutter = Sentences()
    return "".join(speakable(part) for part in [*cutter.push(text), *cutter.rest()])


@given(st.text(alphabet="ab1 .!?\n[]:。,日", max_size=900), st.lists(st.integers(0, 900), max_size=30))
def test_sentences_are_the_text_however_it_comes(text: str, cuts: list[int]) -> None:
    cutter, parts = Sentences(), []
    places = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    for start, end in itertools.pairwise(places):
        parts += cutter.push(text[start:end])
    parts += cutter.rest()
    assert "".join(parts) == text
    assert all(0 < len(part) <= 300 for part in parts[:-1])


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("A dog barks at 3.5 s. A door closes! Silence", ["A dog barks at 3.5 s. ", "A door closes! ", "Silence"]),
        ('She says: "Come in, please." He comes.', ['She says: "Come in, please." ', "He comes."]),
        ("犬が吠え、そして人が話しています。音楽が流れる", ["犬が吠え、そして人が話しています。", "音楽が流れる"]),
        ("1. A dog barks.\n2. A bell", ["1. A dog barks.\n", "2. A bell"]),
        ("word " * 80, ["word " * 60, "word " * 20]),
    ],
)  # fmt: skip
def test_sentences_end_where_people_pause(text: str, sentences: list[str]) -> None:
    cutter = Sentences()
    found = [sentence for letter in text for sentence in cutter.push(letter)]
    assert found + cutter.rest() == sentences


def test_times_and_marks_are_not_read_aloud() -> None:
    assert speakable("[00:01.2-00:03.4] **Hello**,\x1b `you`! [0:02:03.5]\n") == "Hello , you !".replace(" ,", " ,")
    assert speakable("[00:01.2] ... \n") == ""
    assert speakable("At 10:30 the [bell] rings") == "At 10:30 the [bell] rings"


def command(script: str) -> str:
    return shlex.join([sys.executable, "-c", script])


def test_a_command_speaks_through_pipes() -> None:
    samples, rate = asyncio.run(CommandSpeaker(command(TONE)).speak("Four"))
    assert rate == 16000
    np.testing.assert_array_equal(samples, (9000 * np.sin(np.arange(640) / 8)).astype(np.int16))
    check(speaker_of(command(TONE)))


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng")
def test_espeak_s_wav_files_of_unknown_length_are_read() -> None:
    samples, rate = asyncio.run(CommandSpeaker("espeak-ng --stdin --stdout").speak("A dog barks."))
    assert 0.5 < len(samples) / rate < 3
    assert np.abs(samples).max() > 1000


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("import sys; sys.exit('no such voice')", "status 1: no such voice"),
        ("print('hello')", "did not write a WAV file"),
        (TONE.replace("(2, 2,", "(2, 1,"), "8 bits"),
    ],
)  # fmt: skip
def test_a_command_that_fails_says_why(script: str, problem: str) -> None:
    with pytest.raises(SpeechError, match=problem):
        asyncio.run(CommandSpeaker(command(script)).speak("Hello."))


def test_a_silent_or_missing_speaker_is_refused() -> None:
    with pytest.raises(SpeechError, match="silence"):
        check(CommandSpeaker(command(TONE.replace("9000", "0"))))
    with pytest.raises(SpeechError, match="does not start with a program"):
        speaker_of("no-such-program --stdin")
    with pytest.raises(SpeechError, match="cannot be read"):
        speaker_of("espeak 'unclosed")
    with pytest.raises(SpeechError, match=r"piper-tts|cannot be loaded"):
        speaker_of("piper:nowhere.onnx")


def test_stereo_wav_files_are_mixed_and_odd_ends_dropped() -> None:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((2, 2, 22050, 0, "NONE", ""))
        file.writeframes(np.array([[100, 300], [-5, -7]], "<i2").tobytes())
    samples, rate = wav_samples(buffer.getvalue()[:-1] + b"", "it")
    assert (samples.tolist(), rate) == ([200], 22050)


def test_a_cancelled_sentence_ends_its_program(tmp_path: Path) -> None:
    mark = tmp_path / "alive"
    script = f"import os, time\nopen({str(mark)!r}, 'w').write(f'{{os.getpid()}}.')\ntime.sleep(3600)"

    def running(pid: int) -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return True

    async def cut() -> int:
        task = asyncio.create_task(CommandSpeaker(command(script)).speak("Hello."))
        while not (mark.exists() and mark.read_text().endswith(".")):
            assert not task.done()
            await asyncio.sleep(0.02)
        pid = int(mark.read_text()[:-1])
        assert running(pid)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return pid

    pid = asyncio.run(cut())
    assert eventually(lambda: not running(pid))


async def pieces(*texts: str, thinking: str = "") -> AsyncIterator[Piece | str]:
    yield Piece(thinking, thinking=True)
    for text in texts:
        yield Piece(text)
        await asyncio.sleep(0)


def collected(*texts: str, speaker: ToneSpeaker, **options: Any) -> list[Any]:
    async def run() -> list[Any]:
        return [item async for item in spoken(pieces(*texts, **options), speaker, 24000)]

    return asyncio.run(run())


def test_sentences_are_spoken_while_the_text_goes_on() -> None:
    speaker = ToneSpeaker()
    texts = ["A dog", " barks loudly. ", "Then", " a door", " closes. ", "That", " is", " all."]
    items = collected(*texts, speaker=speaker, thinking="I should think about it. A lot.")
    assert [str(item) for item in items if isinstance(item, Piece)][1:] == texts
    sounds = [item for item in items if isinstance(item, Sound)]
    assert [sound.text for sound in sounds] == ["A dog barks loudly. ", "Then a door closes. ", "That is all."]
    assert speaker.texts == ["A dog barks loudly.", "Then a door closes.", "That is all."]
    assert [len(sound.samples) for sound in sounds] == [len(text) * 240 for text in speaker.texts]
    first = items.index(sounds[0])
    assert any(isinstance(item, Piece) for item in items[first:])


def test_a_speaker_that_fails_leaves_the_text(caplog: pytest.LogCaptureFixture) -> None:
    items = collected("A dog barks loudly. ", "A door closes. ", "Silence.", speaker=ToneSpeaker(fails_at="door"))
    assert "".join(item for item in items if isinstance(item, Piece)) == "A dog barks loudly. A door closes. Silence."
    assert len([item for item in items if isinstance(item, Sound)]) == 1
    assert len([item for item in items if isinstance(item, Unspoken)]) == 1
    assert "no voice" in caplog.text


def test_closing_early_stops_the_speaker() -> None:
    speaker = ToneSpeaker(slow=3600)

    async def run() -> None:
        async with aclosing(spoken(pieces("A dog barks loudly. ", "More."), speaker, 24000)) as items:
            async for _ in items:
                return

    asyncio.run(asyncio.wait_for(run(), 100))
    assert speaker.texts == []


@pytest.mark.parametrize("law", ["audio/pcmu", "audio/pcma"])
def test_g711_is_the_nearest_code(law: str) -> None:
    levels = decoded(base64.b64encode(bytes(range(256))).decode(), law).astype(np.int64)
    samples = np.arange(-32768, 32768, 7).astype(np.int16)
    heard = decoded(encoded(samples, law), law).astype(np.int64)
    nearest = np.abs(samples.astype(np.int64)[:, None] - levels[None]).min(axis=1)
    np.testing.assert_array_equal(np.abs(heard - samples), nearest)


def content() -> list[dict[str, Any]]:
    data = base64.b64encode(SCENE.read_bytes()).decode()
    return [
        {"type": "input_audio", "input_audio": {"data": data, "format": "flac"}},
        {"type": "text", "text": QUESTION},
    ]


def sound_of(text: str) -> int:
    """Samples at 24 kHz that the tone speaker makes of an answer."""
    return 240 * len(said(text))


@pytest.fixture
def tone(service: Running, monkeypatch: pytest.MonkeyPatch) -> ToneSpeaker:
    speaker = ToneSpeaker()
    monkeypatch.setattr(service.server, "speaker", speaker)
    return speaker


def test_chat_completions_speak(service: Running, tone: ToneSpeaker) -> None:
    client = service.openai()
    request: Any = {"model": "", "messages": [{"role": "user", "content": content()}], "modalities": ["text", "audio"]}
    expected = service.model.ask(str(SCENE), QUESTION).text
    whole = client.chat.completions.create(**request, audio={"voice": "alloy", "format": "wav"})
    message = whole.choices[0].message
    assert message.content is None
    assert message.audio is not None
    assert message.audio.transcript == expected
    samples, rate = wav_samples(base64.b64decode(message.audio.data), "it")
    assert rate == 24000
    assert len(samples) == sound_of(expected)
    assert np.abs(samples).max() > 8000
    stream = client.chat.completions.create(**request, audio={"voice": "alloy", "format": "pcm16"}, stream=True)
    text, pcm = "", b""
    for chunk in stream:
        if (audio := chunk.choices[0].delta.audio) is not None:
            text += audio.transcript or ""
            pcm += base64.b64decode(audio.data or "")
    assert text == expected
    np.testing.assert_array_equal(np.frombuffer(pcm, "<i2"), samples)


def test_speech_that_fails_is_said_in_the_stream(service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.server, "speaker", ToneSpeaker(fails_at=""))
    request = {
        "messages": [{"role": "user", "content": "Say something."}],
        "modalities": ["text", "audio"],
        "audio": {"format": "pcm16"},
        "max_tokens": 8,
    }
    with service.http() as client:
        assert client.post("/v1/chat/completions", json=request).json()["error"]["code"] == "speech_failed"
        body = client.post("/v1/chat/completions", json={**request, "stream": True}).text
    last = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")][-1]
    assert "the speaker failed" in last["afnext"]["warnings"][-1]


def test_without_a_voice_audio_is_refused(service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    request: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello."}], "modalities": ["audio"]}
    with service.http() as client:
        refused = client.post("/v1/chat/completions", json=request).json()["error"]
        assert (refused["param"], "--speaker" in refused["message"]) == ("modalities", True)
        assert client.get("/v1/models").json()["data"][0]["afnext"]["voice"] is None
        monkeypatch.setattr(service.server, "speaker", ToneSpeaker())
        assert client.get("/v1/models").json()["data"][0]["afnext"]["voice"] == "tone"
        for wrong in ({}, {"audio": {"format": "mp3"}}, {"audio": {"format": "wav"}, "stream": True}):
            assert client.post("/v1/chat/completions", json={**request, **wrong}).status_code == 400


def test_openai_s_realtime_client_hears_the_answer(service: Running, tone: ToneSpeaker) -> None:
    samples = scene()
    expected = service.model.ask((samples, 24000), QUESTION).text

    async def talk() -> tuple[str, bytes, Any]:
        client = openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none")
        async with client.realtime.connect(model="afnext-tiny") as connection:
            output: Any = {"format": {"type": "audio/pcm", "rate": 24000}, "voice": "marin"}
            session: Any = {"type": "realtime", "output_modalities": ["audio"], "audio": {"output": output}}
            await connection.session.update(session=session)
            await connection.input_audio_buffer.append(audio=base64.b64encode(samples.tobytes()).decode())
            item: Any = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": QUESTION}]}
            await connection.conversation.item.create(item=item)
            await connection.response.create()
            text, pcm = "", b""
            async for event in connection:
                if event.type == "session.updated":
                    assert event.session.audio.output.voice == "tone"  # type: ignore[union-attr]
                elif event.type == "response.output_audio_transcript.delta":
                    text += event.delta
                elif event.type == "response.output_audio.delta":
                    pcm += base64.b64decode(event.delta)
                elif event.type == "response.done":
                    return text, pcm, event.response
                assert event.type != "error", event
        raise AssertionError("no response.done")

    text, pcm, response = asyncio.run(talk())
    assert text == expected
    assert len(pcm) == 2 * sound_of(expected)
    assert response.output_modalities == ["audio"]
    part = response.output[0].content[0]
    assert (part.type, part.transcript) == ("output_audio", expected)


def test_what_was_not_played_leaves_the_conversation(service: Running, tone: ToneSpeaker) -> None:
    with connected(service) as socket:
        append(socket, scene())
        item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": QUESTION}]}
        send(socket, "conversation.item.create", item=item)
        send(socket, "response.create", response={"output_modalities": ["audio"]})
        done = receive(socket, "response.done")["response"]
        whole = done["output"][0]["content"][0]["transcript"]
        cutter = Sentences()
        first = [*cutter.push(whole), *cutter.rest()][0]
        send(socket, "conversation.item.truncate", item_id="another", content_index=0, audio_end_ms=5)
        assert json.loads(socket.recv(timeout=100))["error"]["param"] == "item_id"
        heard_ms = max(1, 10 * len(speakable(first)) - 5)
        send(
            socket,
            "conversation.item.truncate",
            item_id=done["output"][0]["id"],
            content_index=0,
            audio_end_ms=heard_ms,
        )
        assert receive(socket, "conversation.item.truncated")["audio_end_ms"] == heard_ms
        follow = "What else?"
        turn = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": follow}]}
        send(socket, "conversation.item.create", item=turn)
        send(socket, "response.create")
        second = receive(socket, "response.done")["response"]["output"][0]["content"][0]["text"]
    turns = [("user", QUESTION), ("assistant", first), ("user", follow)]
    messages = [{"role": role, "content": content} for role, content in turns]
    expected = service.model.listen((scene(), 24000)).chat(messages)
    assert second == expected.text


def test_cancelling_a_response_stops_its_voice(service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    speaker = ToneSpeaker(slow=3600)
    monkeypatch.setattr(service.server, "speaker", speaker)
    with connected(service) as socket:
        append(socket, scene())
        item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": QUESTION}]}
        send(socket, "conversation.item.create", item=item)
        send(socket, "response.create", response={"output_modalities": ["audio"]})
        receive(socket, "response.output_audio_transcript.delta")
        send(socket, "response.cancel")
        assert receive(socket, "response.done")["response"]["status"] == "cancelled"
    assert speaker.texts == []
