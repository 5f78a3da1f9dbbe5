"""Batches: one task for each of many recordings; a run resumes where a killed one stopped.

Each item has an id that changes with its file, the model and the options. Items with a row on disk (`batch_rows`) are
done; the runner processes the others and writes a row for each item, whether it succeeds or fails.
"""

import asyncio
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ..engine.sampler import SamplingParams
from ..errors import EngineDeadError, OutputError
from ..io.audio import AudioSource
from ..model.hub import full_name
from .answer import Answer, Usage
from .api import Model, question_messages
from .async_model import AsyncModel
from .batch_rows import FAILED, OK, Row, Rows
from .conversation import Message
from .generation_config import stop_strings
from .prompts import Prompts
from .responder import AnswerOptions
from .transcribe import DEFAULT_OVERLAP, DEFAULT_WINDOW, Transcript, spans

T = TypeVar("T")
DEFAULT_JOBS = 8
AHEAD = 2  # recordings that are decoded ahead while all jobs are busy
_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja")
_log = logging.getLogger("afnext")


@dataclass(frozen=True)
class Outcome:
    """The result of an item: the fields of its row besides id, path and status."""

    fields: Mapping[str, Any]
    usage: Usage
    timings: Mapping[str, float]


class Work(Protocol):
    """The task to do for an item."""

    def check(self, model: Model) -> None:
        """Raise AfnextError if the model cannot do it for any recording."""

    async def run(self, session: "Session", item: "Item") -> Outcome:
        """Do it. Raises AfnextError."""


@dataclass(frozen=True)
class Item:
    """A future row: `id` identifies its row on disk, `head` has the fields by which users find it."""

    id: str
    head: Mapping[str, Any]
    work: Work

    @property
    def name(self) -> str:
        """Its name in messages."""
        return str(next(iter(self.head.values())))


@dataclass(frozen=True)
class Session:
    """The state of a run. slots: one is held while the engine works on an item; meanwhile the next ones are decoded."""

    model: AsyncModel
    slots: asyncio.Semaphore
    threads: ThreadPoolExecutor
    stopped: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def of(cls, model: Model, jobs: int) -> "Session":
        """For a model whose engine works on `jobs` items at once."""
        threads = ThreadPoolExecutor(jobs + AHEAD, thread_name_prefix="afnext-batch")
        return cls(AsyncModel(model), asyncio.Semaphore(jobs), threads)

    async def answer(self, messages: Sequence[Message], options: AnswerOptions) -> Answer:
        """The answer to a conversation."""
        async with self.model.stream_chat(messages, **options) as stream:
            await stream.ready()
            async with self.slots:
                return await stream.finish()

    async def transcript(self, audio: AudioSource, **options: Any) -> tuple[Transcript, float]:
        """The transcript of a recording, and the seconds it took."""
        start = time.perf_counter()
        transcribe = partial(self.model.model.stream_transcribe, audio, **options, cancelled=self.stopped.is_set)
        stream = await self._in_thread(transcribe)
        async with self.slots:
            transcript = await self._in_thread(stream.finish)
        return transcript, time.perf_counter() - start

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.threads, call)


@dataclass(frozen=True)
class Question:
    """The same question about each recording: `text`, or the prompt of a task."""

    text: str | None = None
    task: str | None = None
    to: str | None = None
    source: str | None = None
    system: str | None = None
    options: AnswerOptions = field(default_factory=lambda: AnswerOptions())

    def check(self, model: Model) -> None:
        """See `Work`."""
        self._question(model.prompts)
        check_sampling(self.options)

    async def run(self, session: Session, item: Item) -> Outcome:
        """See `Work`."""
        question = self._question(session.model.model.prompts)
        answer = await session.answer(question_messages(item.head["path"], question, self.system), self.options)
        result = answer.to_dict()
        for name in ("usage", "timings", "token_ids"):
            del result[name]
        return Outcome({"result": result}, answer.usage, answer.timings.to_dict())

    def _question(self, prompts: Prompts) -> str:
        return self.text if self.text is not None else prompts.get(self.task or "", to=self.to, source=self.source)


@dataclass(frozen=True)
class Transcription:
    """A transcript of each recording; the fields are the options of `Model.transcribe`."""

    window: float | None = None
    overlap: float = DEFAULT_OVERLAP
    timestamps: bool | None = None
    speakers: bool | None = None
    prompt: str | None = None
    system: str | None = None
    options: AnswerOptions = field(default_factory=lambda: AnswerOptions())

    def check(self, model: Model) -> None:
        """See `Work`."""
        if self.prompt is None:
            model.prompts.transcript(timestamps=self.timestamps, speakers=self.speakers)
        spans(0.0, DEFAULT_WINDOW if self.window is None else self.window, self.overlap)
        check_sampling(self.options)

    async def run(self, session: Session, item: Item) -> Outcome:
        """See `Work`."""
        values = {name: value for name, value in vars(self).items() if name != "options"}
        transcript, seconds = await session.transcript(item.head["path"], **values, **self.options)
        result = {"text": transcript.text, **transcript.to_dict()}
        for window in result["windows"]:
            del window["usage"]
        return Outcome({"result": result}, transcript.usage, {"total": seconds})


def check_sampling(options: AnswerOptions) -> None:
    """Raise SamplingError for invalid sampling options."""
    known = SamplingParams.__dataclass_fields__
    given: dict[str, Any] = {name: value for name, value in options.items() if name in known}
    SamplingParams(**{"max_new_tokens": 1, **given})
    if "stop" in options:
        stop_strings("stop", options["stop"])


def plan_files(paths: Iterable[str], work: Question | Transcription, model: Mapping[str, Any]) -> list[Item]:
    """An item for each path, in order; duplicates are left out.

    model: from `model_identity`.
    """
    return unique(
        Item(
            item_id(file=file_state(path), work=[type(work).__name__, asdict(work)], model=model), {"path": path}, work
        )
        for path in paths
    )


def unique(items: Iterable[Item]) -> list[Item]:
    """The items without duplicate ids."""
    first: dict[str, Item] = {}
    for item in items:
        first.setdefault(item.id, item)
    return list(first.values())


def item_id(**values: Any) -> str:
    """A hash of plain values: 32 hexadecimal digits, equal for equal values."""
    text = json.dumps(values, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def file_state(path: str) -> dict[str, Any]:
    """Values that change with a file: its absolute path, size in bytes and modification time in ns."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # the run will report the error
        return {"path": os.path.abspath(path), "size": None, "mtime": None}
    return {"path": os.path.abspath(path), "size": status.st_size, "mtime": status.st_mtime_ns}


def model_identity(model: str, **options: Any) -> dict[str, Any]:
    """Values that a model's answers depend on: its name or, for a folder, its files; and options of `load`."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return {"name": full_name(model), **options}
    files = sorted({path for pattern in _MODEL_FILES for path in folder.glob(pattern)})
    return {"name": os.path.abspath(folder), "files": [file_state(str(path)) for path in files], **options}


@dataclass
class Summary:
    """The result of a run. done, failed: items of this run; skipped: done before; failed_before: failed before and not
    retried. seconds: of the run; audio_seconds: of the audio processed."""

    items: int = 0
    done: int = 0
    failed: int = 0
    skipped: int = 0
    failed_before: int = 0
    seconds: float = 0.0
    audio_seconds: float = 0.0


def pending(items: Sequence[Item], rows: Rows, *, retry: bool = False) -> list[Item]:
    """The items without a row. retry: also those that failed, whose rows are removed."""
    if retry:
        rows.forget({item.id for item in items if rows.statuses.get(item.id) == FAILED})
    return [item for item in items if item.id not in rows.statuses]


@dataclass(frozen=True)
class Runner:
    """Computes rows. at_once: number of items to pass at a time. row: returns the row of an item, failed or not.

    row raises EngineDeadError and OutputError, which end the run.
    """

    at_once: int
    row: Callable[[Item], Awaitable[Row]]


RunnerContext = AbstractAsyncContextManager[Runner]
"""A context manager that provides a runner."""


@asynccontextmanager
async def local_runner(model: Model, jobs: int = DEFAULT_JOBS) -> AsyncIterator[Runner]:
    """Runs a model in this process. jobs: items that its engine processes at once."""
    session = Session.of(model, jobs)
    with session.threads:
        try:
            yield Runner(jobs + AHEAD, partial(item_row, session))
        finally:
            session.stopped.set()


def run_batch(
    runner: RunnerContext,
    items: Sequence[Item],
    rows: Rows,
    on_row: Callable[[Item, Row], None] = lambda item, row: None,
) -> Summary:
    """Process items, and write a row for each as it ends.

    on_row: called after each row is written. A failed item gets a row, too. Raises EngineDeadError and OutputError,
    which end the run.
    """
    summary = Summary(len(items))
    start = time.perf_counter()

    def write(item: Item, row: Row) -> None:
        rows.append(row)
        if row["status"] == OK:
            summary.done += 1
            summary.audio_seconds += row["usage"]["audio_seconds"]
        else:
            summary.failed += 1
        on_row(item, row)

    try:
        asyncio.run(_run(runner, items, write))
    finally:
        summary.seconds = time.perf_counter() - start
    return summary


async def _run(runner: RunnerContext, items: Sequence[Item], write: Callable[[Item, Row], None]) -> None:
    async with runner as running:
        left = iter(items)
        workers = [asyncio.create_task(_work(running, left, write)) for _ in range(min(running.at_once, len(items)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)


async def _work(runner: Runner, left: Iterator[Item], write: Callable[[Item, Row], None]) -> None:
    for item in left:
        write(item, await runner.row(item))


def failed_row(item: Item, error: Exception) -> Row:
    """The row of an item that failed with an error."""
    problem = {"code": type(error).__name__, "message": str(error)}
    return {"id": item.id, **item.head, "status": FAILED, "error": problem}


async def item_row(session: Session, item: Item) -> Row:
    """The row of an item, failed or not. Raises EngineDeadError and OutputError, which end the run."""
    try:
        outcome = await item.work.run(session, item)
    except (EngineDeadError, OutputError):
        raise
    except Exception as error:
        _log.debug("%s", item.name, exc_info=True)
        return failed_row(item, error)
    usage = asdict(outcome.usage)
    cached = usage.pop("cached_tokens")  # depends on earlier requests, as the timings do
    return {
        "id": item.id,
        **item.head,
        "status": OK,
        **outcome.fields,
        "usage": usage,
        "timings": {**outcome.timings, "cached_tokens": cached},
    }
