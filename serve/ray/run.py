"""Runs a fleet from the command line: starts or joins a cluster, serves until a signal, stops what it has started."""

import logging
import signal
import sys
import tempfile
import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from ...kernels.errors import AfnextError
from ...runtime.app.ray_cluster import connected
from ...runtime.model.hub import resolve
from ...runtime.model.opened import open_checkpoint
from ..cli import Plan
from ..run import bound
from ..settings import Settings
from .options import FRONT_CPUS

_NAME = "afnext"
_log = logging.getLogger("afnext.serve")


def run(plan: Plan) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit code.

    Raises AfnextError if the model cannot be loaded, for an address that cannot be used, and for options that a fleet
    does not support.
    """
    fleet, settings = plan.fleet, plan.settings
    if fleet.ray_address is not None and settings.state_dir is None:
        raise AfnextError("with --ray-address, give --state-dir: a folder on storage that all machines share.")
    if fleet.ray_address is None:  # on another cluster, the model may be only where the replicas run
        open_checkpoint(resolve(plan.loading.model, revision=plan.loading.revision))
        settings = replace(settings, port=free_port(settings))
    places = (fleet.max_replicas or fleet.replicas) * (plan.loading.threads or 1) + FRONT_CPUS * fleet.fronts
    with ExitStack() as stack:
        folder = settings.state_dir
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="afnext-state-")))
        settings = replace(settings, state_dir=folder.resolve())
        stack.enter_context(connected(fleet.ray_address, places, logs=True))
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        return _serve(replace(plan, settings=settings), stop)


def free_port(settings: Settings) -> int:
    """The port to listen on, or one that is free where the settings leave the choice.

    Raises AfnextError if the address cannot be used. Ray's proxy would share the port with another server: it sets
    SO_REUSEPORT.
    """
    with bound(settings) as listening:
        port: int = listening.getsockname()[1]
        return port


def _serve(plan: Plan, stop: threading.Event) -> int:
    from ray import serve

    from .deployment import application

    certificate, key = plan.tls or (None, None)
    scheme, settings = "https" if plan.tls else "http", plan.settings
    if running := sorted(serve.status().applications):
        raise AfnextError(
            f"the cluster already runs Ray Serve ({', '.join(running)}), which a second fleet would replace or end; "
            "stop it first, or use another cluster."
        )
    print(f"{settings.names[0]} on {scheme}://{settings.host}:{settings.port}", file=sys.stderr, flush=True)
    address = {"host": plan.settings.host, "port": plan.settings.port}
    serve.start(proxy_location="HeadOnly", http_options={**address, "ssl_certfile": certificate, "ssl_keyfile": key})
    try:
        try:
            serve.run(application(plan), name=_NAME, route_prefix="/")
        except RuntimeError as error:  # Ray Serve's error after a replica's constructor has failed every time
            raise AfnextError(f"the fleet has not started ({error}); the lines above say why.") from None
        print("ready", file=sys.stderr, flush=True)
        stop.wait()
        try:
            serve.delete(_NAME)
        except TimeoutError:
            _log.warning("some requests did not end in time and are broken off")
    finally:
        serve.shutdown()
    return 0
