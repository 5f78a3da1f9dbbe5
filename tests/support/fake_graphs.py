"""CUDA graphs without a GPU: decode steps on the CPU that are recorded, and repeated by running them again."""

from collections.abc import Callable

import pytest
import torch

from afnext.runtime.engine import executor, graphs
from afnext.runtime.engine.graphs import GraphMemory


class FakeGraphs:
    """The captures that were made, by the pool whose memory each was given. `replays` counts the steps repeated."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.pools: list[object] = []
        self.replays = 0
        handles = iter(range(1, 1_000_000))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
        monkeypatch.setattr(graphs, "captured", self._captured)
        monkeypatch.setattr(graphs, "TRITON_AVAILABLE", True)
        for module in (graphs, executor):
            monkeypatch.setattr(module, "runs_triton", lambda device: True)

    def _captured(self, run: Callable[[], object], device: torch.device, memory: GraphMemory) -> "_Graph":
        self.pools.append(memory.pool)
        return _Graph(self, run)


class _Graph:
    def __init__(self, graphs: FakeGraphs, run: Callable[[], object]):
        self._graphs, self._run = graphs, run

    def replay(self) -> None:
        self._graphs.replays += 1
        self._run()
