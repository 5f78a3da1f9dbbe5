"""The fleet as an application of Ray Serve: `Front` receives requests, and `Listener` answers them.

Ray Serve starts, scales, checks and replaces the processes. `front.py` chooses the replica for a request; the router
only sends each call to the replica that it names. Only this file, `run.py`, `router.py` and `loopback.py` use Ray
Serve's interface.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from contextvars import Context
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from ...kernels.errors import AfnextError
from ...runtime.app.ray_cluster import gpus_of_a_replica
from ..app import Guarded, create_routes
from ..cli import Plan, command_line, log, parsed
from ..http import Message, Receive, Scope, Send
from ..local import LocalBackend
from ..server import Server
from ..speech import speaker_of
from . import front, present
from .bridge import Bridge, cut
from .front import ReplicaLostError
from .loopback import keep_to_loopback
from .options import FRONT_CPUS
from .router import NamedRouter

_ID = b"x-request-id"
_MISROUTED: Message = {"type": "afnext.misrouted"}
_ONGOING = 10_000  # calls at once; the application itself refuses requests under load
_BATCH = 32  # requests that an engine processes at once
_UTILIZATION = 0.6
_DOWNSCALE_SECONDS = 600.0  # long, because a removed replica's cache is lost
_HEALTH_SECONDS = 10.0
_STARTS = 3  # attempts of a replica that cannot load the model
_SAVE_SECONDS = 60.0  # to save contexts, after the last request


class Listener:
    """A replica: the whole application with a model."""

    async def __init__(self, plan: Plan):  # type: ignore[misc] # Ray Serve awaits it
        """Load the model."""
        keep_to_loopback()
        log(plan.verbose)
        speaker = None if plan.speaker is None else speaker_of(plan.speaker)
        self._name = serve.get_replica_context().replica_id.unique_id
        self._backend = LocalBackend(plan.loading.load, share_cache=plan.settings.share_cache)
        self._bridge = Bridge(create_routes(Server(self._backend, plan.settings, speaker)))
        await self._backend.start()
        await self._bridge.start()

    async def http(self, replica: str, scope: Scope, body: Sequence[Any]) -> AsyncIterator[list[Message]]:
        """See `Replicas.request`. body: bytes, or references to them."""
        if replica != self._name:
            yield [_MISROUTED]
            return
        pieces = [piece for part in body for piece in cut(await part if isinstance(part, ray.ObjectRef) else part)]
        async for messages in self._bridge.request(scope, pieces):
            yield messages

    async def websocket(self, replica: str, session: str, scope: Scope) -> AsyncIterator[list[Message]]:
        """See `Replicas.connect`."""
        if replica != self._name:
            yield [_MISROUTED]
            return
        async for messages in self._bridge.connect(session, scope):
            yield messages

    async def send(self, replica: str, session: str, messages: Sequence[Message]) -> bool:
        """See `Replicas.send`."""
        return replica == self._name and await self._bridge.receive(session, messages)

    async def check_health(self) -> None:
        """Raise if the replica has failed; Ray Serve then replaces it."""
        if self._backend.dead or self._backend.stuck:
            raise RuntimeError("the engine has failed")

    async def __del__(self) -> None:
        await self._bridge.close()


class RayReplicas:
    """The replicas of the fleet; see `front.Replicas`."""

    def __init__(self, listener: DeploymentHandle):
        self._http = listener.options(method_name="http", stream=True)
        self._websocket = listener.options(method_name="websocket", stream=True)
        self._send = listener.options(method_name="send")

    def names(self) -> Sequence[str]:
        """See `Replicas`."""
        return present.names

    @asynccontextmanager
    async def request(
        self, replica: str, scope: Scope, body: bytes | Path
    ) -> AsyncIterator[AsyncIterator[list[Message]]]:
        """See `Replicas`."""
        part = body if isinstance(body, bytes) else await asyncio.to_thread(_shared, body)
        response = _called(self._http, replica, scope, [part])  # in a list, so that Ray Serve does not resolve it
        try:
            yield _messages(response)
        finally:
            response.cancel()

    @asynccontextmanager
    async def connect(self, replica: str, session: str, scope: Scope) -> AsyncIterator[AsyncIterator[list[Message]]]:
        """See `Replicas`."""
        response = _called(self._websocket, replica, session, scope)
        try:
            yield _messages(response)
        finally:
            response.cancel()

    async def send(self, replica: str, session: str, messages: Sequence[Message]) -> bool:
        """See `Replicas`."""
        try:
            taken: bool = await _called(self._send, replica, session, messages)
            return taken
        except (RayError, RayServeException) as error:
            raise ReplicaLostError from error


def _called(handle: DeploymentHandle, *arguments: Any) -> Any:
    """The response to a call. Ray Serve mistakes concurrent calls in one context for a single call."""
    return Context().run(handle.remote, *arguments)


async def _messages(response: Any) -> AsyncIterator[list[Message]]:
    try:
        async for messages in response:
            if messages[0]["type"] == _MISROUTED["type"]:
                raise ReplicaLostError
            yield messages
    except (RayError, RayServeException) as error:
        raise ReplicaLostError from error


def _shared(path: Path) -> Any:
    """A file's bytes in memory that processes share."""
    return ray.put(path.read_bytes())


@serve.ingress()
class Front:
    """Receives requests: see `front.Front`."""

    def __init__(self, plan: Plan, listener: DeploymentHandle):
        keep_to_loopback()
        log(plan.verbose)
        self._plan = plan
        self._listener = listener

    def __serve_build_asgi_app__(self) -> ASGIApp:
        fronted = Guarded(front.Front(self._plan.settings, RayReplicas(self._listener)), self._plan.settings)
        return _named_by_ray(fronted)


def _named_by_ray(application: ASGIApp) -> ASGIApp:
    """The application with Ray Serve's id for each request. Ray Serve adds the id to the response itself."""

    async def named(scope: Scope, receive: Receive, send: Send) -> None:
        given = dict(scope.get("headers", ())).get(_ID, b"").decode("latin-1")
        if re.fullmatch(r"[\w-]{1,64}", given):
            scope["afnext.id"] = given

        async def without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [(name, value) for name, value in message["headers"] if name != _ID]}
            await send(message)

        await application(scope, receive, without_id)

    return named


def application(plan: Plan) -> serve.Application:
    """The fleet of a plan, as an application for the cluster that this process is connected to."""
    fleet, ranks = plan.fleet, max(plan.loading.tp, plan.loading.sp)
    gpus = gpus_of_a_replica(fleet.gpus_per_replica, plan.loading.device, ranks)
    size: dict[str, Any] = {"num_replicas": fleet.replicas}
    if fleet.max_replicas is not None:
        size = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=fleet.replicas,
                max_replicas=fleet.max_replicas,
                target_ongoing_requests=_UTILIZATION * _BATCH,
                downscale_delay_s=_DOWNSCALE_SECONDS,
            )
        }
    common: dict[str, Any] = {
        "max_ongoing_requests": _ONGOING,
        "graceful_shutdown_timeout_s": plan.settings.drain_seconds + _SAVE_SECONDS,
        "logging_config": {"enable_access_log": False},
    }
    listener = serve.deployment(
        name="Listener",
        ray_actor_options={"num_cpus": plan.loading.threads or 1, "num_gpus": gpus},
        request_router_config=RequestRouterConfig(request_router_class=NamedRouter),
        health_check_period_s=_HEALTH_SECONDS,
        max_constructor_retry_count=_STARTS,
        **size,
        **common,
    )(Listener)
    receiver = serve.deployment(
        name="Front", num_replicas=fleet.fronts, ray_actor_options={"num_cpus": FRONT_CPUS}, **common
    )(Front)
    return receiver.bind(plan, listener.bind(plan))


def build(arguments: Mapping[str, Any]) -> serve.Application:
    """The application of a Serve configuration file, whose `args` are the options of `afnext serve`, such as
    `{model: next, max-replicas: 4, share-cache: true}`. Raises AfnextError without `state-dir`."""
    plan = parsed(["--ray", *command_line(arguments)])
    if plan.settings.state_dir is None:
        raise AfnextError("give state-dir: a folder on storage that all machines share.")
    return application(plan)
