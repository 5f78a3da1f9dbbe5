"""Converts OpenAI's messages to those of `Model.chat`: roles, text, and audio in every supported form."""

from typing import Any

from ..runtime.app.openai_format import ROLES
from .audio import AudioReader
from .errors import ApiError, unsupported
from .http import Exchange
from .server import Server


class MessageReader:
    """Reads the messages of one request. `context` is the id of the context that the messages name, if any."""

    def __init__(self, server: Server, exchange: Exchange, *, truncate: bool):
        self.context: str | None = None
        self._server = server
        self._key = exchange.key
        self._audio = AudioReader(
            exchange, server.pool, max_seconds=server.backend.max_audio_seconds, truncate=truncate
        )

    async def read(self, messages: list[dict[str, Any]], where: str = "messages") -> list[dict[str, Any]]:
        """The messages with their audio decoded. Raises ApiError that names the wrong part."""
        return [await self._message(message, f"{where}[{index}]") for index, message in enumerate(messages)]

    async def _message(self, message: dict[str, Any], where: str) -> dict[str, Any]:
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in ROLES:
            raise ApiError(400, "invalid_value", f"{where}.role cannot be {role!r:.40}", param=f"{where}.role")
        if content is None and role == "assistant":
            content = ""
        if isinstance(content, str):
            return {"role": ROLES[role], "content": content}
        if not isinstance(content, list):
            problem = f"{where}.content has to be text or a list of parts"
            raise ApiError(400, "invalid_value", problem, param=f"{where}.content")
        parts = [await self._part(part, f"{where}.content[{index}]") for index, part in enumerate(content)]
        return {"role": ROLES[role], "content": [part for part in parts if part is not None]}

    async def _part(self, part: Any, where: str) -> dict[str, Any] | None:
        kind = part.get("type") if isinstance(part, dict) else None
        value = part.get(kind) if isinstance(kind, str) else None
        if kind in ("text", "input_text", "output_text", "refusal"):
            text = part.get("text", part.get("refusal"))
            if not isinstance(text, str):
                raise ApiError(400, "invalid_value", f"{where}.text has to be text", param=f"{where}.text")
            return {"type": "text", "text": text}
        if kind == "input_audio" and isinstance(value, dict):
            return _audio(await self._audio.from_base64(value.get("data"), f"{where}.input_audio.data"))
        if kind in ("file", "input_file"):
            return await self._file(value if isinstance(value, dict) else part, f"{where}.file")
        if kind == "audio_url" and isinstance(value, dict):
            url = value.get("url")
            if isinstance(url, str) and url.startswith("data:"):
                return _audio(await self._audio.from_base64(url, f"{where}.audio_url.url"))
            if not isinstance(url, str):
                raise unsupported(f"{where}.audio_url.url", "the URL has to be text")
            return _audio(await self._audio.from_url(url, self._server.fetcher, f"{where}.audio_url.url"))
        raise unsupported(f"{where}.type", f"parts of type {kind!r:.40} are not supported; send text or input_audio")

    async def _file(self, value: dict[str, Any], where: str) -> dict[str, Any] | None:
        if value.get("file_data") is not None:
            return _audio(await self._audio.from_base64(value["file_data"], f"{where}.file_data"))
        if value.get("file_url") is not None:
            raise unsupported(f"{where}.file_url", "URLs are not read; upload the file and send its file_id")
        identifier = value.get("file_id")
        if isinstance(identifier, str) and identifier.startswith("ctx_"):
            if self.context not in (None, identifier):
                raise unsupported(f"{where}.file_id", "a conversation can be about one context only")
            self.context = identifier
            return None
        path, name = self._server.files.path(identifier, self._key, f"{where}.file_id")
        return _audio(await self._audio.from_file(path, name, f"{where}.file_id"))


def _audio(recording: Any) -> dict[str, Any]:
    return {"type": "audio", "audio": recording}
