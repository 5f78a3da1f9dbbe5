"""The executor's operations, each run by all ranks together on their shards.

Rank 0 sends the other ranks one message for each operation: its kind and some lists of integers (tokens, positions,
pages), as int64. Tensors follow as broadcasts of the group. Thus all ranks run the same collectives in the same order.
"""

import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from enum import IntEnum
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...kernels.compilation import Uncompiled, collecting, compile_all, is_collecting
from ...kernels.cpus import usable_cpus
from ...kernels.dispatch import BACKENDS, backend, backend_here
from ...kernels.row_groups import is_row_invariant, row_invariant
from ..errors import EngineError
from ..model.encoder import token_count
from ..model.group import Group
from .executor import LocalExecutor
from .prefill import PlacedWindow
from .timings import Timings

Lists = list[list[int]]
_LENGTH = struct.Struct("<Q")
_MOST_BYTES = 1 << 28


class Op(IntEnum):
    """The operations; see the methods of `Executor`."""

    SET_THREADS = 0
    RESIZE = 1
    COPY_PAGE = 2
    ENCODE = 3
    EMBED = 4
    PREFILL = 5
    LOGITS = 6
    DECODE = 7
    READ = 8
    WRITE = 9
    FINGERPRINT = 10
    WARM_UP = 11
    COMPILE = 12


class Rank:
    """This process's part of the operations. Rank 0 passes tensors and gets results; on other ranks both are None."""

    def __init__(self, local: LocalExecutor, group: Group):
        self._local = local
        self._group = group
        self._collected: list[list[Uncompiled]] = []  # not on rank 0, where the rehearsal has them
        self._operations: dict[Op, Callable[..., Any]] = {
            Op.SET_THREADS: self._set_threads,
            Op.RESIZE: self._resize,
            Op.COPY_PAGE: self._copy_page,
            Op.ENCODE: self._encode,
            Op.EMBED: self._embed,
            Op.PREFILL: self._prefill,
            Op.LOGITS: self._logits,
            Op.DECODE: self._decode,
            Op.READ: self._read,
            Op.WRITE: self._write,
            Op.FINGERPRINT: self._fingerprint,
            Op.WARM_UP: self._warm_up,
            Op.COMPILE: self._compile,
        }

    def run(self, op: Op, lists: Lists, given: Any = None) -> Any:
        """Do this rank's part of an operation. Raises GroupError if another rank ended."""
        return self._operations[op](lists, given)

    def serve(self, control: socket.socket) -> None:
        """Run the operations that rank 0 sends, until it closes the connection."""
        while (message := receive(control)) is not None:
            op, conditions, lists = decoded(message)
            with ExitStack() as stack:
                stack.enter_context(torch.inference_mode())
                if conditions[0] >= 0:
                    stack.enter_context(backend(BACKENDS[conditions[0]]))
                if conditions[1]:
                    stack.enter_context(row_invariant())
                if conditions[2]:
                    self._collected.append(stack.enter_context(collecting()))
                self.run(op, lists)

    def _set_threads(self, lists: Lists, _: None) -> None:
        self._local.set_threads(lists[0][0])

    def _resize(self, lists: Lists, _: None) -> Exception | None:
        """Resize on all ranks or none. Returns the error if a rank ran out of memory."""
        (pages, before, end), error = lists[0], None
        pool = self._local.cache.pool
        if self._group.rank:  # the pages whose contents are kept; only rank 0 knows which are in use
            pool.use(list(range(end)))
        try:
            self._local.resize(pages)
        except (MemoryError, RuntimeError) as problem:
            error = problem
        if not self._group.minimum(error is None):
            if error is None:
                self._local.resize(before)
            error = error or MemoryError("another rank has no memory for them")
        if self._group.rank:
            pool.release(list(range(end)))
        return error

    def _copy_page(self, lists: Lists, _: None) -> None:
        self._local.copy_page(*lists[0])

    def _encode(self, lists: Lists, given: tuple[list[PlacedWindow], Timings] | None) -> list[Tensor]:
        """Each rank encodes some windows and has zeros for the others; the sum over the ranks is the result."""
        lengths, indices = lists
        windows, timings = given or (None, Timings())
        whole = None if windows is None else torch.cat([window.waveform for window in windows])
        samples = self._shared(whole, (sum(lengths),), torch.float32)
        counts = [token_count(length) for length in lengths]
        waveforms = samples.split(lengths)
        placed = [PlacedWindow(0, *each) for each in zip(counts, waveforms, indices, strict=True)]
        mine = slice(self._group.rank, None, self._group.size)
        encoded = self._local.encode(placed[mine], timings) if placed[mine] else []
        width = self._local.model.config.decoder.hidden_size
        tokens = torch.zeros(sum(counts), width, dtype=self._local.model.dtype, device=self._group.device)
        parts = tokens.split(counts)
        for part, output in zip(parts[mine], encoded, strict=True):
            part.copy_(output)
        self._group.all_reduce(tokens)
        return list(parts)

    def _embed(self, lists: Lists, _: None) -> Tensor:
        return self._local.embed(torch.tensor(lists[0], device=self._group.device))

    def _prefill(self, lists: Lists, x: Tensor | None) -> Tensor:
        (start, count), pages = lists
        width = self._local.model.config.decoder.hidden_size
        return self._local.prefill(self._shared(x, (1, count, width), self._local.model.dtype), pages, start)

    def _logits(self, lists: Lists, hidden: Tensor | None) -> Tensor:
        return self._local.logits(self._shared(hidden, lists[0], self._local.model.dtype))

    def _decode(self, lists: Lists, _: None) -> Tensor:
        tokens, positions, *pages = lists
        time = len(tokens) // len(positions)
        rows = [tokens[start : start + time] for start in range(0, len(tokens), time)]
        return self._local.decode(rows, positions, pages)

    def _read(self, lists: Lists, _: None) -> Tensor:
        (index,), pages = lists
        return torch.cat(self._group.all_gather(self._local.read(index, pages)), dim=1)

    def _write(self, lists: Lists, rows: Tensor | None) -> None:
        (index, count), pages = lists
        pool = self._local.cache.pools[index]
        heads = pool.shape[2]
        rows = self._shared(rows, (count, heads * self._group.size, *pool.shape[3:]), pool.dtype)
        self._local.write(index, pages, rows.narrow(1, self._group.rank * heads, heads))

    def _fingerprint(self, _lists: Lists, _: None) -> str:
        return self._local.fingerprint()

    def _warm_up(self, _lists: Lists, progress: Callable[[int, int], None] | None) -> None:
        self._local.warm_up(progress or (lambda done, total: None))

    def _compile(self, _lists: Lists, given: tuple[Sequence[Uncompiled], Callable[[int, int], None]] | None) -> None:
        """Most kernels are the same on all ranks. Each rank starts with other ones, and loads from Triton's cache on
        disk what another has compiled."""
        kernels, progress = given or ([*chain(*self._collected)], lambda done, total: None)
        self._collected.clear()
        first = len(kernels) * self._group.rank // self._group.size
        threads = max(1, usable_cpus().threads // self._group.size)
        compile_all([*kernels[first:], *kernels[:first]], progress, threads=threads)

    def _shared(self, x: Tensor | None, shape: Any, dtype: torch.dtype) -> Tensor:
        """Broadcast rank 0's tensor to every rank."""
        if x is None:
            x = torch.empty(*shape, dtype=dtype, device=self._group.device)
        return self._group.broadcast(x.to(self._group.device).contiguous())


def encoded(op: Op, lists: Lists) -> bytes:
    """The message of an operation: its kind, its conditions, and its lists."""
    forced = backend_here()
    conditions = [BACKENDS.index(forced) if forced else -1, is_row_invariant(), is_collecting()]
    head = [op, *conditions, len(lists), *map(len, lists)]
    return np.array([*head, *(number for numbers in lists for number in numbers)], np.int64).tobytes()


def decoded(message: bytes) -> tuple[Op, list[int], Lists]:
    """The operation of a message, its conditions (backend, row invariance, collecting kernels), and its lists."""
    numbers = np.frombuffer(message, np.int64).tolist()
    lengths = numbers[5 : 5 + numbers[4]]
    lists, at = [], 5 + numbers[4]
    for length in lengths:
        lists.append(numbers[at : at + length])
        at += length
    return Op(numbers[0]), numbers[1:4], lists


def send(control: socket.socket, message: bytes) -> None:
    """Send a message. Raises OSError if the other end is closed."""
    control.sendall(_LENGTH.pack(len(message)) + message)


def receive(control: socket.socket) -> bytes | None:
    """The next message, or None once the other end is closed. Raises EngineError for one that is too long."""
    head = _exactly(control, _LENGTH.size)
    if head is None:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > _MOST_BYTES:
        raise EngineError(f"a message between ranks has {length:,} bytes")
    return _exactly(control, length)


def _exactly(control: socket.socket, count: int) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        try:
            piece = control.recv(min(count - len(data), 1 << 20))
        except ConnectionResetError:  # the other end was closed before it had read everything
            return None
        if not piece:
            return None
        data += piece
    return bytes(data)
