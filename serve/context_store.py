"""Contexts: recordings that the model has processed, kept for further questions.

The uploaded files are stored, and their keys and values are cached: contexts hold at most half of the KV cache. The
least recently used context is saved to disk, or dropped and recomputed for the next question about it. So a context
survives a restart of the server, and a question never fails because contexts fill the cache. If the disk is full,
saved keys and values are removed before recordings are refused.

Several servers may share the folder: each can answer about a context that another one has made. The modification time
of a context's description is its last use by any server. A question reads only the files of its own context; the whole
folder is read for lists, for new contexts, and by `expire`, which a server calls once a minute.
"""

import asyncio
import itertools
import json
import logging
import math
import os
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..kernels.errors import AfnextError
from ..runtime.app.context import Context
from ..runtime.errors import OutOfPagesError
from ..runtime.files import output_file
from ..runtime.io.audio import Audio
from .errors import ApiError, api_error
from .store import changes, description, is_id, remove_orphans
from .threads import to_its_end

IDLE_SECONDS = 3600
_MOST_CONTEXTS = 1000
_PREFIX = "ctx_"
_log = logging.getLogger("afnext.serve")


@dataclass(frozen=True)
class Description:
    """The stored description of a context. Its recordings are in files beside it, as uploaded."""

    id: str
    key: str
    system: str | None
    names: tuple[str, ...]
    fingerprint: str
    seconds: float
    tokens: int
    bytes: int
    warnings: tuple[tuple[str, ...], ...]
    truncated: tuple[bool, ...]
    lengths: tuple[float, ...]
    created: int
    ttl: int


@dataclass
class Entry:
    """A context in the server. `heard` is None while its keys and values are not in the cache.

    stored, saved: bytes on disk of its recordings, and of its keys and values.
    """

    about: Description
    heard: Context | None = None
    stored: int = 0
    saved: int = 0
    last_active: float = field(default_factory=time.time)
    uses: int = 0
    forgotten: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def public(self) -> dict[str, Any]:
        """The context as clients see it."""
        about = self.about
        audio = [
            {"filename": name, "seconds": seconds, "truncated": truncated, "warnings": list(warnings)}
            for name, seconds, truncated, warnings in zip(
                about.names, about.lengths, about.truncated, about.warnings, strict=True
            )
        ]
        return {
            "id": about.id,
            "object": "context",
            "status": "ready",
            "progress": 1.0,
            "seconds": about.seconds,
            "tokens": about.tokens,
            "bytes": about.bytes,
            "audio": audio,
            "fingerprint": about.fingerprint,
            "created_at": about.created,
            "last_active_at": int(self.last_active),
            "expires_at": int(self.last_active) + about.ttl,
            "loaded": self.heard is not None,
        }


@dataclass
class Listening:
    """A context whose recordings are processed in the background. If that failed, `error` says why, until `expires`.

    stored: bytes on disk of its recordings.
    """

    id: str
    key: str
    names: tuple[str, ...]
    created: int
    expires: float
    stored: int
    done: int = 0
    total: int = 0
    error: ApiError | None = None
    task: asyncio.Task[None] = field(init=False)

    def heard_so_far(self, done: int, total: int) -> None:
        """Note the progress."""
        self.done, self.total = done, total

    def public(self) -> dict[str, Any]:
        """The context as clients see it."""
        return {
            "id": self.id,
            "object": "context",
            "status": "listening" if self.error is None else "failed",
            "progress": self.done / self.total if self.total else 0.0,
            "audio": [{"filename": name} for name in self.names],
            "created_at": self.created,
            **({} if self.error is None else self.error.body()),
        }


class Ears(Protocol):
    """The model's side of contexts. Each call may take as long as encoding and prefilling the recordings."""

    @property
    def room(self) -> int:
        """Tokens that the KV cache can hold."""

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values per token."""

    async def hear(
        self, audio: list[Audio], system: str | None, progress: Callable[[int, int], None], *, key: str
    ) -> Context:
        """Compute keys and values of recordings for a client's key. Ends when the caller is cancelled."""

    async def resume(self, path: Path) -> Context:
        """Load a saved context. Raises AfnextError."""


Decode = Callable[[Path, str], Awaitable[Audio]]
"""Decodes a file, which errors and warnings call by the name given."""


def new_id(route: str = "") -> str:
    """An id that nobody can guess. route: hexadecimal digits that end it."""
    return f"{_PREFIX}{secrets.token_hex(16)}{route}"


class ContextStore:
    """The contexts of all keys."""

    def __init__(self, folder: Path, ears: Callable[[], Ears], decode: Decode, max_bytes: int = 20 << 30):
        """max_bytes: on disk."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder = folder
        self._ears = ears
        self._decode = decode
        self._max_bytes = max_bytes
        self._arriving = 0  # bytes that are being written
        self._entries: dict[str, Entry] = {}
        self._listening: dict[str, Listening] = {}
        self._read()
        remove_orphans(folder, _PREFIX, self._entries)

    @property
    def bytes(self) -> int:
        """Bytes on disk of all contexts."""
        entries = sum(entry.stored + entry.saved for entry in self._entries.values())
        return self._arriving + entries + sum(context.stored for context in self._listening.values())

    async def create(
        self,
        key: str,
        files: list[tuple[Path, Audio]],
        system: str | None,
        ttl: int,
        progress: Callable[[int, int], None],
        route: str = "",
    ) -> Entry:
        """Make a context of recordings, given as uploaded and as samples. The same recordings with the same system
        message and key give the same context. route: the end of its id. Raises what `Ears.hear` raises, and ApiError
        (413) if the disk has no room for the recordings."""
        self.expire()
        self._make_disk_room(_size(path for path, _ in files))
        heard = await self._make_room_and_hear(key, [audio for _, audio in files], system, progress)
        same = self._same(key, system, heard.fingerprint)
        if same is not None:
            await self._adopt(same, heard)
            return same
        return await self.add(new_id(route), key, heard, [path for path, _ in files], system, ttl)

    async def listen(
        self,
        key: str,
        files: list[tuple[Path, Audio]],
        system: str | None,
        ttl: int,
        around: AbstractAsyncContextManager[None],
        route: str = "",
    ) -> Listening:
        """Make a context in the background, inside the context manager `around`. Copies the files before it returns.

        Raises ApiError (413) if the disk has no room for them.
        """
        self.expire()
        now, paths = time.time(), [path for path, _ in files]
        names = tuple(audio.source for _, audio in files)
        context = Listening(new_id(route), key, names, int(now), now + IDLE_SECONDS, _size(paths))
        with self._disk_room(context.stored):
            try:
                kept = await to_its_end(self._keep_uploads, context.id, paths)
            except BaseException:
                self._remove_files(context.id)
                raise
            self._listening[context.id] = context
        listening = self._listen(context, kept, [audio for _, audio in files], system, ttl, around)
        task = asyncio.create_task(listening)
        context.task = task
        return context

    async def _listen(
        self,
        context: Listening,
        kept: list[Path],
        audio: list[Audio],
        system: str | None,
        ttl: int,
        around: AbstractAsyncContextManager[None],
    ) -> None:
        try:
            async with around:
                heard = await self._make_room_and_hear(context.key, audio, system, context.heard_so_far)
                await self.add(context.id, context.key, heard, kept, system, ttl)
            self._listening.pop(context.id, None)
        except BaseException as error:
            if context.id in self._entries:  # cancelled at the very end
                self._forget(self._entries[context.id])
            self._remove_files(context.id)
            context.stored = 0
            context.error = api_error(error)
            if not isinstance(error, Exception):
                raise
            _log.warning("a context could not be heard in the background (%s)", context.error)

    async def add(
        self, identifier: str, key: str, heard: Context, files: list[Path], system: str | None, ttl: int
    ) -> Entry:
        """Store a finished context. files: its recordings, from which it can be recomputed.

        Raises ApiError (413) if the disk has no room for them.
        """
        recordings = heard.recordings
        about = Description(
            id=identifier,
            key=key,
            system=system,
            names=tuple(recording.source for recording in recordings),
            fingerprint=heard.fingerprint,
            seconds=heard.seconds,
            tokens=heard.tokens,
            bytes=heard.tokens * self._ears().token_bytes,
            warnings=tuple(recording.warnings for recording in recordings),
            truncated=tuple(recording.truncated for recording in recordings),
            lengths=tuple(recording.seconds for recording in recordings),
            created=int(time.time()),
            ttl=ttl,
        )
        entry = Entry(about, heard, stored=_size(files))
        try:
            with self._disk_room(_size(path for path in files if path.parent != self._folder)):
                await to_its_end(self._keep, about, files)
                self._entries[about.id] = entry
        except BaseException:
            self._release(entry)
            raise
        await self._evict(self._ears().room // 2)
        return entry

    def get(self, identifier: Any, key: str, param: str | None = None) -> Entry:
        """A context. Raises ApiError (404) unless this key made it and it has not expired."""
        entry = self._current(identifier) if is_id(identifier, _PREFIX) else None
        if entry is None or entry.about.key != key:
            raise ApiError(404, "context_not_found", "there is no such context", param=param)
        return entry

    def public(self, identifier: str, key: str) -> dict[str, Any]:
        """A context as clients see it, heard or not; errors as of `get`."""
        listening = self._listening_of(identifier, key)
        return self.get(identifier, key).public() if listening is None else listening.public()

    def of(self, key: str) -> list[dict[str, Any]]:
        """The contexts of a key as clients see them, the newest first."""
        self.expire()
        mine = [entry.public() for entry in self._entries.values() if entry.about.key == key]
        mine += [context.public() for context in self._listening.values() if context.key == key]
        return sorted(mine, key=lambda context: context["created_at"], reverse=True)

    def states(self) -> dict[str, int]:
        """Numbers of contexts that are in the cache, not in the cache, and being made."""
        loaded = sum(entry.heard is not None for entry in self._entries.values())
        listening = sum(context.error is None for context in self._listening.values())
        return {"loaded": loaded, "stored": len(self._entries) - loaded, "listening": listening}

    @asynccontextmanager
    async def used(self, identifier: Any, key: str, param: str | None = None) -> AsyncIterator[tuple[Context, bool]]:
        """A context with its keys and values in the cache for the length of the block, and whether they were
        recomputed. Waits for a context that is made in the background, and raises its error if that failed."""
        listening = self._listening_of(identifier, key)
        if listening is not None:
            await asyncio.wait({listening.task})
            if listening.error is not None:
                raise listening.error
        entry = self.get(identifier, key, param)
        entry.uses += 1
        try:
            async with entry.lock:
                reloaded = entry.heard is None
                if entry.heard is None:
                    entry.heard = await self._reload(entry)
            self._touch(entry)
            yield entry.heard, reloaded
        finally:
            entry.uses -= 1
            self._touch(entry)
            if entry.forgotten and not entry.uses:
                self._release(entry)

    async def make_room(self, tokens: int) -> None:
        """Evict idle contexts until a request of `tokens` tokens fits beside the others."""
        await self._evict(max(0, self._ears().room - tokens))

    def delete(self, identifier: str, key: str) -> None:
        """Delete a context, also one that is being made; errors as of `get`."""
        listening = self._listening_of(identifier, key)
        if listening is None:
            self._forget(self.get(identifier, key))
            return
        del self._listening[identifier]
        listening.task.cancel()

    def expire(self) -> None:
        """Remove expired contexts, and the oldest beyond a thousand. Load the list of contexts that other servers have
        made and removed."""
        self._read()
        now = time.time()
        idle = [entry for entry in self._entries.values() if not entry.uses]
        extra = len(self._entries) - _MOST_CONTEXTS
        if extra > 0 or any(entry.last_active + entry.about.ttl <= now for entry in idle):
            for entry in idle:
                entry.last_active = max(entry.last_active, self._last_use(entry.about.id) or 0.0)
            for index, entry in enumerate(sorted(idle, key=lambda entry: entry.last_active)):
                if entry.last_active + entry.about.ttl <= now or index < extra:
                    self._forget(entry)
        for context in [c for c in self._listening.values() if c.error is not None and c.expires <= now]:
            del self._listening[context.id]

    async def close(self) -> None:
        """Cancel the contexts that are being made, and save those in the cache for the next start of the server."""
        tasks = [context.task for context in self._listening.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for entry in self._entries.values():
            await self._drop(entry)

    async def _make_room_and_hear(
        self, key: str, audio: list[Audio], system: str | None, progress: Callable[[int, int], None]
    ) -> Context:
        try:
            return await self._ears().hear(audio, system, progress, key=key)
        except OutOfPagesError:
            await self._evict(0)
            return await self._ears().hear(audio, system, progress, key=key)

    async def _adopt(self, entry: Entry, heard: Context) -> None:
        """Use recomputed keys and values for a context that is not in the cache."""
        async with entry.lock:
            if entry.heard is None and not entry.forgotten:
                entry.heard = heard
            else:
                await asyncio.to_thread(heard.close)
        self._touch(entry)
        await self._evict(self._ears().room // 2)

    async def _reload(self, entry: Entry) -> Context:
        saved = self._saved(entry.about.id)
        if saved.is_file():
            try:
                return await self._ears().resume(saved)
            except AfnextError as error:
                _log.warning("a saved context cannot be resumed and is heard again (%s)", type(error).__name__)
                self._remove_saved(entry)
        about = entry.about
        audio = [await self._decode(self._upload(about.id, i), name) for i, name in enumerate(about.names)]
        return await self._make_room_and_hear(about.key, audio, about.system, lambda done, total: None)

    async def _evict(self, tokens: int) -> None:
        """Evict idle contexts, least recently used first, until contexts hold at most `tokens` tokens."""
        held = [entry for entry in self._entries.values() if entry.heard is not None]
        total = sum(entry.about.tokens for entry in held)
        for entry in sorted(held, key=lambda entry: entry.last_active):
            if total <= tokens:
                break
            if not entry.uses and await self._drop(entry):
                total -= entry.about.tokens

    async def _drop(self, entry: Entry) -> bool:
        """Save an idle context's keys and values if the disk has room, and free them; False if it is in use."""
        async with entry.lock:
            if entry.uses or entry.forgotten:  # while this call waited for the lock
                return False
            heard, entry.heard = entry.heard, None
            if heard is None:
                return True
            if not entry.saved:
                await self._save(entry, heard)
            await asyncio.to_thread(heard.close)
            return True

    async def _save(self, entry: Entry, heard: Context) -> None:
        """Write keys and values to disk, if it has room beside the recordings and the more recently used contexts."""
        path = self._saved(entry.about.id)
        try:
            with self._disk_room(entry.about.bytes, before=entry.last_active):
                await to_its_end(heard.save, path)
                entry.saved = _size([path])
        except (AfnextError, ApiError) as error:
            _log.warning("a context is dropped unsaved (%s); it is heard again when needed", api_error(error))

    @contextmanager
    def _disk_room(self, count: int, before: float = math.inf) -> Iterator[None]:
        """Reserve room for the bytes that the block writes; see `_make_disk_room`."""
        self._make_disk_room(count, before)
        self._arriving += count
        try:
            yield
        finally:
            self._arriving -= count

    def _make_disk_room(self, count: int, before: float = math.inf) -> None:
        """Remove saved keys and values of idle contexts last used before the time `before`, the oldest first, until
        `count` bytes fit. Raises ApiError (413), and removes nothing, if they cannot."""
        excess = self.bytes + count - self._max_bytes
        idle = [e for e in self._entries.values() if e.saved and not e.uses and e.last_active < before]
        if excess > sum(entry.saved for entry in idle):
            raise ApiError(
                413, "payload_too_large", "the server's store of contexts is full; delete some, or try later"
            )
        for entry in sorted(idle, key=lambda entry: entry.last_active):
            if excess <= 0:
                break
            excess -= entry.saved
            self._remove_saved(entry)

    def _remove_saved(self, entry: Entry) -> None:
        self._saved(entry.about.id).unlink(missing_ok=True)
        entry.saved = 0

    def _forget(self, entry: Entry) -> None:
        """Remove a context. Its memory is freed once the requests about it have ended."""
        self._entries.pop(entry.about.id, None)
        self._description(entry.about.id).unlink(missing_ok=True)
        entry.forgotten = True
        if not entry.uses:
            self._release(entry)

    def _release(self, entry: Entry) -> None:
        heard, entry.heard = entry.heard, None
        if heard is not None:  # in a thread: closing waits for the engine's step
            asyncio.get_running_loop().run_in_executor(None, heard.close)
        self._remove_files(entry.about.id)

    def _remove_files(self, identifier: str) -> None:
        for path in (self._description(identifier), self._saved(identifier)):
            path.unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            for index in itertools.count():
                self._upload(identifier, index).unlink()

    def _read(self) -> None:
        """Load the list of contexts that other servers have made and removed."""
        gone, new = changes(self._folder, _PREFIX, self._entries.keys())
        for identifier in gone:
            self._forget(self._entries[identifier])
        for identifier, values in new.items():
            self._take(identifier, values)

    def _current(self, identifier: str) -> Entry | None:
        """The context of an id as its files are now, whichever server wrote them; None if it has been removed."""
        used, entry = self._last_use(identifier), self._entries.get(identifier)
        if used is None:
            if entry is not None:
                self._forget(entry)
            return None
        if entry is None:
            return self._take(identifier, description(self._description(identifier)))
        entry.last_active = max(entry.last_active, used)
        if not entry.lock.locked():  # it is not being saved
            entry.saved = _size([self._saved(identifier)])
        if not entry.uses and entry.last_active + entry.about.ttl <= time.time():
            self._forget(entry)
            return None
        return entry

    def _take(self, identifier: str, values: dict[str, Any] | None) -> Entry | None:
        """Add a context from a description that another server wrote; None if it is not a valid description."""
        with suppress(TypeError, KeyError):
            about = _parsed(values or {})
            if about.id == identifier:
                stored = _size(self._upload(identifier, index) for index in range(len(about.names)))
                entry = Entry(about, stored=stored, saved=_size([self._saved(identifier)]))
                self._entries[identifier] = entry
                return entry
        return None

    def _touch(self, entry: Entry) -> None:
        entry.last_active = time.time()
        with suppress(OSError):  # it has been removed
            os.utime(self._description(entry.about.id))

    def _last_use(self, identifier: str) -> float | None:
        """The time of a context's last use by any server; None if it is gone."""
        try:
            return self._description(identifier).stat().st_mtime
        except FileNotFoundError:
            return None

    def _same(self, key: str, system: str | None, fingerprint: str) -> Entry | None:
        wanted = (key, system, fingerprint)
        found = (e for e in self._entries.values() if (e.about.key, e.about.system, e.about.fingerprint) == wanted)
        return next(found, None)

    def _listening_of(self, identifier: Any, key: str) -> Listening | None:
        context = self._listening.get(identifier) if isinstance(identifier, str) else None
        return context if context is not None and context.key == key else None

    def _keep_uploads(self, identifier: str, uploads: list[Path]) -> list[Path]:
        """Copy recordings beside the context, unless they are there."""
        kept = [self._upload(identifier, index) for index in range(len(uploads))]
        for upload, path in zip(uploads, kept, strict=True):
            if upload != path:
                shutil.copyfile(upload, path)
        return kept

    def _keep(self, about: Description, uploads: list[Path]) -> None:
        self._keep_uploads(about.id, uploads)
        with output_file(self._description(about.id), AfnextError) as file:
            file.write(json.dumps(asdict(about)).encode())

    def _description(self, identifier: str) -> Path:
        return self._folder / f"{identifier}.json"

    def _upload(self, identifier: str, index: int) -> Path:
        return self._folder / f"{identifier}.{index}.bin"

    def _saved(self, identifier: str) -> Path:
        return self._folder / f"{identifier}.safetensors"


def _size(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths if path.is_file())


def _parsed(values: dict[str, Any]) -> Description:
    """The description that was stored as a JSON object. Raises KeyError and TypeError for another object."""
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    lists["warnings"] = tuple(tuple(texts) for texts in values["warnings"])
    return Description(**{**values, **lists})
