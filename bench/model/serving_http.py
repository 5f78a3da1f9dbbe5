"""The server under load on the loopback interface: beside the same model without HTTP, during uploads, and overloaded.

Three kinds of records:

- "load": each client asks questions in turn about recordings of different lengths and reads the stream of the answer.
  Tokens per second of all clients together, time to the first token and between the pieces of an answer. If the
  benchmark starts the server itself, the same questions and files also go to `AsyncModel`, in alternating order:
  `over_direct` is the time per answer over HTTP, divided by that of the model alone, and `same_answers` the share of
  equal answers.
- "uploads": the delay of a timer in the server's event loop, and the response time of `/health`, while some clients
  upload files and others ask.
- "overload": the time until a request beyond the server's limit is refused, while the server is at the limit.

A run takes a limited time: what would not end in time is left out, and each record is written as soon as it is there.
"""

import asyncio
import itertools
import json
import math
import re
import secrets
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ...kernels.errors import AfnextError
from ...quant.recipe import recipe
from ...runtime.app.api import load as load_model
from ...runtime.app.async_model import AsyncModel
from ..core.machine import machine
from ..core.random_checkpoint import write_random_checkpoint
from ..core.record import SCHEMES, Record, append, recipe_of
from .http_clients import LENGTHS, NEW_TOKENS, Ask, Http, Load, Question, direct, load, quantiles

_UPLOADERS, _ASKING, _UPLOAD_BYTES = 4, 8, 32 << 20
_PROBE_SECONDS = 0.02  # between two probes
_EXTRA = 4  # clients beyond the server's limit, so that it stays reached
_URL = re.compile(r"http://127\.0\.0\.1:\d+")
_WARM_UP = 4  # questions, one about each length of recording
_TRIAL = 8  # questions at least, to see how many are answered in a second
_OTHERS_SECONDS = 10.0  # of uploads, and of overload
_USUAL_LIMIT = 128  # requests that a server admits
Say = Callable[[str], None]


@dataclass
class _Budget:
    """The time that a run may take. say: called with a line about each part; rate: questions per second so far."""

    seconds: float
    say: Say
    rate: float = math.inf
    _start: float = field(default_factory=time.perf_counter)

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.seconds - (time.perf_counter() - self._start)

    async def spend(self, what: str, needed: float, work: Callable[[], Awaitable[None]], *, reserve: float = 0) -> None:
        """Do `work`, which takes about `needed` seconds, unless less than that and `reserve` is left."""
        if needed + reserve > self.left:
            self.say(f"{what}: left out, it would take about {needed:.0f} s; see --minutes")
            return
        self.say(f"{what}: about {needed:.0f} s")
        try:
            await asyncio.wait_for(work(), max(0.1, self.left))
        except asyncio.TimeoutError:
            self.say(f"{what}: stopped, the time is over; see --minutes")


@dataclass(frozen=True)
class _Subject:
    """The served model. label: its name in the records; dtype: as in `load`."""

    model: str
    label: str
    dtype: str = "auto"


def run_http(
    out: Path,
    *,
    url: str | None,
    model: str,
    clients: Iterable[int],
    seconds: float,
    api_key: str = "",
    random: str | None = None,
    scheme: str = "bf16",
    minutes: float = 8.0,
    say: Say = lambda line: None,
) -> list[Record]:
    """Load the server at `url`, or one started here, with each number of clients for `seconds`; append to `out`.

    With a server started here, the same questions also go to the model directly, for as long. Uploads and overload
    follow, for at most ten seconds each. random: serve random weights of that shape (see `random_checkpoint.py`), in a
    scheme of `record.SCHEMES`, instead of `model`. minutes: of the whole run; parts that would not end in time are left
    out. say: called with a line about each part. Raises AfnextError without an answer, and for `random` with `url`.
    """
    budget = _Budget(60 * minutes, say)
    if random is None:
        return asyncio.run(_run(out, url, _Subject(model, model), list(clients), seconds, api_key, budget))
    if url is not None:
        raise AfnextError("random weights are served by a server of the bench's own; leave out --random or --url")
    recipe_name = recipe_of(scheme)
    say(f"writing random weights: {random} {scheme}")
    with tempfile.TemporaryDirectory(prefix="afnext-bench-") as folder:
        write_random_checkpoint(Path(folder), random, quant=recipe(recipe_name) if recipe_name else None)
        subject = _Subject(folder, f"{random} {scheme}", SCHEMES[scheme])
        return asyncio.run(_run(out, None, subject, list(clients), seconds, api_key, budget))


async def _run(
    out: Path, url: str | None, subject: _Subject, clients: list[int], seconds: float, api_key: str, budget: _Budget
) -> list[Record]:
    records: list[Record] = []
    where, questions = machine(), map(Question, itertools.count())
    short = min(_OTHERS_SECONDS, seconds)

    def note(name: str, side: str, case: dict[str, Any], values: dict[str, Any]) -> None:
        record = Record("http", name, f"{side} {subject.label}", case, values, machine=where)
        append(out, record)
        records.append(record)
        figures = (f"{name} {value:.4g}" for name, value in values.items() if isinstance(value, float))
        budget.say(f"  {record.subject}: {', '.join(figures)}")

    async def measured(http: Http, alone: AsyncModel | None, count: int) -> None:
        case = {"clients": count, "audio_s": list(LENGTHS), "new_tokens": NEW_TOKENS}
        if alone is None:
            asked = _prepared(questions, await _count(http.ask, count, questions, seconds))
            served = await load(http.ask, count, asked)
            note("load", "HTTP", case, served.values())
        else:
            beside, served = await _compared(alone, http, count, questions, seconds)
            note("load", "direct", case, beside.values())
            note("load", "HTTP", case, {**served.values(), **beside_direct(served, beside)})
        budget.rate = max(len(served.answers), 1) / served.seconds

    async def loads(http: Http, alone: AsyncModel | None) -> None:
        sides = 1 if alone is None else 2
        for count in clients:
            least = 2 * sides * count / budget.rate
            needed = max(sides * seconds, least) + (_TRIAL + _WARM_UP + count) / budget.rate
            reserve = 2 * short + (_ASKING + _USUAL_LIMIT) / budget.rate
            await budget.spend(f"load, clients {count}", needed, partial(measured, http, alone, count), reserve=reserve)

    async def uploads(http: Http) -> None:
        case = {"uploads": _UPLOADERS, "upload_bytes": _UPLOAD_BYTES, "clients": _ASKING}
        note("uploads", "HTTP", case, await _uploads(http, questions, short))

    async def overload(http: Http, count: int) -> None:
        note("overload", "HTTP", {"clients": count}, await _overload(http, count, questions, short))

    async def others(http: Http) -> None:
        await budget.spend("uploads", short + _ASKING / budget.rate, partial(uploads, http))
        count = await _limit(http) + _EXTRA
        await budget.spend("overload", short + count / budget.rate, partial(overload, http, count))

    if url is not None:
        http = Http(url, api_key)
        await loads(http, None)
        await others(http)
        return records
    budget.say(f"loading {subject.label} and starting its server")
    alone = AsyncModel(await asyncio.to_thread(load_model, subject.model, dtype=subject.dtype))
    async with _own_server(subject) as http:
        await loads(http, alone)
        await alone.close()
        await others(http)
    return records


def beside_direct(served: Load, alone: Load) -> dict[str, float]:
    """Time per answer over that of the model alone, and the share of the server's answers that equal the model's. The
    server refuses questions if there are too many clients."""
    if not served.answers:
        return {}
    same = sum(alone.answers[number] == text for number, text in served.answers.items())
    return {
        "over_direct": served.seconds / len(served.answers) / (alone.seconds / len(alone.answers)),
        "same_answers": same / len(served.answers),
    }


async def _compared(
    model: AsyncModel, http: Http, clients: int, questions: Iterator[Question], seconds: float
) -> tuple[Load, Load]:
    """The same questions to the model and to the server, for about `seconds` each.

    They take turns, and each begins once, so that other load on the machine affects both alike.
    """
    sides = ((direct(model), Load()), (http.ask, Load()))
    await load(http.ask, clients, _prepared(questions, _WARM_UP))
    count = await _count(direct(model), clients, questions, seconds / 2)
    for order in (sides, sides[::-1]):
        asked = _prepared(questions, count)
        for ask, result in order:
            result.add(await load(ask, clients, asked))
    return sides[0][1], sides[1][1]


async def _count(ask: Ask, clients: int, questions: Iterator[Question], seconds: float) -> int:
    """Number of questions that clients can ask in `seconds`, at least one each, measured after a warm-up."""
    await load(ask, clients, _prepared(questions, _WARM_UP))
    trial = _prepared(questions, max(clients, _TRIAL))
    result = await load(ask, clients, trial)
    return clients * max(1, round(seconds / result.seconds * len(trial) / clients))


def _prepared(questions: Iterator[Question], count: int) -> list[Question]:
    """Questions with their bodies already made."""
    asked = list(itertools.islice(questions, count))
    for question in asked:
        _ = question.body
    return asked


async def _uploads(http: Http, questions: Iterator[Question], seconds: float) -> dict[str, Any]:
    """The server's event loop and its /health while some clients upload files and others ask."""
    asked = itertools.cycle(_prepared(questions, 8 * _ASKING))
    content, uploaded, before = secrets.token_bytes(_UPLOAD_BYTES), 0, await _lag(http)
    start = time.perf_counter()

    async def upload() -> None:
        nonlocal uploaded
        while True:
            await http.store(content)
            uploaded += len(content)
            if time.perf_counter() >= start + seconds:
                return

    async with _probing(http, "GET", "/health") as health:
        asking = asyncio.create_task(load(http.ask, _ASKING, asked, seconds))
        await asyncio.gather(asking, *(upload() for _ in range(_UPLOADERS)))
    late, result = _since(before, await _lag(http)), asking.result()
    return {
        **{f"loop_lag_p{percent}_at_most_s": _quantile(late, percent / 100) for percent in (50, 95, 99)},
        **quantiles("health", [took for _, took in health]),
        "uploaded_bytes_per_s": uploaded / (time.perf_counter() - start),
        "tokens_per_s": result.tokens / result.seconds,
    }


async def _overload(http: Http, clients: int, questions: Iterator[Question], seconds: float) -> dict[str, Any]:
    """The time until one more request is refused while the server is at its limit."""
    asked = _prepared(questions, 2 * clients)
    async with _probing(http, "POST", "/v1/chat/completions", asked[0].body) as probes:
        result = await load(http.ask, clients, itertools.cycle(asked), seconds)
    refusals = [took for status, took in probes if status == 429]
    numbers = {"refused": result.refused + len(refusals), "answered": len(result.answers)}
    return {**quantiles("refusal", refusals), **numbers}


@asynccontextmanager
async def _probing(http: Http, method: str, path: str, body: bytes = b"") -> AsyncIterator[list[tuple[int, float]]]:
    """Send a request repeatedly for the length of the block; collects statuses and times."""
    probes: list[tuple[int, float]] = []

    async def probe() -> None:
        while True:
            probes.append(await asyncio.to_thread(http.probe, method, path, body))
            await asyncio.sleep(_PROBE_SECONDS)

    probing = asyncio.create_task(probe())
    try:
        yield probes
    finally:
        probing.cancel()
        await asyncio.gather(probing, return_exceptions=True)


async def _limit(http: Http) -> int:
    """Requests that the server admits at once."""
    status = json.loads(await http.get("/v1/status"))
    most: int | None = status["settings"]["max_requests"]
    return most or 4 * int(status["engine"]["max_batch"])


@asynccontextmanager
async def _own_server(subject: _Subject) -> AsyncIterator[Http]:
    """A server in a separate process, which ends with the block."""
    arguments = ("-m", "afnext", "serve", "--model", subject.model, "--dtype", subject.dtype, "--port", "0")
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stderr=asyncio.subprocess.PIPE)
    assert process.stderr is not None
    lines = []
    async for line in process.stderr:
        lines.append(line.decode())
        if line == b"ready\n":
            break
    else:
        raise AfnextError(f"the server ended while it started: {''.join(lines)}")
    url = next(filter(None, map(_URL.search, lines)))[0]
    draining = asyncio.create_task(process.stderr.read())  # its log
    try:
        yield Http(url)
    finally:
        process.terminate()
        await draining
        await process.wait()


async def _lag(http: Http) -> dict[float, float]:
    """Counts of the server's loop delays up to each bound in seconds, since the server started."""
    text = (await http.get("/metrics")).decode()
    found = re.findall(r'^afnext_event_loop_lag_seconds_bucket{le="(.*)"} (.*)$', text, re.MULTILINE)
    return {float(bound): float(count) for bound, count in found}


def _since(before: dict[float, float], after: dict[float, float]) -> dict[float, float]:
    return {bound: count - before[bound] for bound, count in after.items()}


def _quantile(counts: dict[float, float], part: float) -> float | None:
    """The smallest bound for at least that share of the times; None without times, or beyond the last bound."""
    total = max(counts.values(), default=0.0)
    found = (bound for bound, count in sorted(counts.items()) if count >= part * total > 0)
    bound = next(found, math.inf)
    return bound if math.isfinite(bound) else None
