"""A small random model, and simulated GPUs, for the tests of the engine."""

from collections.abc import Iterator

import pytest
import torch
from support.fake_cuda import FakeCuda

from afnext.bench.core.random_checkpoint import write_random_checkpoint
from afnext.runtime.engine.engine import Engine
from afnext.runtime.model.audio_flamingo import AudioFlamingo


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> AudioFlamingo:
    """A random network in float32 on the CPU."""
    folder = write_random_checkpoint(tmp_path_factory.mktemp("random"))
    return AudioFlamingo.from_folder(folder, device=torch.device("cpu"), dtype=lambda stored: torch.float32)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """Two simulated GPUs. Models are loaded without the rehearsal that compiles kernels."""
    if torch.cuda.is_available():
        pytest.skip("there is a real GPU")
    monkeypatch.setattr(Engine, "rehearse", lambda engine, progress: None)
    with FakeCuda(monkeypatch).active() as cuda:
        yield cuda
