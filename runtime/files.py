"""Reading untrusted files and writing output files.

Reading: only regular files, with size limits, and JSON objects without duplicate keys. Writing: a new file that
replaces the old one only when it is complete. Every failure is raised as the caller's `AfnextError`.
"""

import errno
import json
import os
import re
import secrets
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ..kernels.errors import AfnextError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_WRITE_ADVICE = {
    errno.ENOSPC: "free some space, or choose another folder",
    errno.EDQUOT: "free some space, or choose another folder",
    errno.EFBIG: "choose another folder, or raise the limit of file sizes",
    errno.EROFS: "choose another folder",
    errno.EACCES: "change its permissions, or choose another path",
    errno.EPERM: "change its permissions, or choose another path",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "create the folder first",
    errno.ENOTDIR: "create the folder first",
}


@contextmanager
def output_file(path: Path, error: type[AfnextError]) -> Iterator[BinaryIO]:
    """A new binary file that replaces `path` when the `with` block ends without an exception.

    The contents go to a temporary file in the same folder, which is synced to disk and then renamed; after an exception
    it is removed, and `path` is unchanged. The new file has the permissions of the one it replaces.

    Raises `error` if `path` is anything but a regular file (symbolic links and devices are refused, not followed), and
    for every OSError, also from the block: full or read-only disks, missing folders, names that are too long.
    """
    temporary = path.with_name(f".{path.name[:24]}.{secrets.token_hex(8)}.part") if path.name else path
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        mode = _replaceable(path, error)
        descriptor = os.open(temporary, flags, 0o666)
    except (OSError, ValueError) as problem:  # ValueError: a path with a NUL, or that cannot be encoded
        raise unwritable(path, problem, error) from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            if mode is not None:
                os.chmod(temporary, mode)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as problem:
        with suppress(OSError):
            os.unlink(temporary)
        if isinstance(problem, OSError):
            raise unwritable(path, problem, error) from None
        raise
    _sync_folder(path.parent)


def append_file(path: Path, error: type[AfnextError]) -> BinaryIO:
    """Open a regular file for reading and appending; one that does not exist is created.

    Raises `error` for symbolic links, devices and FIFOs, and for a file that cannot be written.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        new = _replaceable(path, error) is None
        file = os.fdopen(os.open(path, flags, 0o666), "a+b")
    except (OSError, ValueError) as problem:
        raise unwritable(path, problem, error) from None
    if new:
        _sync_folder(path.parent)
    return file


def _replaceable(path: Path, error: type[AfnextError]) -> int | None:
    """The permissions of the regular file at `path`, None if nothing is there. Raises `error` for anything else."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        raise error(f"{path} is {_kind(mode)}; choose the path of a new or of a regular file to write to.")
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return stat.S_IMODE(mode) & 0o777


def unwritable(path: Path, problem: Exception, error: type[AfnextError]) -> AfnextError:
    """The `error` that says why `path` cannot be written, and what to do."""
    number = problem.errno if isinstance(problem, OSError) else None
    reason = problem.strerror if isinstance(problem, OSError) and problem.strerror else str(problem)
    return error(f"{path} cannot be written ({reason}); {_WRITE_ADVICE.get(number or 0, 'choose another path')}.")


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable, on systems that can sync folders."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def open_regular(path: Path, where: str, error: type[AfnextError]) -> BinaryIO:
    """Open a regular file, or a link to one, for reading. Never waits for the other end of a FIFO.

    Raises `error`, naming the file as `where`, for anything else and for files that cannot be read.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):  # checked before opening, which can have effects, and after it
            flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
            file = os.fdopen(os.open(path, flags), "rb")
            mode = os.fstat(file.fileno()).st_mode
            if stat.S_ISREG(mode):
                return file
            file.close()
    except (OSError, ValueError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) and problem.strerror else str(problem)
        raise error(f"{where} cannot be read ({reason}); check the path.") from None
    raise error(f"{where} cannot be read: it is {_kind(mode)}, not a regular file; check the path.")


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "a special file")


def parse_json_object(data: bytes, where: str, error: type[AfnextError]) -> dict[str, Any]:
    """Parse a JSON object from the UTF-8 bytes `data`; `where` names their source in errors.

    Raises `error` when they are not UTF-8, not JSON, not an object, nested too deeply, repeat a key, or have a string
    with half of a surrogate pair.
    """

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            repeated, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise error(
                f"{where}: the key {shown(repeated)} occurs twice in one object; the file is damaged or forged."
            )
        return values

    try:
        values = json.loads(data.decode("utf-8"), object_pairs_hook=without_duplicates)
        if _SURROGATE.search(data):
            json.dumps(values, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as problem:
        raise error(f"{where} is not valid JSON ({problem}); download or save it again.") from None
    if not isinstance(values, dict):
        raise error(f"{where} holds a JSON {type(values).__name__}, not an object; download or save it again.")
    return values


def read_json_object(path: Path, where: str, error: type[AfnextError], max_bytes: int = 1 << 24) -> dict[str, Any]:
    """The JSON object in the file `path`, read only if it is at most `max_bytes` long.

    Raises `error`, naming the file as `where`, when it cannot be read, is longer, or is not one sound JSON object.
    """
    return parse_json_object(read_bytes(path, where, error, max_bytes), where, error)


def read_text(path: Path, where: str, error: type[AfnextError], max_bytes: int) -> str:
    """The UTF-8 text of the file `path`. Raises `error` when it cannot be read, is longer, or is not UTF-8."""
    try:
        return read_bytes(path, where, error, max_bytes).decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"{where} is not UTF-8 text ({problem}); download or save it again.") from None


def read_bytes(path: Path, where: str, error: type[AfnextError], max_bytes: int) -> bytes:
    """The bytes of the regular file `path`. Raises `error` when it cannot be read or has more than `max_bytes`."""
    try:
        with open_regular(path, where, error) as file:
            data = file.read(max_bytes + 1)
    except OSError as problem:
        raise error(f"{where} cannot be read: {problem.strerror or problem}.") from None
    if len(data) > max_bytes:
        raise error(f"{where} is longer than {max_bytes:,} bytes, more than such a file ever needs.")
    return data


def shown(value: object, limit: int = 120) -> str:
    """`repr(value)`, shortened to `limit` characters, so that hostile names cannot flood an error message."""
    if isinstance(value, int) and value.bit_length() > 400:
        return "a huge integer"
    text = ascii(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
