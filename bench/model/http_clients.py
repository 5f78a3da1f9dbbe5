"""Clients that load a server over HTTP, or the same model directly, and their measurements."""

import asyncio
import base64
import io
import itertools
import json
import secrets
import time
import wave
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from ...kernels.audio_format import SAMPLE_RATE
from ...kernels.errors import AfnextError
from ...runtime.app.async_model import AsyncModel

LENGTHS = (1.0, 3.0, 6.0, 12.0)  # seconds of the mixed recordings
NEW_TOKENS = 32
_REFUSED_SECONDS = 0.2  # a refused client's pause
_PIECE = 64 << 10

Ask = Callable[["Question", "Load"], Awaitable[None]]


@dataclass(frozen=True)
class Question:
    """A question about noise that is unique to it, so that no cache has it."""

    number: int

    @property
    def text(self) -> str:
        """The text of the question."""
        return f"Describe recording {self.number}."

    @cached_property
    def samples(self) -> np.ndarray:
        """The recording: int16 [n] at `SAMPLE_RATE`."""
        length = round(LENGTHS[self.number % len(LENGTHS)] * SAMPLE_RATE)
        noise = np.random.default_rng(self.number).standard_normal(length)
        return (noise * 1500).clip(-32768, 32767).astype("<i2")

    @cached_property
    def file(self) -> bytes:
        """The recording as a WAV file."""
        file = io.BytesIO()
        with wave.open(file, "wb") as wav:
            wav.setnchannels(1)
            wav.setsampwidth(2)
            wav.setframerate(SAMPLE_RATE)
            wav.writeframes(self.samples.tobytes())
        return file.getvalue()

    @cached_property
    def body(self) -> bytes:
        """The question as a request body, made in advance so that this time is not measured."""
        data = base64.b64encode(self.file).decode()
        parts = [
            {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}},
            {"type": "text", "text": self.text},
        ]
        body = {"messages": [{"role": "user", "content": parts}], "stream": True, "max_tokens": NEW_TOKENS}
        body |= {"stream_options": {"include_usage": True}, "temperature": 1.0, "seed": self.number}
        return json.dumps(body).encode()


@dataclass
class Load:
    """The measurements of the clients of one run. Times in seconds.

    first: to the first piece of an answer; between: its pieces; tokens: of all answers; answers: texts by number of
    the question; refused: requests; seconds: the whole run.
    """

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    tokens: int = 0
    answers: dict[int, str] = field(default_factory=dict)
    refused: int = 0
    seconds: float = 0.0

    def received(self, question: Question, text: str, tokens: int, start: float, times: list[float]) -> None:
        """Count an answer whose pieces came at `times`."""
        self.answers[question.number] = text
        self.tokens += tokens
        if times:
            self.first.append(times[0] - start)
            self.between += [later - earlier for earlier, later in itertools.pairwise(times)]

    def add(self, other: "Load") -> None:
        """Count another run of the same clients, too."""
        self.first += other.first
        self.between += other.between
        self.tokens += other.tokens
        self.answers |= other.answers
        self.refused += other.refused
        self.seconds += other.seconds

    def values(self) -> dict[str, Any]:
        """The figures of a record."""
        return {
            "tokens_per_s": self.tokens / self.seconds,
            "requests": len(self.answers),
            "refused": self.refused,
            **quantiles("first_token", self.first),
            **quantiles("inter_token", self.between),
        }


def quantiles(name: str, seconds: list[float]) -> dict[str, float | None]:
    """The median, 95th and 99th percentile of times, None without any."""
    percents = (50, 95, 99)
    return {f"{name}_p{p}_s": float(np.percentile(seconds, p)) if seconds else None for p in percents}


async def load(ask: Ask, clients: int, questions: Iterable[Question], seconds: float | None = None) -> Load:
    """Let clients ask questions in turn and finish the last.

    seconds: no question is begun after this time, but each client asks at least one; None to ask all `questions`.
    """
    result, start, left = Load(), time.perf_counter(), iter(questions)

    async def client() -> None:
        for question in left:
            await ask(question, result)
            if seconds is not None and time.perf_counter() - start >= seconds:
                return

    await asyncio.gather(*(client() for _ in range(clients)))
    result.seconds = time.perf_counter() - start
    return result


def direct(model: AsyncModel) -> Ask:
    """Asks a model in this process, which decodes the same files as the server."""

    async def ask(question: Question, load: Load) -> None:
        file = question.file
        start, times, text = time.perf_counter(), [], ""
        options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "temperature": 1.0, "seed": question.number}
        stream = model.stream(file, question.text, **options)
        async for piece in stream:
            times.append(time.perf_counter())
            text += piece
        answer = await stream.finish()
        load.received(question, text, answer.usage.new_tokens, start, times)

    return ask


class Http:
    """A server at `http://HOST:PORT`. Raises AfnextError for another URL."""

    def __init__(self, url: str, api_key: str = ""):
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise AfnextError(f"the bench loads servers at http://HOST:PORT, not {url}")
        self._url, self._host, self._port = url, parts.hostname, parts.port or 80
        self._fields = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    @asynccontextmanager
    async def sent(
        self, method: str, path: str, body: bytes = b"", kind: str = "application/json"
    ) -> AsyncIterator[tuple[int, asyncio.StreamReader]]:
        """The status of the response to a request, and the rest of it. Raises AfnextError without a response."""
        try:
            reader, writer = await asyncio.open_connection(self._host, self._port)
        except OSError as error:
            raise AfnextError(f"no server answers at {self._url} ({error}); start one with `afnext serve`") from None
        try:
            fields = {"Host": f"{self._host}:{self._port}", "Connection": "close", **self._fields}
            fields |= {"Content-Type": kind, "Content-Length": str(len(body))}
            lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
            writer.write(f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode())
            with suppress(ConnectionError):  # it has responded already
                for start in range(0, len(body), _PIECE):
                    writer.write(body[start : start + _PIECE])
                    await writer.drain()
            line = (await reader.readline()).split()
            if len(line) < 2:
                raise AfnextError(f"the server at {self._url} hung up without an answer; see its log")
            yield int(line[1]), reader
        finally:
            writer.close()

    def probe(self, method: str, path: str, body: bytes = b"") -> tuple[int, float]:
        """The status of the response to a request, and the seconds that it took. Blocks: call it in a separate thread,
        so that other clients of this process do not delay it. Raises OSError without a response."""
        start = time.perf_counter()
        connection = HTTPConnection(self._host, self._port, timeout=60)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json", **self._fields})
            return connection.getresponse().status, time.perf_counter() - start
        finally:
            connection.close()

    async def get(self, path: str) -> bytes:
        """The body of a response. Raises AfnextError for an error."""
        return await self._body("GET", path)

    async def store(self, content: bytes) -> None:
        """Upload a file, and delete it."""
        edge = secrets.token_hex(8)
        head = f'--{edge}\r\nContent-Disposition: form-data; name="file"; filename="noise"\r\n\r\n'
        body = head.encode() + content + f"\r\n--{edge}--\r\n".encode()
        stored = json.loads(await self._body("POST", "/v1/files", body, f"multipart/form-data; boundary={edge}"))
        await self._body("DELETE", f"/v1/files/{stored['id']}")

    async def ask(self, question: Question, load: Load) -> None:
        """Ask, and read the stream of the answer."""
        body = question.body
        start, times, lines = time.perf_counter(), [], []
        async with self.sent("POST", "/v1/chat/completions", body) as (status, reader):
            if status == 429:
                load.refused += 1
                await asyncio.sleep(_REFUSED_SECONDS)
                return
            async for line in reader:
                if b'"delta":{"content":' in line or b'"delta":{"reasoning_content":' in line:
                    times.append(time.perf_counter())
                if line.startswith(b"data: {"):
                    lines.append(line)
        if status != 200 or not lines:
            raise AfnextError(f"the server at {self._url} answered with status {status}; see its log")
        chunks = [json.loads(line[6:]) for line in lines]
        if "usage" not in chunks[-1]:
            raise AfnextError(f"the server at {self._url} broke an answer off: {chunks[-1].get('error')}")
        deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
        text = "".join(delta.get("reasoning_content") or delta.get("content") or "" for delta in deltas)
        load.received(question, text, chunks[-1]["usage"]["completion_tokens"], start, times)

    async def _body(self, method: str, path: str, body: bytes = b"", kind: str = "application/json") -> bytes:
        async with self.sent(method, path, body, kind) as (status, reader):
            _, _, content = (await reader.read()).partition(b"\r\n\r\n")
        if status != 200:
            raise AfnextError(f"the server at {self._url} answered {method} {path} with status {status}; see its log")
        return content
