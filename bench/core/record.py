"""Results of benchmarks: one JSON line per measurement, with its machine.

Lines are appended to the file one by one, so an interrupted run keeps its results, and `finished` returns the
measurements that a resumed run can skip.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...kernels.errors import AfnextError
from ...quant.recipe import RECIPES

# The schemes that can be measured, and the dtype of each computation: dense ones, and recipes of packed weights.
DENSE_SCHEMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
SCHEMES = {**DENSE_SCHEMES, **dict.fromkeys(RECIPES, "bfloat16")}


class ResultsError(AfnextError):
    """A file of results cannot be read."""


@dataclass(frozen=True)
class Record:
    """One measurement.

    bench: "e2e", "kernels" or "quality"; name: the measured stage or operation, such as "prefill" or "attention";
    subject: the implementation, such as "afnext bfloat16" or "transformers bfloat16"; case: its input (shapes, seconds
    of audio, scheme, batch); values: the figures by name, the unit in the name (`median_s`, `p90_s`, `tokens_per_s`,
    `peak_bytes`); kind: "measured", "extrapolated" (from fewer layers) or "projected" (from a roofline); machine: see
    `machine.py`.
    """

    bench: str
    name: str
    subject: str
    case: dict[str, Any]
    values: dict[str, Any]
    kind: str = "measured"
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """A key that is equal for the same measurement on any machine."""
        return json.dumps([self.bench, self.name, self.subject, self.case, self.kind], sort_keys=True)


def recipe_of(scheme: str | None) -> str | None:
    """The recipe that dense weights are packed by for a scheme, None for a dense one."""
    return scheme if scheme in RECIPES else None


def append(path: Path, record: Record) -> None:
    """Add a record to a file of results, making the file and its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(asdict(record), ensure_ascii=False, sort_keys=True) + "\n"
    with path.open("a+b") as file:
        # Otherwise this line would be joined to an incomplete line of an interrupted run.
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line.encode())


def read(path: Path) -> Iterator[Record]:
    """The records of a file. An incomplete last line is skipped; raises ResultsError for other invalid lines."""
    if not path.is_file():
        raise ResultsError(
            f"there are no results at {path}; run `afnext bench e2e --out {path}` or another bench first"
        )
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            yield Record(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise ResultsError(f"{path}, line {number}, is no result of afnext bench: {error}") from None


def finished(path: Path) -> set[str]:
    """The keys of the records in a file of results; empty if there is no file."""
    return {record.key for record in read(path)} if path.is_file() else set()
