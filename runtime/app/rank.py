"""The process of a rank other than the first: `python -m afnext.runtime.app.rank FD`, started by `load_parallel`.

It ends when rank 0 closes its end of the socket FD, even during a computation, and when rank 0's process has ended. It
ignores signals of the terminal and of a service manager: rank 0 handles them, and completes requests first.
"""

import contextlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import torch

from ..engine.executor import LocalExecutor
from ..engine.rank import Rank, receive, send
from ..errors import GroupError
from ..model.opened import open_checkpoint
from .loading import NetworkSettings, load_network
from .tensor_parallel import RankSettings

_SECONDS_TO_END = 1.0  # time for a computing rank to end after rank 0 has ended


def main(descriptor: int) -> None:
    """Load this rank's part and run rank 0's operations. After an error, sends it and exits with status 1."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()
    with socket.socket(fileno=descriptor) as control:
        threading.Thread(target=_end_with, args=(control, parent), daemon=True).start()
        try:
            _serve(control)
        except BaseException as error:
            answer = {"error": f"{type(error).__name__}: {error}", "lost": isinstance(error, GroupError)}
            with contextlib.suppress(OSError):
                send(control, json.dumps(answer).encode())
            os._exit(1)  # a collective may be in progress
        os._exit(0)


def _serve(control: socket.socket) -> None:
    text = receive(control)
    if text is None:
        return
    settings = RankSettings.from_json(text)
    network_settings, device = NetworkSettings.from_dict(settings.network), torch.device(settings.device)
    torch.set_num_threads(settings.threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    checkpoint = open_checkpoint(Path(settings.folder))
    options = network_settings.within(checkpoint, device, settings.size)
    send(control, b"{}")
    group = settings.connect()
    rank = Rank(LocalExecutor(load_network(checkpoint, network_settings, device, group=group), options), group)
    send(control, b"{}")
    group.minimum(options.max_kv_tokens or 0)
    rank.serve(control)


def _end_with(control: socket.socket, parent: int) -> None:
    """End this process soon after rank 0 has closed its end, or has ended while another process holds that end open."""
    poll = select.poll()
    poll.register(control, 0)
    while not poll.poll(1000) and os.getppid() == parent:
        pass
    time.sleep(_SECONDS_TO_END)
    os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
