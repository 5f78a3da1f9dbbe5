"""OpenAI's batch files: one request per line, {"custom_id", "method", "url", "body"}, and the responses to them."""

import base64
import binascii
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ..errors import RequestError
from ..files import open_regular, parse_json_object, shown
from ..io.audio import AudioSource
from ..io.subtitles import to_srt, to_vtt
from .answer import Answer
from .api import Model
from .batch import Item, Outcome, Session, file_state, item_id, unique
from .openai_format import (
    HARMLESS,
    IMPOSSIBLE,
    ROLES,
    completion,
    completion_usage,
    plain_text,
    transcript_prompt,
    transcript_usage,
)
from .transcribe import Transcript

CHAT, TRANSCRIPTIONS = "/v1/chat/completions", "/v1/audio/transcriptions"
MAX_LINE = 1 << 28

_SAMPLING = ("temperature", "top_p", "seed", "stop", "top_k", "min_p", "repetition_penalty", "stop_repetition")
_LIMITS = ("max_completion_tokens", "max_tokens")
_CHAT = {"model", "messages", "stream", "stream_options", "truncate", *_SAMPLING, *_LIMITS}
_TRANSCRIPTIONS = {
    *("model", "file", "language", "prompt", "response_format", "temperature", "seed", "stream"),
    *("instruction", "window", "overlap", "speakers", "truncate"),
}
_STYLES = ("json", "text", "srt", "vtt")


@dataclass(frozen=True)
class Request:
    """A request of a batch file, checked except for its audio. `recordings`: files and bytes, by position."""

    custom_id: str
    url: str
    body: Mapping[str, Any]

    @property
    def files(self) -> list[str]:
        """The paths of its recordings."""
        sources = [self.body["file"]] if self.url == TRANSCRIPTIONS else list(_audio_texts(self.body["messages"]))
        return [path for source in sources if (path := _path(source)) is not None]


@dataclass(frozen=True)
class Line:
    """A request's line in a batch file. It is read again when it is processed, as it may contain a long recording."""

    path: Path
    number: int
    offset: int
    length: int
    problem: RequestError | None = None

    def check(self, model: Model) -> None:
        """See `Work`."""

    async def run(self, session: Session, item: Item) -> Outcome:
        """See `Work`."""
        if self.problem is not None:
            raise self.problem
        with open_regular(self.path, str(self.path), RequestError) as file:
            file.seek(self.offset)
            request = parse_request(file.read(self.length), f"line {self.number} of {self.path}")
        if request.url == CHAT:
            return await _chat(session, request, item)
        return await _transcription(session, request, item)


def plan_requests(path: Path, model: Mapping[str, Any]) -> list[Item]:
    """An item for each request of a batch file, in order. model: from `model_identity`.

    An invalid line becomes an item that fails. Raises RequestError for a file that cannot be read.
    """
    return unique(_items(path, model))


def _items(path: Path, model: Mapping[str, Any]) -> Iterator[Item]:
    lines_of: dict[str, tuple[int, str]] = {}  # number and id of the first line with a custom_id
    for number, offset, text in _lines(path):
        where, problem = f"line {number} of {path}", None
        custom_id: Any = None
        try:
            if len(text) >= MAX_LINE:
                raise RequestError(f"{where} is longer than {MAX_LINE:,} bytes; name the recording's file instead.")
            line = parse_json_object(text, where, RequestError)
            custom_id = line.get("custom_id")
            request = _request(line, where)
            files = [file_state(file) for file in request.files]
            identifier = item_id(custom_id=custom_id, url=request.url, body=request.body, files=files, model=model)
            before, first = lines_of.setdefault(request.custom_id, (number, identifier))
            if first != identifier:
                raise RequestError(f"{where} has the custom_id of line {before}; give each request its own.")
        except RequestError as error:
            problem = error
            identifier = item_id(line=text.hex(), file=str(path.resolve()), number=number, model=model)
        head = {"custom_id": custom_id if isinstance(custom_id, str) and custom_id else f"line {number}"}
        yield Item(identifier, head, Line(path, number, offset, len(text), problem))


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number, offset and text of each line that is not blank."""
    with open_regular(path, str(path), RequestError) as file:
        offset = number = 0
        while text := file.readline(MAX_LINE):
            number += 1
            if text.strip():
                yield number, offset, text
            offset += len(text)


def parse_request(text: bytes, where: str) -> Request:
    """Parse the request in a line. Raises RequestError, which names the line as `where`."""
    return _request(parse_json_object(text, where, RequestError), where)


def _request(line: Mapping[str, Any], where: str) -> Request:
    custom_id, url, body = line.get("custom_id"), line.get("url"), line.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        raise RequestError(f"{where} has no custom_id; give each request its own, as text.")
    if line.get("method", "POST") != "POST" or url not in (CHAT, TRANSCRIPTIONS):
        raise RequestError(f"{where}: only POST to {CHAT} and {TRANSCRIPTIONS} can be answered, not {shown(url)}.")
    if not isinstance(body, dict):
        raise RequestError(f"{where} has no body; give the request as an object.")
    _check_fields(body, _CHAT if url == CHAT else _TRANSCRIPTIONS, where)
    if url == CHAT:
        list(_audio_texts(_messages(body, where)))
    elif not isinstance(body.get("file"), str):
        raise RequestError(f"{where}: body.file must be the path of a recording, or a data: URL with it.")
    elif body.get("response_format", "json") not in _STYLES:
        raise RequestError(
            f"{where}: response_format can be {', '.join(_STYLES)}, not {shown(body['response_format'])}."
        )
    return Request(custom_id, url, body)


def _check_fields(body: Mapping[str, Any], known: set[str], where: str) -> None:
    for name, value in body.items():
        if name in IMPOSSIBLE and known is _CHAT and value not in IMPOSSIBLE[name]:
            raise RequestError(f"{where}: {name} is not supported by this model; leave it out.")
        if name not in known and name not in HARMLESS and name not in IMPOSSIBLE:
            raise RequestError(f"{where}: the field {shown(name)} is not known; leave it out.")
    if body.get("stream"):
        raise RequestError(f"{where}: a batch has no streams; leave out stream.")


def _messages(body: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise RequestError(f"{where}: body.messages must be a list of messages.")
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise RequestError(f"{where}: a message cannot have the role {shown(role)}.")
        if not isinstance(content, str | list) or not all(isinstance(part, str | dict) for part in content):
            raise RequestError(f"{where}: the content of a message must be text or a list of parts.")
    return messages


def _audio_texts(messages: list[dict[str, Any]]) -> Iterator[str]:
    """The reference to each recording: a path, a data: URL, or base64 after `data:,`. Raises RequestError."""
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else ():
            converted = _part(part)
            if "audio" in converted:
                yield converted["audio"]


def _part(part: dict[str, Any]) -> dict[str, Any]:
    """A part of a message in the format of `Model.chat`, except that its audio is text."""
    kind = part.get("type")
    value = part.get(kind) if isinstance(kind, str) else None
    if kind == "text" and isinstance(value, str):
        return {"type": "text", "text": value}
    if kind == "input_audio" and isinstance(value, dict) and isinstance(value.get("data"), str):
        data = value["data"]
        return {"type": "audio", "audio": data if data.startswith("data:") else f"data:;base64,{data}"}
    if kind == "audio_url" and isinstance(value, dict) and isinstance(value.get("url"), str):
        return {"type": "audio", "audio": value["url"]}
    raise RequestError(f"a part of a message is of the type {shown(kind)}; it can be text, input_audio or audio_url.")


def _path(source: str) -> str | None:
    if source.startswith("file://"):
        return unquote(source.removeprefix("file://"))
    return None if source.startswith("data:") else source


def _source(text: str) -> AudioSource:
    """A path, or the bytes of a data: URL. Raises RequestError for a URL without base64."""
    path = _path(text)
    if path is not None:
        return path
    head, comma, data = text.partition(",")
    if not comma or not head.endswith(";base64"):
        raise RequestError("a data: URL must contain base64, as in data:audio/wav;base64,UklGR...")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"the audio is not valid base64 ({error}); encode it again.") from None


def _given(body: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: body[name] for name in names if body.get(name) is not None}


async def _chat(session: Session, request: Request, item: Item) -> Outcome:
    body = request.body
    options: dict[str, Any] = _given(body, (*_SAMPLING, "truncate"))
    for name in _LIMITS:
        if body.get(name) is not None:
            options.setdefault("max_new_tokens", body[name])
    answer = await session.answer([_message(message) for message in body["messages"]], options)  # type: ignore[arg-type]
    return Outcome(_response(item, _completion(answer, item)), answer.usage, answer.timings.to_dict())


def _message(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, list):
        content = [_part(part) for part in content]
        content = [{**part, "audio": _source(part["audio"])} if "audio" in part else part for part in content]
    return {"role": ROLES[message["role"]], "content": content}


def _completion(answer: Answer, item: Item) -> dict[str, Any]:
    usage = completion_usage(answer.usage)
    del usage["prompt_tokens_details"]["cached_tokens"]  # depends on earlier requests
    details = {"warnings": list(answer.warnings), "finish_reason": answer.finish_reason}
    head = {"id": f"chatcmpl-{item.id}", "created": int(time.time()), "model": "afnext"}
    return completion(answer, head, usage, {**details, "truncated": answer.usage.truncated})


async def _transcription(session: Session, request: Request, item: Item) -> Outcome:
    body, style = request.body, request.body.get("response_format", "json")
    timestamps = True if style in ("srt", "vtt") else None
    options = _given(body, ("temperature", "seed", "window", "overlap", "speakers", "truncate"))
    prompt = body.get("instruction") or transcript_prompt(
        session.model.model.prompts,
        timestamps=timestamps,
        speakers=body.get("speakers"),
        language=body.get("language") or "",
        hint=body.get("prompt") or "",
    )
    transcript, seconds = await session.transcript(
        _source(body["file"]), prompt=prompt, timestamps=timestamps, **options
    )
    return Outcome(_response(item, _written(transcript, style)), transcript.usage, {"total": seconds})


def _written(transcript: Transcript, style: str) -> Any:
    if style == "srt":
        return to_srt(transcript.segments)
    if style == "vtt":
        return to_vtt(transcript.segments)
    if style == "text":
        return f"{plain_text(transcript.segments)}\n"
    value = {"text": plain_text(transcript.segments), "usage": transcript_usage(transcript)}
    return {**value, "warnings": list(transcript.warnings)} if transcript.warnings else value


def _response(item: Item, body: Any) -> dict[str, Any]:
    return {"response": {"status_code": 200, "request_id": item.id, "body": body}, "error": None}
