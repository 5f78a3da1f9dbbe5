"""`afnext batch --ray`: the items of a batch on any number of machines; the rows are written here."""

import asyncio
import os
import platform
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from ...kernels.errors import AfnextError
from ..errors import EngineDeadError, WorkerLostError
from .api import Model
from .batch import AHEAD, DEFAULT_JOBS, Item, Runner, Session, Work, failed_row, item_row
from .batch_rows import Row

_ATTEMPTS = 3  # per item, if its worker ends
_LOSSES = 3  # consecutive workers per replica that may end without completing a row


class Worker:
    """The model in a separate process: a Ray actor."""

    def __init__(self, load: Callable[[], Model], jobs: int):
        """load: see `ray_runner`."""
        self._load = load
        self._jobs = jobs
        self._session: Session | None = None

    async def start(self, works: Collection[Work], folder: str) -> str | None:
        """Load the model, and check that it can do `works`. Returns the error, or None.

        folder: the base of relative paths.
        """
        try:
            os.chdir(folder)
        except OSError:
            return f"{folder} is not there on {platform.node()}; put the recordings on storage that all machines share."
        try:
            model = await asyncio.to_thread(self._load)
            for work in works:
                work.check(model)
        except AfnextError as error:
            return str(error)
        self._session = Session.of(model, self._jobs)
        return None

    async def row(self, item: Item) -> Row:
        """The row of an item. Raises EngineDeadError: then the process is unusable."""
        assert self._session is not None
        return await item_row(self._session, item)


@dataclass(eq=False)
class _Place:
    """A worker and its number of items."""

    actor: Any
    items: int = 0


class _Workers:
    """The workers that have started; replaces those that end."""

    def __init__(self, start: Callable[[], Any], works: Collection[Work], count: int, at_once: int):
        """start: makes a worker. at_once: number of items passed to each at a time."""
        self._make = start
        self._works = works
        self._at_once = at_once
        self._most_losses = _LOSSES * count
        self._losses = 0
        self._places: list[_Place] = []
        self._changed = asyncio.Condition()
        self._failure: AfnextError | None = None
        self._starting = {asyncio.create_task(self._start()) for _ in range(count)}

    async def row(self, item: Item) -> Row:
        """The row of an item, from the worker with the fewest items."""
        problem = ""
        for _ in range(_ATTEMPTS):
            place = await self._taken()
            try:
                row: Row = await place.actor.row.remote(item)
                self._losses = 0
                return row
            except Exception as error:  # Ray's error for an ended process, or that of a dead engine
                problem = _first_line(error)
                self._lost(place, problem)
            finally:
                await self._give_back(place)
        return failed_row(item, WorkerLostError(f"each process that worked on it has ended ({problem})"))

    async def close(self) -> None:
        """Stop starting workers."""
        for task in self._starting:
            task.cancel()
        await asyncio.gather(*self._starting, return_exceptions=True)

    async def _taken(self) -> _Place:
        async with self._changed:
            await self._changed.wait_for(lambda: self._failure is not None or self._free())
            if self._failure is not None:
                raise self._failure
            place = min(self._free(), key=lambda place: place.items)
            place.items += 1
            return place

    def _free(self) -> list[_Place]:
        return [place for place in self._places if place.items < self._at_once]

    async def _give_back(self, place: _Place) -> None:
        async with self._changed:
            place.items -= 1
            self._changed.notify_all()

    def _lost(self, place: _Place, problem: str) -> None:
        """Replace a worker, unless another item has already noticed its end."""
        if place not in self._places:
            return
        self._places.remove(place)
        self._losses += 1
        if self._losses > self._most_losses:
            self._failure = EngineDeadError(f"the processes that work on the batch keep ending: {problem}")
            return
        task = asyncio.create_task(self._start())
        self._starting.add(task)
        task.add_done_callback(self._starting.discard)

    async def _start(self) -> None:
        actor = self._make()
        try:
            problem = await actor.start.remote(self._works, os.getcwd())
        except Exception as error:  # Ray's: the process has ended
            problem = f"a process that should work on the batch has ended: {_first_line(error)}"
        async with self._changed:
            if problem is None:
                self._places.append(_Place(actor))
            else:
                self._failure = AfnextError(problem)
            self._changed.notify_all()


@asynccontextmanager
async def ray_runner(
    load: Callable[[], Model],
    works: Collection[Work],
    *,
    replicas: int,
    gpus: float,
    cpus: float,
    jobs: int = DEFAULT_JOBS,
) -> AsyncIterator[Runner]:
    """Runs `replicas` models on the connected cluster (see `ray_cluster`).

    load: loads the model; it is pickled. works: the tasks that they must support. gpus, cpus: requested by each
    replica. jobs: items that each processes at once. Recordings are read on the replica's machine, under the same
    paths. The runner raises AfnextError if a replica cannot be loaded or does not support the tasks.
    """
    import ray

    at_once = jobs + AHEAD
    actor = ray.remote(num_cpus=cpus, num_gpus=gpus, max_concurrency=at_once + 1)(Worker)
    made: list[Any] = []

    def start() -> Any:
        made.append(actor.remote(load, jobs))
        return made[-1]

    workers = _Workers(start, works, replicas, at_once)
    try:
        yield Runner(replicas * at_once, workers.row)
    finally:
        await workers.close()
        for each in made:
            ray.kill(each)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
