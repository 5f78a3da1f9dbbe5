"""Chooses the replica for a request: one that has its recording in the cache, if that one is up and has room.

A route is a short hash of the first recording that a request names. Each route has its own order of the replicas
(rendezvous hashing): the first is its home, and the next ones take requests that the home has no room for. When a
replica is added or removed, the others keep their order, so only the routes whose home is that replica move.
"""

import hashlib
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

_BYTES = 4  # per route
_OVERFLOW = 2  # replicas tried after the home; a low limit saves useless attempts in a large, full fleet
_ID = re.compile(r"(?:ctx_|file-)[0-9a-f]{32}([0-9a-f]{8})")


def route_of(digest: bytes, key: str) -> str:
    """The route of a recording for an API key, given a hash of its file. Keys share no cache, nor routes."""
    return hashlib.blake2b(digest + key.encode(), digest_size=_BYTES).hexdigest()


def new_route() -> str:
    """A random route, for a request without a recording."""
    return secrets.token_hex(_BYTES)


def route_in(identifier: str) -> str | None:
    """The route at the end of a file's or context's id."""
    found = _ID.fullmatch(identifier)
    return found[1] if found else None


def preference(route: str, replicas: Iterable[str]) -> list[str]:
    """All replicas in the order in which they should answer a route."""
    return sorted(replicas, key=lambda replica: (_weight(route, replica), replica))


def candidates(route: str, replicas: Iterable[str]) -> list[str]:
    """The replicas to try in turn, until one accepts the request."""
    return preference(route, replicas)[: 1 + _OVERFLOW]


@dataclass(frozen=True)
class Refusal:
    """A replica's refusal, after which another replica is tried: status, Retry-After in seconds, and ASGI messages."""

    status: int
    retry_after: int
    messages: Sequence[Any] = ()

    def __lt__(self, other: "Refusal") -> bool:
        """Whether this refusal is better for a client: a short Retry-After before a long one, an outage last."""
        return (self.status, self.retry_after) < (other.status, other.retry_after)


def _weight(route: str, replica: str) -> bytes:
    return hashlib.blake2b(f"{route} {replica}".encode(), digest_size=16).digest()
