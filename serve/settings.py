"""Settings of `afnext serve`."""

from dataclasses import dataclass, field
from pathlib import Path

MIB = 1 << 20
SLOWEST = 1024  # bytes per second at which a client has to send a body and read a response


@dataclass(frozen=True)
class Settings:
    """How the server listens and what it allows.

    host, port: where it listens. keys: name of each API key by its SHA-256, hex; empty for none. no_auth: allow a
    public address without keys. allowed_hosts: values of the Host header that are accepted besides the loopback names.
    cors_origins: origins that may call from a browser, besides the server's own page.
    audio_hosts: hosts whose https URLs are fetched as recordings.
    names: names under which the model is served, the first is its own. share_cache: let keys share cached prompts.
    max_requests: unfinished requests; None for four times the engine's batch. max_queued_tokens: prompt tokens that
    wait. max_json_bytes, max_upload_bytes: of a request's body. spool_bytes: of all bodies on disk together.
    slow_seconds: a request's head has to arrive within this time. In every interval of this length, the client has to
    send 1 KiB of the body, or read 1 KiB of the response, per second.
    decode_workers, decode_seconds, decode_bytes: processes that decode audio, and the limits of each.
    max_live: realtime sessions at once.
    drain_seconds: time that running requests get after SIGTERM. state_dir: where files and contexts are kept.
    store_bytes: of the files there, and of the contexts.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keys: dict[str, str] = field(default_factory=dict)
    no_auth: bool = False
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    audio_hosts: tuple[str, ...] = ()
    names: tuple[str, ...] = ("afnext",)
    share_cache: bool = False
    max_requests: int | None = None
    max_queued_tokens: int = 360_000
    max_live: int = 16
    max_json_bytes: int = 128 * MIB
    max_upload_bytes: int = 512 * MIB
    spool_bytes: int = 10 << 30
    slow_seconds: float = 30.0
    decode_workers: int = 2
    decode_seconds: float = 120.0
    decode_bytes: int = 3 << 30
    drain_seconds: float = 30.0
    state_dir: Path | None = None
    store_bytes: int = 20 << 30

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in ("127.0.0.1", "::1", "localhost")
