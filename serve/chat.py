"""POST /v1/chat/completions: questions about audio, whole or streamed, answered in text or spoken."""

import base64
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, Literal

import msgspec
import numpy as np

from ..runtime.app.answer import Answer, Piece
from ..runtime.app.openai_format import FINISH, completion, completion_usage
from ..runtime.app.responder import QuestionOptions
from ..runtime.engine.sampler import MOST_TOKENS
from .backend import Answering
from .errors import ApiError, unsupported
from .fields import json_body, parse
from .http import Event, Exchange
from .messages import MessageReader
from .realtime_audio import encoded
from .server import Server
from .speech import PCM_RATE, Sound, Speaker, Unspoken, spoken, wav_bytes


class StreamOptions(msgspec.Struct):
    include_usage: bool = False


class SpeechOptions(msgspec.Struct):
    """How the answer is spoken: 24 kHz, 16 bits, by the server's voice, whatever `voice` names."""

    format: Literal["wav", "pcm16"]
    voice: Any = None


class Sampling(msgspec.Struct, kw_only=True):
    """Sampling options: OpenAI's fields, and this model's own."""

    model: str = ""
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_repetition: bool | None = None
    priority: int | None = None
    deadline: float | None = None
    truncate: bool = False

    def options(self, limit: int | None, limit_name: str) -> QuestionOptions:
        """The options that were given. limit: of new tokens, in the client's field `limit_name`.

        Raises ApiError for an impossible limit, and for too many stop strings.
        """
        if limit is not None and not 1 <= limit <= MOST_TOKENS:
            raise unsupported(limit_name, f"{limit_name} is {limit}; it must be from 1 to {MOST_TOKENS}")
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        if stop is not None and len(stop) > 16:
            raise unsupported("stop", f"at most 16 stop strings are possible, not {len(stop)}")
        values: dict[str, Any] = {
            "max_new_tokens": limit,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "stop": stop,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "stop_repetition": self.stop_repetition,
            "priority": self.priority,
            "deadline": self.deadline,
        }
        return {name: value for name, value in values.items() if value is not None}  # type: ignore[return-value]


class ChatRequest(Sampling, kw_only=True):
    messages: list[dict[str, Any]]
    stream_options: StreamOptions | None = None
    max_completion_tokens: int | None = None
    max_tokens: int | None = None
    context: str | None = None
    modalities: list[Literal["text", "audio"]] | None = None
    audio: SpeechOptions | None = None


async def chat_completions(server: Server, exchange: Exchange) -> None:
    """Answer a conversation."""
    request = parse(exchange, await json_body(exchange, server.pool), ChatRequest)
    model = server.served(request.model)
    speaker = server.speaks("audio" in (request.modalities or []), "modalities")
    if speaker is not None and (request.audio is None or (request.stream and request.audio.format != "pcm16")):
        raise unsupported("audio", 'a spoken answer needs audio={"format": "wav"}; a stream takes "pcm16" only')
    answering = await exchange.watched(_prepared(server, exchange, request))
    head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
    if request.stream:
        usage = request.stream_options is not None and request.stream_options.include_usage
        await exchange.events(_chunks(server, exchange, answering, head, usage, speaker))
        return
    sound = None if speaker is None else await exchange.watched(_sound(answering, speaker))
    answer = await exchange.watched(answering.finish())
    server.answered(exchange, answer)
    response = completion(answer, head, completion_usage(answer.usage), details(answer, answering))
    if sound is not None and request.audio is not None:
        is_wav = request.audio.format == "wav"
        data = base64.b64encode(wav_bytes(sound, PCM_RATE)).decode() if is_wav else encoded(sound, "audio/pcm")
        audio = {**_audio_head(head), "data": data, "transcript": answer.text}
        response["choices"][0]["message"] |= {"content": None, "audio": audio}
    await exchange.json(response)


async def _prepared(server: Server, exchange: Exchange, request: ChatRequest) -> Answering:
    """The conversation with its audio decoded, accepted by the engine."""
    name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    options = request.options(getattr(request, name), name)
    reader = MessageReader(server, exchange, truncate=request.truncate)
    messages = await reader.read(request.messages)
    return await start(server, exchange, messages, options, request.context or reader.context)


async def start(
    server: Server,
    exchange: Exchange,
    messages: list[dict[str, Any]],
    options: QuestionOptions,
    context: str | None,
) -> Answering:
    """Start the answer to a conversation. context: the id of its context, if any, which the answer keeps in use."""
    heard, reloaded = None, False
    if context is not None:
        heard, reloaded = await exchange.keep(server.contexts.used(context, exchange.key, "context"))
    answering = await server.backend.answer(
        messages, options, key=exchange.key, context=heard, make_room=server.contexts.make_room
    )
    if context is not None:
        answering.details.update(context=context, reloaded=reloaded)
    return answering


def details(answer: Answer, answering: Answering) -> dict[str, Any]:
    """The `afnext` object of an answer: values that have no field in OpenAI's format."""
    return {
        "warnings": list(answer.warnings),
        "truncated": answer.usage.truncated,
        "finish_reason": answer.finish_reason,
        "timings": answer.timings.to_dict(),
        **answering.details,
    }


async def _sound(answering: Answering, speaker: Speaker) -> np.ndarray:
    """The sound of the whole answer: samples, int16 [n]. Raises ApiError if the speaker fails."""
    blocks = [np.empty(0, np.int16)]
    async with aclosing(spoken(answering.events(), speaker, PCM_RATE)) as events:
        async for event in events:
            if isinstance(event, Unspoken):
                raise ApiError(500, "speech_failed", "the speaker failed; ask for text, or try again later")
            if isinstance(event, Sound):
                blocks.append(event.samples)
    return np.concatenate(blocks)


async def _chunks(
    server: Server,
    exchange: Exchange,
    answering: Answering,
    head: dict[str, Any],
    include_usage: bool,
    speaker: Speaker | None,
) -> AsyncIterator[Event]:
    def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> Event:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return Event({**head, "object": "chat.completion.chunk", "choices": [choice], **more})

    audio = None if speaker is None else _audio_head(head)
    warnings = []
    try:
        yield chunk({"role": "assistant", "content": ""})
        async with aclosing(spoken(answering.events(), speaker, PCM_RATE)) as events:
            async for event in events:
                if isinstance(event, Piece | Sound):
                    yield chunk(_delta(event, audio))
                elif isinstance(event, Unspoken):
                    warnings.append(event.message)
                else:
                    yield Event(None, comment=event)
        answer = await answering.finish()
        server.answered(exchange, answer)
        about = details(answer, answering)
        about["warnings"] += warnings
        yield chunk({}, FINISH[answer.finish_reason], afnext=about)
        if include_usage:
            yield Event(
                {**head, "object": "chat.completion.chunk", "choices": [], "usage": completion_usage(answer.usage)}
            )
    finally:
        await answering.close()


def _delta(event: Piece | Sound, audio: dict[str, Any] | None) -> dict[str, Any]:
    """The delta of the message for a piece of an answer. audio: fields of its audio object, if the answer is spoken."""
    if isinstance(event, Sound):
        return {"audio": {**(audio or {}), "data": encoded(event.samples, "audio/pcm")}}
    text = str(event)
    if event.thinking:
        return {"reasoning_content": text, "reasoning": text}
    return {"content": text} if audio is None else {"audio": {**audio, "transcript": text}}


def _audio_head(head: dict[str, Any]) -> dict[str, Any]:
    """The first fields of a message's audio object. It expires at once, because the server does not store the sound."""
    return {"id": head["id"].replace("chatcmpl", "audio"), "expires_at": head["created"]}
