"""Runs the server: loads the model, listens, and shuts down in order."""

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import uvicorn

from ..kernels.errors import AfnextError
from ..runtime.app.api import Model
from .app import create_app
from .connection import HttpConnection, WebSocketConnection
from .local import LocalBackend
from .notify import notify, watchdog
from .server import Server
from .settings import Settings
from .speech import Speaker

_log = logging.getLogger("afnext.serve")
_END_SECONDS = 10.0


def check(settings: Settings) -> None:
    """Raise AfnextError for an address that others could reach without a key."""
    if not settings.loopback and not settings.keys and not settings.no_auth:
        raise AfnextError(
            f"listening on {settings.host} without API keys lets everyone in the network use the model; give keys with "
            "--api-key-file or AFNEXT_API_KEYS, or say --no-auth."
        )


def run(
    settings: Settings,
    load: Callable[[], Model],
    *,
    tls: tuple[str, str] | None = None,
    speaker: Speaker | None = None,
) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit code: 0, or 1 if the model cannot be loaded or has failed.

    Raises AfnextError for an address, a certificate or a folder that cannot be used, before the model is loaded.
    """
    check(settings)
    with bound(settings) as listening:
        scheme, port = "https" if tls else "http", listening.getsockname()[1]
        print(f"{settings.names[0]} on {scheme}://{settings.host}:{port}", file=sys.stderr, flush=True)
        return asyncio.run(_run(settings, load, listening, tls, speaker))


def bound(settings: Settings) -> socket.socket:
    """A socket that listens at the address. Raises AfnextError if it cannot."""
    host, port = settings.host, settings.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise AfnextError(f"port {port} of {host} is in use; choose another one with --port.") from None
        raise AfnextError(f"the server cannot listen on port {port} of {host}: {error.strerror or error}.") from None


def log_requests() -> None:
    """Write the line of JSON of each request to stderr, without a prefix."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    requests = logging.getLogger("afnext.serve.requests")
    requests.addHandler(handler)
    requests.propagate = False


async def _run(
    settings: Settings,
    load: Callable[[], Model],
    listening: socket.socket,
    tls: tuple[str, str] | None,
    speaker: Speaker | None,
) -> int:
    backend = LocalBackend(load, share_cache=settings.share_cache)
    try:
        server = Server(backend, settings, speaker)
    except OSError as error:
        raise AfnextError(f"{settings.state_dir} cannot keep files and contexts: {error.strerror or error}.") from None
    http = listener(server, tls)
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, _stop, stop, server)
    serving = asyncio.create_task(http.serve(sockets=[listening]))
    loading = asyncio.create_task(_load(backend, stop))
    watching = asyncio.create_task(_watch(backend, stop))
    living = asyncio.create_task(watchdog(lambda: not backend.dead))
    try:
        await asyncio.wait({asyncio.create_task(stop.wait()), serving}, return_when=asyncio.FIRST_COMPLETED)
        running = not serving.done() and not backend.dead
        if running and not await server.drain(settings.drain_seconds):
            _log.warning("%d requests did not end in time and are broken off", server.requests)
    finally:
        notify("STOPPING=1")
        server.draining = True
        server.stop.set()
        dead = backend.dead
        for task in (loading, watching, living):
            task.cancel()
        http.should_exit = True
        if dead:
            _end_soon(1)
        with contextlib.suppress(asyncio.CancelledError):
            await serving
        _end_soon(1 if dead or backend.failure is not None else 0)
    if backend.failure is not None:
        raise backend.failure
    return 1 if dead else 0


def listener(server: Server, tls: tuple[str, str] | None = None) -> uvicorn.Server:
    """The uvicorn server for a server's connections. tls: paths of a certificate and its key.

    Raises AfnextError if they cannot be read.
    """
    certificate, key = tls or (None, None)

    def patience() -> float:
        return server.settings.slow_seconds

    config = uvicorn.Config(
        create_app(server),
        http=cast(type[asyncio.Protocol], partial(HttpConnection, patience=patience)),
        ws=cast(type[asyncio.Protocol], partial(WebSocketConnection, patience=patience)),
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        ssl_certfile=certificate,
        ssl_keyfile=key,
        timeout_graceful_shutdown=5,
        ws_max_size=15 << 20,
    )
    try:
        config.load()
    except OSError as error:
        reason = error.strerror or "they are not a pair in PEM format"
        raise AfnextError(f"the certificate {certificate} and the key {key} cannot be read: {reason}.") from None
    return _Http(config)


class _Http(uvicorn.Server):
    """uvicorn without its own signal handlers: requests are drained before it stops."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


def _stop(stop: asyncio.Event, server: Server) -> None:
    if stop.is_set():  # second signal: exit now; workers exit when their standard input closes
        server.remove_temporary_files()
        os._exit(1)
    stop.set()


def _end_soon(code: int) -> None:
    """End the process even if a thread hangs, such as a stuck engine or a model that is still loading."""

    def end() -> None:
        _log.warning("a thread did not end; the process ends without it")
        os._exit(code)

    timer = threading.Timer(_END_SECONDS, end)
    timer.daemon = True
    timer.start()


async def _load(backend: LocalBackend, stop: asyncio.Event) -> None:
    try:
        await backend.start()
        sys.stderr.write("ready\n")  # in one piece: other threads log
        sys.stderr.flush()
        notify("READY=1")
    except Exception:
        stop.set()


async def _watch(backend: LocalBackend, stop: asyncio.Event) -> None:
    """Stop the server when the engine has failed, so that its supervisor can restart it."""
    while True:
        await asyncio.sleep(1.0)
        if backend.dead:
            _log.critical("the engine has failed; the server ends")
            stop.set()
