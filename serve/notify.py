"""Notifies systemd that the server is ready, stopping, or alive (sd_notify without a library)."""

import asyncio
import os
import socket
from collections.abc import Callable


def notify(state: str) -> None:
    """Send a state such as "READY=1" to the service manager, if there is one."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # an abstract socket
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sending:
        sending.sendto(state.encode(), address)


async def watchdog(alive: Callable[[], bool]) -> None:
    """Notify the service manager twice per watchdog interval that the server is alive. Returns without a watchdog."""
    interval = int(os.environ.get("WATCHDOG_USEC", "0")) / 2e6
    if not interval or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return
    while True:
        if alive():
            notify("WATCHDOG=1")
        await asyncio.sleep(interval)
