"""The first recording of a request's body."""

import base64
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afnext.serve.context_store import new_id
from afnext.serve.ray.recordings import FormFinder, RawFinder, route_of_json

WAV = bytes(range(256)) * 40
ROUTE = "0123abcd"


def raw_route(data: bytes, key: str = "key") -> str | None:
    finder = RawFinder()
    finder.feed(data)
    return finder.route(key)


def form_route(piece: int = 100, **fields: Any) -> str | None:
    """The route of a form, fed in pieces of so many bytes. fields: of httpx."""
    request = httpx.Request("POST", "http://host/", **fields)
    body = request.read()
    finder = FormFinder(request.headers["content-type"])
    for start in range(0, len(body), piece):
        finder.feed(body[start : start + piece])
    return finder.route("key")


def json_route(body: Any, spooled: tuple[Path, ...] = ()) -> str | None:
    return route_of_json(json.dumps(body).encode(), spooled, "key")


def parts(*contents: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "system", "content": "Hear."}, {"role": "user", "content": list(contents)}]}


def inline(data: bytes) -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"}}


@settings(max_examples=50)
@given(st.binary(min_size=1, max_size=5000), st.integers(1, 6000))
def test_a_recording_has_one_route_however_it_comes(data: bytes, piece: int) -> None:
    expected = raw_route(data)
    assert expected is not None
    text = base64.b64encode(data).decode()
    assert json_route(parts(inline(data))) == expected
    assert json_route(parts({"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{text}"}})) == expected
    assert json_route(parts({"type": "file", "file": {"file_data": text}})) == expected
    assert json_route({"input": parts({"type": "input_file", "file_data": text})["messages"]}) == expected
    assert form_route(piece, data={"model": "m"}, files={"file": ("a.wav", data)}) == expected


def test_a_recording_that_was_moved_to_a_file_has_its_route_and_no_other_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "0"
    path.write_bytes(WAV)
    body = parts({"type": "input_audio", "input_audio": {"data": {"spooled": str(path)}}})
    assert json_route(body, (path,)) == raw_route(WAV)
    assert json_route(body) is None


def test_the_first_recording_counts() -> None:
    assert json_route(parts({"type": "text", "text": "?"}, inline(WAV), inline(b"other"))) == raw_route(WAV)
    both = {"file": ("a.wav", WAV), "file2": ("b.wav", b"other")}
    assert form_route(files=both) == raw_route(WAV)


@pytest.mark.parametrize("kind", ["file-", "ctx_"])
def test_ids_carry_their_route(kind: str) -> None:
    identifier = new_id(ROUTE).replace("ctx_", kind)
    assert json_route(parts({"type": "file", "file": {"file_id": identifier}}, inline(WAV))) == ROUTE
    assert json_route({"input": parts({"type": "input_file", "file_id": identifier})["messages"]}) == ROUTE
    assert json_route({"file_ids": [identifier, new_id("ffffffff")]}) == ROUTE
    assert json_route({"context": identifier, **parts(inline(WAV))}) == ROUTE
    assert form_route(7, files={"file_id": (None, identifier)}) == ROUTE


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b'"\\ud800"',
        b'{"messages": 3}',
        b'{"messages": [3, {"content": [3, {"type": "input_audio"}, {"type": 4}]}]}',
        b'{"messages": [{"content": [{"type": "input_audio", "input_audio": {"data": "?"}}]}]}',
        b'{"messages": [{"content": [{"type": "file", "file": {"file_data": {"spooled": "/etc/passwd"}}}]}]}',
        b'{"messages": [{"content": "Hello"}]}',
    ],
)
def test_a_body_that_names_no_recording_has_no_route(body: bytes) -> None:
    assert route_of_json(body, (), "key") is None


@pytest.mark.parametrize(
    "kind", ["multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=x"]
)
def test_a_form_that_makes_no_sense_has_no_route(kind: str) -> None:
    finder = FormFinder(kind)
    for piece in (b"no form", b"\0" * 2000):
        finder.feed(piece)
    assert finder.route("key") is None


@given(st.binary(max_size=400))
def test_any_bytes_are_fed_to_a_form(data: bytes) -> None:
    finder = FormFinder("multipart/form-data; boundary=x")
    finder.feed(b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n')
    finder.feed(data)
    finder.feed(data)
    finder.route("key")
