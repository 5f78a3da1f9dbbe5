"""Shared fixtures: a fresh printed seed for each test, the shared recordings where they exist, GPU selection."""

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS))  # so that tests can say `from support... import ...`
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(int(os.environ.get("AFNEXT_TEST_THREADS", "2")))


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A fresh seed, printed with a failing test; AFNEXT_TEST_SEED repeats a run."""
    value = int(os.environ.get("AFNEXT_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"AFNEXT_TEST_SEED={value}")
    torch.manual_seed(value)
    np.random.seed(value)
    random.seed(value)
    return value


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real recordings and tokenizers beside the repository; skips where it does not exist."""
    folder = TESTS.parent.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the folder of shared recordings is not beside this checkout")
    return folder


@pytest.fixture
def restored_threads() -> Iterator[None]:
    """Torch's number of threads after the test is that before it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device that kernel tests run on: the CPU, or the GPU under the `gpu` marker."""
    return torch.device("cuda" if request.node.get_closest_marker("gpu") else "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip_gpu = pytest.mark.skip(reason="no GPU on this machine")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(skip_gpu)
