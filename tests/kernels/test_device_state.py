"""What GPUs can do, and that launches go to the one that was named. The GPUs are stand-ins for torch's calls."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from afnext.kernels import device_state
from afnext.kernels.dispatch import Operation
from afnext.runtime.app import loading
from afnext.runtime.engine.graphs import capturable
from afnext.runtime.errors import AfnextError


class FakeGpus:
    """Two GPUs of given compute capabilities. `current` is the one that launches go to."""

    def __init__(self, *capabilities: tuple[int, int]):
        self.capabilities = capabilities
        self.current = 0
        self.switches = 0

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device.index
        self.switches += 1
        try:
            yield
        finally:
            self.current = before


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpus]:
    """cuda:0 is an A100, cuda:1 a T4."""
    fake = FakeGpus((8, 0), (7, 5))
    device_state.capability.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: fake.capabilities[device.index])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: fake.current)
    monkeypatch.setattr(torch.cuda, "device", fake.device)
    monkeypatch.setattr(torch.version, "hip", None)
    yield fake
    device_state.capability.cache_clear()


NEW, OLD = torch.device("cuda", 0), torch.device("cuda", 1)


def where(gpus: FakeGpus, backends: tuple[str, ...] = ("triton", "torch")) -> Operation:  # type: ignore[type-arg]
    """An operation that says on which backend and on which GPU it ran."""
    operation = Operation("where", lambda: ("reference", gpus.current))
    for name in backends:
        operation.implementations[name] = lambda name=name: (name, gpus.current)
    return operation


def test_launches_go_to_the_gpu_that_was_named(gpus: FakeGpus) -> None:
    gpus.capabilities = ((8, 0), (9, 0))
    operation = where(gpus)
    assert operation.on(NEW)() == ("triton", 0)
    assert gpus.switches == 0  # it is the current one already
    assert operation.on(OLD)() == ("triton", 1)
    assert gpus.current == 0
    gpus.current = 1
    assert operation.on(NEW)() == ("triton", 0)


def test_implementations_that_cover_some_arguments_are_guarded_too(gpus: FakeGpus) -> None:
    gpus.capabilities = ((8, 0), (9, 0))
    operation = where(gpus)
    operation._misfits["triton"] = lambda: None
    assert operation.on(OLD)() == ("triton", 1)
    operation._misfits["triton"] = lambda: "anything"
    assert operation.on(OLD)() == ("torch", 1)


def test_gpus_too_old_for_triton_run_on_torch(gpus: FakeGpus) -> None:
    assert where(gpus).candidates(NEW) == ["triton", "torch", "reference"]
    assert where(gpus).candidates(OLD) == ["torch", "reference"]
    assert not capturable(OLD)


def test_the_gpu_that_was_named_is_asked_for_bfloat16(gpus: FakeGpus) -> None:
    assert loading.compute_dtype("auto", "bfloat16", NEW) == torch.bfloat16
    assert loading.compute_dtype("auto", "bfloat16", OLD) == torch.float16
    with pytest.raises(AfnextError, match="float16"):
        loading.compute_dtype("bfloat16", "bfloat16", OLD)


def test_amd_gpus_run_triton(gpus: FakeGpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert device_state.runs_triton(OLD)
    assert device_state.has_bfloat16(OLD)


def test_the_cpu_needs_no_guard() -> None:
    cpu = torch.device("cpu")
    assert not device_state.runs_triton(cpu)
    assert device_state.has_bfloat16(cpu)
    with device_state.current(cpu):
        pass
