"""Finds the first recording that a request names, in its body, during or after the upload.

Nothing is decoded or checked here: an invalid body names no recording, and the replica reports the error.
"""

import binascii
import hashlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Protocol

import msgspec
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from ..worker import decoded_base64
from .routing import route_in, route_of

_PIECE = 1 << 20
_LONGEST_ID = 64
_SOURCES = ("data", "file_data", "file_id", "url")


class Finder(Protocol):
    """Reads a body piece by piece."""

    def feed(self, piece: bytes) -> None:
        """Take the next piece."""

    def route(self, key: str) -> str | None:
        """The route of the first recording, for the API key of that name."""


class RawFinder:
    """The body is a recording."""

    def __init__(self) -> None:
        self._hash = _digest()

    def feed(self, piece: bytes) -> None:
        """See `Finder`."""
        self._hash.update(piece)

    def route(self, key: str) -> str | None:
        """See `Finder`."""
        return route_of(self._hash.digest(), key)


class FormFinder:
    """The body is a multipart form: its first file, or the first id in its fields."""

    def __init__(self, content_type: str):
        _, options = parse_options_header(content_type)
        self._parser: MultipartParser | None = None
        self._hash: Any = None  # of the first file
        self._identifier: bytes | None = None  # the first field file_id
        self._disposition, self._header = b"", b""
        self._kind = ""  # of the current part
        if options.get(b"boundary"):
            self._parser = MultipartParser(
                options[b"boundary"],
                {
                    "on_part_begin": self._part,
                    "on_header_field": self._header_field,
                    "on_header_value": self._header_value,
                    "on_header_end": self._header_end,
                    "on_headers_finished": self._headers,
                    "on_part_data": self._data,
                },
            )

    def feed(self, piece: bytes) -> None:
        """See `Finder`."""
        if self._parser is None:
            return
        try:
            self._parser.write(piece)
        except MultipartParseError:
            self._parser = None

    def route(self, key: str) -> str | None:
        """See `Finder`."""
        if self._hash is not None:
            return route_of(self._hash.digest(), key)
        return None if self._identifier is None else route_in(self._identifier.decode("latin-1").strip())

    def _part(self) -> None:
        self._disposition, self._header, self._kind = b"", b"", ""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition += data[start:end]

    def _header_end(self) -> None:
        self._header = b""

    def _headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"filename" in options:
            self._kind = "" if self._hash is not None else "file"
            self._hash = self._hash or _digest()
        elif options.get(b"name") == b"file_id" and self._identifier is None:
            self._kind, self._identifier = "id", b""

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._kind == "file":
            self._hash.update(memoryview(data)[start:end])
        elif self._kind == "id" and self._identifier is not None:
            self._identifier = (self._identifier + data[start:end])[:_LONGEST_ID]


def route_of_json(body: bytes, spooled: Collection[Path], key: str) -> str | None:
    """The route of the first recording that a JSON body names. spooled: files to which its audio may have been moved
    (see `worker.extract`)."""
    try:
        source = next(_sources(msgspec.json.decode(body)), None)
        if isinstance(source, str):
            return route_in(source) or route_of(_digest(_contents(source)).digest(), key)
    except (msgspec.DecodeError, UnicodeError, RecursionError, binascii.Error):
        return None
    if isinstance(source, dict) and (path := Path(str(source.get("spooled")))) in spooled:
        return route_of(_file_digest(path), key)
    return None


def _sources(body: Any) -> Iterator[Any]:
    """The references to recordings: ids, URLs, base64 texts, and objects that name a file with the decoded base64."""
    if not isinstance(body, dict):
        return
    if isinstance(body.get("context"), str):
        yield body["context"]
    yield from _list(body.get("file_ids"))
    for message in [*_list(body.get("messages")), *_list(body.get("input"))]:
        for part in _list(message.get("content") if isinstance(message, dict) else None):
            if isinstance(part, dict):
                yield from _of_part(part)


def _of_part(part: dict[str, Any]) -> Iterator[Any]:
    kind = part.get("type")
    if kind in ("input_audio", "file", "input_file", "audio_url"):
        value = part.get(kind, part)
        found = [value[name] for name in _SOURCES if value.get(name)] if isinstance(value, dict) else []
        yield from found[:1]


def _contents(source: str) -> bytes:
    """The decoded file of base64, or the text of a URL."""
    return source.encode() if source.startswith(("http:", "https:")) else decoded_base64(source)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _digest(data: bytes = b"") -> "hashlib.blake2b":
    return hashlib.blake2b(data, digest_size=16)


def _file_digest(path: Path) -> bytes:
    digest = _digest()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.digest()
