"""The rows of a batch on disk: appended JSON lines, or a folder of Parquet files.

Both can be resumed after a run was killed: a row is either complete or absent.
"""

import json
import os
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, Protocol

from ..errors import OutputError
from ..files import append_file, output_file, shown, unwritable
from .output_folder import lock_file, locked_folder

Row = Mapping[str, Any]
OK, FAILED = "ok", "failed"
JSONL, PARQUET = ".jsonl", ".parquet"

_START = b'{"id": "'
_MAX_LINE = 1 << 28
_PART_ROWS, _PART_SECONDS = 256, 60.0
_COLUMNS = ("id", "custom_id", "path", "status", "text", "result", "response", "error", "usage", "timings")


class Rows(Protocol):
    """The rows on disk. `statuses` maps the id of each to OK or FAILED."""

    statuses: dict[str, str]

    def append(self, row: Row) -> None:
        """Add a row. Raises OutputError when it cannot be written."""

    def forget(self, ids: Collection[str]) -> None:
        """Remove the rows of these ids."""


@contextmanager
def open_rows(path: Path) -> "Iterator[Rows]":
    """The rows in `path`, which ends in .jsonl or .parquet; no other run can open them meanwhile.

    Raises OutputError for another suffix, for a file with other contents, and when it cannot be written.
    """
    with ExitStack() as stack:
        if path.suffix == JSONL:
            lines = JsonLines(path)
            stack.callback(lines.close)
            yield lines
        elif path.suffix == PARQUET:
            parquet = _pyarrow()
            stack.enter_context(locked_folder(path))
            parts = ParquetParts(path, parquet)
            try:
                yield parts
            finally:
                parts.flush()
        else:
            raise OutputError(f"{path} ends neither in {JSONL} nor in {PARQUET}; choose a name that does.")


class JsonLines:
    """A file with one row per line. Each is on disk when `append` returns."""

    def __init__(self, path: Path):
        """Open the file and drop an incomplete last line of a killed run."""
        self._path = path
        self._file = _locked(path)
        try:
            self.statuses = self._read()
        except BaseException:
            self.close()
            raise

    def append(self, row: Row) -> None:
        """See `Rows`."""
        try:
            self._file.write(_line(row))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as problem:
            raise unwritable(self._path, problem, OutputError) from None
        self.statuses[row["id"]] = row["status"]

    def forget(self, ids: Collection[str]) -> None:
        """See `Rows`. The file is replaced by one without them."""
        if not ids:
            return
        with output_file(self._path, OutputError) as kept:
            self._file.seek(0)
            kept.writelines(line for line in self._file if json.loads(line)["id"] not in ids)
        old, self._file = self._file, _locked(self._path)
        old.close()
        for each in ids:
            self.statuses.pop(each, None)

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # closing retries a failed write
            self._file.close()

    def _read(self) -> dict[str, str]:
        statuses: dict[str, str] = {}
        self._file.seek(0)
        end = number = 0
        while line := self._file.readline(_MAX_LINE):
            number += 1
            if not line.endswith(b"\n") and _is_torn(line):
                self._file.truncate(end)
                break
            identifier, status = self._parsed(line, number)
            statuses[identifier] = status
            end += len(line)
        return statuses

    def _parsed(self, line: bytes, number: int) -> tuple[str, str]:
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("id"), str) and row.get("status") in (OK, FAILED):
                return row["id"], row["status"]
        raise OutputError(
            f"line {number} of {self._path} is not a row of a batch ({shown(line[:40].decode('utf-8', 'replace'))}); "
            "choose another file for --out, or remove the line."
        )


def _locked(path: Path) -> BinaryIO:
    file = append_file(path, OutputError)
    try:
        lock_file(file.fileno(), path)
    except BaseException:
        file.close()
        raise
    return file


def _is_torn(line: bytes) -> bool:
    """Whether a line without a newline is an incomplete row, or zeros from a file whose length was written first."""
    return line.startswith(_START) or _START.startswith(line) or not line.strip(b"\0")


def _line(row: Row) -> bytes:
    assert next(iter(row)) == "id"
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # a path that is not UTF-8
        return (json.dumps(row) + "\n").encode()


class ParquetParts:
    """A folder of Parquet files, each of which is written completely and then renamed.

    Rows are written in groups of 256, every minute, and at the end: a killed run loses rows not yet written.
    """

    def __init__(self, folder: Path, parquet: ModuleType):
        """parquet: pyarrow.parquet."""
        self._folder = folder
        self._parquet = parquet
        self._waiting: list[Row] = []
        self._written = time.monotonic()
        for unfinished in folder.glob(".part-*.part"):
            unfinished.unlink()
        self._next = 1 + max((_number(part) for part in self._parts()), default=-1)
        self.statuses = {
            row["id"]: row["status"] for part in self._parts() for row in self._read(part, ["id", "status"]).to_pylist()
        }

    def append(self, row: Row) -> None:
        """See `Rows`."""
        self._waiting.append(row)
        self.statuses[row["id"]] = row["status"]
        if len(self._waiting) >= _PART_ROWS or time.monotonic() > self._written + _PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the pending rows as one file."""
        waiting, self._waiting = self._waiting, []
        self._written = time.monotonic()
        if waiting:
            self._write(self._folder / f"part-{self._next:06}{PARQUET}", [_flat(row) for row in waiting])
            self._next += 1

    def forget(self, ids: Collection[str]) -> None:
        """See `Rows`. Files with such rows are replaced by ones without them, or removed."""
        self._waiting = [row for row in self._waiting if row["id"] not in ids]
        for part in self._parts() if ids else ():
            rows = self._read(part, list(_COLUMNS)).to_pylist()
            kept = [row for row in rows if row["id"] not in ids]
            if not kept:
                part.unlink()
            elif len(kept) < len(rows):
                self._write(part, kept)
        for each in ids:
            self.statuses.pop(each, None)

    def _parts(self) -> list[Path]:
        return sorted(path for path in self._folder.glob(f"part-*{PARQUET}"))

    def _read(self, part: Path, columns: list[str]) -> Any:
        try:
            table = self._parquet.read_table(part, columns=columns, partitioning=None)
            return table.select(columns)  # raises KeyError if one is missing
        except (OSError, ValueError, KeyError) as problem:  # pyarrow's errors are ValueErrors and KeyErrors
            reason = shown(str(problem).partition("\n")[0])
            raise OutputError(f"{part} has no rows of a batch ({reason}); choose another --out.") from None

    def _write(self, path: Path, rows: list[dict[str, str | None]]) -> None:
        import pyarrow

        schema = pyarrow.schema([(name, pyarrow.string()) for name in _COLUMNS])
        with output_file(path, OutputError) as file:
            self._parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), file, compression="zstd")


def _number(part: Path) -> int:
    digits = part.stem.removeprefix("part-")
    return int(digits) if digits.isdecimal() else -1


def _flat(row: Row) -> dict[str, str | None]:
    """A row as text: nested values in JSON, the text of an answer or transcript in a separate column."""
    result = row.get("result")
    values = {**row, "text": result["text"] if isinstance(result, dict) else None}
    return {name: _cell(values.get(name)) for name in _COLUMNS}


def _cell(value: Any) -> str | None:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return None if value is None else _line_of(value)


def _line_of(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def _pyarrow() -> ModuleType:
    try:
        import pyarrow.parquet
    except ImportError:
        raise OutputError(
            "Parquet files need pyarrow: run `pip install '.[batch]'` in a checkout of afnext. "
            "Or choose a name that ends in .jsonl."
        ) from None
    return pyarrow.parquet
