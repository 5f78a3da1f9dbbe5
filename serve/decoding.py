"""Decoding of uploads in a pool of worker processes (`worker.py`), each with limits on memory and time."""

import asyncio
import contextlib
import json
import logging
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.io.audio import Audio
from .errors import ApiError, overloaded

_log = logging.getLogger("afnext.serve")
_KEPT = {"PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "TMPDIR", "VIRTUAL_ENV", "SYSTEMROOT"}


class Spool:
    """Temporary files of requests in a folder of their own, with a limit on all of them together."""

    def __init__(self, max_bytes: int):
        self._folder = tempfile.TemporaryDirectory(prefix="afnext-serve-")
        self._max_bytes = max_bytes
        self._bytes = 0

    @property
    def bytes(self) -> int:
        """Bytes that requests in progress have reserved."""
        return self._bytes

    def path(self) -> Path:
        """The path of a new file."""
        return Path(self._folder.name, secrets.token_hex(16))

    def reserve(self, count: int) -> None:
        """Account for bytes about to be written. Raises ApiError (429) if all requests together write too much."""
        if self._bytes + count > self._max_bytes:
            raise overloaded("too many uploads are in progress")
        self._bytes += count

    def release(self, count: int) -> None:
        """Give reserved bytes back."""
        self._bytes -= count

    def close(self) -> None:
        """Remove the folder."""
        self._folder.cleanup()


class _Worker:
    """One process, started when it is first needed and replaced when it has died."""

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._process: asyncio.subprocess.Process | None = None

    async def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """The process's answer, or None if it died or took too long. A process that takes too long is killed."""
        answered = False
        try:
            process = await self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(request).encode() + b"\n")
            line = await asyncio.wait_for(process.stdout.readline(), seconds)
            answered = bool(line)
            return json.loads(line) if line else None
        except (asyncio.TimeoutError, OSError, ValueError):
            return None
        finally:
            if not answered:  # also if the request was cancelled: its answer must not go to the next request
                await self.kill()

    async def kill(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await asyncio.shield(process.wait())

    async def _running(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "afnext.serve.worker",
                str(self._max_bytes),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                limit=1 << 20,
                env=_environment(),
                start_new_session=True,  # the server alone handles Ctrl-C
            )
        return self._process


def _environment() -> dict[str, str]:
    """The environment variables that a worker needs. API keys are left out, so that a hostile file cannot leak them."""
    kept = {name: value for name, value in os.environ.items() if name in _KEPT or name.startswith("LC_")}
    return {**kept, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class DecodePool:
    """Worker processes that decode audio and extract the audio of large JSON bodies."""

    def __init__(
        self,
        workers: int,
        *,
        seconds: float,
        max_bytes: int,
        max_waiting: int = 64,
        observe: Callable[[float], None] = lambda seconds: None,
    ):
        """seconds, max_bytes: limits of one request. max_waiting: requests beyond it are refused. observe: called with
        the seconds that each request took."""
        self._observe = observe
        self._seconds = seconds
        self._idle: asyncio.LifoQueue[_Worker] = asyncio.LifoQueue()
        self._workers = [_Worker(max_bytes) for _ in range(workers)]
        for worker in self._workers:
            self._idle.put_nowait(worker)
        self._max_waiting = max_waiting
        self.waiting = 0

    @property
    def idle(self) -> int:
        """Number of idle workers."""
        return self._idle.qsize()

    async def decode(self, path: Path, name: str, *, spool: Spool, max_seconds: float, truncate: bool) -> Audio:
        """Decode a file. Raises ApiError if it cannot be decoded."""
        out = spool.path()
        request = {
            "op": "decode",
            "path": str(path),
            "name": name,
            "out": str(out),
            "max_seconds": max_seconds,
            "truncate": truncate,
        }
        try:
            result = await self._ask(request, name)
            samples = np.memmap(out, np.float32, "c", shape=(result["samples"],))
        finally:
            out.unlink(missing_ok=True)
        return Audio(samples, result["rate"], result["channels"], name, result["truncated"], tuple(result["warnings"]))

    async def extract(self, path: Path, out: Path) -> tuple[bytes, list[Path]]:
        """Move the base64 audio of a JSON body to files in the folder `out`. Returns the body and the files. Raises
        ApiError."""
        result = await self._ask({"op": "extract", "path": str(path), "out": str(out)}, "the body")
        return await asyncio.to_thread((out / "body").read_bytes), [Path(file) for file in result["files"]]

    async def close(self) -> None:
        """End all processes."""
        for worker in self._workers:
            await worker.kill()

    async def _ask(self, request: dict[str, Any], name: str) -> dict[str, Any]:
        if self.waiting >= self._max_waiting:
            raise overloaded("too many files wait to be decoded")
        self.waiting += 1
        try:
            worker = await self._idle.get()
        finally:
            self.waiting -= 1
        start = time.monotonic()
        try:
            result = await worker.ask(request, self._seconds)
        finally:
            self._idle.put_nowait(worker)
            self._observe(time.monotonic() - start)
        if result is None:
            _log.warning("a decoding worker died or ran out of time")
            code = "invalid_audio" if request["op"] == "decode" else "request_too_large"
            raise ApiError(400, code, f"{name} could not be decoded within the limits of time and memory")
        if "error" in result:
            code = {"too_long": "audio_too_long", "audio": "invalid_audio", "json": "invalid_json"}[result["kind"]]
            raise ApiError(400, code, result["error"])
        return result
