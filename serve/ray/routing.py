"""Which replica answers a request: one that has heard its recording, if it is there and has room.

A route is a short hash of the first recording that a request names. Each route has an order of the replicas of its own
(rendezvous hashing): the first is its home, the next ones take what the home has no room for. When a replica comes or
goes, the other replicas keep their places in every order, so only the routes at home on that replica move.
"""

import hashlib
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

_BYTES = 4  # of a route
_OVERFLOW = 2  # replicas that are asked after the home: in a large fleet that is full, few are asked for nothing
_ID = re.compile(r"(?:ctx_|file-)[0-9a-f]{32}([0-9a-f]{8})")


def route_of(digest: bytes, key: str) -> str:
    """The route of a recording, given a hash of its file, for an API key, which shares nothing with other keys."""
    return hashlib.blake2b(digest + key.encode(), digest_size=_BYTES).hexdigest()


def new_route() -> str:
    """The route of a request without a recording: any."""
    return secrets.token_hex(_BYTES)


def route_in(identifier: str) -> str | None:
    """The route in the id of a file or context, which ends with it."""
    found = _ID.fullmatch(identifier)
    return found[1] if found else None


def preference(route: str, replicas: Iterable[str]) -> list[str]:
    """All replicas in the order in which they should answer a route."""
    return sorted(replicas, key=lambda replica: (_weight(route, replica), replica))


def candidates(route: str, replicas: Iterable[str]) -> list[str]:
    """The replicas that a request is offered to, one after the other while they refuse it."""
    return preference(route, replicas)[: 1 + _OVERFLOW]


@dataclass(frozen=True)
class Refusal:
    """A replica's answer that another replica may better: its status, Retry-After in seconds, and its messages."""

    status: int
    retry_after: int
    messages: Sequence[Any] = ()

    def __lt__(self, other: "Refusal") -> bool:
        """Whether this is the better one for a client: to come again soon, rather than later, rather than an outage."""
        return (self.status, self.retry_after) < (other.status, other.retry_after)


def _weight(route: str, replica: str) -> bytes:
    return hashlib.blake2b(f"{route} {replica}".encode(), digest_size=16).digest()
