"""Loads a model in several processes: rank 0 is the caller's, the others are started here.

Each loads its own part of the checkpoint. They connect through a file in a folder that only the user may read, and
communicate only over the loopback interface and socket pairs.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...kernels.errors import AfnextError
from ..engine.executor import LocalExecutor
from ..engine.links import ProcessLinks
from ..engine.options import EngineOptions
from ..engine.parallel_executor import ParallelExecutor
from ..engine.rank import send
from ..errors import ConfigError
from ..model.config import ModelConfig
from ..model.group import Group
from ..model.opened import OpenCheckpoint
from ..model.sharding import shard_config
from .loading import NetworkSettings, load_network


@dataclass(frozen=True)
class RankSettings:
    """Settings for a rank's process. store: the file through which the ranks connect; threads: number of CPU threads;
    network: `NetworkSettings` as plain values."""

    folder: str
    rank: int
    size: int
    device: str
    store: str
    threads: int
    network: dict[str, Any]

    def to_json(self) -> bytes:
        """As JSON."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, text: bytes) -> "RankSettings":
        """The inverse of `to_json`."""
        return cls(**json.loads(text))

    def connect(self) -> Group:
        """Connect this process to the other ranks. Raises GroupError if one does not connect."""
        distributed: Any = torch.distributed
        return Group(distributed.FileStore(self.store, self.size), self.rank, self.size, torch.device(self.device))


def rank_device(device: torch.device, rank: int) -> torch.device:
    """The device of a rank: its own GPU, or the CPU."""
    return torch.device("cuda", rank) if device.type == "cuda" else device


def check_ranks(config: ModelConfig, device: torch.device, *, tp: int, sp: int) -> int:
    """The number of processes to compute in. device: of rank 0; the others take the following GPUs.

    Raises ValueError, ConfigError, SchemeError or AfnextError if that many processes cannot share a model with this
    config.
    """
    for name, count in (("tp", tp), ("sp", sp)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if tp > 1 and sp > 1:
        raise ValueError("give tp or sp, not both: with sp, decoding is divided as with tp")
    size = max(tp, sp)
    if size == 1:
        return 1
    shard_config(config, size)
    if os.name != "posix" or not torch.distributed.is_available():
        raise AfnextError("tp needs Linux or macOS and a torch with torch.distributed; leave it out.")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"tp computes on CPUs or on CUDA GPUs, not on {device.type}.")
    if device.type == "cuda" and (device.index or 0) != 0:
        raise ConfigError("with tp the ranks take the GPUs from cuda:0 on; choose them with CUDA_VISIBLE_DEVICES.")
    if device.type == "cuda" and torch.cuda.device_count() < size:
        raise ConfigError(f"tp={size} needs {size} GPUs, and {torch.cuda.device_count()} are visible.")
    if device.type == "cuda":
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")  # NCCL listens on every interface otherwise
    return size


def load_parallel(
    checkpoint: OpenCheckpoint,
    settings: NetworkSettings,
    options: EngineOptions,
    device: torch.device,
    size: int,
    progress: Callable[[int, int], None],
) -> tuple[ParallelExecutor, EngineOptions]:
    """Load a checkpoint in `size` processes. Returns their executor, and the options with the KV cache limited to the
    memory of every rank.

    options: with the KV cache limited to the memory of rank 0, this process; device: of rank 0. Raises the errors of
    loading, and EngineDeadError with the cause if another rank fails.
    """
    with _private_folder() as private:
        first, *others = (
            RankSettings(
                folder=str(checkpoint.folder),
                rank=rank,
                size=size,
                device=str(rank_device(device, rank)),
                store=str(private / "store"),
                threads=max(1, torch.get_num_threads() // size),
                network=settings.to_dict(),
            )
            for rank in range(size)
        )
        links = _start(others)
        try:
            links.wait_for_all()  # all have started
            group = first.connect()
            network = load_network(checkpoint, settings, device, group=group, progress=progress)
            links.wait_for_all()  # all have loaded
            options = replace(options, max_kv_tokens=group.minimum(options.max_kv_tokens or 0))
            links.watch(group.abort)
        except BaseException:
            links.close()
            raise
    return ParallelExecutor(LocalExecutor(network, options), group, links), options


def _start(ranks: list[RankSettings]) -> ProcessLinks:
    processes, sockets = [], []
    for rank in ranks:
        ours, theirs = socket.socketpair()
        with theirs:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "afnext.runtime.app.rank", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                )
            )
        sockets.append(ours)
        with contextlib.suppress(OSError):  # if it has ended, waiting for its answer reports why
            send(ours, rank.to_json())
    return ProcessLinks(processes, sockets)


@contextmanager
def _private_folder() -> Iterator[Path]:
    folder = tempfile.mkdtemp(prefix="afnext-ranks-")
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
