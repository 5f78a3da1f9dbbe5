"""Hostile requests: each gets the right status, and the server answers the next one."""

import base64
import io
import json
import random
import select
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

import afnext
from afnext import AfnextError, AudioError
from afnext.serve.fetch import Fetcher
from afnext.serve.guard import read_keys
from afnext.serve.worker import extract

from .conftest import QUESTION, SCENE, Running, eventually, running, stalled

SMALL = {"max_tokens": 3, "model": "afnext-tiny"}


@pytest.fixture(scope="module")
def strict() -> Iterator[Running]:
    """A server with small limits."""
    limits = {"max_json_bytes": 4 << 20, "max_upload_bytes": 6 << 20, "decode_bytes": 600 << 20}
    with running(lambda: afnext.load("afnext-tiny"), **limits) as service:
        yield service


def chat(service: Running, part: Any, **more: Any) -> Any:
    body = {**SMALL, "messages": [{"role": "user", "content": [{"type": "text", "text": QUESTION}, part]}], **more}
    with service.http() as client:
        return client.post("/v1/chat/completions", json=body)


def spoken(data: bytes, kind: str = "wav") -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": kind}}


def is_error(response: Any, status: int, code: str) -> bool:
    assert "/tmp" not in response.text
    assert "afnext-serve" not in response.text
    return (response.status_code, response.json()["error"]["code"]) == (status, code)


def works(service: Running) -> bool:
    """Whether the server answers, holds no bytes of earlier requests, and all its decoding workers are free."""
    server = service.server
    folder = Path(server.spool._folder.name)

    def tidy() -> bool:  # the response arrives before the request is tidied up
        nothing = not server.requests and not server.spool.bytes and not list(folder.iterdir())
        return nothing and server.pool.idle == server.settings.decode_workers

    return chat(service, spoken(SCENE.read_bytes())).status_code == 200 and eventually(tidy)


def exchange(service: Running, head: str, pieces: list[bytes], pause: float = 0.0) -> str:
    """Send a request by hand, piece by piece until there is an answer, and return its beginning; "" if there is none.

    pause: seconds that the client waits after each piece.
    """
    host, port = service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=100) as connection:
        try:
            connection.sendall(head.encode())
            for piece in pieces:
                connection.sendall(piece)
                if pause and select.select([connection], [], [], pause)[0]:
                    break
        except OSError:
            pass  # the server has answered and hung up
        received = b""
        with suppress(ConnectionError):
            while b"}}" not in received and (piece := connection.recv(1 << 16)):
                received += piece
    return received.decode()


HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize("sent", [b"", b'{"messages": ', b" " * 100_000])
def test_a_body_that_stalls_times_out(strict: Running, sent: bytes) -> None:
    """However much has come already: a fast beginning buys no patience."""
    answer = stalled(strict, lambda: exchange(strict, f"{HEAD}Content-Length: 1000000\r\n\r\n", [sent]))
    assert answer.startswith("HTTP/1.1 408")
    assert "upload_timeout" in answer
    assert "connection: close" in answer.lower()
    assert works(strict)


def test_a_body_that_drips_times_out(strict: Running) -> None:
    """A byte in a while, until the server answers."""
    answer = stalled(strict, lambda: exchange(strict, f"{HEAD}Content-Length: 100000\r\n\r\n", [b"{"] * 900, 0.1))
    assert answer.startswith("HTTP/1.1 408")


def test_a_chunked_body_beyond_the_limit_is_cut_off(strict: Running) -> None:
    chunk = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
    answer = exchange(strict, f"{HEAD}Transfer-Encoding: chunked\r\n\r\n", [chunk] * 6)
    assert answer.startswith("HTTP/1.1 413")
    assert "payload_too_large" in answer
    assert works(strict)


def test_ten_gigabytes_are_refused_before_they_come(strict: Running) -> None:
    answer = exchange(strict, f"{HEAD}Content-Length: {10 << 30}\r\n\r\n", [])
    assert answer.startswith("HTTP/1.1 413")


@pytest.mark.parametrize("pad", [0, 2 << 20])
@pytest.mark.parametrize(
    "body",
    [
        b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"a":' * 2000 + b"1" + b"}" * 2000,
        b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": NaN}',
        b"\x00\x01\x02",
        b'{"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}',
        b'{"messages": [{"role": "user", "content": [7, null]}]}',
        b'{"messages": [[]]}',
    ],
)
def test_bodies_that_are_no_requests_are_the_clients_fault(strict: Running, body: bytes, pad: int) -> None:
    """The same, short and so long that a worker takes it apart."""
    with strict.http() as client:
        response = client.post("/v1/chat/completions", content=body + b" " * pad)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("pad", ["", "x" * (2 << 20)])
@pytest.mark.parametrize("data", ["!!!!", "QUJD=QUJD", "data:audio/wav,QUJD", "A", "🎵", "QUJ\u0000"])
def test_damaged_base64_is_named(strict: Running, data: str, pad: str) -> None:
    part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    assert is_error(chat(strict, part, metadata={"pad": pad}), 400, "invalid_audio")


def test_fields_named_data_are_audio_only_where_audio_is_expected(tmp_path: Path) -> None:
    body = {"metadata": {"data": "no base64!"}, "input_audio": {"data": "QUJD"}, "more": {"file_data": "REVG"}}
    path = tmp_path / "request"
    path.write_text(json.dumps(body))
    (out := tmp_path / "out").mkdir()
    files = extract(str(path), str(out))["files"]
    assert [Path(file).read_bytes() for file in files] == [b"ABC", b"DEF"]
    assert json.loads((out / "body").read_text())["metadata"] == body["metadata"]


def test_a_body_of_many_recordings_is_refused(strict: Running) -> None:
    parts = [spoken(b"x")] * 100
    body = {**SMALL, "messages": [{"role": "user", "content": parts}], "metadata": {"pad": "x" * (2 << 20)}}
    with strict.http() as client:
        response = client.post("/v1/chat/completions", json=body)
    assert is_error(response, 400, "invalid_json")
    assert works(strict)


CONTAINERS = [
    *(("wav", "pcm_s16le"), ("wav", "pcm_f32le"), ("wav", "adpcm_ms"), ("w64", "pcm_s16le"), ("aiff", "pcm_s16be")),
    *(("au", "pcm_s16be"), ("caf", "pcm_s16le"), ("flac", "flac"), ("mp3", "mp3"), ("adts", "aac"), ("ogg", "flac")),
    *(("mpegts", "aac"), ("ogg", "libopus"), ("mp4", "aac"), ("mp4", "alac"), ("mov", "pcm_s16le")),
    *(("matroska", "flac"), ("webm", "libopus"), ("asf", "wmav2"), ("avi", "pcm_s16le"), ("mpegts", "mp2")),
]


def encode(container: str, codec: str, seconds: float = 2.0) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        rate = 44_100 if codec == "wmav2" else 48_000
        stream = output.add_stream(codec, rate=rate, layout="stereo", bit_rate=128_000)
        stream.codec_context.open()
        tone = (0.3 * np.sin(np.arange(round(seconds * rate)) * 0.06) * 32767).astype(np.int16)
        for start in range(0, len(tone), 1024):
            piece = np.repeat(tone[start : start + 1024], 2)[None]
            frame = av.AudioFrame.from_ndarray(piece, format="s16", layout="stereo")
            frame.sample_rate, frame.pts = rate, start
            for packet in stream.encode(frame):
                output.mux(packet)
        for packet in stream.encode(None):
            output.mux(packet)
    return file.getvalue()


@pytest.mark.parametrize(("container", "codec"), CONTAINERS)
def test_contents_decide_what_a_recording_is(strict: Running, container: str, codec: str) -> None:
    """Twenty containers, each under a wrong name, a wrong format and a wrong MIME type."""
    data = encode(container, codec)
    with strict.http() as client:
        files = {"file": ("notes.txt", data, "text/html")}
        stored = client.post("/v1/files", files=files).json()
        peaks = client.get(f"/v1/files/{stored['id']}/peaks", params={"n": 4})
    assert peaks.status_code == 200, peaks.text
    assert peaks.json()["seconds"] == pytest.approx(2.0, abs=0.1)
    assert stored["filename"] == "notes.txt"


@pytest.mark.parametrize(
    "data",
    [
        b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
        b"ffconcat version 1.0\nfile '/etc/hostname'\n",
        b"RIFF\xff\xff\xff\xffWAVEfmt \x10\x00\x00\x00",
        b"<html>not audio</html>",
        b"\x00" * 5000,
    ],
)
def test_what_is_no_recording_is_refused(strict: Running, data: bytes) -> None:
    assert is_error(chat(strict, spoken(data)), 400, "invalid_audio")
    with strict.http() as client:
        response = client.post("/v1/audio/transcriptions", files={"file": ("a.wav", data, "audio/wav")})
    assert is_error(response, 400, "invalid_audio")


def test_corrupt_files_are_heard_or_refused_as_by_the_library(strict: Running, shared_data: Path) -> None:
    for path in sorted((shared_data / "corrupt").iterdir()):
        try:
            seconds = afnext.load_audio(str(path)).duration
        except AudioError:
            seconds = None
        with strict.http() as client:
            stored = client.post("/v1/files", files={"file": (path.name, path.read_bytes())}).json()
            response = client.get(f"/v1/files/{stored['id']}/peaks")
        if seconds is None:
            assert is_error(response, 400, "invalid_audio"), path
        else:
            assert response.json()["seconds"] == pytest.approx(seconds), path
    assert works(strict)


def test_urls_are_fetched_from_allowed_hosts_only(strict: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fetcher has tests of its own; here are a request's ways to it and back."""
    part = {"type": "audio_url", "audio_url": {"url": "https://audio.example/a.flac"}}
    assert is_error(chat(strict, part), 400, "unsupported_value")

    async def fetch(self: Fetcher, parts: Any, path: Path, most: int, reserve: Any, param: str) -> None:
        reserve(SCENE.stat().st_size)
        path.write_bytes(SCENE.read_bytes())

    monkeypatch.setattr(Fetcher, "_fetch", fetch)
    monkeypatch.setattr(strict.server, "fetcher", Fetcher(["audio.example"]))
    answer = chat(strict, part, max_tokens=2000).json()["choices"][0]["message"]["content"]
    assert answer == strict.model.ask(str(SCENE), QUESTION).text
    for url in ("https://evil.example/a.flac", "http://audio.example/a.flac", "file:///etc/passwd", 3):
        refused = chat(strict, {"type": "audio_url", "audio_url": {"url": url}})
        assert is_error(refused, 400, "unsupported_value"), url
    assert works(strict)


def test_an_audio_bomb_kills_a_worker_only(strict: Running) -> None:
    """Silence packs well: some MB of it are 460 MB of samples."""
    bomb = encode_silence(hours=2)
    with strict.http() as client:
        response = client.post("/v1/audio/transcriptions", files={"file": ("a.flac", bomb)})
    assert is_error(response, 400, "invalid_audio"), response.text
    assert works(strict)


def encode_silence(hours: int, rate: int = 16_000) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="flac") as output:
        stream = output.add_stream("flac", rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 60 * rate), np.int16), format="s16", layout="mono")
        frame.rate = rate
        for _ in range(60 * hours):
            frame.pts = None
            for packet in stream.encode(frame):
                output.mux(packet)
        for packet in stream.encode(None):
            output.mux(packet)
    return file.getvalue()


def test_a_recording_that_takes_too_long_kills_a_worker_only(strict: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(strict.server.pool, "_seconds", 0.0)
        assert is_error(chat(strict, spoken(SCENE.read_bytes())), 400, "invalid_audio")
    assert works(strict)


def test_a_worker_knows_no_api_keys(strict: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFNEXT_API_KEYS", "top-secret")
    monkeypatch.setattr(strict.server.pool, "_seconds", 0.0)
    chat(strict, spoken(SCENE.read_bytes()))
    monkeypatch.undo()
    monkeypatch.setenv("AFNEXT_API_KEYS", "top-secret")
    assert works(strict)
    (worker,) = strict.server.pool._workers
    assert worker._process is not None
    assert b"top-secret" not in Path(f"/proc/{worker._process.pid}/environ").read_bytes()


def part(head: bytes, content: bytes = b"x") -> bytes:
    return b"--x\r\n" + head + b"\r\n\r\n" + content + b"\r\n"


FIELD = b'Content-Disposition: form-data; name="a"'
FORMS = {
    "no boundary": ("multipart/form-data", part(FIELD) + b"--x--\r\n"),
    "long boundary": ("multipart/form-data; boundary=" + "x" * 300, b""),
    "no parts": ("multipart/form-data; boundary=x", b"nothing"),
    "no end": ("multipart/form-data; boundary=x", part(FIELD)),
    "no name": ("multipart/form-data; boundary=x", part(b"Content-Disposition: form-data")),
    "no disposition": ("multipart/form-data; boundary=x", part(b"Content-Type: text/plain")),
    "no colon": ("multipart/form-data; boundary=x", part(b"what")),
    "endless field": ("multipart/form-data; boundary=x", b"--x\r\nX-A: " + b"a" * (2 << 20)),
    "many fields": ("multipart/form-data; boundary=x", part(b"\r\n".join([FIELD, *[b"X-A: b"] * 100]))),
    "many parts": ("multipart/form-data; boundary=x", part(FIELD) * 65 + b"--x--\r\n"),
    "many files": ("multipart/form-data; boundary=x", part(FIELD + b'; filename="f"') * 18 + b"--x--\r\n"),
    "large field": ("multipart/form-data; boundary=x", part(FIELD, b"y" * (2 << 20)) + b"--x--\r\n"),
    **{
        f"charset {charset}": (
            f"multipart/form-data; boundary=x; charset={charset}",
            part(FIELD, b"\xff") + b"--x--\r\n",
        )
        for charset in ("rot13", "zlib", "undefined", "idna", "utf-16", "no such")
    },
}


@pytest.mark.parametrize(("kind", "body"), FORMS.values(), ids=list(FORMS))
def test_malformed_forms_are_the_clients_fault(strict: Running, kind: str, body: bytes) -> None:
    with strict.http() as client:
        for path in ("/v1/files", "/v1/contexts", "/v1/audio/transcriptions"):
            response = client.post(path, content=body, headers={"Content-Type": kind})
            assert response.status_code in (400, 415), (path, response.text)
            assert response.json()["error"]["type"] == "invalid_request_error"


NAMES = [
    "../../etc/passwd",
    "a\x7fb\x01.wav",
    "x" * 4000,
    "C:\\temp\\a.wav",
    "ünïcode 🎵.wav",
    "",
    '"; x="',
    "%0d%0aX-Evil: 1",
]


@pytest.mark.parametrize("name", NAMES)
def test_file_names_are_names_only(strict: Running, name: str) -> None:
    with strict.http() as client:
        response = client.post("/v1/files", files={"file": (name or "blank", SCENE.read_bytes())})
        stored = response.json()
        content = client.get(f"/v1/files/{stored['id']}/content")
    assert "/" not in stored["filename"]
    assert "\\" not in stored["filename"]
    assert stored["filename"].isprintable()
    assert 0 < len(stored["filename"]) <= 100
    assert "x-evil" not in response.headers
    assert content.content == SCENE.read_bytes()


def test_names_of_form_fields_inject_no_header(strict: Running) -> None:
    fields = "".join(
        f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n1\r\n'
        for name in ("a\x00b", "tab\there", "y" * 3000, "fine")
    )
    audio = SCENE.read_bytes()
    end = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + audio + b"\r\n--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x", "x-request-id": "mine"}
    with strict.http() as client:
        response = client.post("/v1/audio/transcriptions", content=fields.encode() + end, headers=headers)
    assert response.status_code == 200, response.text
    assert set(response.headers["x-afnext-ignored"].split(", ")) == {"?", "fine"}
    assert response.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    "options",
    [
        *({"temperature": value} for value in (-1, 1e400, 1e308, 5)),
        *({"top_p": value} for value in (-1, 0, 7)),
        *({"seed": value} for value in (-1, 2**63, 2**70)),
        *({"max_tokens": value} for value in (-1, 0, 2**40, 2**70)),
        *({"stop": value} for value in ([""], "", ["x"] * 17, ["y" * 100_000])),
        *({"top_k": value} for value in (-5, 2**40)),
        *({"min_p": value} for value in (-1, 2)),
        *({"repetition_penalty": value} for value in (0, -1, 1e300)),
        *({"priority": value} for value in (2**70, -(2**70))),
        *({"deadline": value} for value in (-1, 0, 1e300)),
        *({"context": value} for value in ("ctx_x", "../..", "\x00")),
    ],
    ids=lambda options: f"{options!r:.30}",
)
def test_no_option_breaks_the_server(strict: Running, options: dict[str, Any]) -> None:
    content = json.dumps({**SMALL, "messages": [{"role": "user", "content": "hi"}], **options})
    with strict.http() as client:
        response = client.post("/v1/chat/completions", content=content)
    assert response.status_code in (200, 400, 404), response.text


@pytest.mark.parametrize("field", ["temperature", "window", "overlap", "seed"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999", "x", "-1", "9" * 5000, "0x10"])
def test_no_form_field_breaks_the_server(strict: Running, field: str, value: str) -> None:
    with strict.http() as client:
        files = {"file": ("a.flac", SCENE.read_bytes())}
        response = client.post("/v1/audio/transcriptions", files=files, data={field: value})
    assert response.status_code == 400 or (field == "seed" and value == "-1"), response.text


@pytest.mark.parametrize("path", ["/v1/files/x/peaks?n=" + "9" * 5000, "/v1/files/%00", "/v1/contexts/..%2f..", "/%ff"])
def test_no_path_breaks_the_server(strict: Running, path: str) -> None:
    with strict.http() as client:
        assert client.get(path).status_code in (400, 404)


@pytest.mark.parametrize("origin", ["http://[", "http://[::1", "https://", "\xff"])
def test_no_origin_breaks_the_server(strict: Running, origin: str) -> None:
    with strict.http() as client:
        response = client.get("/v1/models", headers={"Origin": origin.encode("latin-1")})
    assert is_error(response, 403, "forbidden_origin")


def test_an_empty_key_is_no_key() -> None:
    for variable in ("name:", "a,name: "):
        with pytest.raises(AfnextError, match="empty"):
            read_keys(None, variable)


def test_random_bytes_never_end_the_server(strict: Running) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    for _ in range(20):
        junk = chance.randbytes(chance.randrange(1, 3000))
        host, port = strict.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=100) as connection:
            connection.sendall(junk)
    assert works(strict)
