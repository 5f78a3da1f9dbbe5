"""POST /v1/audio/transcriptions and /v1/audio/translations, in every response format, whole or streamed."""

import math
import zlib
from collections.abc import AsyncIterator
from typing import Any

from starlette.datastructures import FormData, UploadFile

from ..runtime.app.openai_format import plain_text, transcript_usage
from ..runtime.app.transcribe import MAX_SECONDS, Transcript
from ..runtime.io.scripts import continued
from ..runtime.io.segments import Segment
from ..runtime.io.subtitles import to_srt, to_vtt
from .audio import AudioReader
from .backend import Transcribing, TranscriptOptions, TranscriptRequest
from .errors import ApiError, unsupported
from .http import Event, Exchange
from .server import Server

FORMATS = ("json", "text", "srt", "vtt", "verbose_json", "diarized_json")
_FIELDS = {
    *("file", "file_id", "model", "language", "prompt", "response_format", "temperature", "stream"),
    *("chunking_strategy", "chunking_strategy[type]", "timestamp_granularities[]", "timestamp_granularities"),
    *("include[]", "include", "instruction", "window", "overlap", "speakers", "truncate", "seed"),
}
_WORDS = "word times are not available: the model states times of segments"
# whisper.cpp's clients send fields of its decoder, which have no meaning here.
_HARMLESS = {"user", "temperature_inc", "no_speech_threshold", "encode", "beam_size", "best_of"}


async def transcriptions(server: Server, exchange: Exchange) -> None:
    """Transcribe a recording in its own language."""
    await _answer(server, exchange, task="transcribe")


async def translations(server: Server, exchange: Exchange) -> None:
    """Transcribe a recording in English."""
    await _answer(server, exchange, task="translate")


async def _answer(server: Server, exchange: Exchange, *, task: str) -> None:
    form = await exchange.form()
    exchange.ignore(name for name in form if name not in _FIELDS | _HARMLESS)
    server.served("" if (name := _text(form, "model", "")) == "whisper-1" else name)
    style = _text(form, "response_format", "json")
    if style not in FORMATS:
        raise unsupported("response_format", f"response_format can be {', '.join(FORMATS)}, not {style!r:.40}")
    granularities = form.getlist("timestamp_granularities[]") + form.getlist("timestamp_granularities")
    if "word" in granularities and "segment" not in granularities:
        raise unsupported("timestamp_granularities[]", f"{_WORDS}; ask for segment")
    if "logprobs" in form.getlist("include[]") + form.getlist("include"):
        raise unsupported("include[]", "log probabilities are not available")
    warnings = [_WORDS] if "word" in granularities else []
    transcribing = await exchange.watched(_started(server, exchange, form, style, task == "translate"))
    language = _text(form, "language", "") or ("english" if task == "translate" else "unknown")
    temperature = _number(form, "temperature") or 0.0
    try:
        if _flag(form, "stream"):
            await exchange.events(_events(server, exchange, transcribing, style, temperature))
        else:
            transcript = await exchange.watched(transcribing.finish())
            server.transcribed(exchange, transcript)
            await _send(exchange, transcript, style, task, language, temperature, warnings)
    finally:
        await transcribing.close()


async def _started(server: Server, exchange: Exchange, form: FormData, style: str, translate: bool) -> Transcribing:
    """The transcript of the form's recording, accepted by the engine."""
    reader = AudioReader(exchange, server.pool, max_seconds=MAX_SECONDS, truncate=_flag(form, "truncate"))
    upload = form.get("file")
    if (count := len(form.getlist("file"))) > 1:
        raise ApiError(400, "invalid_value", f"send one recording, not {count}", param="file")
    if isinstance(upload, UploadFile):
        audio = await reader.from_file(await exchange.saved(upload), _shown(upload.filename), "file")
    elif form.get("file_id"):
        path, name = server.files.path(form["file_id"], exchange.key, "file_id")
        audio = await reader.from_file(path, name, "file_id")
    else:
        raise ApiError(400, "missing_value", "send the recording in the field file", param="file")
    options = TranscriptOptions(
        window=_number(form, "window"),
        overlap=_number(form, "overlap"),
        temperature=_number(form, "temperature"),
        seed=None if (seed := _number(form, "seed")) is None else int(seed),
        speakers=True if style == "diarized_json" else _flag(form, "speakers") if form.get("speakers") else None,
        timestamps=None if style in ("json", "text") else True,
    )
    wanted = TranscriptRequest(
        options,
        translate=translate,
        language=_text(form, "language", ""),
        hint=_text(form, "prompt", ""),
        instruction=_text(form, "instruction", ""),
    )
    return await server.backend.transcribe(audio, wanted, key=exchange.key)


async def _send(
    exchange: Exchange,
    transcript: Transcript,
    style: str,
    task: str,
    language: str,
    temperature: float,
    warnings: list[str],
) -> None:
    if style == "srt":
        await exchange.reply(200, to_srt(transcript.segments).encode(), "text/plain; charset=utf-8")
    elif style == "vtt":
        await exchange.reply(200, to_vtt(transcript.segments).encode(), "text/plain; charset=utf-8")
    elif style == "text":
        await exchange.reply(200, f"{plain_text(transcript.segments)}\n".encode(), "text/plain; charset=utf-8")
    elif style == "json":
        value = {"text": plain_text(transcript.segments), "usage": transcript_usage(transcript)}
        if transcript.warnings or warnings:
            value["warnings"] = [*warnings, *transcript.warnings]
        await exchange.json(value)
    elif style == "diarized_json":
        await exchange.json(
            {
                "task": task,
                "duration": transcript.duration,
                "text": plain_text(transcript.segments),
                "segments": [_diarized(index, segment) for index, segment in enumerate(transcript.segments)],
                "usage": {"type": "duration", "seconds": transcript.duration},
                "warnings": [*warnings, *transcript.warnings],
            }
        )
    else:
        await exchange.json(
            {
                "task": task,
                "language": language,
                "duration": transcript.duration,
                "text": plain_text(transcript.segments),
                "segments": [_verbose(i, segment, temperature) for i, segment in enumerate(transcript.segments)],
                "usage": {"type": "duration", "seconds": transcript.duration},
                "warnings": [*warnings, *transcript.warnings],
            }
        )


async def _events(
    server: Server, exchange: Exchange, transcribing: Transcribing, style: str, temperature: float
) -> AsyncIterator[Event]:
    """OpenAI's transcript events. The joined deltas are the text. verbose_json adds segments with times, as OpenAI's
    format does for diarized_json."""
    text, count = "", 0
    async for segment in transcribing.segments():
        delta = continued(text, segment.text)
        text += delta
        if style == "diarized_json":
            yield Event(_diarized(count, segment))
        elif style == "verbose_json":
            values = _verbose(count, segment, temperature)
            yield Event({**values, "type": "transcript.text.segment", "id": _segment_id(count)})
        identifier = {"segment_id": _segment_id(count)} if style in ("diarized_json", "verbose_json") else {}
        yield Event({"type": "transcript.text.delta", "delta": delta, **identifier})
        count += 1
    transcript = await transcribing.finish()
    server.transcribed(exchange, transcript)
    warnings = {"warnings": list(transcript.warnings)} if transcript.warnings else {}
    yield Event({"type": "transcript.text.done", "text": text, "usage": transcript_usage(transcript), **warnings})


def _segment_id(index: int) -> str:
    return f"seg_{index}"


def _diarized(index: int, segment: Segment) -> dict[str, Any]:
    return {
        "type": "transcript.text.segment",
        "id": _segment_id(index),
        "start": segment.start,
        "end": segment.end,
        "speaker": speaker_letter(segment.speaker),
        "text": segment.text,
    }


def _verbose(index: int, segment: Segment, temperature: float) -> dict[str, Any]:
    """A segment with every key of OpenAI's format, none null, because strict clients fail otherwise."""
    encoded = segment.text.encode()
    value = {
        "id": index,
        "seek": round(100 * segment.start),
        "start": segment.start,
        "end": segment.end,
        "text": segment.text,
        "tokens": [],
        "temperature": temperature,
        "avg_logprob": 0.0,
        "compression_ratio": len(encoded) / len(zlib.compress(encoded)) if encoded else 1.0,
        "no_speech_prob": 0.0,
        "start_stated": segment.start_stated,
    }
    return value if segment.speaker is None else {**value, "speaker": segment.speaker}


def speaker_letter(speaker: str | None) -> str:
    """OpenAI names speakers A, B, ...; ours are "Speaker 1", "Speaker 2", ... or another label."""
    label = (speaker or "Speaker 1").removeprefix("Speaker ")
    return chr(ord("A") + int(label) - 1) if label.isdecimal() and 1 <= int(label) <= 26 else label


def _shown(name: str | None) -> str:
    """The client's name of a file, for errors and warnings."""
    base = (name or "the recording").replace("\\", "/").rsplit("/", 1)[-1]
    return "".join(char for char in base if char.isprintable())[:100] or "the recording"


def _text(form: FormData, name: str, default: str) -> str:
    value = form.get(name, default)
    if not isinstance(value, str):
        raise ApiError(400, "invalid_value", f"{name} has to be text", param=name)
    return value


def _number(form: FormData, name: str) -> float | None:
    text = _text(form, name, "")
    try:
        value = float(text) if text else None
    except ValueError:
        value = math.nan
    if value is not None and not math.isfinite(value):
        raise ApiError(400, "invalid_value", f"{name} has to be a number, not {text!r:.40}", param=name)
    return value


def _flag(form: FormData, name: str) -> bool:
    text = _text(form, name, "false").lower()
    if text not in ("true", "false", "1", "0", ""):
        raise ApiError(400, "invalid_value", f"{name} has to be true or false, not {text!r:.40}", param=name)
    return text in ("true", "1")
