"""The one rule that decides which implementation runs."""

import logging
from collections.abc import Callable
from functools import partial

import pytest
import torch

from afnext import kernels
from afnext.kernels.dispatch import Operation, forced_backend, synchronize
from afnext.kernels.errors import AfnextError, BackendError

CPU, CUDA, OTHER = torch.device("cpu"), torch.device("cuda"), torch.device("meta")


@pytest.fixture(autouse=True)
def _unforced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AFNEXT_BACKEND", raising=False)


def operation(*names: str) -> Operation[Callable[[], str]]:
    """An operation whose implementations return their own backend's name."""
    made: Operation[Callable[[], str]] = Operation("example", lambda: "reference")
    for name in names:
        made.implementation(name)(partial(str, name))
    return made


@pytest.mark.parametrize(
    ("names", "device", "expected"),
    [
        ((), CPU, "reference"),
        (("torch",), CPU, "torch"),
        (("torch", "native", "triton"), CPU, "native"),
        (("native", "torch"), CUDA, "torch"),
        (("torch", "native", "triton"), CUDA, "triton"),
        (("torch", "native", "triton"), OTHER, "torch"),
        (("triton",), CPU, "reference"),
        (("native",), CUDA, "reference"),
    ],
)
def test_the_device_decides(names: tuple[str, ...], device: torch.device, expected: str) -> None:
    assert operation(*names).on(device)() == expected


def test_forced_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert forced_backend() is None
    monkeypatch.setenv("AFNEXT_BACKEND", "reference")
    assert forced_backend() == "reference"
    assert operation("torch").on(CPU)() == "reference"
    monkeypatch.setenv("AFNEXT_BACKEND", "")
    assert operation("torch").on(CPU)() == "torch"


def test_forced_by_context_has_precedence_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFNEXT_BACKEND", "torch")
    example = operation("torch", "native")
    with kernels.backend("native"):
        assert example.on(CPU)() == "native"
        with kernels.backend("reference"):
            assert example.on(CPU)() == "reference"
        assert example.on(CPU)() == "native"
    assert example.on(CPU)() == "torch"
    with pytest.raises(KeyError), kernels.backend("native"):
        raise KeyError
    assert example.on(CPU)() == "torch"


def test_a_forced_backend_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    example = operation("torch")
    with kernels.backend("triton"), pytest.raises(BackendError, match=r"example has no triton.*reference, torch"):
        example.on(CPU)
    monkeypatch.setenv("AFNEXT_BACKEND", "native")
    with pytest.raises(BackendError, match=r"example has no native.*AFNEXT_BACKEND"):
        example.on(CPU)


def test_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=r"'cudnn'.*triton, native, torch, reference"), kernels.backend("cudnn"):
        pass
    with pytest.raises(BackendError, match="'cudnn'"):
        operation().implementation("cudnn")
    monkeypatch.setenv("AFNEXT_BACKEND", "Torch")
    with pytest.raises(BackendError, match="'Torch'"):
        operation("torch").on(CPU)
    assert issubclass(BackendError, AfnextError)


def test_the_choice_is_logged_once_per_device_and_backend(caplog: pytest.LogCaptureFixture) -> None:
    example = operation("torch")
    with caplog.at_level(logging.INFO, logger="afnext.kernels"):
        example.on(CPU)
        example.on(CPU)
        example.on(CUDA)
        with kernels.backend("reference"):
            example.on(CPU)
        example.on(CPU)
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.INFO, "example on cpu runs on torch"),
        (logging.INFO, "example on cuda runs on torch"),
        (logging.INFO, "example on cpu runs on reference"),
    ]


def test_synchronize_accepts_any_device() -> None:
    synchronize(CPU)
    synchronize(OTHER)
