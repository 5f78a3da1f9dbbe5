"""Child processes that end with their parent."""

import os
import threading
import time

_POLL = 0.5  # seconds


def end_with_parent(pid: int) -> None:
    """End this process as soon as its parent `pid` has ended.

    A parent that is killed cannot end its children itself.
    """

    def watch() -> None:
        while os.getppid() == pid:
            time.sleep(_POLL)
        os._exit(1)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()
