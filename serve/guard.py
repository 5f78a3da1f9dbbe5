"""Checks who may call: the Host header, the Origin header, API keys, and uploads that are refused before they are sent.

Pure ASGI, so that streaming and disconnects pass through untouched.
"""

import hashlib
import hmac
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from ..kernels.errors import AfnextError
from .errors import ApiError
from .settings import Settings

_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_SUBPROTOCOL = "openai-insecure-api-key."
OPEN_PATHS = ("/", "/static/", "/health", "/health/live", "/health/ready", "/favicon.ico")


def read_keys(path: Path | None, environment: str | None) -> dict[str, str]:
    """Names of API keys by SHA-256 (hex), from a file's lines `name:sha256` and a variable's `key,key` or `name:key`.

    Raises AfnextError for a line that is neither.
    """
    keys: dict[str, str] = {}
    if path is not None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise AfnextError(f"the API keys in {path} cannot be read: {error}") from None
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            name, colon, digest = line.strip().rpartition(":")
            if not colon or len(digest) != 64 or not all(char in "0123456789abcdef" for char in digest.lower()):
                raise AfnextError(f"line {number} of {path} should read NAME:SHA256, the key's SHA-256 in hexadecimal")
            keys[digest.lower()] = name
    for number, entry in enumerate(filter(None, (environment or "").split(",")), 1):
        name, colon, key = entry.strip().rpartition(":")
        if not key:
            raise AfnextError(
                "an API key in AFNEXT_API_KEYS is empty; write NAME:KEY or KEY, with commas between them."
            )
        keys[hashlib.sha256(key.encode()).hexdigest()] = name if colon else f"key{number}"
    return keys


def check_host(headers: Headers, settings: Settings) -> None:
    """Raise ApiError (403) for an unknown Host header, as in DNS rebinding by a page of another site."""
    if not settings.loopback and not settings.allowed_hosts:
        return
    host = headers.get("host", "").lower()
    name = host if host.endswith("]") else host.rpartition(":")[0] or host
    if name not in _LOOPBACK and name not in settings.allowed_hosts and host not in settings.allowed_hosts:
        raise ApiError(403, "forbidden_host", "this host name is not served here; see --allowed-host")


def check_origin(headers: Headers, settings: Settings) -> None:
    """Raise ApiError (403) if the browser sends the request for a page of another site."""
    origin = headers.get("origin")
    if origin is None or origin in settings.cors_origins:
        return
    try:
        site = urlsplit(origin).netloc.lower()
    except ValueError:
        site = ""
    if not site or site != headers.get("host", "").lower():
        raise ApiError(403, "forbidden_origin", "pages of other sites may not call; see --cors-origin")


def key_name(headers: Headers, path: str, keys: Mapping[str, str]) -> str:
    """The name of the caller's API key, "" if none is needed. Raises ApiError (401) without a valid key."""
    if not keys or path in OPEN_PATHS or path.startswith("/static/"):
        return ""
    given = ""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        given = value.strip()
    for protocol in headers.get("sec-websocket-protocol", "").split(","):
        if protocol.strip().startswith(_SUBPROTOCOL):
            given = protocol.strip().removeprefix(_SUBPROTOCOL)
    digest = hashlib.sha256(given.encode("latin-1")).hexdigest()  # the bytes that were sent
    found = [name for known, name in keys.items() if hmac.compare_digest(known, digest)]
    if not found:
        message = "the API key is wrong" if given else "an API key is needed: send Authorization: Bearer KEY"
        raise ApiError(401, "invalid_api_key", message, headers={"WWW-Authenticate": "Bearer"})
    return found[0]
