"""The one rule that decides which implementation runs."""

import logging
from collections.abc import Callable
from functools import partial

import pytest
import torch

from afnext import kernels
from afnext.kernels.dispatch import Operation, check_forced_operations, forced_backend, operations
from afnext.kernels.errors import AfnextError, BackendError

CPU, CUDA, OTHER = torch.device("cpu"), torch.device("cuda"), torch.device("meta")


@pytest.fixture(autouse=True)
def _unforced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AFNEXT_BACKEND", raising=False)
    monkeypatch.setattr("afnext.kernels.dispatch._AVAILABLE", {})  # the rule, whatever is installed here


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


def test_a_backend_for_single_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    example, another = operation("native", "torch"), Operation("another", lambda: "reference")
    another.implementation("torch")(lambda: "torch")
    monkeypatch.setenv("AFNEXT_BACKEND", "example=torch")
    assert [made.on(CPU)() for made in (example, another)] == ["torch", "torch"]
    assert forced_backend() is None
    assert forced_backend("example") == "torch"
    monkeypatch.setenv("AFNEXT_BACKEND", " reference, example = native ")
    assert [made.on(CPU)() for made in (example, another)] == ["native", "reference"]
    assert forced_backend() == "reference"
    with kernels.backend("torch"):
        assert [made.on(CPU)() for made in (example, another)] == ["torch", "torch"]
    check_forced_operations()
    monkeypatch.setenv("AFNEXT_BACKEND", "exmple=torch")
    with pytest.raises(BackendError, match=r"unknown operations exmple; there are .*example"):
        check_forced_operations()
    monkeypatch.setenv("AFNEXT_BACKEND", "example=tensorflow")
    with pytest.raises(BackendError, match="unknown backend 'tensorflow'"):
        example.on(CPU)


def test_several_backends_for_single_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    example = picky(torch="odd numbers", native=None)
    monkeypatch.setenv("AFNEXT_BACKEND", "example=torch+native")
    assert [example.on(CPU)(number) for number in (2, 3)] == ["torch", "native"]
    assert forced_backend("example") == "torch"
    monkeypatch.setenv("AFNEXT_BACKEND", "example=torch+reference")
    assert example.on(CPU)(3) == "reference"
    monkeypatch.setenv("AFNEXT_BACKEND", "example=native+triton")
    with pytest.raises(BackendError, match="example has no triton implementation"):
        example.on(CPU)
    monkeypatch.setenv("AFNEXT_BACKEND", "torch+native")
    with pytest.raises(BackendError, match=r"unknown backend 'torch\+native'"):
        example.on(CPU)


def picky(**misfits: str | None) -> Operation[Callable[[int], str]]:
    """Implementations named by keyword: each returns its name and misses odd numbers for the reason given."""
    made: Operation[Callable[[int], str]] = Operation("example", lambda number: "reference")
    for name, reason in misfits.items():
        misfit = None if reason is None else partial(lambda reason, number: reason if number % 2 else None, reason)
        made.implementation(name, misfit)(partial(lambda name, number: name, name))
    return made


def test_arguments_that_are_not_covered_go_to_the_next(caplog: pytest.LogCaptureFixture) -> None:
    example = picky(native="odd numbers", torch=None)
    with caplog.at_level(logging.INFO, logger="afnext.kernels"):
        assert [example.on(CPU)(number) for number in (2, 3, 5, 4)] == ["native", "torch", "torch", "native"]
    assert [record.getMessage() for record in caplog.records] == [
        "example on cpu runs on native",
        "example on cpu: native does not cover odd numbers",
        "example on cpu runs on torch",
    ]
    assert picky(native="odd numbers", torch="odd numbers").on(CPU)(3) == "reference"


def test_a_forced_backend_that_does_not_cover_raises() -> None:
    example = picky(native="odd numbers", torch=None)
    with kernels.backend("native"):
        assert example.on(CPU)(2) == "native"
        with pytest.raises(BackendError, match="native implementation of example does not cover odd numbers"):
            example.on(CPU)(3)
        with pytest.raises(BackendError, match="run on the CPU"):
            example.on(CUDA)


def test_operations_are_listed_by_name() -> None:
    kept = operation("torch"), Operation("another", lambda: None)
    names = [made.name for made in operations()]
    assert names == sorted(names)
    assert {made.name for made in kept} <= set(names)


def test_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(BackendError, match=r"'tensorrt'.*triton, native, torch, reference"),
        kernels.backend("tensorrt"),
    ):
        pass
    with pytest.raises(BackendError, match="'tensorrt'"):
        operation().implementation("tensorrt")
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
