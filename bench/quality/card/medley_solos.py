"""Medley-solos-DB, its test subset: which of eight instruments plays.

    Medley-solos-DB_metadata.csv beside Medley-solos-DB_SUBSET-INSTRUMENT_UUID.wav

Source: Lostanlen et al. 2019.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

from ..data import Item, Items, ManifestError, inside
from .rows import Fingerprint

INSTRUMENTS = (
    *("clarinet", "distorted electric guitar", "female singer", "flute"),
    *("piano", "tenor saxophone", "trumpet", "violin"),
)
_QUESTION = "Which instrument plays in this recording?"


def local(folder: Path, _unpacked: Path) -> Items:
    """The recordings of the test subset in `folder`, which has the table and the recordings."""
    path = folder / "Medley-solos-DB_metadata.csv"
    if not path.is_file():
        raise ManifestError(f"{folder} has no {path.name}; name the folder that holds it and the recordings")
    fingerprint = Fingerprint()
    items = list(_solos(path, fingerprint))
    if not items:
        raise ManifestError(f"{path} has no row of the test subset")
    return Items(items, str(fingerprint))


def _solos(path: Path, fingerprint: Fingerprint) -> Iterator[Item]:
    number = 0
    for row in csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines()):
        if {"subset", "instrument_id", "uuid4"} - row.keys():
            raise ManifestError(
                f"{path} has the columns {', '.join(map(str, row))}; subset, instrument_id and uuid4 are needed"
            )
        if row["subset"] != "test":
            continue
        number += 1
        fingerprint.add(row)
        where = f"{path}, test row {number}"
        if not row["instrument_id"].isdigit() or int(row["instrument_id"]) >= len(INSTRUMENTS):
            raise ManifestError(
                f"{where}: instrument_id is {row['instrument_id']!r}; it must be 0 to {len(INSTRUMENTS) - 1}"
            )
        name = f"Medley-solos-DB_{row['subset']}-{row['instrument_id']}_{row['uuid4']}.wav"
        audio = inside(path.parent, name, where)
        if not audio.is_file():
            raise ManifestError(f"{where}: {name} is not there")
        answer = INSTRUMENTS[int(row["instrument_id"])]
        yield Item(number, row["uuid4"], audio, name, answer, _QUESTION, INSTRUMENTS, {"category": answer})
