"""A small random model for the tests of the engine."""

import pytest
import torch

from afnext.bench.core.random_checkpoint import write_random_checkpoint
from afnext.runtime.model.audio_flamingo import AudioFlamingo


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> AudioFlamingo:
    """A random network in float32 on the CPU."""
    folder = write_random_checkpoint(tmp_path_factory.mktemp("random"))
    return AudioFlamingo.from_folder(folder, device=torch.device("cpu"), dtype=lambda stored: torch.float32)
