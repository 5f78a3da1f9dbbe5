"""The messages to systemd: readiness, the end, and that the server is alive."""

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="serving needs the extra `serve`")
from afnext.serve.notify import notify, watchdog

pytestmark = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="needs Unix sockets")


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A service manager's socket."""
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiving:
        receiving.bind(path)
        receiving.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        monkeypatch.delenv("WATCHDOG_PID", raising=False)
        yield receiving


def test_states_reach_the_service_manager(manager: socket.socket) -> None:
    notify("READY=1")
    notify("STOPPING=1")
    assert [manager.recv(100), manager.recv(100)] == [b"READY=1", b"STOPPING=1"]


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="abstract sockets are Linux's")
def test_an_abstract_socket_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiving:
        receiving.bind("")  # the kernel chooses an abstract name
        receiving.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + receiving.getsockname()[1:].decode())
        notify("READY=1")
        assert receiving.recv(100) == b"READY=1"


def test_without_a_service_manager_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    notify("READY=1")
    asyncio.run(watchdog(lambda: True))


def test_the_watchdog_hears_from_a_living_server_only(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "2000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    states = iter([True, True, False, True])

    def alive() -> bool:
        try:
            return next(states)
        except StopIteration:
            raise KeyError from None

    with pytest.raises(KeyError):
        asyncio.run(watchdog(alive))
    notify("the end")
    received = [manager.recv(100) for _ in range(4)]
    assert received == [b"WATCHDOG=1"] * 3 + [b"the end"]


def test_the_watchdog_of_another_process_is_not_fed(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "2000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid() + 1))
    asyncio.run(watchdog(lambda: True))
    notify("the end")
    assert manager.recv(100) == b"the end"
