"""Ranks as threads of one process: everything of tensor parallelism but the processes; and what they are equal to."""

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from afnext.quant.linear import Linear
from afnext.quant.recipe import Recipe
from afnext.runtime.engine.executor import LocalExecutor
from afnext.runtime.engine.options import EngineOptions
from afnext.runtime.engine.parallel_executor import ParallelExecutor
from afnext.runtime.engine.rank import Rank, send
from afnext.runtime.errors import EngineDeadError
from afnext.runtime.model.audio_flamingo import AudioFlamingo
from afnext.runtime.model.decoder import DecoderLayer
from afnext.runtime.model.group import Group
from afnext.runtime.model.opened import open_checkpoint
from afnext.runtime.model.sharding import RowParallel

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
            other.join(60)
    assert not failures or links.failure is not None
    assert not any(other.is_alive() for other in others)


class _InTurn:
    """Stands for the group of ranks whose parts one process computes in turn."""

    largest: Tensor

    def maximum(self, _: Tensor) -> Tensor:
        return self.largest

    def all_reduce(self, x: Tensor) -> Tensor:
        return x


class _InParts(Linear):
    """A layer that adds up the products of parts of its columns, as ranks do."""

    def __init__(self, whole: Linear, size: int, long: int | None):
        super().__init__(0, 0, bias=False)
        self._group = _InTurn()
        self._whole, self._long = whole, long
        self._parts = [self._part(rank, size) for rank in range(size)]

    def _part(self, rank: int, size: int) -> RowParallel:
        part = RowParallel(Linear(0, 0, bias=False), self._group)  # type: ignore[arg-type]
        part.scheme = self._whole.scheme
        part._buffers = dict.fromkeys(self._whole._buffers)
        for name, tensor in self._whole.named_buffers():
            part.register_buffer(name, (tensor.chunk(size, 1)[rank] if tensor.ndim == 2 else tensor).contiguous())
        part.prepare(torch.float32)
        return part

    def forward(self, x: Tensor, *, residual: Tensor | None = None, up: Linear | None = None) -> Tensor:
        """As `RowParallel.forward`."""
        if self._long is not None and x.shape[1] >= self._long:
            return self._whole(x)
        self._group.largest = x.abs().amax(-1, keepdim=True)
        columns = x.chunk(len(self._parts), -1)
        total, *rest = [part(own.contiguous()) for part, own in zip(self._parts, columns, strict=True)]
        for product in rest:
            total = total + product
        return total


def add_in_parts(model: AudioFlamingo, size: int, *, long: int | None = None) -> None:
    """Let one process form each sum over ranks as `size` ranks do, in the order of the ranks.

    What is left of a difference between the two is not rounding. long: tokens of a chunk from which on it is divided by
    tokens, so that no sum is divided.
    """
    for layer in model.decoder.layers:
        assert isinstance(layer, DecoderLayer)
        layer.self_attn.o_proj = _InParts(layer.self_attn.o_proj, size, long)
        layer.mlp.down_proj = _InParts(layer.mlp.down_proj, size, long)
