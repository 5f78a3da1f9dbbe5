"""Rank 0's connections to the processes of the other ranks: sends messages, and notices when a process has ended."""

import contextlib
import json
import logging
import os
import selectors
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable

from ..errors import EngineDeadError, GroupError
from .rank import receive, send

_SECONDS_TO_END = 5.0  # time for ranks to end by themselves before they are killed
_SECONDS_TO_EXPLAIN = 2.0  # time that rank 0 waits for the report of the rank whose end made a collective fail
_log = logging.getLogger("afnext.engine")


class ProcessLinks:
    """See `Links`. A failing process sends its error as JSON, {"error", "lost"}, before it ends; lost: whether it
    failed because another rank had ended."""

    def __init__(self, processes: list[subprocess.Popen[bytes]], sockets: list[socket.socket]):
        self._processes = processes
        self._sockets = sockets
        self._lock = threading.Lock()
        self._known = threading.Event()
        self._owner = os.getpid()
        self._closing = False
        self._failure: EngineDeadError | None = None
        self._abort: Callable[[], None] = lambda: None

    @property
    def failure(self) -> EngineDeadError | None:
        """See `Links`."""
        return self._failure

    def watch(self, abort: Callable[[], None]) -> None:
        """Start to watch for the end of processes. abort: makes the collectives of rank 0 fail."""
        self._abort = abort
        threading.Thread(target=self._watch, name="afnext-ranks", daemon=True).start()

    def send(self, message: bytes) -> None:
        """See `Links`."""
        for control in self._sockets:
            send(control, message)

    def wait_for_all(self) -> None:
        """Wait for an answer from each process, before `watch`. Raises EngineDeadError if one has failed or ended."""
        for rank, control in enumerate(self._sockets, 1):
            answer = _parsed(receive(control))
            if answer is None or "error" in answer:
                raise self._end(self._described(rank, answer))

    def fail(self, error: BaseException) -> EngineDeadError:
        """See `Links`."""
        if isinstance(error, GroupError | OSError):
            self._known.wait(_SECONDS_TO_EXPLAIN)
        return self._end(f"rank 0 failed ({type(error).__name__}: {error})")

    def close(self) -> None:
        """See `Links`. In a forked child it does nothing: the ranks are the parent's."""
        if os.getpid() != self._owner:
            return
        self._closing = True
        for control in self._sockets:
            with contextlib.suppress(OSError):
                control.shutdown(socket.SHUT_RDWR)
        end = time.monotonic() + _SECONDS_TO_END
        for process in self._processes:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for control in self._sockets:
            control.close()

    def _watch(self) -> None:
        """Wait for the first process that fails. One that failed because another ended is not the cause; wait for that
        one."""
        lost: str | None = None
        with selectors.DefaultSelector() as selector:
            for rank, control in enumerate(self._sockets, 1):
                selector.register(control, selectors.EVENT_READ, rank)
            while selector.get_map():
                ready = selector.select(None if lost is None else _SECONDS_TO_EXPLAIN / 2)
                if not ready:
                    break
                for key, _ in ready:
                    selector.unregister(key.fileobj)
                    answer = _parsed(receive(self._sockets[key.data - 1]))
                    described = self._described(key.data, answer)
                    if self._closing:
                        return
                    if answer is None or not answer.get("lost"):
                        self._end(described)
                        return
                    lost = described
        if lost is not None:
            self._end(lost)

    def _described(self, rank: int, answer: dict[str, object] | None) -> str:
        if answer is not None:
            return f"rank {rank} failed ({answer.get('error')})"
        try:
            code = self._processes[rank - 1].wait(_SECONDS_TO_EXPLAIN / 2)
        except subprocess.TimeoutExpired:
            return f"rank {rank} closed its connection"
        if code < 0:
            return f"the process of rank {rank} was killed by {signal.Signals(-code).name}"
        return f"the process of rank {rank} ended with status {code}"

    def _end(self, cause: str) -> EngineDeadError:
        """Record the cause unless one is known, and end all processes."""
        with self._lock:
            if self._failure is None:
                self._failure = EngineDeadError(
                    f"{cause}, so the model's other processes and all of its requests have been ended. Load the model "
                    "again, or restart the server."
                )
                _log.critical("%s", self._failure)
                for process in self._processes:
                    process.kill()
                self._known.set()
                self._abort()
            return self._failure


def _parsed(message: bytes | None) -> dict[str, object] | None:
    if message is None:
        return None
    answer = json.loads(message)
    return answer if isinstance(answer, dict) else None
