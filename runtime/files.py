"""Text and JSON objects from files that nobody vouches for: size-capped, no duplicate keys, one kind of error."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from ..kernels.errors import AfnextError
from .errors import CheckpointError


def parse_json_object(data: bytes, where: str, error: type[AfnextError]) -> dict[str, Any]:
    """The JSON object that the UTF-8 bytes `data` spell; `where` names their source in errors.

    Raises `error` when they are not UTF-8, not JSON, not an object, nested too deeply, or repeat a key.
    """

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            repeated, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise error(
                f"{where}: the key {shown(repeated)} stands twice in one object; the file is damaged or forged."
            )
        return values

    try:
        values = json.loads(data.decode("utf-8"), object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as problem:
        raise error(f"{where} is not valid JSON ({problem}); download or save it again.") from None
    if not isinstance(values, dict):
        raise error(f"{where} holds a JSON {type(values).__name__}, not an object; download or save it again.")
    return values


def read_json_object(path: Path, where: str, error: type[AfnextError], max_bytes: int = 1 << 24) -> dict[str, Any]:
    """The JSON object in the file `path`, read only if it is at most `max_bytes` long.

    Raises `error`, naming the file as `where`, when it cannot be read, is longer, or is not one sound JSON object.
    """
    return parse_json_object(_read_bytes(path, where, error, max_bytes), where, error)


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON object in an optional file of a checkpoint, empty when there is no such file.

    Raises CheckpointError when it is damaged.
    """
    return read_json_object(path, path.name, CheckpointError) if path.is_file() else {}


def read_text(path: Path, where: str, error: type[AfnextError], max_bytes: int) -> str:
    """The UTF-8 text of the file `path`. Raises `error` when it cannot be read, is longer, or is not UTF-8."""
    try:
        return _read_bytes(path, where, error, max_bytes).decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"{where} is not UTF-8 text ({problem}); download or save it again.") from None


def _read_bytes(path: Path, where: str, error: type[AfnextError], max_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
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
