"""GET /health, /health/live, /health/ready, /metrics and /v1/status."""

import time

from .http import Exchange
from .server import Server


async def live(server: Server, exchange: Exchange) -> None:
    """200 while the engine works and, if it has requests, makes progress."""
    alive = not server.backend.dead and not server.backend.stuck
    await exchange.json({"status": "alive" if alive else "dead"}, 200 if alive else 503)


async def ready(server: Server, exchange: Exchange) -> None:
    """200 while the server accepts requests: not while the model loads or the server shuts down."""
    state = "draining" if server.draining else "loading" if server.backend.loading else "ready"
    if state == "ready" and server.backend.dead:
        state = "dead"
    await exchange.json({"status": state}, 200 if state == "ready" else 503)


async def metrics(server: Server, exchange: Exchange) -> None:
    """All metrics for Prometheus."""
    await exchange.reply(200, server.metrics.text(), "text/plain; version=0.0.4; charset=utf-8")


async def status(server: Server, exchange: Exchange) -> None:
    """Settings and statistics of the work in progress, never text."""
    settings = server.settings
    state = {} if server.backend.loading else server.backend.status()
    state.pop("step_counts", None)  # a histogram of /metrics
    await exchange.json(
        {
            "object": "status",
            "models": list(settings.names),
            "uptime_seconds": round(time.time() - server.started, 1),
            "requests": server.requests,
            "spool_bytes": server.spool.bytes,
            "draining": server.draining,
            "settings": {
                "max_requests": settings.max_requests,
                "max_queued_tokens": settings.max_queued_tokens,
                "max_json_bytes": settings.max_json_bytes,
                "max_upload_bytes": settings.max_upload_bytes,
                "decode_workers": settings.decode_workers,
            },
            "engine": state,
        }
    )
