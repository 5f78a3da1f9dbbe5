"""Stored uploads: each is a file with a description beside it, visible only to the API key that stored it.

Several servers may share the folder. Finding a file by its id looks at that file only; the folder is read for lists,
for uploads, and by `expire`, which a server calls once a minute.
"""

import json
import re
import secrets
import shutil
import time
from collections.abc import Container, Iterator, Set
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..kernels.errors import AfnextError
from ..runtime.files import output_file, read_json_object
from .errors import ApiError
from .threads import to_its_end

KEPT_SECONDS = 24 * 3600
_ORPHAN_SECONDS = 3600.0
_LONGEST = 30 * 24 * 3600
_PREFIX = "file-"
_HEX = re.compile(r"[0-9a-f]{1,64}")


@dataclass(frozen=True)
class StoredFile:
    """One upload. created, expires: seconds since the epoch; key: the name of the API key."""

    id: str
    filename: str
    bytes: int
    purpose: str
    created: int
    expires: int
    key: str

    def public(self) -> dict[str, Any]:
        """The file object for OpenAI's clients."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created,
            "expires_at": self.expires,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
        }


class FileStore:
    """The uploads in a folder, which outlive the server."""

    def __init__(self, folder: Path, max_bytes: int = 20 << 30):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder = folder
        self._max_bytes = max_bytes
        self._files: dict[str, StoredFile] = {}
        self._writing: set[str] = set()
        self._read()
        remove_orphans(folder, _PREFIX, self._files)

    async def add(
        self, source: Path, filename: str, *, purpose: str, key: str, seconds: int = KEPT_SECONDS, route: str = ""
    ) -> StoredFile:
        """Move a file into the store for `seconds`. Raises ApiError (413) if the store is full.

        route: hexadecimal digits at the end of its id.
        """
        self.expire()
        size, now = source.stat().st_size, int(time.time())
        if size + sum(file.bytes for file in self._files.values()) > self._max_bytes:
            raise ApiError(413, "payload_too_large", "the server's store is full; delete files, or try again later")
        expires = now + max(1, min(seconds, _LONGEST))
        stored = StoredFile(f"{_PREFIX}{secrets.token_hex(16)}{route}", filename, size, purpose, now, expires, key)
        self._files[stored.id] = stored  # its bytes count from now on
        self._writing.add(stored.id)
        try:
            await to_its_end(self._write, source, stored)
        except BaseException:
            self._remove(stored)
            raise
        finally:
            self._writing.discard(stored.id)
        return stored

    def get(self, identifier: Any, key: str, param: str | None = None) -> StoredFile:
        """A file. Raises ApiError (404) unless this key stored it and it has not expired."""
        stored = self._current(identifier) if is_id(identifier, _PREFIX) else None
        if stored is None or stored.key != key:
            raise ApiError(404, "file_not_found", "there is no such file", param=param)
        return stored

    def path(self, identifier: Any, key: str, param: str | None = None) -> tuple[Path, str]:
        """The path and the name of a file; errors as of `get`."""
        stored = self.get(identifier, key, param)
        return self._data(stored.id), stored.filename

    def of(self, key: str) -> Iterator[StoredFile]:
        """The files of a key, the newest first."""
        self.expire()
        mine = [stored for stored in self._files.values() if stored.key == key]
        yield from sorted(mine, key=lambda stored: stored.created, reverse=True)

    def delete(self, identifier: str, key: str) -> None:
        """Remove a file; errors as of `get`."""
        self._remove(self.get(identifier, key))

    def expire(self) -> None:
        """Remove expired files, and load the list of files that other servers have stored and removed."""
        self._read()
        now = time.time()
        for stored in [stored for stored in self._files.values() if stored.expires <= now]:
            self._remove(stored)

    def _read(self) -> None:
        gone, new = changes(self._folder, _PREFIX, self._files.keys())
        for identifier in gone - self._writing:
            del self._files[identifier]
        for identifier, values in new.items():
            self._take(identifier, values)

    def _current(self, identifier: str) -> StoredFile | None:
        """The file of an id as it is in the folder now, whichever server stored it; None if it has been removed."""
        stored = self._files.get(identifier)
        if stored is None:
            stored = self._take(identifier, description(self._description(identifier)))
        elif identifier not in self._writing and not self._description(identifier).is_file():
            del self._files[identifier]
            return None
        if stored is not None and stored.expires <= time.time():
            self._remove(stored)
            return None
        return stored

    def _take(self, identifier: str, values: dict[str, Any] | None) -> StoredFile | None:
        """Add a file from a description that another server wrote; None if it is not a valid description."""
        with suppress(TypeError):
            stored = StoredFile(**(values or {}))
            if stored.id == identifier and self._data(identifier).is_file():
                self._files[identifier] = stored
                return stored
        return None

    def _write(self, source: Path, stored: StoredFile) -> None:
        shutil.move(source, self._data(stored.id))  # the spool may lie on another file system
        with output_file(self._description(stored.id), AfnextError) as file:
            file.write(json.dumps(asdict(stored)).encode())

    def _remove(self, stored: StoredFile) -> None:
        self._files.pop(stored.id, None)
        self._description(stored.id).unlink(missing_ok=True)
        self._data(stored.id).unlink(missing_ok=True)

    def _data(self, identifier: str) -> Path:
        return self._folder / f"{identifier}.bin"

    def _description(self, identifier: str) -> Path:
        return self._folder / f"{identifier}.json"


def is_id(value: Any, prefix: str) -> bool:
    """Whether a client's value can be an id with that prefix, and is safe at the beginning of a file name."""
    return isinstance(value, str) and value.startswith(prefix) and _HEX.fullmatch(value, len(prefix)) is not None


def description(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if it cannot be read."""
    try:
        return read_json_object(path, path.name, AfnextError)
    except AfnextError:
        return None


def changes(folder: Path, prefix: str, known: Set[str]) -> tuple[set[str], dict[str, dict[str, Any]]]:
    """The changes among a folder's descriptions ID.json with ids of that prefix: the `known` ids that are gone, and the
    JSON objects of the ids that are not `known`. Unreadable descriptions are left out."""
    there = {path.stem: path for path in folder.glob(f"{prefix}*.json")}
    read = {identifier: description(there[identifier]) for identifier in there.keys() - known}
    return set(known - there.keys()), {identifier: values for identifier, values in read.items() if values is not None}


def remove_orphans(folder: Path, prefix: str, known: Container[str]) -> None:
    """Remove unfinished files of a killed server: those of ids with that prefix that are not `known`.

    Young files stay: another server with the same folder may be writing them.
    """
    oldest = time.time() - _ORPHAN_SECONDS
    for path in [*folder.glob(f"{prefix}*.*"), *folder.glob(f".{prefix}*.part")]:
        partial, identifier = path.name.startswith("."), path.name.partition(".")[0]
        if (partial or identifier not in known) and path.stat().st_mtime < oldest:
            path.unlink()
