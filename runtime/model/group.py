"""The processes that compute one model together, and their collectives.

Collectives run on gloo between CPUs, on NCCL between GPUs. A group belongs to one model, not to the process, so a
program may use `torch.distributed` itself and load several models.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...kernels.native.recording import current
from ...kernels.quantize_rows import E4M3
from ...kernels.row_groups import is_row_invariant
from ..errors import GroupError

_SECONDS = {"cpu": 600, "cuda": 60}  # timeout after which a rank counts as lost; CPUs may encode for minutes


class Group:
    """The ranks of one model, of which this process is number `rank` of `size`."""

    def __init__(self, store: Any, rank: int, size: int, device: torch.device):
        """store: a store of `torch.distributed` that all ranks share. Waits for the other ranks.

        Raises GroupError if a rank does not connect.
        """
        self.rank = rank
        self.size = size
        self.device = device
        with _explained():
            self._backend: Any = _nccl(store, rank, size) if device.type == "cuda" else _gloo(store, rank, size)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Replace x on every rank by the sum over all ranks, identical on all, and return it.

        Inside `row_invariant` the order in which an element is summed does not depend on its position.
        """
        if is_row_invariant() and self.size > 2:
            parts = self.all_gather(x)
            return x.copy_(_summed(parts))
        reduce = partial(self._reduce, "SUM")
        reduce(x)
        if (recording := current()) is not None:
            recording.add(reduce, [x], [x])
        return x

    def maximum(self, x: Tensor) -> Tensor:
        """Replace x on every rank by the elementwise maximum over all ranks, and return it."""
        self._reduce("MAX", x)
        return x

    def minimum(self, value: int) -> int:
        """The smallest of the ranks' numbers."""
        x = torch.tensor([value], device=self.device)
        self._reduce("MIN", x)
        return int(x)

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """The tensors of all ranks, of the same shape and dtype, in the order of ranks."""
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        with _explained():
            self._backend.allgather([list(map(_sent, parts))], [_sent(x)]).wait()
        return parts

    def exchange(self, x: Tensor) -> Tensor:
        """Send x[i] to rank i. x: [ranks, ...], contiguous. Returns the tensors that the ranks sent, in the shape of
        x."""
        from torch.distributed import AllToAllOptions

        received = torch.empty_like(x)
        with _explained():
            self._backend.alltoall_base(received, x, [], [], AllToAllOptions()).wait()
        return received

    def rotate(self, x: Tensor) -> Tensor:
        """Send x to the next rank, from the last rank to the first. x: of the same shape on all ranks, contiguous.
        Returns the previous rank's tensor, like x."""
        from torch.distributed import AllToAllOptions

        to_next, from_last = [0] * self.size, [0] * self.size
        to_next[(self.rank + 1) % self.size] = from_last[(self.rank - 1) % self.size] = len(x)
        received = torch.empty_like(x)
        with _explained():
            self._backend.alltoall_base(received, x, from_last, to_next, AllToAllOptions()).wait()
        return received

    def broadcast(self, x: Tensor) -> Tensor:
        """Replace x on every rank by that of rank 0, and return it. It must be contiguous."""
        from torch.distributed import BroadcastOptions

        options = BroadcastOptions()
        options.rootRank = 0
        with _explained():
            self._backend.broadcast([_sent(x)], options).wait()
        return x

    def abort(self) -> None:
        """Make collectives that wait for other ranks fail; callable from any thread. gloo does so itself when a rank
        ends."""
        if self.device.type == "cuda":
            self._backend.abort()

    def _reduce(self, operation: str, x: Tensor) -> None:
        from torch.distributed import AllreduceOptions, ReduceOp

        options = AllreduceOptions()
        options.reduceOp = getattr(ReduceOp, operation)
        with _explained():
            self._backend.allreduce([x], options).wait()


def _sent(x: Tensor) -> Tensor:
    """x as it is sent: e4m3, which gloo lacks, as bytes."""
    return x.view(torch.uint8) if x.dtype == E4M3 else x


def _summed(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


@contextmanager
def _explained() -> Iterator[None]:
    """Turns errors of torch into GroupErrors."""
    try:
        yield
    except RuntimeError as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise GroupError(f"another rank ended or did not answer ({first})") from error


def _gloo(store: Any, rank: int, size: int) -> Any:
    from torch.distributed import ProcessGroupGloo

    gloo: Any = ProcessGroupGloo
    options = gloo._Options()
    options._timeout = timedelta(seconds=_SECONDS["cpu"])
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    return gloo(store, rank, size, options)


def _nccl(store: Any, rank: int, size: int) -> Any:
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=_SECONDS["cuda"])
    return ProcessGroupNCCL(store, rank, size, options)
