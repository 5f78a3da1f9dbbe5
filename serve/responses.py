"""POST /v1/responses: OpenAI's newer form of a question, stateless; whole or as a stream of numbered events."""

import secrets
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec

from ..runtime.app.answer import Answer, Piece
from ..runtime.app.openai_format import IMPOSSIBLE, completion_usage
from .backend import Answering
from .chat import Sampling, details, start
from .errors import ApiError, api_error, unsupported
from .fields import json_body, parse
from .http import Event, Exchange
from .messages import MessageReader
from .server import Server

_IMPOSSIBLE = {
    **IMPOSSIBLE,
    "background": (None, False),
    "conversation": (None,),
    "previous_response_id": (None,),
    "prompt": (None,),
    "truncation": (None, "disabled"),
}
_PLAIN_TEXT = {"type": "text"}


class TextFormat(msgspec.Struct):
    format: dict[str, Any] | None = None


class ResponsesRequest(Sampling, kw_only=True):
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] | None = None
    reasoning: dict[str, Any] | None = None  # the checkpoint decides whether it thinks
    text: TextFormat | None = None
    context: str | None = None


async def responses(server: Server, exchange: Exchange) -> None:
    """Answer text or items."""
    request = parse(exchange, await json_body(exchange, server.pool), ResponsesRequest, _IMPOSSIBLE)
    model = server.served(request.model)
    if request.text is not None and request.text.format not in (None, _PLAIN_TEXT):
        raise unsupported("text.format", "answers are plain text; formats and schemas are not supported")
    answering = await exchange.watched(_prepared(server, exchange, request))
    response = _Response(request, model)
    if request.stream:
        await exchange.events(_events(server, exchange, answering, response))
    else:
        answer = await exchange.watched(answering.finish())
        server.answered(exchange, answer)
        for _ in response.whole(answer):
            pass
        await exchange.json(response.ended(answer, answering))


async def _prepared(server: Server, exchange: Exchange, request: ResponsesRequest) -> Answering:
    reader = MessageReader(server, exchange, truncate=request.truncate)
    messages = await reader.read(_messages(request.input), "input")
    if request.instructions is not None:
        messages = [{"role": "system", "content": request.instructions}, *messages]
    options = request.options(request.max_output_tokens, "max_output_tokens")
    return await start(server, exchange, messages, options, request.context or reader.context)


def _messages(given: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages among the items. Reasoning of earlier answers is left out, as the model's template does."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages = []
    for index, item in enumerate(given):
        kind = item.get("type", "message")
        if kind == "message":
            messages.append(item)
        elif kind != "reasoning":
            raise unsupported(f"input[{index}].type", f"items of type {kind!r:.40} are not supported; send messages")
    return messages


async def _events(
    server: Server, exchange: Exchange, answering: Answering, response: "_Response"
) -> AsyncIterator[Event]:
    number = 0

    def event(kind: str, **values: Any) -> Event:
        nonlocal number
        number += 1
        return Event({"type": f"response.{kind}", "sequence_number": number - 1, **values}, name=f"response.{kind}")

    try:
        yield event("created", response=response.public())
        yield event("in_progress", response=response.public())
        try:
            async for piece in answering.events():
                if isinstance(piece, Piece):
                    for kind, values in response.push(piece):
                        yield event(kind, **values)
                else:
                    yield Event(None, comment=piece)
            answer = await answering.finish()
        except Exception as error:
            failure = api_error(error)
            exchange.record.code = failure.code
            exchange.scope["afnext.log_error"](error, failure)
            yield event("failed", response=response.failed(failure))
            return
        server.answered(exchange, answer)
        for kind, values in response.whole(answer):
            yield event(kind, **values)
        ended = response.ended(answer, answering)
        yield event(ended["status"], response=ended)
    finally:
        await answering.close()


class _Response:
    """A response in progress: first the reasoning, then the message. Methods yield (event, values)."""

    def __init__(self, request: ResponsesRequest, model: str):
        self._request = request
        self._output: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._head = {
            "id": f"resp_{secrets.token_hex(24)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
        }

    def public(self, status: str = "in_progress", **values: Any) -> dict[str, Any]:
        """The response object."""
        request = self._request
        return {
            **self._head,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "output": list(self._output),
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "temperature": request.temperature,
            "top_p": request.top_p,
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
            "text": {"format": _PLAIN_TEXT},
            "truncation": "disabled",
            "previous_response_id": None,
            "store": False,
            "usage": None,
            **values,
        }

    def push(self, piece: Piece) -> Iterator[tuple[str, dict[str, Any]]]:
        """Events of the next piece of text."""
        if not piece:
            return
        kind = "reasoning" if piece.thinking else "message"
        if self._open is None or self._open["type"] != kind:
            yield from self._close_item()
            yield from self._add_item(kind)
        part = self._part()
        part["text"] += str(piece)
        yield f"{part['type']}.delta", {**self._place(), "delta": str(piece), **_logprobs(part)}

    def whole(self, answer: Answer) -> Iterator[tuple[str, dict[str, Any]]]:
        """Events of all text not yet pushed, to the end of the last item. An answer without text that was not cut off
        has an empty message."""
        if not self._output:
            yield from self.push(Piece(answer.thinking or "", thinking=True))
            yield from self.push(Piece(answer.text))
        complete = answer.finish_reason == "stop"
        if complete and (self._open is None or self._open["type"] != "message"):
            yield from self._close_item()
            yield from self._add_item("message")
        yield from self._close_item("completed" if complete else "incomplete")

    def ended(self, answer: Answer, answering: Answering) -> dict[str, Any]:
        """The finished response."""
        usage = completion_usage(answer.usage)
        prompt = usage["prompt_tokens_details"]
        values = {
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {**prompt, "cache_write_tokens": 0},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": usage["completion_tokens_details"],
                "total_tokens": usage["total_tokens"],
                "audio_seconds": usage["audio_seconds"],
            },
            "afnext": details(answer, answering),
        }
        if answer.finish_reason == "stop":
            return self.public("completed", completed_at=int(time.time()), **values)
        return self.public("incomplete", incomplete_details={"reason": "max_output_tokens"}, **values)

    def failed(self, failure: ApiError) -> dict[str, Any]:
        """The response after an error."""
        code = "server_error" if failure.status >= 500 else failure.code
        return self.public("failed", error={"code": code, "message": str(failure)})

    def _add_item(self, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
        item: dict[str, Any] = {"id": f"{kind[:3]}_{secrets.token_hex(16)}", "type": kind, "status": "in_progress"}
        if kind == "reasoning":
            item["summary"] = []
        else:
            item["role"] = "assistant"
        item["content"] = []
        self._output.append(item)
        self._open = item
        yield "output_item.added", {"output_index": len(self._output) - 1, "item": {**item, "content": []}}
        part: dict[str, Any] = {"type": "reasoning_text" if kind == "reasoning" else "output_text", "text": ""}
        if kind == "message":
            part |= {"annotations": [], "logprobs": []}
        item["content"].append(part)
        yield "content_part.added", {**self._place(), "part": dict(part)}

    def _close_item(self, status: str = "completed") -> Iterator[tuple[str, dict[str, Any]]]:
        if self._open is None:
            return
        item, part = self._open, self._part()
        item["status"] = status
        yield f"{part['type']}.done", {**self._place(), "text": part["text"], **_logprobs(part)}
        yield "content_part.done", {**self._place(), "part": dict(part)}
        yield "output_item.done", {"output_index": len(self._output) - 1, "item": dict(item)}
        self._open = None

    def _part(self) -> dict[str, Any]:
        assert self._open is not None
        part: dict[str, Any] = self._open["content"][0]
        return part

    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self._output) - 1, "content_index": 0}


def _logprobs(part: dict[str, Any]) -> dict[str, Any]:
    return {"logprobs": []} if part["type"] == "output_text" else {}
