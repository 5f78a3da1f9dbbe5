"""Shared fixtures: a printed seed for each test, the shared recordings where they exist, GPU selection."""

import os
import random
import zlib
from collections.abc import Iterator
from functools import partial
from inspect import signature
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from support.accuracy import InaccurateError, begin_test, judged_over_draws, seeded, untested
from support.pairing import interpreted_repetitions

os.environ.setdefault("HF_HUB_OFFLINE", "1")
_PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, min(2, (os.cpu_count() or 1) // _PROCESSES)))

# A stalled machine is no fault of the code: only pytest's timeout limits an example. CI repeats the same examples.
settings.register_profile("afnext", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("afnext")


def pytest_report_header() -> str:
    lacks = "; ".join(untested()) or "nothing"
    return f"not tested on this machine: {lacks}"


_SEED = pytest.StashKey[int]()


def _seed_of(item: pytest.Item) -> int:
    """AFNEXT_TEST_SEED repeats a run. CI seeds each test by its name: a failure there is never chance."""
    if "AFNEXT_TEST_SEED" in os.environ:
        return int(os.environ["AFNEXT_TEST_SEED"])
    return zlib.crc32(item.nodeid.encode()) % 2**31 if os.environ.get("CI") else random.SystemRandom().randrange(2**31)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The test's seed, from which every generator started, printed with a failing test."""
    value = request.node.stash[_SEED]
    print(f"AFNEXT_TEST_SEED={value}")
    seeded(value)
    return value


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """What one draw of inputs finds inaccurate is judged over many (see support/accuracy.py)."""
    try:
        return (yield)
    except InaccurateError as broken:
        arguments = {name: pyfuncitem.funcargs[name] for name in signature(pyfuncitem.obj).parameters}
        judged_over_draws(partial(pyfuncitem.obj, **arguments), arguments["seed"], broken)
        return True


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real recordings and tokenizers beside the repository; skips where it does not exist."""
    folder = Path(__file__).parents[2] / "shared" / "data"
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


def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[_SEED] = _seed_of(item)
    seeded(item.stash[_SEED])
    begin_test(on_gpu=item.get_closest_marker("gpu") is not None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skip_gpu = pytest.mark.skip(reason="no GPU on this machine")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(skip_gpu)
    spared = interpreted_repetitions(items)
    if spared:
        items[:] = [item for item in items if item not in spared]
        config.hook.pytest_deselected(items=list(spared))
