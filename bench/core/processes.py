"""Child processes that do not outlive the one that started them."""

import os
import threading
import time

_POLL = 0.5  # seconds


def end_with_parent(pid: int) -> None:
    """From now on end this process at once when `pid`, which started it, is no longer its parent.

    A parent that is killed cannot end its children itself.
    """

    def watch() -> None:
        while os.getppid() == pid:
            time.sleep(_POLL)
        os._exit(1)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()
