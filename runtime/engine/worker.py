"""The engine's thread."""

import contextvars
import queue
import threading
import weakref
from functools import partial

import torch

from ...kernels.errors import AfnextError
from .steps import Inbox, Steps

_IDLE_SECONDS = 30.0  # idle time after which the cache releases memory that nothing uses


class Worker:
    """A daemon thread that does the steps while there is work. While idle it does not keep the engine alive."""

    def __init__(self, inbox: Inbox):
        self._inbox = inbox
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._stopping = False
        self._ended = False

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def is_current(self) -> bool:
        """Whether the calling thread is the engine's."""
        return self._thread is threading.current_thread()

    def start(self, steps: Steps) -> None:
        """Start the thread unless it runs. Raises AfnextError while the interpreter exits."""
        if self.alive:
            return
        if self._ended:
            raise AfnextError("the engine's thread has ended, as the interpreter is exiting")
        with self._lock:
            if not self.alive:
                # A new context: the caller's forced backend and other variables must not apply to all requests.
                self._stopping = False
                work = partial(contextvars.Context().run, self._run, weakref.ref(steps))
                self._thread = threading.Thread(target=work, name="afnext-engine", daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """End the thread after the step in progress, and wait for its end."""
        self._stopping = True
        self._inbox.wake.put(None)
        if self._thread is not None and self.alive and not self.is_current:
            self._thread.join()

    def end(self) -> None:
        """Stop for good, when the engine is dropped or the interpreter exits. Waits up to ten seconds."""
        self._ended = self._stopping = True
        self._inbox.wake.put(None)
        if self._thread is not None and self.alive and not self.is_current:
            self._thread.join(timeout=10)

    def _run(self, reference: "weakref.ref[Steps]") -> None:
        steps = reference()
        if steps is not None and steps.device.type == "cuda":
            torch.cuda.set_device(steps.device)
        while steps is not None and not self._stopping:
            if not steps.step():
                del steps
                idle = self._sleep()
                steps = reference()
                if idle and steps is not None:
                    steps.trim()

    def _sleep(self) -> bool:
        """Wait until there is work. Returns whether there was none for `_IDLE_SECONDS`."""
        try:
            self._inbox.wake.get(timeout=_IDLE_SECONDS)
            while not self._inbox.wake.empty():
                self._inbox.wake.get_nowait()
        except queue.Empty:
            return True
        return False
