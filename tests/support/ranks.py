"""Ranks as threads of one process: everything of tensor parallelism but the processes."""

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import distributed as dist

from afnext.quant.recipe import Recipe
from afnext.runtime.engine.executor import LocalExecutor
from afnext.runtime.engine.options import EngineOptions
from afnext.runtime.engine.parallel_executor import ParallelExecutor
from afnext.runtime.engine.rank import Rank, send
from afnext.runtime.errors import EngineDeadError
from afnext.runtime.model.audio_flamingo import AudioFlamingo
from afnext.runtime.model.group import Group
from afnext.runtime.model.opened import open_checkpoint

T = TypeVar("T")
CPU = torch.device("cpu")


def thread_groups(size: int, rank: Callable[[Group], T]) -> list[T]:
    """What a function returns on each of `size` ranks, all threads of this process."""
    store = dist.HashStore()
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda number: rank(Group(store, number, size, CPU)), range(size)))


class ThreadLinks:
    """Rank 0's ends of the control connections to ranks that are threads."""

    def __init__(self, sockets: list[socket.socket]):
        self.sockets = sockets
        self.failure: EngineDeadError | None = None

    def send(self, message: bytes) -> None:
        for control in self.sockets:
            send(control, message)

    def fail(self, error: BaseException) -> EngineDeadError:
        self.failure = EngineDeadError(f"rank 0 failed: {error!r}")
        self.close()
        return self.failure

    def close(self) -> None:
        for control in self.sockets:
            control.close()


@contextmanager
def thread_ranks(
    folder: Path,
    size: int,
    options: EngineOptions,
    *,
    dtype: torch.dtype = torch.float32,
    quant: Recipe | None = None,
    sequence: bool = False,
) -> Iterator[ParallelExecutor]:
    """The executor of `size` ranks, all but the first of which are threads."""
    store, pairs = dist.HashStore(), [socket.socketpair() for _ in range(size - 1)]
    threads = torch.get_num_threads()
    failures: list[BaseException] = []

    def local(rank: int) -> tuple[LocalExecutor, Group]:
        group = Group(store, rank, size, CPU)
        model = AudioFlamingo.from_checkpoint(
            open_checkpoint(folder), device=CPU, dtype=lambda stored: dtype, quant=quant, group=group, sequence=sequence
        )
        return LocalExecutor(model, options), group

    def serve(rank: int, control: socket.socket) -> None:
        try:
            torch.set_num_threads(1)
            with control:
                Rank(*local(rank)).serve(control)
        except BaseException as error:
            failures.append(error)

    others = [
        threading.Thread(target=serve, args=(rank, control), daemon=True) for rank, (_, control) in enumerate(pairs, 1)
    ]
    for other in others:
        other.start()
    links = ThreadLinks([control for control, _ in pairs])
    try:
        torch.set_num_threads(1)
        first, group = local(0)
        yield ParallelExecutor(first, group, links)
    finally:
        torch.set_num_threads(threads)
        links.close()
        if links.failure is not None:
            del group._backend  # a rank that waits for this one in a collective fails
        for other in others:
            other.join(10)
    assert not failures or links.failure is not None
    assert not any(other.is_alive() for other in others)
