"""Rows of a published dataset, from JSON, Parquet or the `datasets` package, and the recordings that they name."""

import hashlib
import importlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ....kernels.errors import AfnextError
from ..data import Item, Items, ManifestError, inside, parse_rows

Row = Mapping[str, Any]
HUB = "hub"
_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,5}")


@dataclass(frozen=True)
class Hub:
    """A dataset on the Hugging Face Hub: repository, configuration and split."""

    repository: str
    config: str | None
    split: str


@dataclass(frozen=True)
class Recordings:
    """Finds recordings: files below `folder`, or bytes inside a table, which are written to `unpacked` once."""

    folder: Path
    unpacked: Path

    def of(self, value: Any, number: int, where: str) -> Path:
        """The file that row `number` names, or that the row's bytes are written to.

        value: a name relative to `folder`, or {"bytes": ..., "path": ...} as in tables. Raises ManifestError for
        anything else, for names that lead out of the folder, and for missing files.
        """
        content, name = (value.get("bytes"), value.get("path")) if isinstance(value, Mapping) else (None, value)
        if isinstance(content, bytes):
            return self._unpack(content, name, number)
        path = inside(self.folder, name, where)
        if not path.is_file():
            raise ManifestError(f"{where}: {str(name)!r:.200} is not below {self.folder}")
        return path

    def _unpack(self, content: bytes, name: Any, number: int) -> Path:
        suffix = Path(name).suffix if isinstance(name, str) else ""
        path = self.unpacked / f"{number:06d}{suffix if _SUFFIX.fullmatch(suffix) else ''}"
        if not path.is_file() or path.stat().st_size != len(content):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return path


def json_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON list or of JSON lines. Raises ManifestError."""
    return parse_rows(path.read_bytes(), path)


def parquet_rows(paths: Iterable[Path]) -> Iterator[Row]:
    """The rows of Parquet files, file by file. Raises ManifestError for files that are not Parquet."""
    parquet = _imported("pyarrow.parquet", "pyarrow")
    for path in paths:
        try:
            for batch in parquet.ParquetFile(path).iter_batches(batch_size=64):
                yield from batch.to_pylist()
        except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
            raise ManifestError(f"{path} cannot be read as Parquet: {error}") from None


def hub_rows(hub: Hub) -> Iterator[Row]:
    """The rows of a dataset by the `datasets` package, which keeps a copy; recordings stay encoded.

    hub.repository may also be a local folder. Raises ManifestError if the dataset cannot be loaded.
    """
    datasets = _imported("datasets", "datasets")
    try:
        table = datasets.load_dataset(hub.repository, hub.config, split=hub.split)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise ManifestError(f"{hub.repository} cannot be loaded: {' '.join(str(error).split())}") from None
    for name, feature in table.features.items():
        if isinstance(feature, datasets.Audio):
            table = table.cast_column(name, datasets.Audio(decode=False))
    yield from table


def _imported(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise AfnextError(
            f"this dataset needs {package}: run `pip install '.[card]'` in a checkout of afnext"
        ) from None


class Fingerprint:
    """A hash over rows in order, without the contents of their recordings."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, row: Row) -> None:
        """Add a row to the hash."""
        line = json.dumps(row, sort_keys=True, ensure_ascii=False, default=_without_bytes)
        self._digest.update(line.encode("utf-8", "surrogatepass") + b"\n")

    def __str__(self) -> str:
        return self._digest.hexdigest()[:16]


def items_of(rows: Iterable[Row], item: Callable[[Row, int, str], Item | None], where: str = "row") -> Items:
    """The items of a table: `item` makes each from a row, its number and its place; None leaves the row out.

    where: the text before the number in messages.
    """
    fingerprint, items, left_out = Fingerprint(), list[Item](), 0
    for number, row in enumerate(rows, start=1):
        fingerprint.add(row)
        made = item(row, number, f"{where} {number}")
        if made is None:
            left_out += 1
        else:
            items.append(made)
    return Items(items, str(fingerprint), left_out)


def _without_bytes(value: Any) -> str:
    return f"{len(value)} bytes" if isinstance(value, bytes) else str(value)
