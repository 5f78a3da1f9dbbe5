"""GET /v1/models and /v1/models/{model}."""

from typing import Any

from .http import Exchange
from .server import Server


async def list_models(server: Server, exchange: Exchange) -> None:
    """The served model under each of its names."""
    await exchange.json({"object": "list", "data": [_model(server, name) for name in server.settings.names]})


async def get_model(server: Server, exchange: Exchange) -> None:
    """One name of the served model."""
    await exchange.json(_model(server, server.served(exchange.path["model"])))


def _model(server: Server, name: str) -> dict[str, Any]:
    about = {} if server.backend.loading else server.backend.description()
    about = {**about, "voice": server.speaker.name if server.speaker else None}
    return {"id": name, "object": "model", "created": int(server.started), "owned_by": "nvidia", "afnext": about}
